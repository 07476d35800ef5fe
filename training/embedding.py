"""A LoRA adapter for moshi's `ScaledEmbedding`, within its forward. Pure; imports PEFT on use.

PEFT's layer for embeddings adds `s · B A[:, id]` to what the wrapped layer returns. For moshi's
embeddings that is wrong three times: id -1 means exactly zero, and PEFT would look up A's column
-1; a norm or a low-rank projection stands behind the lookup, so that the sum is no longer that
of a changed weight, and could not be merged. Here the lookup itself is adapted:

    row(id) = W[id] + s · (B A)[:, id]            A [rank, n], B [dim, rank], W [n, dim]
    y = low_rank(0 where id = -1, else norm(row(id)))

which is `ScaledEmbedding` at the weight W + s (B A)^T, for every id. PEFT starts with A = 0 and
B random. `train.lora.dropout` has no part in it: the input is one id. An embedding that demuxes
two text streams is refused (`training.lora.target_modules`).
Source: moshi 0.2.13 `models/lm_utils.py`; PEFT 0.21 `tuners/lora/layer.py`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn import functional


@cache
def scaled_embedding_lora() -> type:
    """The layer's class, a subclass of PEFT's own for embeddings."""
    from peft.tuners.lora.layer import Embedding

    class ScaledEmbeddingLora(Embedding):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            """x: int64 [...] with -1 for no input -> [..., dim]."""
            if self.disable_adapters or self.merged:
                return super().forward(x, *args, **kwargs)
            base: Any = self.get_base_layer()
            ids = x.clamp(min=0)
            y = functional.embedding(ids, base.weight)
            for name in self.active_adapters:
                if name in self.lora_embedding_A:
                    a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
                    delta = functional.embedding(ids, a.T) @ b.T * self.scaling[name]
                    y = y + delta.to(y.dtype)
            if base.norm is not None:
                y = base.norm(y)
            y = torch.where((x == base.zero_idx)[..., None], torch.zeros_like(y), y)
            return y if base.low_rank is None else base.low_rank(y)

    return ScaledEmbeddingLora


def register(config: Any) -> Any:
    """Tell a `LoraConfig` to put this layer on moshi's embeddings; returns the config."""
    from moshi.models.lm_utils import ScaledEmbedding

    config._register_custom_module({ScaledEmbedding: scaled_embedding_lora()})
    return config
