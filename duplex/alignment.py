"""Words of a turn -> the text row. Pure; one place for training data and for checks.

Three modes, each one token a frame, in order, nothing lost while there are frames:

`onset`    a turn's tokens stand one a frame from the turn's first frame on, so that the text
           leads the speech as in Moshi's inner monologue. They fill the first `onset_fraction`
           of the turn; what does not fit goes on after that window, after the turn if it must.
           `drop=True` cuts there instead, as the predecessor did, and counts what it cut.
`word`     a word's tokens start in the frame in which the word starts; EPAD stands in the
           frame before a word where that frame is padding. Moshi's native form: equal to
           moshi-finetune's interleaver with `keep_and_shift`.
`uniform`  token j of n stands at `start + j * frames // n`: spread over the whole turn.

A token whose frame is taken goes to the next free one, and all after it likewise. Tokens are
dropped when the frames run out: those are counted, and it is the last ones.

Padding is PAD, which is what the model feeds itself in silence, or -1 (`ZERO_TOKEN`): no
input and no loss, which inference never sees. -1 exists to reproduce the predecessor's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from duplex.streams import TEXT_EPAD, TEXT_PAD

Mode = Literal["onset", "word", "uniform"]


@dataclass(frozen=True)
class TextTurn:
    """An agent turn on the frame grid: frames [start, end), and its token ids in order.

    words: for `word`, (index of the word's first token, frame in which the word starts),
        both never falling, the first index 0.
    """

    start: int
    end: int
    tokens: tuple[int, ...]
    words: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TextRow:
    """row: int64 [T]. `late` counts tokens that stand later than their mode wants them,
    `dropped` those that stand nowhere."""

    row: np.ndarray
    late: int
    dropped: int


# A token with the first frame that it may have, and the last that is in time.
Placement = tuple[int, int, int]


def align(
    turns: Sequence[TextTurn],
    num_frames: int,
    mode: Mode = "onset",
    *,
    onset_fraction: float = 0.3,
    drop: bool = False,
    padding: int = TEXT_PAD,
) -> TextRow:
    """Text row of `num_frames` frames, `padding` where nothing is said.

    Raises:
        ValueError: turns out of order or outside [0, num_frames); for `word`, a turn whose
            words do not cover its tokens; `drop` with a mode other than `onset`.
    """
    if drop and mode != "onset":
        raise ValueError(f"drop must go with onset alignment, found {mode}")
    _check_turns(turns, num_frames)
    row = np.full(num_frames, padding, dtype=np.int64)
    late = dropped = cursor = 0
    place: Callable[[TextTurn], Iterator[Placement]] = {
        "onset": lambda turn: _place_onset(turn, onset_fraction),
        "word": _place_word,
        "uniform": _place_uniform,
    }[mode]
    for turn in turns:
        word_starts = {index for index, _ in turn.words} if mode == "word" else set()
        for index, (token, frame, deadline) in enumerate(place(turn)):
            frame = max(cursor, frame)
            if frame >= num_frames:
                dropped += 1
                cursor = num_frames  # what follows must not come before it
                continue
            if drop and frame > deadline:
                dropped += 1
                continue
            if index in word_starts and frame > 0 and row[frame - 1] == padding:
                row[frame - 1] = TEXT_EPAD
            row[frame] = token
            late += frame > deadline
            cursor = frame + 1
    return TextRow(row, late, dropped)


def _place_onset(turn: TextTurn, onset_fraction: float) -> Iterator[Placement]:
    window_end = turn.start + max(1, int((turn.end - turn.start) * onset_fraction))
    return ((token, turn.start, window_end - 1) for token in turn.tokens)


def _place_word(turn: TextTurn) -> Iterator[Placement]:
    indices = [index for index, _ in turn.words]
    frames = [frame for _, frame in turn.words]
    covers = not turn.tokens or indices[:1] == [0]
    rising = all(a <= b for rows in (indices, frames) for a, b in pairwise(rows))
    if not covers or not rising or (indices and indices[-1] >= len(turn.tokens)):
        raise ValueError(
            "the words of a turn must cover its tokens in order, the first from token 0, "
            f"found {turn.words} for {len(turn.tokens)} tokens"
        )
    bounds = [*indices, len(turn.tokens)]
    for (begin, end), frame in zip(pairwise(bounds), frames, strict=True):
        for index in range(begin, end):
            yield turn.tokens[index], frame, frame + index - begin


def _place_uniform(turn: TextTurn) -> Iterator[Placement]:
    for index, token in enumerate(turn.tokens):
        frame = turn.start + index * (turn.end - turn.start) // len(turn.tokens)
        yield token, frame, frame


def _check_turns(turns: Sequence[TextTurn], num_frames: int) -> None:
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


def written_words(
    text: str, timed: Sequence[tuple[str, float, float]]
) -> list[tuple[str, float, float]]:
    """The words of a text between its spaces, punctuation and all, with start and end in seconds.

    Recognisers and speech engines cut words their own way (`o'clock`, `don't`, no punctuation),
    so a word of the text starts with the timed word that holds its first letter or digit. One
    without any, a lone dash say, starts with the word before it.

    Args:
        timed: words with starts and ends, in order; punctuation and case may differ from `text`.

    Raises:
        ValueError: the timed words do not spell the text.
    """
    spoken = [(char, start, end) for word, start, end in timed for char in _letters(word)]
    written = _letters(text)
    if [char for char, *_ in spoken] != written:
        raise ValueError(
            "the timed words must spell the turn's text, found "
            f"{' '.join(word for word, *_ in timed)[:80]!r} for {text[:80]!r}"
        )
    words: list[tuple[str, float, float]] = []
    before = 0
    start = end = timed[0][1] if timed else 0.0
    for word in text.split():
        count = len(_letters(word))
        if count:
            start = max(start, spoken[before][1])
            end = spoken[before + count - 1][2]
        before += count
        words.append((word, start, end))
    return words


def _letters(text: str) -> list[str]:
    return [char for char in text.casefold() if char.isalnum()]
