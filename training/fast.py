"""The training forward: moshi's weights, computed for training instead of for streaming.

Equal to `LMModel.forward` and its loss (tests/stages/test_fast.py: logits' likelihoods and every
gradient, fp32, 1e-4 relative), and different in how it gets there:

- attention is causal without a mask of T x T while T is within the model's context;
- the depth transformer runs step by step over all places at once (`training/projection.py`), on
  those places alone whose codes carry loss, and no further than the last step with loss: of a
  dep_q 16 model eight steps, where the user's codes carry none (it is causal over codebooks);
- no logits are kept (`training/fused_loss.py`), and no normalised input nor gated product.

It holds moshi's own modules and is made of modules that are called, so FSDP2 can gather what each
of them needs. `unsupported` names what it does not cover; `make_forward` then takes the library's.

Legend: B clips, T frames, N places with audio loss, K depth steps, C temporal width, D depth width,
H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from duplex.streams import DELAYS, NUM_ROWS, TEXT_ROW
from training.attention import causal_attention, rotate, step_attention, turns_of
from training.fused_loss import weighted_nll
from training.loss import PADDING, WORDS, StreamSums, part_masks
from training.projection import project, rms_norm


def unsupported(lm: Any) -> list[str]:
    """Why a model cannot take the fast path; empty if it can. One reason a line."""
    from moshi.modules.transformer import RMSNorm

    reasons = []
    if lm.fuser is not None or lm.condition_provider is not None:
        reasons.append("it is conditioned on other inputs")
    if not lm.depformer or tuple(lm.delays) != DELAYS:
        reasons.append(f"its streams must be Moshi's, with delays {DELAYS}")
    text_emb = getattr(lm.text_emb, "base_layer", lm.text_emb)  # under an adapter too
    if text_emb.demux_second_stream:
        reasons.append("two text streams share its text row")
    for name in ("transformer", "depformer"):
        transformer = getattr(lm, name)
        if transformer is None:
            continue
        embedding = transformer.positional_embedding
        if embedding not in (("rope", "none") if name == "transformer" else ("none",)):
            reasons.append(f"{name}: its positions are of kind {embedding}")
        for layer in transformer.layers:
            if layer.gating is None or layer.cross_attention is not None or layer.skip_self_attn:
                reasons.append(f"{name}: layers must be attention and a gated MLP")
                break
            gatings = gates_of(layer)
            attention = layer.self_attn
            if any(gating.activation is not functional.silu for gating in gatings):
                reasons.append(f"{name}: gates must be silu")
            if attention.kv_repeat != 1 or not attention.causal:
                reasons.append(f"{name}: attention must be causal, with as many keys as queries")
            if not all(type(n) is RMSNorm for n in (layer.norm1, layer.norm2)):
                reasons.append(f"{name}: norms must be RMSNorm")
            if len({gating.linear_out.in_features for gating in gatings}) > 1:
                reasons.append(f"{name}: its steps differ in width")
    if type(lm.out_norm) is not RMSNorm:
        reasons.append("out_norm must be RMSNorm")
    return list(dict.fromkeys(reasons))


def gates_of(layer: Any) -> list[Any]:
    """A layer's gated MLPs: one for each weight of the depth transformer's steps, else one."""
    return list(layer.gating) if isinstance(layer.gating, nn.ModuleList) else [layer.gating]


class FastForward(nn.Module):
    """`training.forward`'s contract over an `LMModel`, adapted by PEFT or not.

    Args:
        checkpointing: none, selective (every second layer's activations are made again in the
            backward pass) or full. The result is the same to the bit.
        compiled: `torch.compile` of each layer.
    """

    def __init__(self, lm: Any, *, checkpointing: str = "none", compiled: bool = False):
        super().__init__()
        assert not unsupported(lm), "the caller asks first"
        self.lm = lm
        self.embedding = InputEmbedding(lm)
        context = lm.context
        self.layers = nn.ModuleList(
            TemporalLayer(layer, context) for layer in lm.transformer.layers
        )
        self.text_head = TextHead(lm)
        self.depth = DepthTransformer(lm, checkpointing)
        self._checkpointing = checkpointing
        if compiled:
            for layer in [*self.layers, *self.depth.layers]:
                layer.compile()

    def shardable_modules(self) -> list[nn.Module]:
        """What FSDP2 shards, innermost first, the root last."""
        return [*self.layers, *self.depth.layers, self]

    def forward(
        self, codes: torch.Tensor, loss_mask: torch.Tensor, coefficients: torch.Tensor
    ) -> tuple[torch.Tensor, StreamSums]:
        """
        Args:
            codes: int64 [B, 17, T], undelayed.
            loss_mask: bool [B, 9 or 17, T].
            coefficients: [P] of `training.loss.coefficients`, of the whole batch.

        Returns:
            The scalar loss with its graph, and the sums without one.
        """
        words, padding, *audio = part_masks(codes, loss_mask)
        inputs, targets = delayed(codes, self.lm.card, self.lm.text_card)
        x = self.embedding(inputs)
        num_frames = x.shape[1]
        turns = turns_of(self.lm.transformer, x.shape[-1], num_frames, x.device)
        for index, layer in enumerate(self.layers):
            x = _call(layer, _again(self._checkpointing, index), x, turns)
        text_weights = coefficients[WORDS] * words + coefficients[PADDING] * padding
        x, loss, text_nll = self.text_head(x, targets[:, TEXT_ROW], text_weights, words | padding)
        nlls = [text_nll[words].sum(), text_nll[padding].sum()]
        counts = [words.sum(), padding.sum()]
        # At place s the depth transformer says code k of frame s - d_k: masks are delayed too.
        masks = torch.stack(
            [_shift(mask, DELAYS[1 + k]) for k, mask in enumerate(audio)]
        )  # [K, B, T]
        audio_loss, audio_nll = self.depth(x, targets, masks, coefficients[2:])
        nlls += audio_nll.unbind(0)
        counts += [mask.sum() for mask in masks]
        sums = StreamSums(torch.stack(nlls).detach(), torch.stack(counts).float())
        return loss + audio_loss, sums


def delayed(codes: torch.Tensor, card: int, text_card: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model reads and what it is to say, at each place: both int64 [B, 17, T].

    Row k is later by its delay, with the initial token before it; inputs are the targets one
    place earlier, the initial tokens first. Source: `LMModel.forward`.
    """
    initial = torch.full((1, NUM_ROWS, 1), card, dtype=codes.dtype, device=codes.device)
    initial[:, TEXT_ROW] = text_card
    targets = codes.clone()
    for row, delay in enumerate(DELAYS):
        if delay:
            targets[:, row, delay:] = codes[:, row, :-delay]
            targets[:, row, :delay] = initial[:, row]
    inputs = torch.cat([initial.expand(codes.shape[0], -1, 1), targets[:, :, :-1]], 2)
    return inputs, targets


def _shift(mask: torch.Tensor, delay: int) -> torch.Tensor:
    """bool [B, T] moved `delay` places later; what leaves the end is lost, as in the library."""
    return functional.pad(mask, (delay, 0))[:, : mask.shape[1]] if delay else mask


def _again(checkpointing: str, index: int) -> bool:
    if not torch.is_grad_enabled():
        return False
    return checkpointing == "full" or (checkpointing == "selective" and index % 2 == 0)


def _call(layer: nn.Module, again: bool, *arguments: Any) -> torch.Tensor:
    """A layer's output; with `again` its activations are made again in the backward pass."""
    y: Any = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
    return y


class InputEmbedding(nn.Module):
    """The sum of the 17 rows' embeddings: [B, 17, T] -> [B, T, C]."""

    def __init__(self, lm: Any):
        super().__init__()
        self.tables = nn.ModuleList([lm.text_emb, *lm.emb])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        total = None
        for row, table in enumerate(self.tables):
            part = table(inputs[:, row])
            if total is None:
                total = part
            elif part.requires_grad:
                total = total + part
            else:
                total += part
        assert total is not None
        return total


class TemporalLayer(nn.Module):
    """One layer of the temporal transformer: [B, T, C] -> [B, T, C]."""

    def __init__(self, layer: Any, context: int | None):
        super().__init__()
        self.layer: Any = layer
        self._context = context

    def forward(self, x: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
        layer, attention = self.layer, self.layer.self_attn
        batch, num_frames, width = x.shape
        heads = attention.num_heads
        flat = x.reshape(1, batch * num_frames, width)
        qkv = project(flat, [attention.in_projs[0]], pre="norm", norm=layer.norm1)
        qkv = qkv.view(batch, num_frames, 3, heads, width // heads)
        if turns is not None:
            qkv = rotate(qkv, turns, attention.rope.interleave)
        y = causal_attention(qkv, self._context).reshape(flat.shape)
        flat = _residual(flat, y, [attention.out_projs[0]], None, "none", layer.layer_scale_1)
        gating = layer.gating
        h = project(flat, [gating.linear_in], pre="norm", norm=layer.norm2)
        flat = _residual(flat, h, [gating.linear_out], None, "gate", layer.layer_scale_2)
        return flat.view(x.shape)


def _residual(
    x: torch.Tensor, y: torch.Tensor, modules: Any, steps: Any, pre: Any, scale: nn.Module
) -> torch.Tensor:
    """x + scale(project(y)); without a layer scale in one."""
    if isinstance(scale, nn.Identity):
        return project(y, modules, steps=steps, pre=pre, residual=x)
    return x + scale(project(y, modules, steps=steps, pre=pre))


class TextHead(nn.Module):
    """The last norm, and the text loss: [B, T, C] -> [B, T, C], scalar, nll [B, T]."""

    def __init__(self, lm: Any):
        super().__init__()
        self.norm, self.head = lm.out_norm, lm.text_linear

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, due: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = rms_norm(x, self.norm)
        loss, picked = weighted_nll(x[due], self.head, targets[due], weights[due])
        nll = torch.zeros(due.shape, dtype=torch.float32, device=x.device)
        nll[due] = picked
        return x, loss, nll


class DepthTransformer(nn.Module):
    """The codebooks of each place, one after the other, and their loss."""

    def __init__(self, lm: Any, checkpointing: str):
        super().__init__()
        self.inputs = lm.depformer_in
        self.embeddings = nn.ModuleList([lm.depformer_text_emb, *lm.depformer_emb])
        self.layers = nn.ModuleList(DepthLayer(layer) for layer in lm.depformer.layers)
        self.norms, self.heads = lm.depformer_norms, lm.linears
        schedule = lm.depformer_weights_per_step_schedule
        self._weights_of_step: list[int] = list(schedule or range(lm.dep_q))
        self._multi_linear = lm.depformer_multi_linear
        self._per_step = bool(lm.depformer.layers[0].weights_per_step)
        self._checkpointing = checkpointing

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x: [B, T, C], the temporal transformer's output.
            targets: int64 [B, 17, T], delayed.
            masks: bool [K, B, T], where code k carries loss; K = 8 or 16.
            weights: [K], of one code of each codebook.

        Returns:
            The scalar loss, and summed nll [K] without a graph.
        """
        due = masks.any(0)  # [B, T]
        h, tokens = x[due], targets.movedim(1, 0)[:, due]  # [N, C], [17, N]
        steps = range(len(masks))
        order = [self._weights_of_step[k] for k in steps]
        if self._multi_linear:
            y = project(h, list(self.inputs), steps=order)
        else:
            y = project(h[None], list(self.inputs)).expand(len(masks), -1, -1)
        y = y + torch.stack([self.embeddings[k](tokens[k]) for k in steps])  # [K, N, D]
        layer_order = order if self._per_step else None
        for index, layer in enumerate(self.layers):
            y = _call(layer, _again(self._checkpointing, index), y, layer_order)
        total, nlls = h.new_zeros((), dtype=torch.float32), []
        for k in steps:
            mask = masks[k][due]
            wanted = torch.where(mask, tokens[1 + k], 0)  # initial tokens are never said
            normed = self.norms[k](y[k])
            loss, nll = weighted_nll(normed, self.heads[k], wanted, mask * weights[k])
            total = total + loss
            nlls.append((nll * mask).sum())
        return total, torch.stack(nlls)


class DepthLayer(nn.Module):
    """One layer over K steps of N places: [K, N, D] -> [K, N, D]."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: torch.Tensor, order: list[int] | None) -> torch.Tensor:
        layer, attention = self.layer, self.layer.self_attn
        qkv = project(x, list(attention.in_projs), steps=order, pre="norm", norm=layer.norm1)
        y = step_attention(qkv, attention.num_heads)
        x = _residual(x, y, list(attention.out_projs), order, "none", layer.layer_scale_1)
        gatings = gates_of(layer)
        inner = [gating.linear_in for gating in gatings]
        h = project(x, inner, steps=order, pre="norm", norm=layer.norm2)
        outer = [gating.linear_out for gating in gatings]
        return _residual(x, h, outer, order, "gate", layer.layer_scale_2)
