"""A head's cross-entropy without its logits: [N, C] in, loss and gradients out, part by part.

    loss = Σ_n c_n · nll_n      nll_n = log Σ_v exp(l_nv) - l_n,target      l = W h + s · B A h

Logits of a whole batch are the largest tensor of a training step (7B, 16 clips of 100 s: 3.9 GB
in float32, and their gradient as much again). Here some rows at a time are projected, turned into
their gradient in place, and multiplied back, so that one chunk of logits is alive at any time and
none is kept. That works because each row's weight c_n is known before the forward pass
(`training.loss.coefficients`). It costs what an ordinary forward and backward pass does: nothing
is computed twice.

The idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989), here for LoRA,
with a weight for each row, and in plain torch.

Legend: N rows, C inputs, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from training.projection import PlainLinear, plain_linear

# Logits of one chunk, in elements: fits a CPU's caches; keeps a GPU busy.
CHUNK_CPU, CHUNK_CUDA = 1 << 20, 1 << 26


def weighted_nll(
    h: torch.Tensor, head: nn.Module, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted loss of a head, and each row's raw negative log-likelihood.

    Args:
        h: [N, C], with its graph.
        head: a Linear, plain or adapted by PEFT.
        targets: int64 [N]; any valid id where the weight is 0.
        weights: float32 [N], c_n; no gradient goes there.

    Returns:
        Scalar loss with its graph, and nll float32 [N] in nats without one.
    """
    part = plain_linear(head)
    if part is None:
        return _by_module(h, head, targets, weights)
    tensors = (part.weight, part.bias, part.a, part.b)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (h, *tensors)
    )
    return _WeightedNll.apply(h, targets, weights, part.scale, needs_grad, *tensors)  # pyright: ignore


def _chunk_rows(device: torch.device, vocabulary: int) -> int:
    return max(256, (CHUNK_CPU if device.type == "cpu" else CHUNK_CUDA) // vocabulary)


def _by_module(
    h: torch.Tensor, head: nn.Module, targets: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Through the head's own forward, chunk by chunk, each made again in the backward pass."""

    def chunk_nll(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(part).float(), wanted, reduction="none")

    rows = _chunk_rows(h.device, int(getattr(head, "out_features", 1 << 15)))
    pieces = [
        checkpoint(chunk_nll, part, wanted, use_reentrant=False)
        for part, wanted in zip(h.split(rows), targets.split(rows), strict=True)
    ]
    nll = torch.cat(pieces) if pieces else h.new_zeros(0, dtype=torch.float32)  # pyright: ignore
    return (nll * weights).sum(), nll.detach()


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        scale: float,
        needs_grad: bool,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs = ctx.needs_input_grad[5:]
        part = PlainLinear(weight, bias, a, b, scale)
        d_tensors = [
            torch.zeros_like(t, dtype=torch.float32)
            if t is not None and needs_grad and need
            else None
            for t, need in zip((weight, bias, a, b), needs, strict=True)
        ]
        dh = torch.empty_like(h) if needs_grad else None
        nll = torch.empty(h.shape[0], dtype=torch.float32, device=h.device)
        rows = _chunk_rows(h.device, weight.shape[0])
        for first in range(0, h.shape[0], rows):
            span = slice(first, first + rows)
            logits, low = _logits(h[span], part)
            log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
            picked = targets[span, None]
            nll[span] = -log_p.gather(1, picked)[:, 0]
            if dh is None:
                continue
            c = weights[span, None]
            grad = log_p.exp_().mul_(c)  # softmax, weighted
            grad.scatter_add_(1, picked, -c)
            grad = grad.to(h.dtype)
            torch.mm(grad, weight, out=dh[span])
            _add_gradients(d_tensors, dh[span], grad, h[span], low, part)
        loss = (nll * weights).sum()
        ctx.save_for_backward(dh, *d_tensors)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, a, b)]
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        outer = grads[0]
        dh, *d_tensors = ctx.saved_tensors
        scaled = [
            None if d is None else (d * outer).to(dtype)
            for d, dtype in zip(d_tensors, ctx.dtypes, strict=True)
        ]
        dh = None if dh is None else dh * outer.to(dh.dtype)
        return dh, None, None, None, None, *scaled


def _logits(h: torch.Tensor, part: PlainLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[n, V], and A h [n, r] where there is an adapter."""
    logits = functional.linear(h, part.weight, part.bias)
    if part.a is None or part.b is None:
        return logits, None
    low = h @ part.a.T.to(h.dtype)
    return logits.addmm_(low, part.b.T.to(h.dtype), alpha=part.scale), low


def _add_gradients(
    sums: list[torch.Tensor | None],
    dh: torch.Tensor,
    grad: torch.Tensor,
    h: torch.Tensor,
    low: torch.Tensor | None,
    part: PlainLinear,
) -> None:
    """Add a chunk's gradients to those of weight, bias, A and B, and the adapter's to `dh`."""
    d_weight, d_bias, d_a, d_b = sums
    if d_weight is not None:
        d_weight += grad.T @ h
    if d_bias is not None:
        d_bias += grad.sum(0, dtype=torch.float32)
    if low is None or part.a is None or part.b is None:
        return
    d_low = grad @ part.b.to(grad.dtype)  # [n, r]
    if d_a is not None:
        d_a.add_(d_low.T @ h, alpha=part.scale)
    if d_b is not None:
        d_b.add_(grad.T @ low, alpha=part.scale)
    dh.addmm_(d_low, part.a.to(grad.dtype), alpha=part.scale)
