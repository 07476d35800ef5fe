"""How large a model and its training are, from the numbers of its config alone. Pure, no torch.

**Counts** follow the construction of moshi's `LMModel` (0.2.13): `tests/unit/test_estimate.py`
holds them against the meta device, for 7B at dep_q 8 and 16, for pocket, and for variants.

    attention   L · ((d + 2d/v)·d + d·d)                     v: queries that share a key
    mlp         L · (d·2h + h·d)                             h = 2f/3, or 21d/8 where f = 4d
    depth       S · (M · (the two above at e, g) + d·e)      S weights, one a depth step
    heads       Q · e·C          text   d·V
    adapters    rank · (in + out) for each layer that has one

L, d, f: layers, dim, feed-forward of the temporal transformer; M, e, g: of the depth transformer;
Q: dep_q; C: card; V: text vocabulary.

**Memory of one process** of P, in bytes, with a = 4 (float32) or 2 (bfloat16) a value:

    weights      a · parameters / P; with nf4 a Linear weight takes 0.5 + 1/64 + 4/(64·256)
    adapters     16 · adapter parameters: value, gradient, two AdamW moments, in float32
    gathered     a · (2 · largest layer + embeddings and heads), where P > 1: FSDP2 has one layer
                 in use and one under way, and keeps the root's own weights
    free run     a · parameters · (1 - 1 / P), where P > 1 and the guards let the model speak: the
                 base is whole then; it does not train meanwhile
    activations  N frames at once = batch_size / (accumulate · P) clips of crop_frames = T
                 temporal  N · Σ layers (54d + 16h + 4T + 16r)       bfloat16: 42d + 10h + 2T + 16r
                 depth     N · Q · Σ layers (41e + 16g' + 16r)       bfloat16: 37e + 10g' + 16r
                 (g': the depth transformer's h; dropout adds 4 bytes a value that an adapter reads)
                 A layer that is checkpointed keeps a·d instead; one layer is at work besides.
    logits       frames · (V + Q·C) · (8 + 2a), for the frames whose logits stand at once

and with our own forward (`train.forward: fast`, no dropout, no nf4):

    activations  temporal  N · Σ layers a·(6d + 2h + 4r)
                 depth     N · Q · Σ layers a·(7e + 2g' + 4r)
    logits       one chunk of at most 2^26 values, a value (8 + 2a)

The factors of the activations are what autograd keeps, counted by hooks on a CPU and held to by
the same test: moshi's own forward with PEFT adapters within 3.5 %, ours within 5 % (all frames
count as if they carried loss; on a CPU the depth transformer keeps one e less).
Dropout and nf4 go through PEFT's modules in ours as well: the library's figures stand for both.
Not in it: CUDA's context, what a kernel needs while it runs, fragmentation. No figure was compared
with a GPU's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duplex.config_train import LoraSection, TrainSection
from duplex.streams import CODEBOOKS

# `moshi.models.loaders._lm_kwargs`, as far as sizes need it.
MOSHI_7B: dict[str, Any] = {
    "dim": 4096, "text_card": 32000, "n_q": 16, "dep_q": 8, "card": 2048, "num_heads": 32,
    "num_layers": 32, "hidden_scale": 4.125, "gating": "silu", "norm": "rms_norm_f32",
    "depformer_dim": 1024, "depformer_dim_feedforward": 4224, "depformer_num_heads": 16,
    "depformer_num_layers": 6, "depformer_gating": "silu", "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
}  # fmt: skip
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its share of the scales at both levels
CHUNK_VALUES = 1 << 26  # `training.fused_loss.CHUNK_CUDA`, written out: planning imports no torch
ADAM_BYTES = 16  # an adapter parameter: value, gradient, two moments


@dataclass(frozen=True)
class LayerKind:
    """`count` layers [rows, columns] of a group, `adapted` of which carry loss and may have an
    adapter. Group `embeddings`: rows are ids."""

    group: str
    count: int
    adapted: int
    rows: int
    columns: int

    @property
    def parameters(self) -> int:
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process while it trains; formulas in the module's docstring."""

    weights: float
    adapters: float
    gathered: float
    activations: float
    logits: float
    free_run: float = 0.0

    @property
    def fixed(self) -> float:
        """What no smaller batch makes less."""
        return self.weights + self.adapters + max(self.gathered, self.free_run)

    @property
    def total(self) -> float:
        training = self.gathered + self.activations + self.logits
        return self.weights + self.adapters + max(training, self.free_run)


def layer_kinds(lm: Mapping[str, Any], codebooks: int = CODEBOOKS) -> list[LayerKind]:
    """All Linear layers and embeddings of an `LMModel`.

    Args:
        lm: its config, with the keys of `MOSHI_7B`; no conditioners, no cross-attention.
        codebooks: how many depth steps carry loss: 8, or 16 with the user's.
    """
    d, e, q = lm["dim"], lm["depformer_dim"], lm["dep_q"]
    schedule = lm.get("depformer_weights_per_step_schedule")
    used = min(q, codebooks)
    steps = max(schedule) + 1 if schedule else q
    steps_used = len(set(schedule[:codebooks])) if schedule else used
    per_step = (steps, steps_used) if lm.get("depformer_weights_per_step") else (1, 1)
    inputs = (steps, steps_used) if lm.get("depformer_multi_linear") else (1, 1)
    layers, depth_layers = lm["num_layers"], lm["depformer_num_layers"]
    gating, shared = lm.get("gating", "none"), lm.get("kv_repeat", 1)
    kinds = [LayerKind("attention", layers, layers, *shape) for shape in _attention(d, shared)]
    feed_forward = int(lm["hidden_scale"] * d)
    kinds += [LayerKind("mlp", layers, layers, *s) for s in _mlp(d, feed_forward, gating)]
    for shape in _attention(e, shared):
        count, adapted = (depth_layers * number for number in per_step)
        kinds.append(LayerKind("depth", count, adapted, *shape))
    depth_gating = lm.get("depformer_gating", gating)
    for index, width in enumerate(_depth_feed_forward(lm, per_step[0])):
        adapted = depth_layers if index in _steps_with_loss(schedule, used, per_step[0]) else 0
        for shape in _mlp(e, width, depth_gating):
            kinds.append(LayerKind("depth", depth_layers, adapted, *shape))
    kinds.append(LayerKind("depth", *inputs, e, d))
    kinds.append(LayerKind("heads", q, used, lm["card"], e))
    kinds.append(LayerKind("text", 1, 1, lm.get("text_card_out") or lm["text_card"], d))
    return kinds + _embeddings(lm, used)


def _attention(dim: int, shared: int) -> list[tuple[int, int]]:
    return [(dim + 2 * dim // shared, dim), (dim, dim)]


def _mlp(dim: int, feed_forward: int, gating: str) -> list[tuple[int, int]]:
    if gating == "none":
        return [(feed_forward, dim), (dim, feed_forward)]
    hidden = hidden_size(dim, feed_forward)
    return [(2 * hidden, dim), (dim, hidden)]


def hidden_size(dim: int, feed_forward: int) -> int:
    """Width of a gated layer: moshi's `ActivationGating`."""
    return 21 * dim // 8 if feed_forward == 4 * dim else 2 * feed_forward // 3


def _depth_feed_forward(lm: Mapping[str, Any], weights: int) -> list[int]:
    """Feed-forward size of each of the depth transformer's weights of a layer."""
    width = lm.get("depformer_dim_feedforward")
    if width is None:
        width = int(lm["hidden_scale"] * lm["depformer_dim"])
    return list(width) if isinstance(width, list | tuple) else [width] * weights


def _steps_with_loss(schedule: list[int] | None, used: int, weights: int) -> set[int]:
    if weights == 1:
        return {0}
    return set(schedule[:used]) if schedule else set(range(used))


def _embeddings(lm: Mapping[str, Any], used: int) -> list[LayerKind]:
    d, e = lm["dim"], lm.get("depformer_low_rank_embeddings") or lm["depformer_dim"]
    audio, text = lm["card"] + 1, lm["text_card"] + 1
    return [
        LayerKind("embeddings", lm["n_q"], lm["n_q"], audio, d),
        LayerKind("embeddings", 1, 1, text, d),
        LayerKind("embeddings", lm["dep_q"] - 1, used - 1, audio, e),
        LayerKind("embeddings", 1, 1, text, e),
    ]


def parameter_count(lm: Mapping[str, Any]) -> int:
    """All parameters of the model, norms included."""
    d, e, q = lm["dim"], lm["depformer_dim"], lm["dep_q"]
    total = sum(kind.parameters for kind in layer_kinds(lm))
    norm = 2 if lm.get("norm", "layer_norm").startswith("layer_norm") else 1  # weight and bias
    total += norm * ((2 * lm["num_layers"] + 1) * d + 2 * lm["depformer_num_layers"] * e)
    if depth_norm := lm.get("depformer_norm"):
        total += (2 if depth_norm.startswith("layer_norm") else 1) * q * e
    if lm.get("bias_proj"):
        total += (lm.get("text_card_out") or lm["text_card"]) + q * lm["card"]
    if low_rank := lm.get("depformer_low_rank_embeddings"):
        total += q * low_rank * e  # a projection behind each of the depth's embeddings
    return total + lm.get("extra_heads_num_heads", 0) * d * lm.get("extra_heads_dim", 6)


def trainable_counts(
    lm: Mapping[str, Any], lora: LoraSection, codebooks: int = CODEBOOKS
) -> dict[str, tuple[int, int]]:
    """Group -> (adapted modules, adapter parameters), as `training.lora.count_trainable`."""
    wanted = (*lora.targets, *(("embeddings",) if lora.embeddings else ()))
    counts: dict[str, tuple[int, int]] = {}
    for kind in layer_kinds(lm, codebooks):
        if kind.group in wanted:
            modules, parameters = counts.get(kind.group, (0, 0))
            size = lora.rank * (kind.rows + kind.columns)
            counts[kind.group] = (modules + kind.adapted, parameters + kind.adapted * size)
    return counts


def estimate_memory(lm: Mapping[str, Any], section: TrainSection) -> MemoryEstimate:
    """Bytes of one process while it trains as `section` says."""
    a = 4 if section.dtype == "float32" else 2
    codebooks = CODEBOOKS * (2 if section.loss.user_streams else 1)
    parameters = parameter_count(lm)
    linear = sum(k.parameters for k in layer_kinds(lm) if k.group != "embeddings")
    per_weight = NF4_BYTES if section.quantize == "nf4" else a
    weights = (parameters - linear) * a + linear * per_weight
    adapters = sum(n for _, n in trainable_counts(lm, section.lora, codebooks).values())
    in_layers = ("attention", "mlp", "depth")
    root = sum(k.parameters for k in layer_kinds(lm) if k.group not in in_layers)
    layer = sum(k.rows * k.columns for k in layer_kinds(lm) if k.group in ("attention", "mlp"))
    clips = section.batch_size // (section.accumulate * section.processes)
    frames = clips * section.crop_frames
    return MemoryEstimate(
        weights=weights / section.processes,
        adapters=ADAM_BYTES * adapters,
        gathered=a * (2 * layer + root) if section.processes > 1 else 0,
        activations=frames * activation_bytes(lm, section),
        logits=_logit_bytes(lm, section, frames),
        free_run=weights * (1 - 1 / section.processes) if _speaks_freely(section) else 0,
    )


def _speaks_freely(section: TrainSection) -> bool:
    return bool(section.guards.clips and section.guards.free_seconds)


def _logit_bytes(lm: Mapping[str, Any], section: TrainSection, frames: int) -> float:
    a = 4 if section.dtype == "float32" else 2
    values = frames * (lm["text_card"] + lm["dep_q"] * lm["card"])
    if section.forward == "fast":
        values = min(frames * lm["text_card"], CHUNK_VALUES)
    return values * (8 + 2 * a)


def activation_bytes(lm: Mapping[str, Any], section: TrainSection) -> float:
    """Bytes a frame that autograd keeps for the backward pass, logits apart."""
    d, e, q = lm["dim"], lm["depformer_dim"], lm["dep_q"]
    half = section.dtype == "bfloat16"
    a, rank, length = (2 if half else 4), section.lora.rank, section.crop_frames
    drop = 4 if section.lora.dropout else 0
    h = hidden_size(d, int(lm["hidden_scale"] * d))
    widths = _depth_feed_forward(lm, 1)
    g = hidden_size(e, sum(widths) // len(widths))
    plain = not section.lora.dropout and section.quantize == "none"
    if section.forward == "fast" and plain:
        steps = min(q, CODEBOOKS * (2 if section.loss.user_streams else 1))
        temporal, depth = a * (6 * d + 2 * h + 4 * rank), a * (7 * e + 2 * g + 4 * rank)
        # The last norm's input, heads' inputs or gradients, and the depth transformer's input.
        return _kept(lm, section, temporal, depth, steps) + a * (3 * d + 2 * steps * e)
    temporal = (42 if half else 54) * d + (10 if half else 16) * h + a * length + 16 * rank
    temporal += drop * (3 * d + h)
    depth = (37 if half else 41) * e + (10 if half else 16) * g + 16 * rank + drop * (3 * e + g)
    # The last norm, the projections into the depth transformer, the inputs of the heads. The
    # projections share one input, unless each makes a float32 copy of it or drops some.
    inputs = 8 if drop else 4 if half else 0
    total = _kept(lm, section, temporal, depth, q)
    return total + (12 + drop + inputs * q) * d + (8 + drop) * q * e


def _kept(
    lm: Mapping[str, Any], section: TrainSection, temporal: float, depth: float, steps: int
) -> float:
    """Of all layers, from what one keeps a frame, and a frame and step of the depth transformer."""
    a = 4 if section.dtype == "float32" else 2
    d, e = lm["dim"], lm["depformer_dim"]
    layers, depth_layers = lm["num_layers"], lm["depformer_num_layers"]
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[section.runtime.checkpointing]
    total = layers * ((1 - again) * temporal + again * a * d)
    total += steps * depth_layers * ((1 - again) * depth + again * a * e)
    return total + max(temporal, steps * depth) if again else total
