"""The frozen base in 4 bits: NF4 of bitsandbytes, adapters in float32 on top (QLoRA).

`y = W4 x + s · B A x`: W4 is W in blocks of 64 values, each a 4-bit index into the 16 quantiles of
a normal distribution times the block's largest magnitude, and those magnitudes in 8 bits again
(double quantization): 0.5 + 1/64 + 4/(64 · 256) = 0.516 bytes a weight. It is unpacked to the
compute type whenever it is used. Gradient passes through it to earlier layers; it gets none.
Source: QLoRA, arXiv 2305.14314; bitsandbytes 0.49 `nn.Linear4bit`.

Every Linear layer of the model is packed, target or not; embeddings and norms stay.

- Targets become `Linear4bit`, and the model is flagged `is_loaded_in_4bit`: only then does PEFT
  put its 4-bit layer on them. `check_wrapped` makes sure of that.
- Others become `Packed`, which is no `nn.Linear`: moshi's gated layers take the `weight` of what
  is one, and would read packed bytes.

Runs on a CPU and on CUDA. Its speed on a GPU is not measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from duplex.errors import MissingInputError, WorkError

QUANT_TYPE = "nf4"


@dataclass(frozen=True)
class QuantizedSize:
    """layers: how many were packed; before, after: bytes of their weights, scales included;
    error: rms of W4 - W over all of them, relative to the rms of W."""

    layers: int
    before: int
    after: int
    error: float


class Packed(nn.Module):
    """A 4-bit Linear without an adapter, called as a module and never read as a weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return self.layer(x)


def quantize_linears(
    model: nn.Module, targets: dict[str, list[str]], device: str | torch.device = "cpu"
) -> QuantizedSize:
    """Pack each `nn.Linear` of `model` in place, one at a time, on `device`.

    Args:
        model: an `LMModel` without adapters; its weights' type becomes the compute type.
        targets: by group, the layers that adapters will be put on.

    Raises:
        MissingInputError: bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    adapted = {name for group in targets.values() for name in group}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    before = after = 0
    squared_error = squared = 0.0
    for name, linear in layers:
        packed = _pack(bnb, linear, device)
        before += linear.weight.numel() * linear.weight.element_size()
        after += packed_bytes(packed)
        weight = linear.weight.detach().float().to(device)
        squared_error += (unpacked(packed).float() - weight).square().sum().item()
        squared += weight.square().sum().item()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed if name in adapted else Packed(packed))
    model.is_loaded_in_4bit = True  # pyright: ignore  # what PEFT asks for
    error = (squared_error / squared) ** 0.5 if squared else 0.0
    return QuantizedSize(len(layers), before, after, error)


def _pack(bnb: Any, linear: nn.Linear, device: str | torch.device) -> Any:
    packed = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        compress_statistics=True,
        quant_type=QUANT_TYPE,
        device="meta",
    )
    weight = bnb.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        compress_statistics=True,
        quant_type=QUANT_TYPE,
        module=packed,
    )
    packed.weight = weight.to(device)  # this is where it is packed
    if linear.bias is not None:
        packed.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
    return packed.train(linear.training)


def packed_bytes(layer: Any) -> int:
    """Bytes of a 4-bit layer's weight: indices, and the scales at both levels."""
    state = layer.weight.quant_state
    parts = [layer.weight.data, state.absmax]
    if state.nested:
        parts += [state.state2.absmax, state.offset]
    return sum(part.numel() * part.element_size() for part in parts)


def unpacked(layer: Any) -> torch.Tensor:
    """The weight that a 4-bit layer multiplies by: [out, in]."""
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def check_wrapped(model: nn.Module, names: Iterable[str]) -> None:
    """
    Raises:
        WorkError: PEFT put another layer than its 4-bit one on a packed layer; it would take
            packed bytes for weights.
    """
    from peft.tuners.lora.bnb import Linear4bit

    foreign = [name for name in names if not isinstance(model.get_submodule(name), Linear4bit)]
    if foreign:
        kind = type(model.get_submodule(foreign[0]))
        raise WorkError(
            "PEFT must put its 4-bit layer on each packed Linear, found "
            f"{kind.__module__}.{kind.__name__} on {foreign[0]} ({len(foreign)} in all). "
            "Use the pinned versions of peft and bitsandbytes, or train.quantize: none."
        )


def _bitsandbytes() -> Any:
    """Imported when it is asked for: it takes 2.5 s, and little else needs it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingInputError(
            "train.quantize: nf4 needs the package bitsandbytes, which cannot be imported: "
            f"{error}. Run `pip install -e '.[quantize]'`, or set train.quantize: none."
        ) from None
    return bitsandbytes
