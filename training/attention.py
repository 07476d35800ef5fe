"""Attention over frames and over codebooks, and rotary positions, for the training forward.

Legend: B clips, T frames, H heads, d width of a head, K depth steps, N places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

PRODUCTS_TO = 512  # frames; scores of longer clips take too much memory


def causal_attention(qkv: torch.Tensor, context: int | None) -> torch.Tensor:
    """Each frame attends to itself and the `context` - 1 before it: [B, T, 3, H, d] -> [B, T, H d].

    While T is within the context torch's fused kernel gets no mask, and skips the upper triangle.
    In bfloat16 on a CPU plain products take its place, which keep [B, H, T, T] for the backward.
    """
    q, k, v = qkv.unbind(2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, T, d]
    num_frames = q.shape[2]
    if _by_products(q) and (context is None or num_frames <= context):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        y = (scores + _later(num_frames, q.dtype)).softmax(-1) @ v
    elif context is None or num_frames <= context:
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        band = _band(num_frames, context, q.device)
        y = functional.scaled_dot_product_attention(q, k, v, band)
    return y.transpose(1, 2).flatten(2)


def _by_products(q: torch.Tensor) -> bool:
    """Where plain products are the faster: forward and backward of 8 clips of 400 frames took 40 ms
    of a core in bfloat16, and 73 ms by the CPU's fused kernel."""
    return not _is_fused(q.device) and q.dtype == torch.bfloat16 and q.shape[2] <= PRODUCTS_TO


@lru_cache(maxsize=64)
def _later(num_frames: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, T]: minus infinity for those that come later, else 0."""
    return torch.full((num_frames, num_frames), -math.inf, dtype=dtype).triu_(1)


@lru_cache(maxsize=4)
def _band(num_frames: int, context: int, device: torch.device) -> torch.Tensor:
    """bool [T, T]: who sees whom within a context; the same for all layers."""
    place = torch.arange(num_frames, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < context)


def step_attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Each depth step attends to itself and those before it: [K, N, 3 H d] -> [K, N, H d].

    A CPU's fused kernel is made for long sequences; over 8 steps plain products take half its time.
    """
    if not _is_fused(qkv.device):
        return _StepAttention.apply(qkv, heads)  # pyright: ignore[reportReturnType]
    steps, places, width = qkv.shape
    if not places:  # a batch of text alone, of which CUDA's kernels make None
        return qkv[..., : width // 3]
    q, k, v = (part.unflatten(0, (places, heads)) for part in _by_place(qkv, heads))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # [N, H, K, d]
    return y.permute(2, 0, 1, 3).reshape(steps, places, width // 3)


def _is_fused(device: torch.device) -> bool:
    return device.type != "cpu"


class _StepAttention(torch.autograd.Function):
    """Keeps its input alone: the K x K weights are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, heads: int) -> torch.Tensor:
        ctx.save_for_backward(qkv)
        ctx.heads = heads
        q, k, v = _by_place(qkv, heads)
        y = torch.bmm(_step_weights(q, k).to(v.dtype), v)  # [N H, K, d]
        steps, places, width = qkv.shape
        y = y.unflatten(0, (places, heads)).permute(2, 0, 1, 3)
        return y.reshape(steps, places, width // 3)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (qkv,) = ctx.saved_tensors
        steps, places, width = qkv.shape
        q, k, v = _by_place(qkv, ctx.heads)
        dy = grads[0].unflatten(-1, (ctx.heads, -1)).permute(1, 2, 0, 3).flatten(0, 1)
        weights = _step_weights(q, k)
        d_weights = torch.bmm(dy, v.transpose(1, 2)).float()
        along = (weights * d_weights).sum(-1, keepdim=True)
        d_scores = d_weights.sub_(along).mul_(weights).mul_(q.shape[-1] ** -0.5).to(q.dtype)
        d_v = torch.bmm(weights.to(v.dtype).transpose(1, 2), dy)
        parts = torch.stack([d_scores @ k, d_scores.transpose(1, 2) @ q, d_v])
        parts = parts.unflatten(1, (places, ctx.heads))  # [3, N, H, K, d]
        return parts.permute(3, 1, 0, 2, 4).reshape(steps, places, width), None


def _by_place(qkv: torch.Tensor, heads: int) -> Sequence[torch.Tensor]:
    """q, k, v of the depth steps: [K, N, 3 H d] -> three [N H, K, d]."""
    parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 1, 3, 0, 4)  # [3, N, H, K, d]
    return parts.flatten(1, 2).unbind(0)


def _step_weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Softmax over this step and those before it: float32 [N H, K, K]."""
    steps = q.shape[1]
    later = torch.full((steps, steps), -math.inf, device=q.device).triu_(1)
    scores = torch.bmm(q, k.transpose(1, 2)).float()
    return torch.softmax(scores.mul_(q.shape[-1] ** -0.5).add_(later), -1)


def turns_of(
    transformer: Any, width: int, num_frames: int, device: torch.device
) -> torch.Tensor | None:
    """The rotation of each frame, complex64 [T, d / 2]; None for a model without.

    Angles as in `moshi.modules.rope`: frame t turns pair i by t · max_period^(-2 i / d).
    """
    if transformer.rope is None:
        return None
    heads = transformer.layers[0].self_attn.num_heads
    return _turns(width // heads, num_frames, transformer.rope.max_period, device)


@lru_cache(maxsize=4)
def _turns(width: int, num_frames: int, max_period: float, device: torch.device) -> torch.Tensor:
    pair = torch.arange(width // 2, device=device, dtype=torch.float32)
    frequency = torch.exp(pair * (-math.log(max_period) * 2 / width))
    time = torch.arange(num_frames, device=device, dtype=torch.float32)
    angle = frequency * time[:, None]
    return torch.complex(torch.cos(angle), torch.sin(angle))


def rotate(qkv: torch.Tensor, turns: torch.Tensor, interleave: bool) -> torch.Tensor:
    """Rotary positions on q and k, in place: [B, T, 3, H, d].

    Args:
        turns: complex64 [T, d / 2].
        interleave: pairs are neighbours (r0 i0 r1 i1 …); else halves (r … i …).
    """
    return _Rotate.apply(qkv, turns, interleave)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back: nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, turns: torch.Tensor, interleave: bool) -> torch.Tensor:
        ctx.save_for_backward(turns)
        ctx.interleave = interleave
        ctx.mark_dirty(qkv)
        _turn_(qkv[:, :, :2], turns, interleave)
        return qkv

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (turns,) = ctx.saved_tensors
        back = grads[0].clone()  # it may be somebody else's too
        _turn_(back[:, :, :2], turns.conj(), ctx.interleave)
        return back, None, None


def _turn_(qk: torch.Tensor, turns: torch.Tensor, interleave: bool) -> None:
    """Rotate [B, T, 2, H, d] in place, in float32."""
    if not interleave:
        pairs = qk.unflatten(-1, (2, -1)).transpose(-1, -2)  # [.., d / 2, 2]
    else:
        pairs = qk.unflatten(-1, (-1, 2))
    wide = pairs.float().contiguous()
    turned = torch.view_as_complex(wide).mul_(turns[:, None, None])
    pairs.copy_(torch.view_as_real(turned))
