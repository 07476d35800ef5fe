"""How a conversation falls apart: text that repeats itself or leaves its script, an agent that
falls silent, text that is not spoken and speech that was not written. Pure.

Shapes: T frames of 80 ms. A text is given as timed words, (frame of the word's first piece, word).
Cost: linear in text and frames.

Sources:
    Radford et al. 2022, "Robust speech recognition via large-scale weak supervision" (section 4.5:
        text whose gzip ratio is over 2.4 is a loop)
    Holtzman et al. 2019, "The curious case of neural text degeneration" (repetition as the failure)
    Silence collapse was seen in a tuned Moshi whose teacher-forced loss was good: a loss over
        frames, most of which are padding, does not show it.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from duplex.frames import FRAME_S
from duplex.metrics import Segment, segments
from duplex.words import plain, words_of

MIN_BYTES = 64  # zlib's own 11 bytes weigh on less; a reply of ten words has about as many
LOOP_ORDER = 4
LOOP_TIMES = 3
TAIL_TURNS = 2

# Text in the first frames of a turn comes before its sound by the lead of the speech and by what
# the audio codebooks are delayed: under half a second in the training data of this project.
NEAR_FRAMES = 6
# Text of a whole turn may stand at its onset, so what is said after a pause for breath has no word
# near: speech that pauses for no longer than this (`DEAD_AIR_S`, about) is one stretch.
JOIN_FRAMES = 13

Silence = Literal["speaks", "collapses", "silent"]


class Loop(NamedTuple):
    """`words` said `times` times in a row; `place`: index of the first word in the text."""

    words: tuple[str, ...]
    times: int
    place: int


# -- text


def compression_ratio(text: str) -> float | None:
    """Bytes of the text in UTF-8 / bytes that zlib makes of it; None under 64 bytes.

    Over 2.4 Whisper takes a text for a loop. It grows with length: scripted replies have .9 to 1.4,
    all replies of one dialogue 1.2 to 1.7, an hour of them 4.5. So it is one reply's or one
    conversation's.
    """
    content = text.encode("utf-8", errors="replace")
    return len(content) / len(zlib.compress(content)) if len(content) >= MIN_BYTES else None


def loops(text: str, order: int = LOOP_ORDER, times: int = LOOP_TIMES) -> tuple[Loop, ...]:
    """The places where the same 1 to `order` words are said `times` times in a row or more.

    Loops don't overlap: at each word the one that covers most words counts, of two such the one
    of fewer words, and the search goes on behind it. "No, no, no" is one, and people say it.
    """
    words = words_of(text)
    found: list[Loop] = []
    place = 0
    while place < len(words):
        here = [
            Loop(tuple(words[place : place + n]), _times(words, place, n), place)
            for n in range(1, order + 1)
        ]
        longest = max(
            (loop for loop in here if loop.times >= times),
            key=lambda loop: (len(loop.words) * loop.times, -len(loop.words)),
            default=None,
        )
        if longest is None:
            place += 1
            continue
        found.append(longest)
        place += len(longest.words) * longest.times
    return tuple(found)


def _times(words: Sequence[str], place: int, n: int) -> int:
    """How often in a row the n words at `place` are said."""
    unit = words[place : place + n]
    times = 1
    while words[place + times * n : place + (times + 1) * n] == unit:
        times += 1
    return times


def foreign_share(text: str, script: str = "LATIN") -> float | None:
    """Letters whose Unicode name does not begin with `script` / all letters; None without letters.

    Digits, marks and punctuation belong to no script and are not counted.
    """
    letters = [c for c in plain(text) if c.isalpha()]
    foreign = sum(not unicodedata.name(c, "").startswith(script) for c in letters)
    return foreign / len(letters) if letters else None


# -- silence


def silence_collapse(agent: np.ndarray, turns: Sequence[Segment]) -> Silence | None:
    """Whether the agent keeps talking to the user.

    A user turn is met when the agent speaks between its end and the next turn's start (the end of
    the conversation for the last), or begins to speak within it.

        silent     no agent speech in the whole conversation
        collapses  none of the last max(2, ceil(n/3)) of n turns is met, and there was agent
                   speech before: a greeting counts, so a model that only greets collapses
        speaks     else

    None where that can't be told: fewer than 2 turns, or no turn at all for a silent agent.

    Args:
        agent: bool [T], from `duplex.metrics.speech_activity`.
        turns: the user's turns in order.
    """
    if not turns:
        return None
    if not agent.any():
        return "silent"
    if len(turns) < TAIL_TURNS:
        return None
    tail = max(TAIL_TURNS, -(-len(turns) // 3))
    onsets = [speech.start for speech in segments(agent)]
    ends = [*(turn.start for turn in turns[1:]), len(agent)]
    met = [
        bool(agent[turn.end : until].any()) or any(turn.start <= onset < until for onset in onsets)
        for turn, until in zip(turns, ends, strict=True)
    ]
    return "speaks" if any(met[-tail:]) else "collapses"


# -- text and speech


def unspoken_share(
    words: Sequence[tuple[int, str]], agent: np.ndarray, near_frames: int = NEAR_FRAMES
) -> float | None:
    """Words without agent speech within `near_frames` of their frame / all words; None without.

    Args:
        words: timed words.
        agent: bool [T].
    """
    silent = [not agent[max(0, f - near_frames) : f + near_frames + 1].any() for f, _ in words]
    return sum(silent) / len(silent) if silent else None


def unwritten_share(
    words: Sequence[tuple[int, str]],
    agent: np.ndarray,
    near_frames: int = NEAR_FRAMES,
    join_frames: int = JOIN_FRAMES,
) -> float | None:
    """Seconds of agent speech in stretches with no word near / all its seconds; None without.

    A stretch is speech with pauses of up to `join_frames`; a word is near from `near_frames` before
    it to `near_frames` behind it. Pauses inside a stretch are not counted as speech.

    Args:
        words: timed words.
        agent: bool [T].
    """
    frames = np.array([frame for frame, _ in words], dtype=np.int64)
    total = unwritten = 0.0
    for stretch in stretches(agent, join_frames):
        seconds = float(np.count_nonzero(agent[stretch.start : stretch.end]) * FRAME_S)
        near = (frames >= stretch.start - near_frames) & (frames < stretch.end + near_frames)
        total += seconds
        unwritten += 0.0 if near.any() else seconds
    return unwritten / total if total else None


def stretches(active: np.ndarray, join_frames: int) -> list[Segment]:
    """The runs of True in a bool [T]; those parted by `join_frames` or less are one."""
    found: list[Segment] = []
    for run in segments(active):
        if found and run.start - found[-1].end <= join_frames:
            found[-1] = Segment(found[-1].start, run.end)
        else:
            found.append(run)
    return found
