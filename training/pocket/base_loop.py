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
from duplex.files import append_line, read_lines
from training.batches import Clip, make_batch
from training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from training.distributed import Ranks
from training.failures import require_finite
from training.fast import FastForward
from training.loss import AUDIO, WORDS, StreamSums, coefficients, part_counts
from training.pocket.base_clips import (
    ClipMaker,
    DialogueClip,
    Lesson,
    TrainingClip,
    lesson,
    silenced,
    thinned,
)
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_ear import SHARE, Ear
from training.pocket.base_hearing import Hearing
from training.pocket.base_optimizer import Masters, mixed_forward
from training.pocket.base_reading import reading_clip
from training.pocket.base_units import UnitIndex
from training.pocket.codec_labels import IGNORED
from training.pocket.roles import Grammar, Side

ALONE = Ranks(0, 1, torch.device("cpu"))
LOSS = LossSection(semantic_weight=10, acoustic_weight=1, text_padding_weight=0.3)
TIMING = "timing.jsonl"
POOL_STEPS = 4
VALID_BATCH = 8
LOG_EVERY = 10
READ_ONE_TO, HEARD_ONE_TO = 8, 4  # a reading, a hearing clip to so many dialogues
READING_CLIPS = 2  # in the place of one dialogue, while there are no others


@dataclass(frozen=True)
class LoopSettings:
    """What decides a training, besides the bank, the tokenizer and the model's configuration.

    reading_steps: how many of the first updates are of reading clips alone (base_reading.py).
    word_steps: how many follow on which the text row alone carries loss, of dialogues, as many
    hearing clips (base_hearing.py) and half as many reading ones. Later there are fewer
    (`READ_ONE_TO`, `HEARD_ONE_TO`). mixed: compute in bfloat16 over float32 weights.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    longest_frames: int = 500
    reading_steps: int = 100
    word_steps: int = 800
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
        assert maker.phones is not None, "lessons in hearing need labels"
        self.hearing = Hearing(maker.bank, maker.tokenizer, maker.phones)
        self._pool: tuple[int, list[list[DialogueClip]]] = (-1, [])

    def clip(self, name: str, side: Side) -> DialogueClip:
        """The dialogue of a name: the same one for the same seed."""
        rng = random.Random(f"{self.settings.seed}/{side}/{name}")
        dialogue = draw_dialogue(self.grammar, self.index, rng, side)
        return cropped(self.maker.clip(dialogue, rng, name), self.settings.longest_frames)

    def batches(self, step: int) -> list[Lesson]:
        """What update `step`, from 0, is made of: dialogues, and lessons, which are shorter."""
        settings = self.settings
        if step < settings.reading_steps:
            count = READING_CLIPS * settings.batch_size
            return [lesson([self.reading(f"{step}.{number}") for number in range(count)])]
        spoken = step >= settings.reading_steps + settings.word_steps
        size = settings.batch_size
        to_read, to_hear = (READ_ONE_TO, HEARD_ONE_TO) if spoken else (2, 1)
        lessons = [self.reading(f"{step}.{number}") for number in range(max(1, size // to_read))]
        lessons += [self.heard(f"{step}.{number}") for number in range(max(1, size // to_hear))]
        noise = np.random.default_rng([settings.seed, step])
        clips = [thinned(one, noise) for one in self._dialogues(step)]
        if not spoken:
            clips = [silenced(one) for one in clips]
        return [lesson(clips), lesson(lessons)]

    def _dialogues(self, step: int) -> list[DialogueClip]:
        group, place = divmod(step, POOL_STEPS)
        if self._pool[0] != group:
            self._pool = (group, self._draw_pool(group))
        return self._pool[1][place]

    def heard(self, name: str, side: Side = "train") -> TrainingClip:
        """A clip that teaches to hear."""
        return self.hearing.clip(
            random.Random(f"{self.settings.seed}/hearing/{side}/{name}"), name, side
        )

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

    def held_out_lessons(self, count: int) -> dict[str, list[TrainingClip]]:
        """Lessons by name: to hear what training holds and what other voices say, and to read."""
        return {
            "hearing, utterances of training": [self.heard(f"lesson-{n}") for n in range(count)],
            "hearing, unheard voices": [self.heard(f"lesson-{n}", "held") for n in range(count)],
            "reading": [self.reading(f"lesson-{n}") for n in range(count)],
        }

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
    phones = None if one.phones is None else one.phones[:longest]
    return DialogueClip(short, one.turns[: len(spans)], phones)


@dataclass(frozen=True)
class Trained:
    """The last state of a training. log: a JSON object a line, as written to losses.jsonl; seconds
    of all calls that led to it; frames_per_second of the last one, None if nothing was left."""

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
    valid_every: int = 200,
    checkpoint_every: int = 200,
    until: int | None = None,
    report: Callable[[str], None] = lambda line: None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Train `lm` in place to `settings.steps` updates, from the last checkpoint in `folder`.

    Args:
        identity: digest of all that decides the run; checkpoints of another are removed.
        until: stop there, as a kill would, after a checkpoint.
        report: told each line of the log.
        ranks: the processes that share each batch, and make the same update.
    """
    dtype = torch.bfloat16 if settings.mixed else torch.float32
    assert source.maker.phones is not None
    Ear.add(lm, len(source.maker.phones.names), settings.seed)
    lm.train().requires_grad_(True)
    masters = Masters(lm, settings.section())
    if ranks.first:
        latest_checkpoint(folder, identity)  # removes what others cannot use
    ranks.wait()
    state = latest_checkpoint(folder, identity)
    place = torch.tensor([0 if state is None else state.step])
    ranks.check_equal({identity: place}, "the checkpoint that a training goes on from")
    first, log = 0, []
    if state is not None:
        first, log = state.step, list(state.log)
        masters.restore(state.tensors)
    masters.copy_to(lm)
    forward = mixed_forward(lm, dtype)
    ear = Ear(lm, forward)
    seen, started_s, written_s = 0, time.monotonic(), time.monotonic()
    for step in range(first, settings.steps if until is None else min(until, settings.steps)):
        batches = source.batches(step)
        sums = accumulate_gradients(forward, batches, masters.section, ranks, ear)
        noted = masters.update(lm, step, ranks)
        require_finite("the gradient's norm", noted["norm"], step + 1, [], folder)
        seen += sum(one.batch.num_frames for one in batches)
        done = step + 1
        line: dict[str, Any] = {}
        if done % LOG_EVERY == 0 or done == settings.steps:
            line |= {"step": done, **noted, **means(sums, "train"), "phones": ear.share(ranks)}
        if valid and (done % valid_every == 0 or done == settings.steps):
            line |= {"step": done, **means(score(forward, valid, ranks), "held")}
        if line:
            log.append(json.dumps(line))
            rate = seen / (time.monotonic() - started_s)
            report(json.dumps({**line, "frames_per_s": round(rate)}))
        if done % checkpoint_every == 0 or done in (settings.steps, until):
            tensors = masters.tensors()
            ranks.check_equal(tensors, f"weights and moments after step {done}")
            if ranks.first:
                save_checkpoint(folder, TrainState(done, tensors, log), identity)
                now_s = time.monotonic()
                append_line(
                    folder / TIMING, json.dumps({"step": done, "seconds": now_s - written_s})
                )
                written_s = now_s
            ranks.wait()
    lm.float().eval()
    masters.copy_to(lm)
    ear.remove()
    rate = seen / (time.monotonic() - started_s) if seen else None
    # Of all calls that led here; of a step that was done twice the last time.
    by_step = {line["step"]: line["seconds"] for line in read_lines(folder / TIMING)}
    return Trained(log, sum(by_step.values()), rate)


def accumulate_gradients(
    forward: FastForward,
    lessons: Sequence[Lesson],
    section: TrainSection,
    ranks: Ranks,
    ear: Ear | None = None,
) -> StreamSums:
    """Leave the gradients of this rank's share of the lessons in the model; sums of the whole."""
    batches = [one.batch for one in lessons]
    counts = [part_counts(batch.codes, batch.loss_mask) for batch in batches]
    whole = sum(counts[1:], counts[0])
    weights = coefficients(whole, section.loss)
    labels = max(1, sum(int((one.phones != IGNORED).sum()) for one in lessons))
    total = StreamSums(torch.zeros_like(whole), torch.zeros_like(whole)).detached()
    for one in lessons:
        codes, mask, phones = (
            rows[ranks.rank :: ranks.count]
            for rows in (one.batch.codes, one.batch.loss_mask, one.phones)
        )
        if len(codes):  # a batch of few clips leaves nothing for the last ranks
            loss, sums = forward(codes, mask, weights)
            if ear is not None:
                loss = loss + SHARE / labels * ear.nll(phones)
            loss.backward()
            total = total + sums.detached()
    return _over_all(total, ranks)


def _over_all(sums: StreamSums, ranks: Ranks) -> StreamSums:
    return StreamSums(ranks.sum(sums.nll), ranks.sum(sums.count))


def score(
    forward: Any, clips: Sequence[DialogueClip] | Sequence[TrainingClip], ranks: Ranks = ALONE
) -> StreamSums:
    """Sums over held-out clips, every frame behind the prompt; no gradient.

    Each rank takes its share of the clips: there must be as many as ranks, at least.
    """
    clips = clips[ranks.rank :: ranks.count]
    total: StreamSums | None = None
    for start in range(0, len(clips), VALID_BATCH):
        batch = make_batch([one.clip for one in clips[start : start + VALID_BATCH]])
        with torch.no_grad():
            nothing = torch.zeros_like(part_counts(batch.codes, batch.loss_mask))
            _, sums = forward(batch.codes, batch.loss_mask, nothing)
        total = sums.detached() if total is None else total + sums.detached()
    assert total is not None, "score needs a clip of each rank"
    return _over_all(total, ranks)


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
