"""Trains the pocket base: all weights of a small `LMModel`, on dialogues made on the fly.

What a step sees follows from (seed, step) alone, as do the rates; a killed run goes on from its
last checkpoint and ends with the same weights, to the bit on one kind of CPU. Dialogues are drawn
for `POOL_STEPS` steps at a time and sorted by length, so that little of a batch is padding.

Shapes: B clips, T frames. docs/training.md explains the loss; what a run measured stands in
BASE.md, which it writes beside its weights.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duplex.config_train import LossSection, TrainSection
from training.batches import Batch, Clip, make_batch
from training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from training.fast import FastForward
from training.loss import AUDIO, WORDS, StreamSums, coefficients, part_counts
from training.pocket.base_clips import (
    ClipMaker,
    DialogueClip,
    TrainingClip,
    masked_batch,
    thinned,
)
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_optimizer import Masters, mixed_forward
from training.pocket.base_reading import reading_clip
from training.pocket.base_units import UnitIndex
from training.pocket.roles import Grammar, Side

LOSS = LossSection(semantic_weight=10, acoustic_weight=1, text_padding_weight=0.3)
POOL_STEPS = 4
VALID_BATCH = 8
LOG_EVERY = 10
READING_ONE_TO = 8
READING_CLIPS = 2  # in the place of one dialogue, while there are no others


@dataclass(frozen=True)
class LoopSettings:
    """What decides a training, besides the bank, the tokenizer and the model's configuration.

    reading_steps: how many of the first updates are of reading clips alone (base_reading.py);
    later there is one to `READING_ONE_TO` dialogues. mixed: compute in bfloat16 over float32
    weights.
    """

    steps: int
    batch_size: int = 16
    learning_rate: float = 1.2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    longest_frames: int = 500
    reading_steps: int = 200
    seed: int = 0
    mixed: bool = True

    def section(self) -> TrainSection:
        """As the optimizer's and the rates' functions take it."""
        return TrainSection(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            loss=LOSS,
        )


class Source:
    """Dialogues as clips: the batch of each step, and the held-out ones."""

    def __init__(self, grammar: Grammar, maker: ClipMaker, settings: LoopSettings):
        self.grammar, self.maker, self.settings = grammar, maker, settings
        self.index = UnitIndex(maker.bank.units)
        self._pool: tuple[int, list[list[DialogueClip]]] = (-1, [])

    def clip(self, name: str, side: Side) -> DialogueClip:
        """The dialogue of a name: the same one for the same seed."""
        rng = random.Random(f"{self.settings.seed}/{side}/{name}")
        dialogue = draw_dialogue(self.grammar, self.index, rng, side)
        return cropped(self.maker.clip(dialogue, rng, name), self.settings.longest_frames)

    def batch(self, step: int) -> Batch:
        """The batch of update `step`, from 0."""
        if step < self.settings.reading_steps:
            count = READING_CLIPS * self.settings.batch_size
            return masked_batch([self.reading(f"{step}.{number}") for number in range(count)])
        group, place = divmod(step, POOL_STEPS)
        if self._pool[0] != group:
            self._pool = (group, self._draw_pool(group))
        noise = np.random.default_rng([self.settings.seed, step])
        clips = [thinned(one, noise) for one in self._pool[1][place]]
        for number in range(self.settings.batch_size // READING_ONE_TO):
            clips.append(self.reading(f"{step}.{number}"))
        return masked_batch(clips)

    def reading(self, name: str) -> TrainingClip:
        """A clip that teaches to read."""
        rng = random.Random(f"{self.settings.seed}/reading/{name}")
        return reading_clip(self.grammar, self.maker.tokenizer, self.maker.bank.tokens, rng, name)

    def _draw_pool(self, group: int) -> list[list[DialogueClip]]:
        size = self.settings.batch_size
        clips = [self.clip(f"{group}.{number}", "train") for number in range(POOL_STEPS * size)]
        clips.sort(key=lambda one: one.clip.num_frames)
        batches = [clips[start : start + size] for start in range(0, len(clips), size)]
        random.Random(f"{self.settings.seed}/order/{group}").shuffle(batches)
        return batches

    def held_out(self, count: int) -> list[DialogueClip]:
        return [self.clip(f"held-{number}", "held") for number in range(count)]


def cropped(one: DialogueClip, longest: int) -> DialogueClip:
    """The clip cut at its end, with the turns that are left."""
    clip = one.clip
    if clip.num_frames <= longest:
        return one
    spans = tuple((r, s, min(e, longest)) for r, s, e in clip.turns if s < longest)
    codes = clip.codes[:, :longest]
    short = Clip(clip.id, codes, clip.prompt_frames, clip.loss_from, spans)
    return DialogueClip(short, one.turns[: len(spans)])


@dataclass(frozen=True)
class Trained:
    """The last state of a training. log: a JSON object a line, as written to losses.jsonl."""

    log: list[str]
    seconds: float
    frames_per_second: float | None


def train(
    lm: Any,
    source: Source,
    settings: LoopSettings,
    folder: Path,
    identity: str,
    *,
    valid: Sequence[DialogueClip] = (),
    valid_every: int = 100,
    checkpoint_every: int = 100,
    until: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train `lm` in place to `settings.steps` updates, from the last checkpoint in `folder`.

    Args:
        identity: digest of all that decides the run; checkpoints of another are removed.
        until: stop there, as a kill would, after a checkpoint.
        report: told each line of the log.
    """
    dtype = torch.bfloat16 if settings.mixed else torch.float32
    lm.train().requires_grad_(True)
    masters = Masters(lm, settings.section())
    state = latest_checkpoint(folder, identity)
    first, log = 0, []
    if state is not None:
        first, log = state.step, list(state.log)
        masters.restore(state.tensors)
    masters.copy_to(lm)
    forward = mixed_forward(lm, dtype)
    seen, started_s = 0, time.monotonic()
    for step in range(first, settings.steps if until is None else min(until, settings.steps)):
        batch = source.batch(step)
        sums = _gradients(forward, batch, masters.section)
        noted = masters.update(lm, step)
        seen += batch.num_frames
        done = step + 1
        line: dict[str, Any] = {}
        if done % LOG_EVERY == 0 or done == settings.steps:
            line |= {"step": done, **noted, **means(sums, "train")}
        if valid and (done % valid_every == 0 or done == settings.steps):
            line |= {"step": done, **means(score(forward, valid), "held")}
        if line:
            log.append(json.dumps(line))
            rate = seen / (time.monotonic() - started_s)
            report(json.dumps({**line, "frames_per_s": round(rate)}))
        if done % checkpoint_every == 0 or done in (settings.steps, until):
            save_checkpoint(folder, TrainState(done, masters.tensors(), log), identity)
    lm.float().eval()
    masters.copy_to(lm)
    spent_s = time.monotonic() - started_s
    return Trained(log, spent_s, seen / spent_s if seen else None)


def _gradients(forward: FastForward, batch: Batch, section: TrainSection) -> StreamSums:
    """Leave the gradients of the batch's loss in the model; the sums."""
    weights = coefficients(part_counts(batch.codes, batch.loss_mask), section.loss)
    loss, sums = forward(batch.codes, batch.loss_mask, weights)
    loss.backward()
    return sums.detached()


def score(forward: Any, clips: Sequence[DialogueClip]) -> StreamSums:
    """Sums over held-out clips, every frame behind the prompt; no gradient."""
    total: StreamSums | None = None
    for start in range(0, len(clips), VALID_BATCH):
        batch = make_batch([one.clip for one in clips[start : start + VALID_BATCH]])
        with torch.no_grad():
            nothing = torch.zeros_like(part_counts(batch.codes, batch.loss_mask))
            _, sums = forward(batch.codes, batch.loss_mask, nothing)
        total = sums.detached() if total is None else total + sums.detached()
    assert total is not None, "score needs a clip"
    return total


def means(sums: StreamSums, prefix: str) -> dict[str, float]:
    """Nats per prediction of words, padding, semantic and acoustic codes."""
    parts = {
        "words": slice(WORDS, WORDS + 1),
        "padding": slice(WORDS + 1, AUDIO),
        "semantic": slice(AUDIO, AUDIO + 1),
        "acoustic": slice(AUDIO + 1, AUDIO + 8),
    }
    return {
        f"{prefix}_{name}": round(float(sums.nll[p].sum() / sums.count[p].sum().clamp(min=1)), 4)
        for name, p in parts.items()
    }
