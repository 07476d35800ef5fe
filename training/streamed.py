"""Runs a checkpoint's LM with the weights of one layer at a time, in float32.

The model is moshi's own, on the meta device, and so is its forward pass. A part of it (an
embedding, a transformer layer, a head) gets its weights just before it runs and gives them back
right after. They get there by moshi's own `load_state_dict`, strictly, so this is also the proof
that the checkpoint loads. Peak on Moshi 7B: its largest part in float32, a temporal layer of
0.8 GB, against 31 GB for the whole.

An adapter runs unmerged: y = W x + scale · B (A x) on the second half of the batch only, so that
one pass gives the base's logits and the tuned ones. Rank, scale and names are read here from the
adapter's files, by none of the merge's code; a test holds this against PEFT's own loader.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from duplex.errors import CorruptFileError
from pipeline.engines.checkpoint import Checkpoint
from training.adapter import CONFIG, WEIGHTS
from training.tensorfile import TensorFile

if TYPE_CHECKING:
    from moshi.models.lm import LMModel


@contextmanager
def streamed_lm(checkpoint: Checkpoint, adapter: Path | None = None) -> Iterator[LMModel]:
    """The LM of a checkpoint, to be called under `torch.no_grad()` on codes [B, 17, T].

    Args:
        adapter: a PEFT folder; it acts on the second half of the batch.

    Raises:
        CorruptFileError: on the call: the weights are not those that config.json describes.
    """
    lm = checkpoint.empty_lm()
    with TensorFile(checkpoint.files()["moshi"]) as weights:
        parts = dict(_parts(lm, ""))
        keys = _keys_of_parts(parts, lm, weights)
        if adapter is None:
            _stream(parts, keys, weights, lm)
            yield lm
            return
        with TensorFile(adapter / WEIGHTS) as sides:
            _put_adapters(lm, sides, _scale(adapter / CONFIG))
            _stream(dict(_parts(lm, "")), keys, weights, lm)
            yield lm


class Unmerged(nn.Module):
    """y = W x, and + scale · B (A x) on the second half of the batch (dimension 0)."""

    sides_names = ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight")

    def __init__(self, inner: nn.Module, name: str, sides: TensorFile, scale: float):
        super().__init__()
        self.inner: Any = inner
        self.name, self.sides, self.scale = name, sides, scale
        self.a = self.b = None
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            state[f"{prefix}inner.{key[len(prefix) :]}"] = state.pop(key)

    def take(self) -> None:
        self.a, self.b = (
            self.sides.read(side.format(self.name), torch.float32) for side in self.sides_names
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.a is not None and self.b is not None
        y = self.inner(x)
        half = x.shape[0] // 2
        low = nn.functional.linear(x[half:], self.a)  # [B/2, …, rank]
        y[half:] += self.scale * nn.functional.linear(low, self.b)
        return y


class UnmergedEmbedding(Unmerged):
    """The same for moshi's `ScaledEmbedding`: the row of id i is W[i] + scale · B A[:, i].

    A [rank, ids], B [dim, rank]; -1 is zero, norm and low-rank projection follow the lookup.
    """

    sides_names = (
        "base_model.model.{}.lora_embedding_A",
        "base_model.model.{}.lora_embedding_B",
    )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.a is not None and self.b is not None
        y = self.inner(x)
        second = x[x.shape[0] // 2 :]
        ids = second.clamp(min=0)
        rows = nn.functional.embedding(ids, self.inner.weight)
        rows = rows + self.scale * nn.functional.linear(self.a.T[ids], self.b)
        if self.inner.norm is not None:
            rows = self.inner.norm(rows)
        rows = rows * (second >= 0)[..., None]
        if self.inner.low_rank is not None:
            rows = self.inner.low_rank(rows)
        y[x.shape[0] // 2 :] = rows
        return y


def _put_adapters(lm: nn.Module, sides: TensorFile, scale: float) -> None:
    for kind in (Unmerged, UnmergedEmbedding):
        before, after = kind.sides_names[0].split("{}")
        names = [key[len(before) : -len(after)] for key in sides.specs if key.endswith(after)]
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(
                lm.get_submodule(parent), last, kind(lm.get_submodule(name), name, sides, scale)
            )


def _scale(path: Path) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (arXiv 2312.03732)."""
    config = json.loads(path.read_text())
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are loaded and freed as a whole: layers of a transformer, members of a
    list, and whatever else has weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) or hasattr(child, "layers"):
            yield from _parts(child, f"{prefix}{name}.")
        elif next(child.parameters(), None) is not None:
            yield f"{prefix}{name}", child


def _keys_of_parts(
    parts: dict[str, nn.Module], lm: nn.Module, weights: TensorFile
) -> dict[str, list[str]]:
    """Names in the file by the part that they belong to.

    Raises:
        CorruptFileError: a name that belongs to none.
    """
    keys: dict[str, list[str]] = {name: [] for name in parts}
    strangers = []
    for key in weights.specs:
        owner = key
        while owner and owner not in parts:
            owner = owner.rpartition(".")[0]
        keys[owner].append(key) if owner else strangers.append(key)
    covered = {f"{part}.{name}" for part in parts for name, _ in parts[part].named_parameters()}
    assert covered == {name for name, _ in lm.named_parameters()}, "a weight is in no part"
    if strangers:
        raise CorruptFileError(
            f"{weights.path}: must hold the weights that config.json describes, found others: "
            f"{', '.join(strangers[:5])}"
        )
    return keys


def _stream(
    parts: dict[str, nn.Module], keys: dict[str, list[str]], weights: TensorFile, lm: nn.Module
) -> None:
    first = next(name for name, _ in lm.named_parameters())
    for name, part in parts.items():
        loader = _loader(name, keys[name], weights)
        if first.startswith(f"{name}."):
            loader(part)  # stays: the model asks its first weight for the device
        else:
            part.register_forward_pre_hook(loader)
            part.register_forward_hook(_free)


def _loader(name: str, keys: list[str], weights: TensorFile) -> Callable[..., None]:
    def load(part: nn.Module, *_: Any) -> None:
        state = {key[len(name) + 1 :]: weights.read(key, torch.float32) for key in keys}
        try:
            part.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CorruptFileError(
                f"{weights.path}: must hold the weights that config.json describes; moshi refused "
                f"those of {name}: {reason}"
            ) from error
        for module in part.modules():
            if isinstance(module, Unmerged):
                module.take()

    return load


def _free(part: nn.Module, *_: Any) -> None:
    """Give a part's weights back, to the system too: what the C library keeps for later of a
    7B model's depth layers came to 0.8 GB."""
    part.to("meta")
    for module in part.modules():
        if isinstance(module, Unmerged):
            module.a = module.b = None
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
