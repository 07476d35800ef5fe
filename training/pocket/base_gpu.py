"""The training forward of a small model on a GPU: few, large kernels.

A GPU is done with one product of a pocket model in microseconds, and takes as long to be told of
it. `FastForward` saves memory by doing much one after the other: eight codebooks, seventeen
embedding tables, parts of a head. Here they lie side by side in one product each, and intermediate
results are kept. Contract and values are `FastForward`'s (tests/stages/pocket/test_gpu.py).

The gradient of an embedding is a product with one-hot rows: of a batch half of all codes are one
code of silence, and CUDA adds rows of one code one after the other. Like every other weight's it is
summed in float32 and rounded to the type that is computed in. The one-hot rows take K V N of that
type, 1 GB for 48 000 places.

Shapes: B clips, T frames, K = 8 codebooks, N places with audio loss, V vocabulary, C temporal
width, D depth width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from duplex.streams import TEXT_ROW
from training.attention import step_attention
from training.fast import FastForward, gates_of


class WideForward(FastForward):
    """Args:
    lm: a pocket model, its weights in the type to compute in; embeddings may be float32.
    """

    def __init__(self, lm: Any):
        super().__init__(lm)
        self.embedding = _SummedTables([lm.text_emb, *lm.emb], lm.text_linear.weight.dtype)
        self.depth = _WideDepth(lm)  # pyright: ignore[reportAttributeAccessIssue]


class _Tables(torch.autograd.Function):
    """Rows of several tables: ids int64 [K, N], -1 for zeros -> [K, N, C]; summed: [N, C]."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, summed: bool, dtype: torch.dtype, *weights: torch.Tensor
    ) -> torch.Tensor:
        sizes = [len(weight) for weight in weights]
        starts = torch.tensor([0, *sizes[:-1]], device=ids.device).cumsum(0)
        whole = torch.cat([*weights, weights[0].new_zeros(1, weights[0].shape[1])])
        places = torch.where(ids < 0, len(whole) - 1, ids + starts[:, None])
        ctx.save_for_backward(ids)
        ctx.sizes, ctx.summed, ctx.dtypes = sizes, summed, [weight.dtype for weight in weights]
        if summed:
            rows = functional.embedding_bag(places.T.contiguous(), whole, mode="sum")
        else:
            rows = functional.embedding(places, whole)
        return rows.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        (dy,) = grads
        names = torch.arange(max(ctx.sizes), device=ids.device)
        one_hot = (ids[:, None] == names[:, None]).to(dy.dtype)  # [K, V, N]
        if ctx.summed:
            found = (one_hot.flatten(0, 1) @ dy).unflatten(0, one_hot.shape[:2])
        else:
            found = torch.bmm(one_hot, dy)
        parts = [
            rows[:size].to(dtype)
            for rows, size, dtype in zip(found, ctx.sizes, ctx.dtypes, strict=True)
        ]
        return None, None, None, *parts


class _SummedTables(nn.Module):
    """[B, 17, T] -> [B, T, C]."""

    def __init__(self, tables: Sequence[Any], dtype: torch.dtype):
        super().__init__()
        self.tables, self._dtype = nn.ModuleList(tables), dtype
        assert all(_is_plain(table) for table in tables)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        ids = inputs.transpose(0, 1).flatten(1)  # [17, B T]
        weights = [table.weight for table in self.tables]
        rows: Any = _Tables.apply(ids, True, self._dtype, *weights)
        return rows.view(inputs.shape[0], inputs.shape[2], -1)


def _is_plain(table: Any) -> bool:
    """Whether an embedding gives its rows as they are."""
    return table.norm is None and table.low_rank is None and not table.demux_second_stream


class _WideDepth(nn.Module):
    """`DepthTransformer`'s contract, all codebooks at once."""

    def __init__(self, lm: Any):
        super().__init__()
        assert lm.depformer_multi_linear and not lm.depformer_weights_per_step_schedule
        assert all(layer.weights_per_step for layer in lm.depformer.layers)
        assert all(type(norm) is nn.Identity for norm in lm.depformer_norms)
        self.inputs, self.heads = lm.depformer_in, lm.linears
        self.tables = nn.ModuleList([lm.depformer_text_emb, *lm.depformer_emb])
        self.layers = lm.depformer.layers
        assert all(_is_plain(table) for table in self.tables)
        scales = [s for layer in self.layers for s in (layer.layer_scale_1, layer.layer_scale_2)]
        assert all(isinstance(scale, nn.Identity) for scale in scales)

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        due = masks.any(0)
        h, tokens = x[due], targets.movedim(1, 0)[:, due]  # [N, C], [17, N]
        if not len(h):
            return x.new_zeros((), dtype=torch.float32), torch.zeros_like(weights)
        count = len(masks)
        y = torch.matmul(h, _stacked(self.inputs).transpose(1, 2))  # [K, N, D]
        before = tokens[TEXT_ROW : TEXT_ROW + count]
        tables: Any = [table.weight for table in self.tables[:count]]
        looked_up: Any = _Tables.apply(before, False, y.dtype, *tables)
        y = y + looked_up
        for layer in self.layers:
            y = _layer(layer, y)
        logits = torch.bmm(y, _stacked(self.heads).transpose(1, 2)).float()  # [K, N, V]
        mask = masks[:, due]
        wanted = torch.where(mask, tokens[1 : 1 + count], 0)
        nll = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        nll = nll.view(count, -1) * mask
        return (nll * weights[:, None]).sum(), nll.detach().sum(1)


def _layer(layer: Any, y: torch.Tensor) -> torch.Tensor:
    """One layer of the depth transformer: [K, N, D] -> [K, N, D]."""
    attention, gates = layer.self_attn, gates_of(layer)
    z = _normed(y, layer.norm1.alpha.flatten(), layer.norm1.eps)
    qkv = torch.bmm(z, _stacked(attention.in_projs).transpose(1, 2))
    said = step_attention(qkv, attention.num_heads)
    y = torch.baddbmm(y, said, _stacked(attention.out_projs).transpose(1, 2))
    z = _normed(y, layer.norm2.alpha.flatten(), layer.norm2.eps)
    inner = torch.bmm(z, _stacked([gate.linear_in for gate in gates]).transpose(1, 2))
    a, b = inner.chunk(2, -1)
    outer = _stacked([gate.linear_out for gate in gates]).transpose(1, 2)
    return torch.baddbmm(y, functional.silu(a) * b, outer)


def _stacked(modules: Any) -> torch.Tensor:
    """Weights of Linear layers as [K, O, C]."""
    return torch.stack([module.weight for module in modules])


def _normed(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """moshi's `RMSNorm`, computed in float32."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * scale).to(x.dtype)
