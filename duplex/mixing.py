"""Turns with samples -> one two-channel timeline. Pure: the random generator is passed in.

Each turn starts on a frame boundary, a gap after the latest end so far (rounded up to a whole
frame). The gap is the turn's own `gap_frames`, or drawn: from `gap_after_user` where the agent
answers the user, from `gap_other` else. A negative gap overlaps.

An interruption: a turn with `cut_after_words` is cut by the next one, which starts in the first
frame after the end of that word. Who is cut goes on for a moment (`yield_ms`, drawn), finishes the
word that is under way when that takes less than `FINISH_WORD_S`, and else breaks off in it, faded
out. What was not spoken is in neither sound nor text; of a broken word half must have been heard.

A backchannel is the other side's word within a turn, from the first frame after `after_word` and
a small delay on, `BACKCHANNEL_DB` softer. One that would meet a turn of its own speaker, or whose
place was cut away, is left out.

As many numbers are drawn for each turn whatever becomes of it, so fixing one turn's gap moves
the later turns and redraws none. Under the user's channel lies what `duplex/room.py` makes; the
agent's is digital silence outside of its turns, since it is what the model learns to say.

Cost: linear in the samples; 5 ms of CPU time for a minute of conversation, 50 ms with room tone
and leakage, 140 ms with noise too.
Source: gaps in 80 ms frames and speech at -24 are the predecessor's, which
measured LUFS; RMS needs neither its filter nor its gate.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from duplex.alignment import written_words
from duplex.base import Emotion, Role
from duplex.characters import GapRange
from duplex.config_data import TimelineSection
from duplex.frames import (
    FRAME_SAMPLES,
    SAMPLE_RATE,
    frames_covering_samples,
    frames_covering_seconds,
    frames_to_seconds,
)
from duplex.records import SpokenTurn, Word
from duplex.room import room_of

if TYPE_CHECKING:
    import random

CHANNELS: tuple[Role, Role] = ("agent", "user")  # rows of the timeline; left and right of a WAV
PEAK_LIMIT = 0.99
FADE_S = 0.008
FINISH_WORD_S = 0.12
HEARD_SHARE = 0.5  # of a word's time, for it to count as spoken
BACKCHANNEL_DB = -6.0
BACKCHANNEL_DELAY_S = 0.16  # at most
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class VoicedBackchannel:
    """What the other side says within a turn. samples: float32 [S]; times from its start."""

    text: str
    voice_id: str
    after_word: int
    samples: np.ndarray = field(repr=False)
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class VoicedTurn:
    """A turn before it has a place. samples: float32 [S] at 24 kHz; word times from its start."""

    role: Role
    text: str
    voice_id: str
    samples: np.ndarray = field(repr=False)
    words: tuple[Word, ...] = ()
    gap_frames: int | None = None
    emotion: Emotion | None = None
    cut_after_words: int | None = None
    backchannels: tuple[VoicedBackchannel, ...] = ()


@dataclass(frozen=True)
class Timeline:
    """audio: float32 [2, S], row 0 agent, row 1 user, S a whole number of frames."""

    audio: np.ndarray = field(repr=False)
    turns: tuple[SpokenTurn, ...]


@dataclass(frozen=True)
class _Draws:
    """A turn's numbers in [0, 1)."""

    gap: float
    going_on: float
    delay: float


@dataclass(frozen=True)
class _Placed:
    """Something spoken, and the frame in which it starts. `gain_db` is on top of the loudness."""

    start: int
    turn: VoicedTurn
    cut: bool = False
    kind: Literal["turn", "backchannel"] = "turn"
    gain_db: float = 0.0

    @property
    def end(self) -> int:
        return self.start + frames_covering_samples(len(self.turn.samples))


def mix_turns(
    turns: Sequence[VoicedTurn],
    *,
    gap_after_user: GapRange,
    gap_other: GapRange,
    rng: random.Random,
    loudness_dbfs: float,
    lead_in_s: float,
    tail_s: float,
    section: TimelineSection | None = None,
) -> Timeline:
    """Place all turns, in order, between a lead-in and a tail (rounded up to whole frames).

    The first turn follows the lead-in, later by its `gap_frames` if it has some. An overlap
    reaches back no further than its predecessor's start, and never over the same speaker.
    What is returned is sorted by start.

    Raises:
        ValueError: no turns, a turn without sound, a cut that the other side does not make, or
            a place in a turn whose words are not those of its text.
    """
    if not turns:
        raise ValueError("a timeline needs at least one turn, found none")
    section = section or TimelineSection()
    room_seed = rng.getrandbits(64)
    draws = [_Draws(rng.random(), rng.random(), rng.random()) for _ in turns]
    placed = _place_turns(
        turns, draws, (gap_after_user, gap_other), frames_covering_seconds(lead_in_s), section
    )
    placed += _place_backchannels(placed, turns, draws)
    placed.sort(key=lambda one: one.start)  # stable: turns that start together stay in order
    num_frames = max(one.end for one in placed) + frames_covering_seconds(tail_s)
    agent = np.zeros(num_frames * FRAME_SAMPLES, dtype=np.float32)
    user = np.zeros_like(agent)
    _say(agent, [one for one in placed if one.turn.role == "agent"], loudness_dbfs)
    room = room_of(agent, section, room_seed)
    _say(user, [one for one in placed if one.turn.role == "user"], loudness_dbfs, room)
    if room is not None:
        user += room
    return Timeline(np.stack([agent, user]), tuple(_on_timeline(one) for one in placed))


# -- places


def _place_turns(
    turns: Sequence[VoicedTurn],
    draws: Sequence[_Draws],
    gaps: tuple[GapRange, GapRange],
    lead_in: int,
    section: TimelineSection,
) -> list[_Placed]:
    """Each turn with its frame; those that the next one cuts are cut."""
    placed: list[_Placed] = []
    latest_end = earlier_end = 0  # frames from here on are free, also without the last turn
    channel_end = dict.fromkeys(CHANNELS, 0)
    for index, turn in enumerate(turns):
        before = placed[-1] if placed else None
        if before is None:
            start = lead_in + max(0, turn.gap_frames or 0)
        elif before.turn.cut_after_words:
            start = max(before.start + _cut_frames(before.turn, turn.role), channel_end[turn.role])
            placed[-1] = before = _cut(before, start, draws[index - 1].going_on, section)
            channel_end[before.turn.role] = before.end
            latest_end = max(earlier_end, before.end)
        else:
            answers = before.turn.role == "user" and turn.role == "agent"
            drawn = _between(gaps[0] if answers else gaps[1], draws[index].gap)
            gap = drawn if turn.gap_frames is None else turn.gap_frames
            start = max(latest_end + gap, before.start, channel_end[turn.role])
        placed.append(_Placed(start, turn))
        channel_end[turn.role] = placed[-1].end
        earlier_end, latest_end = latest_end, max(latest_end, placed[-1].end)
    if turns[-1].cut_after_words:
        raise ValueError("nobody cuts in on the last turn: it must have no cut_after_words")
    return placed


def _between(gap: GapRange, number: float) -> int:
    return gap.low + int(number * (gap.high - gap.low + 1))


def _cut_frames(turn: VoicedTurn, next_role: Role) -> int:
    """Frames of a turn until the other side cuts in."""
    if next_role == turn.role:
        raise ValueError(f"the other side must cut in on a turn, found the {next_role} again")
    assert turn.cut_after_words
    return frames_covering_seconds(_end_of_word(turn, turn.cut_after_words))


def _end_of_word(turn: VoicedTurn, number: int) -> float:
    """When the `number`-th word of a turn's text ends, in seconds from the turn's start.

    A lone dash at the beginning takes no time: the first word that does stands for it.
    """
    words = _timed(turn)
    if not 1 <= number <= len(words):
        raise ValueError(f"a place must be within the turn's {len(words)} words, found {number}")
    end_s = next((word.end_s for word in words[number - 1 :] if word.end_s > 0), words[-1].end_s)
    return min(end_s, len(turn.samples) / SAMPLE_RATE)


def _timed(turn: VoicedTurn) -> list[Word]:
    """The words of the text as it is written."""
    timed = [(word.text, word.start_s, word.end_s) for word in turn.words]
    return [
        Word(text=text, start_s=start, end_s=max(start, end))
        for text, start, end in written_words(turn.text, timed)
    ]


def _cut(one: _Placed, next_start: int, number: float, section: TimelineSection) -> _Placed:
    """A turn as far as it was spoken when the next one starts in frame `next_start`."""
    turn = one.turn
    least, most = section.yield_ms
    stop_s = frames_to_seconds(next_start - one.start) + (least + number * (most - least)) / 1000
    words = _timed(turn)
    under_way = [word for word in words if word.start_s < stop_s < word.end_s]
    if under_way and under_way[0].end_s - stop_s < FINISH_WORD_S:
        stop_s = under_way[0].end_s
    num_samples = round(stop_s * SAMPLE_RATE)
    if num_samples >= len(turn.samples):
        return one  # it was over before anybody had to yield
    stop_s = num_samples / SAMPLE_RATE
    count = max(index for index, word in enumerate(words, 1) if _was_heard(word, stop_s))
    heard = tuple(
        word.model_copy(update={"end_s": min(word.end_s, stop_s)}) for word in words[:count]
    )
    samples = _faded(turn.samples[:num_samples])
    text = " ".join(word.text for word in heard)
    return replace(one, turn=replace(turn, text=text, words=heard, samples=samples), cut=True)


def _was_heard(word: Word, stop_s: float) -> bool:
    heard_s = min(word.end_s, stop_s) - word.start_s
    return word.start_s < stop_s and heard_s >= HEARD_SHARE * (word.end_s - word.start_s)


def _faded(samples: np.ndarray) -> np.ndarray:
    """A copy that ends softly: a cut through a wave clicks."""
    count = min(round(FADE_S * SAMPLE_RATE), len(samples))
    faded = samples.copy()
    faded[len(samples) - count :] *= np.linspace(1, 0, count + 1, dtype=np.float32)[:-1]
    return faded


def _place_backchannels(
    placed: Sequence[_Placed], turns: Sequence[VoicedTurn], draws: Sequence[_Draws]
) -> list[_Placed]:
    """Those that find a place of their own. `placed` are the turns, in order."""
    spans = {role: sorted((one.start, one.end) for one in placed if one.turn.role == role)
             for role in CHANNELS}  # fmt: skip
    found: list[_Placed] = []
    for one, turn, drawn in zip(placed, turns, draws, strict=True):
        other: Role = "user" if turn.role == "agent" else "agent"
        for number, said in enumerate(sorted(turn.backchannels, key=lambda b: b.after_word)):
            after_s = _end_of_word(turn, said.after_word)
            if after_s >= len(one.turn.samples) / SAMPLE_RATE and one.cut:
                continue
            delay_s = (drawn.delay + number * GOLDEN) % 1 * BACKCHANNEL_DELAY_S
            start = one.start + frames_covering_seconds(after_s + delay_s)
            voiced = VoicedTurn(other, said.text, said.voice_id, said.samples, said.words)
            new = _Placed(start, voiced, kind="backchannel", gain_db=BACKCHANNEL_DB)
            if _insert_free(spans[other], (new.start, new.end)):
                found.append(new)
    return found


def _insert_free(spans: list[tuple[int, int]], span: tuple[int, int]) -> bool:
    """Insert a span where it meets none of the others (sorted, apart); whether there was room."""
    at = bisect_left(spans, span)
    meets_left = at > 0 and spans[at - 1][1] > span[0]
    if meets_left or (at < len(spans) and spans[at][0] < span[1]):
        return False
    spans.insert(at, span)
    return True


# -- sound


def _say(
    channel: np.ndarray,
    placed: Sequence[_Placed],
    loudness_dbfs: float,
    room: np.ndarray | None = None,
) -> None:
    """Put what one side says into its channel, each at its level, with room for the `room`."""
    for one in placed:
        first = one.start * FRAME_SAMPLES
        here = slice(first, first + len(one.turn.samples))
        limit = PEAK_LIMIT - (float(np.abs(room[here]).max()) if room is not None else 0.0)
        level = loudness_dbfs + one.gain_db
        channel[here] = normalize_loudness(one.turn.samples, level, peak_limit=limit)


def normalize_loudness(
    samples: np.ndarray, loudness_dbfs: float, peak_limit: float = PEAK_LIMIT
) -> np.ndarray:
    """float32 [S] scaled to an RMS of `loudness_dbfs`, or to the peak limit where that is less.

    Scaled as a whole, never clipped: a peaky utterance comes out softer, not distorted.

    Raises:
        ValueError: the samples are empty, all zero or not finite.
    """
    exact = samples.astype(np.float64)
    power = float(np.mean(exact**2)) if len(exact) else 0.0
    if not math.isfinite(power) or power <= 0:
        raise ValueError(
            f"a turn needs samples with sound in them, found {len(exact)} with power {power}"
        )
    wanted = 10 ** (loudness_dbfs / 20)
    gain = min(wanted / math.sqrt(power), peak_limit / float(np.abs(exact).max()))
    return (exact * gain).astype(np.float32)


def _on_timeline(one: _Placed) -> SpokenTurn:
    # Microseconds: finer than a sample, and short in JSON.
    turn, start_s = one.turn, frames_to_seconds(one.start)
    return SpokenTurn(
        kind=one.kind,
        role=turn.role,
        text=turn.text,
        voice_id=turn.voice_id,
        start_s=round(start_s, 6),
        end_s=round(start_s + len(turn.samples) / SAMPLE_RATE, 6),
        words=tuple(
            Word(
                text=word.text,
                start_s=round(start_s + word.start_s, 6),
                end_s=round(start_s + word.end_s, 6),
            )
            for word in turn.words
        ),
        emotion=turn.emotion,
        cut=one.cut,
    )
