"""Does the model read its prompt? A dialogue scored under its own prompt and under others'.

The prompt frames of a held-out clip are replaced by those of another persona's clip, all 17
rows (system text, voice sample and greeting where there are any), and the dialogue behind them
is kept. Teacher-forced, in nats per prediction, over the dialogue's frames alone:

    margin = mean over other prompts of NLL(dialogue | other) - NLL(dialogue | own)

Above 0: the own prompt makes the dialogue likelier. About 0: the prompt is not read, however
low the loss. Prompts differ in length, so a dialogue also moves along the positions; a prompt
of equal content would show what that costs, and no margin should be read without its interval:
Student's, over clips, each one value (the swaps of one clip are not independent).

A persona's clips are never swapped with each other: its wordings tell the same facts, and with
one persona held out the margin would be one of paraphrases. Nor are two clips with the same system
text, whoever's they are: nothing would differ that the dialogue should depend on. Cost: 1 + swaps
forward passes of each clip, no gradient.
Legend: B clips, K = 17 rows, T frames, P parts (`training/loss.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from duplex.metrics import mean_interval
from duplex.streams import TEXT_EPAD, TEXT_PAD, TEXT_ROW
from training.batches import Clip, make_batch
from training.loss import AUDIO, WORDS, StreamSums, part_counts

Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, StreamSums]
]  # of `training/forward.py`


@dataclass(frozen=True)
class Margin:
    """Mean over `num_clips` clips, in nats per prediction, and its 95 % interval (None: one
    clip)."""

    mean: float
    interval: tuple[float, float] | None
    num_clips: int

    def as_dict(self) -> dict[str, Any]:
        low, high = self.interval or (None, None)
        return {"mean": self.mean, "low": low, "high": high, "clips": self.num_clips}

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.3f} nats (one clip, no interval)"
        low, high = self.interval
        return f"{self.mean:+.3f} nats [{low:+.3f}, {high:+.3f}]"


@dataclass(frozen=True)
class SwapTask:
    """A held-out clip, cut so that the dialogue alone is scored, and the clips whose prompts
    it is scored under."""

    own: Clip
    others: tuple[Clip, ...]


@dataclass(frozen=True)
class TaskScore:
    """own: sums under the own prompt, float64 [P]; margins: by part, `WORDS` and `AUDIO` (the
    semantic code), None without such predictions or without another prompt."""

    own: StreamSums
    margins: dict[int, float | None]


@dataclass(frozen=True)
class SwapResult:
    """words, semantic: margins per text token that is no padding, and per semantic code; None
    where no clip has both such predictions and another prompt.
    own: sums under the own prompts of all clips, with or without other prompts; float64 [P]."""

    words: Margin | None
    semantic: Margin | None
    own: StreamSums
    num_swaps: int


def prompt_tokens(clip: Clip) -> tuple[int, ...]:
    """Text of a clip's prompt: its tokens without padding. Empty: it has none."""
    row = clip.codes[TEXT_ROW, : clip.prompt_frames]
    return tuple(int(token) for token in row if token >= 0 and token not in (TEXT_PAD, TEXT_EPAD))


def held_out_clips(clips: Sequence[Clip], count: int, seed: int) -> list[Clip]:
    """`count` of the clips, as many different prompts among them as there are; always the same
    ones for a seed, in any order of `clips`."""
    ranked = sorted(clips, key=lambda clip: _rank(seed, clip.id))
    seen: dict[tuple[int, ...], int] = {}
    rounds = []
    for clip in ranked:  # the first of each prompt, then the second of each …
        key = prompt_tokens(clip)
        seen[key] = seen.get(key, -1) + 1
        rounds.append(seen[key])
    order = sorted(range(len(ranked)), key=lambda place: (rounds[place], place))
    return [ranked[place] for place in order[:count]]


def plan_swaps(
    clips: Sequence[Clip], pools: Sequence[Sequence[Clip]], swaps: int, seed: int
) -> list[SwapTask]:
    """For each clip, up to `swaps` clips of other personas, with prompts that differ from its own
    and from each other.

    Args:
        pools: where prompts are taken from, in order of preference: the held-out clips, then
            the training clips. A clip without a prompt text gets none.
    """
    tasks = []
    for clip in clips:
        taken = {prompt_tokens(clip), ()}
        others: list[Clip] = []
        for pool in pools if prompt_tokens(clip) else ():
            for other in sorted(pool, key=lambda other: _rank(seed, f"{clip.id}\0{other.id}")):
                if len(others) == swaps:
                    break
                if not _same_persona(clip, other) and prompt_tokens(other) not in taken:
                    taken.add(prompt_tokens(other))
                    others.append(other)
        tasks.append(SwapTask(_dialogue_alone(clip), tuple(others)))
    return tasks


def _same_persona(clip: Clip, other: Clip) -> bool:
    return clip.persona_id is not None and clip.persona_id == other.persona_id


def swapped(clip: Clip, other: Clip) -> Clip:
    """The dialogue of `clip` behind the prompt of `other`; the dialogue alone is scored."""
    prompt = other.codes[:, : other.prompt_frames]
    codes = np.concatenate([prompt, clip.codes[:, clip.prompt_frames :]], axis=1)
    frames = other.prompt_frames
    return Clip(f"{clip.id} under {other.id}", codes, frames, frames)


def score_task(forward: Forward, task: SwapTask, device: torch.device) -> TaskScore:
    """Score one dialogue under its prompt and under the others'; as `score_swaps`."""
    own = _sums(forward, [task.own], device)
    # One clip at a time: a batch of all swaps would be several steps' worth of memory.
    foreign = [_sums(forward, [swapped(task.own, other)], device) for other in task.others]
    margins: dict[int, float | None] = {WORDS: None, AUDIO: None}
    for part in margins:
        if foreign and own.count[part] > 0:
            mean = sum(_mean(sums, part) for sums in foreign) / len(foreign)
            margins[part] = mean - _mean(own, part)
    return TaskScore(own, margins)


def score_swaps(forward: Forward, tasks: Sequence[SwapTask], device: torch.device) -> SwapResult:
    """Score each dialogue under its prompt and under the others'. No gradient; the model's mode
    is the caller's, and should be evaluation.

    Args:
        forward: contract of `training/forward.py`.
        tasks: at least one.
    """
    own_sums: StreamSums | None = None
    values: dict[int, list[float]] = {WORDS: [], AUDIO: []}
    for task in tasks:
        scored = score_task(forward, task, device)
        own_sums = scored.own if own_sums is None else own_sums + scored.own
        for part, margins in values.items():
            if (margin := scored.margins[part]) is not None:
                margins.append(margin)
    assert own_sums is not None, "score_swaps needs a task"
    return SwapResult(
        _margin(values[WORDS]),
        _margin(values[AUDIO]),
        own_sums,
        sum(len(task.others) for task in tasks),
    )


def _sums(forward: Forward, clips: list[Clip], device: torch.device) -> StreamSums:
    batch = make_batch(clips)
    codes, loss_mask = batch.codes.to(device), batch.loss_mask.to(device)
    with torch.no_grad():
        # Coefficients weigh the loss, which is not read here; the sums don't depend on them.
        _, sums = forward(codes, loss_mask, torch.zeros_like(part_counts(codes, loss_mask)))
    return sums.detached()


def _dialogue_alone(clip: Clip) -> Clip:
    """The clip with its prompt out of the loss, whatever `train.loss.prompt` says."""
    return Clip(clip.id, clip.codes, clip.prompt_frames, clip.prompt_frames)


def _mean(sums: StreamSums, part: int) -> float:
    return float(sums.nll[part] / sums.count[part])


def _margin(values: list[float]) -> Margin | None:
    if not values:
        return None
    return Margin(sum(values) / len(values), mean_interval(values), len(values))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0guards\0{name}".encode()).digest()
