"""Words of a turn -> the text row. Pure; one place for training data and for checks.

`onset`: a turn's tokens stand one a frame from the turn's first frame on, so that the text
leads the speech as in Moshi's inner monologue. They fill the first `onset_fraction` of the
turn; what does not fit goes on after that window, one a frame, after the turn if it must.
A turn that begins while its predecessor still has tokens starts its own right after them.
No token is lost unless the frames run out: those are counted, and it is the last ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duplex.streams import TEXT_PAD


@dataclass(frozen=True)
class TextTurn:
    """An agent turn on the frame grid: frames [start, end), and its token ids in order."""

    start: int
    end: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class TextRow:
    """row: int64 [T]. `late` counts tokens placed after their turn's window, `dropped` those
    for which no frame was left."""

    row: np.ndarray
    late: int
    dropped: int


def align_onset(turns: Sequence[TextTurn], num_frames: int, onset_fraction: float = 0.3) -> TextRow:
    """Text row of `num_frames` frames, PAD where nothing is said.

    Raises:
        ValueError: turns out of order, or outside [0, num_frames).
    """
    row = np.full(num_frames, TEXT_PAD, dtype=np.int64)
    late = dropped = cursor = 0
    previous_start = 0
    for turn in turns:
        if not 0 <= turn.start < turn.end <= num_frames:
            raise ValueError(
                f"a turn must lie in [0, {num_frames}), found [{turn.start}, {turn.end})"
            )
        if turn.start < previous_start:
            raise ValueError(
                f"turns must be sorted by start, found {turn.start} after {previous_start}"
            )
        previous_start = turn.start
        window_end = turn.start + max(1, int((turn.end - turn.start) * onset_fraction))
        cursor = max(cursor, turn.start)
        placed = min(len(turn.tokens), num_frames - cursor)
        row[cursor : cursor + placed] = turn.tokens[:placed]
        cursor += placed
        late += max(0, min(placed, cursor - window_end))
        dropped += len(turn.tokens) - placed
    return TextRow(row, late, dropped)
