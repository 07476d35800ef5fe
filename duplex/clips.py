"""A spoken conversation on the frame grid: its text turns, where it may be cut, its tensor. Pure.

Frames are counted from the first frame of the dialogue, which follows the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from duplex.alignment import TextTurn, written_words
from duplex.base import canonical_json
from duplex.frames import frame_at, frames_covering_seconds
from duplex.records import FrameSpan, SpokenTurn, Turn
from duplex.streams import AGENT_ROWS, NUM_ROWS, TEXT_ROW, USER_ROWS

LEAD_FRAMES = 4  # silence kept before the first turn of a cut-out window, at most
TOLERANCE_S = 1e-5  # times are rounded to microseconds, edges are not


def text_turns(
    turns: Sequence[SpokenTurn],
    num_frames: int,
    tokens_of: Callable[[str], Sequence[int]],
    *,
    by_word: bool = False,
) -> list[TextTurn]:
    """The agent's turns, tokenized; with their words' frames when `by_word`.

    Raises:
        ValueError: `by_word`, and a turn whose timed words do not spell its text.
    """
    placed = []
    for turn in turns:
        if turn.role != "agent":
            continue
        start = min(max(frame_at(turn.start_s), 0), num_frames - 1)
        end = min(max(frames_covering_seconds(turn.end_s), start + 1), num_frames)
        if not by_word:
            placed.append(TextTurn(start, end, tuple(tokens_of(turn.text))))
            continue
        tokens: list[int] = []
        words = []
        timed = [(word.text, word.start_s, word.end_s) for word in turn.words]
        for word, start_s, _ in written_words(turn.text, timed):
            words.append((len(tokens), min(max(frame_at(start_s), start), num_frames - 1)))
            tokens += tokens_of(word)
        placed.append(TextTurn(start, end, tuple(tokens), tuple(words)))
    return sorted(placed, key=lambda turn: turn.start)


def shift_turns(
    turns: Sequence[SpokenTurn], start_s: float, end_s: float
) -> tuple[SpokenTurn, ...]:
    """The turns that start in [start_s, end_s), with times counted from `start_s`."""
    return tuple(
        turn.model_copy(
            update={
                "start_s": max(turn.start_s - start_s, 0.0),
                "end_s": turn.end_s - start_s,
                "words": tuple(
                    word.model_copy(
                        update={
                            "start_s": max(word.start_s - start_s, 0.0),
                            "end_s": max(word.end_s - start_s, 0.0),
                        }
                    )
                    for word in turn.words
                ),
            }
        )
        for turn in turns
        if start_s - TOLERANCE_S <= turn.start_s < end_s - TOLERANCE_S
    )


def turn_frames(turn: SpokenTurn) -> tuple[int, int]:
    """Frames [start, end) that a turn touches."""
    return frame_at(turn.start_s), frames_covering_seconds(turn.end_s)


def turn_spans(turns: Sequence[SpokenTurn], offset: int, num_frames: int) -> tuple[FrameSpan, ...]:
    """Where each turn stands in a tensor of `num_frames` whose prompt has `offset` frames."""
    return tuple(
        FrameSpan(
            label=turn.role,
            start=min(offset + start, num_frames),
            end=min(offset + end, num_frames),
        )
        for turn in turns
        for start, end in [turn_frames(turn)]
    )


def cut_windows(
    turns: Sequence[SpokenTurn], num_frames: int, budget: int
) -> list[tuple[int, int]] | None:
    """Frames [start, end) of the clips that a long conversation becomes, `budget` at most each.

    Cut only where nobody speaks. As many turns as fit go into a clip; a clip starts up to
    `LEAD_FRAMES` before its first turn. None where a stretch of speech without a pause is
    longer than the budget.
    """
    if num_frames <= budget:
        return [(0, num_frames)]
    stretches: list[list[int]] = []  # of unbroken speech, overlaps joined
    for turn in sorted(turns, key=lambda turn: turn.start_s):
        start, end = turn_frames(turn)
        if stretches and start <= stretches[-1][1]:
            stretches[-1][1] = max(stretches[-1][1], end)
        else:
            stretches.append([start, end])
    windows: list[list[int]] = []
    previous_end = 0
    for start, end in stretches:
        first = max(previous_end, start - LEAD_FRAMES)
        if windows and end - windows[-1][0] <= budget:
            windows[-1][1] = end
        elif end - first <= budget:
            windows.append([first, end])
        else:
            return None
        previous_end = end
    # What follows the last word belongs to the clip before it, as far as there is room.
    following = [start for start, _ in windows[1:]] + [num_frames]
    return [
        (start, min(limit, start + budget))
        for (start, _), limit in zip(windows, following, strict=True)
    ]


def assemble(prompt: np.ndarray | None, text_row: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """int64 [17, P + T]: the prompt's frames, then text row and audio codes.

    Args:
        prompt: int64 [17, P] as the tensor holds it, or None.
        text_row: int64 [T].
        audio: int64 [2, 8, T], agent first.
    """
    dialogue = np.empty((NUM_ROWS, audio.shape[2]), dtype=np.int64)
    dialogue[TEXT_ROW] = text_row
    dialogue[AGENT_ROWS], dialogue[USER_ROWS] = audio
    return dialogue if prompt is None else np.concatenate([prompt, dialogue], axis=1)


def text_digest(turns: Sequence[SpokenTurn | Turn]) -> str:
    """sha256 of who says what, whatever the case, spacing and voices."""
    said = [[turn.role, " ".join(turn.text.casefold().split())] for turn in turns]
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()
