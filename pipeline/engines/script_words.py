"""A text -> the words that are spoken of it, and times for them where nobody gave any. Pure.

A word is what stands between spaces, without the punctuation around it. Chinese and Japanese have
no spaces: there each character is a word of its own.
"""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duplex.frames import SAMPLE_RATE
from duplex.metrics import words_of
from duplex.records import Word

SPOKEN_PUNCTUATION = "&%@#"
# Han, kana and what lies between: scripts that set no spaces. (Korean does.)
SPACELESS = re.compile(r"[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
STEP_S = 0.01
PAUSE_STEPS, NEAR_STEPS = 10, 8
QUIET_DB = 35.0  # below the loudest step: a pause


@dataclass(frozen=True)
class ScriptWord:
    end: int  # offset in the script, exclusive, with the punctuation that follows
    text: str


def script_words(text: str) -> list[ScriptWord]:
    """The words that have something to say, without the punctuation around them."""
    words = []
    for match in re.finditer(r"\S+", text):
        for start, end in _pieces(match[0]):
            bare = _without_punctuation(match[0][start:end])
            if any(c.isalnum() or _is_symbol(c) for c in bare):
                words.append(ScriptWord(match.start() + end, bare))
    return words


def _pieces(token: str) -> list[tuple[int, int]]:
    """[start, end) of the words within one token: itself, or its spaceless characters."""
    if not SPACELESS.search(token):
        return [(0, len(token))]
    edges = [0]
    for index, character in enumerate(token):
        before = token[index - 1] if index else ""
        begins = SPACELESS.match(character) and character != "ー"
        follows = bool(before and SPACELESS.match(before)) and character.isalnum()
        if index and (begins or (follows and character != "ー")):
            edges.append(index)
    return list(zip(edges, [*edges[1:], len(token)], strict=True))


def _is_symbol(character: str) -> bool:
    return unicodedata.category(character)[0] == "S" or character in SPOKEN_PUNCTUATION


def _without_punctuation(token: str) -> str:
    def silent(character: str) -> bool:
        return unicodedata.category(character)[0] == "P" and character not in SPOKEN_PUNCTUATION

    start, end = 0, len(token)
    while start < end and silent(token[start]):
        start += 1
    while end > start and silent(token[end - 1]):
        end -= 1
    return token[start:end]


# -- times


def active_steps(samples: np.ndarray) -> np.ndarray:
    """bool [N]: which steps of 10 ms are loud, that is within 35 dB of the loudest.

    Args:
        samples: float32 [S] at 24 kHz.
    """
    step = round(STEP_S * SAMPLE_RATE)
    count = len(samples) // step
    if not count:
        return np.zeros(0, dtype=bool)
    power = np.mean(samples[: count * step].reshape(count, step).astype(np.float64) ** 2, axis=1)
    return power > power.max() * 10 ** (-QUIET_DB / 10) if power.max() > 0 else power > 0


def words_by_letters(text: str, samples: np.ndarray) -> tuple[Word, ...]:
    """Each word gets its letters' share of the time in which there is sound; pauses get none.

    Args:
        samples: float32 [S] at 24 kHz.
    """
    words = [word.text for word in script_words(text)]
    return _laid_out(words, active_steps(samples), 0.0, len(samples) / SAMPLE_RATE)


def words_by_ear(text: str, samples: np.ndarray, heard: Sequence[Word]) -> tuple[Word, ...] | None:
    """The text's words at the times at which a recogniser heard them.

    Words that it heard as others share, by their letters, the sound between those around them.
    None where it heard fewer than half of the words: then it is no witness.

    Args:
        heard: what the recogniser heard, in order, times from the start of `samples`.
    """
    words = [word.text for word in script_words(text)]
    plain = ["".join(words_of(word)) for word in words]
    listed = [("".join(words_of(word.text)), word) for word in heard]
    matcher = difflib.SequenceMatcher(None, plain, [name for name, _ in listed], autojunk=False)
    anchors = {
        block.a + offset: listed[block.b + offset][1]
        for block in matcher.get_matching_blocks()
        for offset in range(block.size)
        if plain[block.a + offset]
    }
    if not words or len(anchors) * 2 < len(words):
        return None
    active = active_steps(samples)
    length_s = len(samples) / SAMPLE_RATE
    timed: list[Word] = []
    index, reached_s = 0, 0.0
    while index < len(words):
        if index in anchors:
            start_s = max(anchors[index].start_s, reached_s)
            end_s = min(max(anchors[index].end_s, start_s), length_s)
            timed.append(_word(words[index], min(start_s, end_s), end_s))
            index, reached_s = index + 1, end_s
            continue
        following = min((known for known in anchors if known > index), default=len(words))
        until_s = max(anchors[following].start_s, reached_s) if following in anchors else length_s
        timed += _laid_out(words[index:following], active, reached_s, min(until_s, length_s))
        index, reached_s = following, min(until_s, length_s)
    return tuple(timed)


def _laid_out(
    words: Sequence[str], active: np.ndarray, start_s: float, end_s: float
) -> tuple[Word, ...]:
    """Words laid over the sound in [start_s, end_s) by their letters."""
    first, last = round(start_s / STEP_S), min(round(end_s / STEP_S), len(active))
    loud = np.flatnonzero(active[first:last]) + first
    letters = np.array([max(sum(c.isalnum() for c in word), 1) for word in words], dtype=float)
    shares = np.concatenate([[0.0], np.cumsum(letters) / letters.sum()]) if len(words) else []
    bounds: list[tuple[float, float]]
    if len(loud):
        places = [round(float(p)) for p in _at_pauses(np.asarray(shares) * len(loud), loud)]
        starts = [float(loud[min(place, len(loud) - 1)]) * STEP_S for place in places[:-1]]
        ends = [(float(loud[max(place - 1, 0)]) + 1) * STEP_S for place in places[1:]]
        bounds = list(zip(starts, ends, strict=True))
    else:
        edges = [start_s + (end_s - start_s) * float(share) for share in shares]
        bounds = [(float(a), float(b)) for a, b in itertools.pairwise(edges)]
    # A word that begins in the step in which the one before it ends begins at that end.
    timed, reached = [], start_s
    for word, (a, b) in zip(words, bounds, strict=True):
        begins_s = float(min(max(a, reached), end_s))
        reached = float(max(begins_s, min(b, end_s)))
        timed.append(_word(word, begins_s, reached))
    return tuple(timed)


def _at_pauses(places: np.ndarray, loud: np.ndarray) -> np.ndarray:
    """Edges of words moved to a pause that is near: people pause between words."""
    pauses = np.flatnonzero(np.diff(loud) > PAUSE_STEPS) + 1
    if not len(pauses):
        return places
    nearest = pauses[np.abs(places[:, None] - pauses[None, :]).argmin(axis=1)]
    return np.where(np.abs(nearest - places) <= NEAR_STEPS, nearest, places)


def _word(text: str, start_s: float, end_s: float) -> Word:
    return Word(text=text, start_s=round(float(start_s), 6), end_s=round(float(end_s), 6))
