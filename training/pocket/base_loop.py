"""Trains the pocket base: all weights of a small `LMModel`, on dialogues made on the fly.

What a step sees follows from (seed, step) alone, as do the rates; a killed run goes on from its
last checkpoint and ends with the same weights, to the bit on one kind of CPU.

Shapes: B clips, T frames. docs/training.md explains the loss; what a run measured stands in
BASE.md, which it writes beside its weights.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duplex.config_train import TrainSection
from duplex.files import append_line, read_lines
from training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from training.distributed import Ranks
from training.failures import require_finite
from training.fast import FastForward
from training.loss import AUDIO, WORDS, StreamSums, coefficients, part_counts
from training.pocket.base_clips import DialogueClip, Lesson, TrainingClip, whole_lesson
from training.pocket.base_ear import SHARES, Ear, label_counts
from training.pocket.base_optimizer import Masters, mixed_forward
from training.pocket.base_source import LoopSettings, Source, drawn_ahead

ALONE = Ranks(0, 1, torch.device("cpu"))
TIMING = "timing.jsonl"
VALID_BATCH = 8
LOG_EVERY = 10


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
    makers: int = 0,
) -> Trained:
    """Train `lm` in place to `settings.steps` updates, from the last checkpoint in `folder`.

    It is moved to the ranks' device and stays there.

    Args:
        identity: digest of all that decides the run; checkpoints of another are removed.
        until: stop there, as a kill would, after a checkpoint.
        report: told each line of the log.
        ranks: the processes that share each batch, and make the same update.
        makers: processes that draw batches ahead.
    """
    lm.to(ranks.device)
    dtype = torch.bfloat16 if settings.mixed else torch.float32
    assert source.maker.phones is not None
    sounds = len(source.maker.phones.names)
    classes = {"phones": sounds, "spoken": sounds, "acts": len(source.maker.acts)}
    Ear.add(lm, classes, settings.seed)
    last = settings.steps if until is None else min(until, settings.steps)
    lm.train().requires_grad_(True)
    masters = Masters(lm, settings.section(), settings.muon_rate)
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
    on_gpu = ranks.device.type != "cpu"
    forward = mixed_forward(lm, dtype, wide=on_gpu)
    ear = Ear(lm, forward)
    drawn = drawn_ahead(source, first, last, makers, together=on_gpu)
    seen, started_s, written_s = 0, time.monotonic(), time.monotonic()
    for step, batches in enumerate(drawn, first):
        sums = accumulate_gradients(forward, batches, masters.section, ranks, ear)
        noted = masters.update(lm, step, ranks)
        require_finite("the gradient's norm", noted["norm"], step + 1, [], folder)
        seen += sum(one.batch.num_frames for one in batches)
        done = step + 1
        line: dict[str, Any] = {}
        if done % LOG_EVERY == 0 or done == settings.steps:
            line |= {"step": done, **noted, **means(sums, "train"), **ear.shares(ranks)}
        if valid and (done % valid_every == 0 or done == settings.steps):
            ear.restart()
            line |= {"step": done, **means(score(forward, valid, ranks, ear), "held")}
            line |= {f"held_{name}": share for name, share in ear.shares(ranks).items()}
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
    """Leave the gradients of this rank's share of the lessons in the model; sums of the whole,
    float64 on their device."""
    of_each = [label_counts(one.by_task) for one in lessons]
    labels = {name: sum(counts[name] for counts in of_each) for name in SHARES}
    lessons = [one.to(ranks.device) for one in lessons]
    counts = [part_counts(one.batch.codes, one.batch.loss_mask) for one in lessons]
    whole = sum(counts[1:], counts[0])
    weights = coefficients(whole, section.loss)
    zeros = torch.zeros_like(weights, dtype=torch.float64)
    total = StreamSums(zeros, zeros)
    if ear is not None:
        ear.restart()
    for one in lessons:
        codes, mask = (
            rows[ranks.rank :: ranks.count] for rows in (one.batch.codes, one.batch.loss_mask)
        )
        if len(codes):  # a batch of few clips leaves nothing for the last ranks
            loss, sums = forward(codes, mask, weights)
            if ear is not None:
                own = {name: rows[ranks.rank :: ranks.count] for name, rows in one.by_task.items()}
                for name, nats in ear.nll(own).items():
                    loss = loss + SHARES[name] / max(1, labels[name]) * nats
            loss.backward()
            total = total + sums  # of what carries no graph
    return _over_all(total, ranks)


def _over_all(sums: StreamSums, ranks: Ranks) -> StreamSums:
    return StreamSums(ranks.sum(sums.nll), ranks.sum(sums.count))


def score(
    forward: Any,
    clips: Sequence[DialogueClip] | Sequence[TrainingClip],
    ranks: Ranks = ALONE,
    ear: Ear | None = None,
) -> StreamSums:
    """Sums over held-out clips, every frame behind the prompt; no gradient.

    Each rank takes its share of the clips: there must be as many as ranks, at least. `ear` names
    what is heard in them, and counts.
    """
    clips = clips[ranks.rank :: ranks.count]
    device = forward.lm.text_emb.weight.device
    total: StreamSums | None = None
    for start in range(0, len(clips), VALID_BATCH):
        given = whole_lesson(clips[start : start + VALID_BATCH]).to(device)
        batch = given.batch
        with torch.no_grad():
            nothing = torch.zeros_like(part_counts(batch.codes, batch.loss_mask))
            _, sums = forward(batch.codes, batch.loss_mask, nothing)
            if ear is not None:
                ear.nll(given.by_task)
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
