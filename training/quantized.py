"""The frozen base in 4 bits: NF4 of bitsandbytes, adapters in float32 on top (QLoRA).

`y = W4 x + s · B A x`: W4 is W in blocks of 64 values, each a 4-bit index into the 16 quantiles of
a normal distribution times the block's largest magnitude, and those magnitudes in 8 bits again
(double quantization): 0.5 + 1/64 + 4/(64 · 256) = 0.516 bytes a weight. It is unpacked to the
compute type whenever it is used. Gradient passes through it to earlier layers; it gets none.
Source: QLoRA, arXiv 2305.14314; bitsandbytes 0.49 `nn.Linear4bit`.

Every Linear layer whose input is a multiple of 64 wide is packed, target or not: all of Moshi's
are. Embeddings and norms stay, and so do other widths: there bitsandbytes 0.49.2 unpacks wrongly
on a CPU (rms error .25 of the weights at [64, 176], where NF4 has .09), since its kernel lets each
row begin a new block and its packing does not.

- Targets become `Linear4bit`, and the model is flagged `is_loaded_in_4bit`: only then does PEFT
  put its 4-bit layer on them. `check_wrapped` makes sure of that.
- Others go into a `Frozen`, which is no `nn.Linear`: moshi's gated layers take the `weight` of
  what is one, and would read packed bytes.

Runs on a CPU and on CUDA. Its speed on a GPU is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from duplex.errors import MissingInputError, WorkError

QUANT_TYPE = "nf4"
BLOCK = 64  # weights that share a scale


@dataclass(frozen=True)
class QuantizedSize:
    """layers: how many were packed; left: those that were not; before, after: bytes of the packed
    weights, scales included; error: rms of W4 - W over all of them, relative to the rms of W."""

    layers: int
    left: tuple[str, ...]
    before: int
    after: int
    error: float


class Frozen(nn.Module):
    """A layer without an adapter that can be called, and is no `nn.Linear` to be looked into."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    @property
    def in_features(self) -> int:
        return self.layer.in_features  # pyright: ignore[reportReturnType]

    @property
    def out_features(self) -> int:
        return self.layer.out_features  # pyright: ignore[reportReturnType]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        return self.layer(x)


def quantize_linears(
    model: nn.Module, targets: dict[str, list[str]], device: str | torch.device = "cpu"
) -> QuantizedSize:
    """Pack the Linear layers of `model` in place, one at a time, on `device`.

    Args:
        model: an `LMModel` without adapters; its weights' type becomes the compute type.
        targets: by group, the layers that adapters will be put on.

    Raises:
        MissingInputError: bitsandbytes is not installed.
    """
    bnb = _bitsandbytes()
    adapted = {name for group in targets.values() for name in group}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    left = []
    before = after = 0
    squared_error = squared = 0.0
    for name, linear in layers:
        layer: nn.Module = linear
        if linear.in_features % BLOCK:
            left.append(name)
        else:
            layer = _pack(bnb, linear, device)
            before += linear.weight.numel() * linear.weight.element_size()
            after += packed_bytes(layer)
            weight = linear.weight.detach().to(device).float()
            squared_error += (unpacked(layer).float() - weight).square().sum().item()
            squared += weight.square().sum().item()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer if name in adapted else Frozen(layer))
    model.is_loaded_in_4bit = True  # pyright: ignore  # what PEFT asks for
    error = (squared_error / squared) ** 0.5 if squared else 0.0
    return QuantizedSize(len(layers) - len(left), tuple(left), before, after, error)


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
    # On a CPU with AVX512-BF16 a pass without gradients, a validation, would repack the weight for
    # good: scales in bfloat16, rows in 32s, and no gradient through it from then on.
    packed.support_avx512bf16_for_cpu = False
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


def num_weights(parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for: a byte of a packed one holds two."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def unpacked(layer: Any) -> torch.Tensor:
    """The weight that a 4-bit layer multiplies by: [out, in]."""
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def check_wrapped(model: nn.Module) -> None:
    """
    Raises:
        WorkError: PEFT put another layer than its 4-bit one on a packed layer; it would take
            packed bytes for weights.
    """
    from peft.tuners.lora.bnb import Linear4bit

    bnb = _bitsandbytes()
    foreign = [
        f"{type(module).__module__}.{type(module).__name__} on {name}"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), bnb.nn.Linear4bit)
        and not isinstance(module, Linear4bit)
    ]
    if foreign:
        raise WorkError(
            "PEFT must put its 4-bit layer on each packed Linear, found "
            f"{foreign[0]} ({len(foreign)} in all). "
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
