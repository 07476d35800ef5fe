"""A linear layer as training needs it: norm or gate before, LoRA beside, residual after, in one.

    y_k = r_k + W_k z_k + s · B_k A_k z_k      z_k = pre(x_k)      k = 1 … K

`pre` is nothing, an RMS norm, or the gate `silu(a) · b` of the halves of x. K is 1 for the
temporal transformer; for the depth transformer it is its steps, each with weights of its own.
The steps lie outermost, [K, N, C], so each of them is one matrix product over all N places:
the library slices `[N, 1, C]` out of `[N, K, C]` for each step instead.

Kept for the backward pass: x, the norm's 1/rms and A z (rank-sized). z itself is made again, so
neither normalised inputs nor gated products stay in memory, and nothing of y's size does.
Written as one autograd function on plain tensors; what it does not cover (adapter dropout, 4-bit
weights, several adapters) goes through the modules themselves, which `plain_linear` decides.

Legend: K steps, N places, C inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

Pre = Literal["none", "norm", "gate"]


@dataclass(frozen=True)
class PlainLinear:
    """What a Linear with at most one plain LoRA adapter computes with.

    weight [O, C], bias [O] or None; a [r, C] and b [O, r], or None; scale: of B A.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    scale: float


def plain_linear(module: nn.Module) -> PlainLinear | None:
    """The tensors of `module`, or None where only calling it will do."""
    if type(module) is nn.Linear:
        return PlainLinear(module.weight, module.bias, None, None, 0.0)
    adapted: Any = module
    base = getattr(adapted, "base_layer", None)
    if not hasattr(adapted, "lora_A") or type(base) is not nn.Linear:
        return None
    active = list(adapted.active_adapters)
    if adapted.disable_adapters or adapted.merged or len(active) != 1:
        return None
    (name,) = active
    if name not in adapted.lora_A or adapted.use_dora.get(name) or adapted.lora_bias.get(name):
        return None
    dropout = adapted.lora_dropout[name]
    if adapted.training and not isinstance(dropout, nn.Identity) and dropout.p > 0:
        return None
    a, b = adapted.lora_A[name].weight, adapted.lora_B[name].weight
    return PlainLinear(base.weight, base.bias, a, b, float(adapted.scaling[name]))


def project(
    x: torch.Tensor,
    modules: Sequence[nn.Module],
    *,
    steps: Sequence[int] | None = None,
    pre: Pre = "none",
    norm: nn.Module | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply linear layers step by step: [K, N, C] -> [K, N, O], differentiable in everything.

    Args:
        x: [K, N, C]; [N, C] where all steps read the same; for a gate [K, N, 2 C].
        modules: the layers, plain or adapted by PEFT.
        steps: the index of each step's layer, K of them; None: one layer for all K.
        norm: moshi's `RMSNorm`, for `pre="norm"`.
        residual: added to the result, [K, N, O].
    """
    parts = [plain_linear(module) for module in modules]
    order = tuple(steps) if steps is not None else (0,) * (x.shape[0] if x.dim() == 3 else 1)
    if steps is None and x.dim() == 3:  # one layer: one product over everything
        flat = x.reshape(1, -1, x.shape[-1])
        rest = None if residual is None else residual.reshape(1, flat.shape[1], -1)
        y = _apply(flat, parts, modules, (0,), pre, norm, rest)
        return y.reshape(*x.shape[:-1], -1)
    return _apply(x, parts, modules, order, pre, norm, residual)


def _apply(
    x: torch.Tensor,
    parts: Sequence[PlainLinear | None],
    modules: Sequence[nn.Module],
    order: tuple[int, ...],
    pre: Pre,
    norm: nn.Module | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    plain = [part for part in parts if part is not None]
    if len(plain) < len(parts):
        return _by_modules(x, modules, order, pre, norm, residual)
    alpha, eps = (norm.alpha, norm.eps) if norm is not None else (None, 0.0)  # pyright: ignore
    scales = tuple(part.scale for part in plain)
    tensors: list[torch.Tensor | None] = []
    for part in plain:
        tensors += [part.weight, part.bias, part.a, part.b]
    return _Projection.apply(x, residual, alpha, eps, pre, order, scales, *tensors)  # pyright: ignore


def _by_modules(
    x: torch.Tensor,
    modules: Sequence[nn.Module],
    order: tuple[int, ...],
    pre: Pre,
    norm: Any,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The same through the modules' own forward, for what `plain_linear` refuses."""
    outputs = []
    for k, index in enumerate(order):
        z = x if x.dim() == 2 else x[k]
        if pre == "norm":
            z = rms_norm(z, norm)
        elif pre == "gate":
            a, b = z.chunk(2, -1)
            z = functional.silu(a) * b
        outputs.append(modules[index](z))
    y = torch.stack(outputs)
    return y if residual is None else y + residual


class _Projection(torch.autograd.Function):
    """See the module's docstring. `tensors`: weight, bias, a, b of each layer in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        alpha: torch.Tensor | None,
        eps: float,
        pre: Pre,
        order: tuple[int, ...],
        scales: tuple[float, ...],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        layers = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        shared = x.dim() == 2
        num_places = x.shape[-2]
        weight = layers[0][0]
        assert weight is not None
        y = x.new_empty(len(order), num_places, weight.shape[0])
        inverse_rms, lows = [], []
        for k, index in enumerate(order):
            weight, bias, a, b = layers[index]
            assert weight is not None
            z = x if shared else x[k]
            if pre == "norm":
                assert alpha is not None
                inverse = _inverse_rms(z, eps)
                inverse_rms.append(inverse)
                z = _normed(z, inverse, alpha)
            elif pre == "gate":
                z = _gated(z)
            torch.mm(z, weight.T, out=y[k])
            if bias is not None:
                y[k] += bias
            if a is not None and b is not None:
                low = z @ a.T.to(z.dtype)  # [N, r]
                y[k].addmm_(low, b.T.to(z.dtype), alpha=scales[index])
                lows.append(low)
            else:
                lows.append(z.new_empty(0))
            if residual is not None:
                y[k] += residual[k]
        ctx.pre, ctx.order, ctx.scales, ctx.shared = pre, order, scales, shared
        ctx.has_residual, ctx.num_tensors = residual is not None, len(tensors)
        ctx.save_for_backward(x, alpha, *tensors, *inverse_rms, *lows)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (dy,) = grads
        x, alpha, *rest = ctx.saved_tensors
        tensors, rest = rest[: ctx.num_tensors], rest[ctx.num_tensors :]
        layers = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
        steps = len(ctx.order)
        inverse_rms = rest[:steps] if ctx.pre == "norm" else []
        lows = rest[len(inverse_rms) :]
        needs_x, _, needs_alpha = ctx.needs_input_grad[:3]
        needs = ctx.needs_input_grad[7:]
        d_tensors: list[torch.Tensor | None] = [None] * ctx.num_tensors
        d_alpha = torch.zeros_like(alpha, dtype=torch.float32) if needs_alpha else None
        needs_dz = needs_x or needs_alpha
        dx = torch.empty_like(x) if needs_x else None
        for k, index in enumerate(ctx.order):
            weight, bias, a, b = layers[index]
            place = 4 * index
            x_k, dy_k = (x if ctx.shared else x[k]), dy[k]
            z = x_k
            if ctx.pre == "norm":
                z = _normed(x_k, inverse_rms[k], alpha)
            elif ctx.pre == "gate":
                z = _gated(x_k)
            if needs[place]:
                _add(d_tensors, place, dy_k.T @ z)
            if bias is not None and needs[place + 1]:
                _add(d_tensors, place + 1, dy_k.sum(0))
            dz = dy_k @ weight if needs_dz else None
            if a is not None:
                scale = ctx.scales[index]
                d_low = dy_k @ b.to(dy_k.dtype)  # [N, r]
                if needs[place + 2]:
                    _add(d_tensors, place + 2, (d_low.T @ z).to(a.dtype).mul_(scale))
                if needs[place + 3]:
                    _add(d_tensors, place + 3, (dy_k.T @ lows[k]).to(b.dtype).mul_(scale))
                if dz is not None:
                    dz.addmm_(d_low, a.to(dy_k.dtype), alpha=scale)
            if dz is None:
                continue
            if ctx.pre == "norm":
                dz = _norm_backward(x_k, inverse_rms[k], alpha, dz, d_alpha)
            elif ctx.pre == "gate":
                if dx is not None:
                    _gate_backward_(x_k, dz, dx[k])
                continue
            if dx is None:
                continue
            if not ctx.shared:
                dx[k] = dz
            elif k == 0:
                dx.copy_(dz)
            else:
                dx += dz
        d_alpha = None if d_alpha is None else d_alpha.to(alpha.dtype)
        d_residual = dy if ctx.has_residual and ctx.needs_input_grad[1] else None
        return dx, d_residual, d_alpha, None, None, None, None, *d_tensors


def _add(sums: list[torch.Tensor | None], place: int, value: torch.Tensor) -> None:
    """Several steps may share a layer: its gradients add up."""
    before = sums[place]
    sums[place] = value if before is None else before.add_(value)


# -- what stands before a layer


def rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """moshi's `RMSNorm` of the last dimension, keeping x alone for the backward pass."""
    return _RmsNorm.apply(x, norm.alpha, norm.eps)  # pyright: ignore[reportReturnType]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, alpha: torch.Tensor, eps: float) -> torch.Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, alpha, inverse)
        return _normed(x, inverse, alpha)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, alpha, inverse = ctx.saved_tensors
        needs_alpha = ctx.needs_input_grad[1]
        d_alpha = torch.zeros_like(alpha, dtype=torch.float32) if needs_alpha else None
        dx = _norm_backward(x, inverse, alpha, grads[0], d_alpha)
        return dx, None if d_alpha is None else d_alpha.to(alpha.dtype), None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms of the last dimension, float32 [N, 1]."""
    size = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(size).add_(eps).rsqrt_()


def _normed(x: torch.Tensor, inverse: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    y = x * inverse  # float32
    return y.mul_(alpha.reshape(-1)).to(x.dtype)


def _norm_backward(
    x: torch.Tensor,
    inverse: torch.Tensor,
    alpha: torch.Tensor,
    dz: torch.Tensor,
    d_alpha: torch.Tensor | None,
) -> torch.Tensor:
    """dx of z = x · inverse · alpha; adds to `d_alpha` in place."""
    unit = x * inverse  # float32, of rms 1
    if d_alpha is not None:
        d_alpha += (unit * dz).reshape(-1, unit.shape[-1]).sum(0).reshape(d_alpha.shape)
    d_unit = dz * alpha.float().reshape(-1)
    along = torch.linalg.vecdot(unit, d_unit)[..., None] / unit.shape[-1]
    return d_unit.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype)


def _gated(x: torch.Tensor) -> torch.Tensor:
    """silu(a) · b of the halves of the last dimension: [N, 2 C] -> [N, C]."""
    a, b = x.chunk(2, -1)
    return functional.silu(a).mul_(b)


def _gate_backward_(x: torch.Tensor, dz: torch.Tensor, out: torch.Tensor) -> None:
    """dx [N, 2 C] of silu(a) · b, written to `out`."""
    a, b = x.chunk(2, -1)
    d_a, d_b = out.chunk(2, -1)
    d_b.copy_(functional.silu(a).mul_(dz))
    # silu'(a) by torch's own backward kernel, one pass.
    d_a.copy_(torch.ops.aten.silu_backward(dz * b, a))
