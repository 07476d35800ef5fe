"""What a conversation measures: timing from two audio channels, and what the words say.

Speech is found per frame of 80 ms by its level, so every time here is a multiple of 80 ms and
an onset is known to one frame. Definitions are written out again from their sources; where a
benchmark clamps or hides something (a latency cut at 0, a greeting counted as a prompt
answer), this module does not. Cost: linear in the samples, quadratic in the words of a reply.

Shapes: S samples, T frames.

Sources:
    Heldner & Edlund 2010, "Pauses, gaps and overlaps in conversations" (floor-transfer offset)
    Jefferson 1989, "a possible metric which provides for a 'standard maximum' silence" (1 s)
    Lin et al. 2025, Full-Duplex-Bench (take-over and latency)
    Welleck et al. 2020, "Neural text generation with unlikelihood training" (seq-rep-4)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from duplex.frames import FRAME_S, FRAME_SAMPLES, frames_covering_samples
from duplex.words import words_of

THRESHOLD_DBFS = -45.0  # 21 dB under the level at which speech is made here
HANGOVER_FRAMES = 2  # a silence of up to 160 ms inside speech is a closure or a breath
MIN_SPEECH_FRAMES = 2  # one loud frame by itself is a click
DEAD_AIR_S = 1.0

ECHO_MIN_WORDS = 4
ECHO_MAX_WER = 0.35
ECHO_MIN_LCS = 0.8
ECHO_MAX_NOVEL = 0.2
REPEAT_ORDER = 4


class Segment(NamedTuple):
    """Frames [start, end)."""

    start: int
    end: int

    @property
    def seconds(self) -> float:
        return (self.end - self.start) * FRAME_S


# -- speech activity


def frame_levels_dbfs(samples: np.ndarray) -> np.ndarray:
    """Level of each frame: `20 log10(RMS)`, where full scale is 1.0 (a full sine is -3 dB).

    Args:
        samples: float [S] at 24 kHz; a last partial frame counts with zeros behind it.

    Returns:
        float64 [T]; -inf for digital silence.
    """
    num_frames = frames_covering_samples(len(samples))
    padded = np.zeros(num_frames * FRAME_SAMPLES, dtype=np.float64)
    padded[: len(samples)] = samples
    rms = np.sqrt(np.mean(padded.reshape(num_frames, FRAME_SAMPLES) ** 2, axis=1))
    with np.errstate(divide="ignore"):
        return 20 * np.log10(rms)


def speech_activity(
    samples: np.ndarray,
    *,
    threshold_dbfs: float = THRESHOLD_DBFS,
    hangover_frames: int = HANGOVER_FRAMES,
    min_speech_frames: int = MIN_SPEECH_FRAMES,
) -> np.ndarray:
    """Which frames hold speech: bool [T].

    A frame is loud at `threshold_dbfs` or more. Silences of up to `hangover_frames` between
    loud frames belong to the speech; after that, bursts under `min_speech_frames` are dropped.
    The hangover bridges and never lengthens, so onsets and ends keep their frame.
    """
    active = frame_levels_dbfs(samples) >= threshold_dbfs
    for gap in segments(~active):
        inside = gap.start > 0 and gap.end < len(active)
        if inside and gap.end - gap.start <= hangover_frames:
            active[gap.start : gap.end] = True
    for burst in segments(active):
        if burst.end - burst.start < min_speech_frames:
            active[burst.start : burst.end] = False
    return active


def segments(active: np.ndarray) -> list[Segment]:
    """The runs of True in a bool [T], in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    return [Segment(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


# -- timing


@dataclass(frozen=True)
class Timing:
    """`delays_s` holds one entry for each user turn, None where no answer came."""

    delays_s: tuple[float | None, ...]
    overlap_s: float
    dead_air_s: float
    agent_speech_s: float
    agent_share: float

    @property
    def responses(self) -> int:
        return sum(delay is not None for delay in self.delays_s)


def timing(agent: np.ndarray, user: np.ndarray, turns: Sequence[Segment]) -> Timing:
    """Timing of one conversation.

    overlap_s: seconds in which both speak, whoever began.
    dead_air_s: seconds in silences of both that last more than a second, each counted whole.
    agent_share: frames in which the agent speaks / all frames.

    Args:
        agent, user: bool [T], from `speech_activity`.
        turns: the user's turns in order, where he speaks.

    Raises:
        ValueError: the channels differ in length, or turns are not in order within them.
    """
    if agent.shape != user.shape:
        raise ValueError(
            f"both channels must have the same frames, found {agent.shape} and {user.shape}"
        )
    bounds = [frame for turn in turns for frame in turn]
    if bounds != sorted(bounds) or (bounds and not 0 <= bounds[0] <= bounds[-1] <= len(agent)):
        raise ValueError(f"turns must be in order within [0, {len(agent)}), found {list(turns)}")
    silences = segments(~(agent | user))
    return Timing(
        delays_s=response_delays_s(segments(agent), turns, len(agent)),
        overlap_s=float(np.count_nonzero(agent & user) * FRAME_S),
        dead_air_s=sum(s.seconds for s in silences if s.seconds > DEAD_AIR_S + 1e-9),
        agent_speech_s=float(np.count_nonzero(agent) * FRAME_S),
        agent_share=float(np.mean(agent)) if len(agent) else 0.0,
    )


def response_delays_s(
    agent: Sequence[Segment], turns: Sequence[Segment], num_frames: int
) -> tuple[float | None, ...]:
    """Floor-transfer offset of each user turn: agent onset - user end, in seconds.

    Negative: the agent began early. The answer to a turn is the agent's first segment that
    begins between this turn's start and the next one's and still lasts after this turn's end.
    So a greeting before the turn is no answer, a "mhm" within the turn is none, and an agent
    that talks without a pause never answers.
    """
    delays: list[float | None] = []
    for index, turn in enumerate(turns):
        until = turns[index + 1].start if index + 1 < len(turns) else num_frames
        answers = (s.start for s in agent if turn.start <= s.start < until and s.end > turn.end)
        onset = next(answers, None)
        delays.append(None if onset is None else round((onset - turn.end) * FRAME_S, 6))
    return tuple(delays)


# -- words


def word_error_rate(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """Levenshtein distance in words / words of the reference; may exceed 1.

    With an empty reference: 0 when the hypothesis is empty too, else infinite.
    """
    if not reference:
        return math.inf if hypothesis else 0.0
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, found in enumerate(hypothesis, start=1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != found))
            diagonal, row[j] = row[j], cost
    return row[-1] / len(reference)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence of words that both hold in order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def is_echo(user_text: str, reply: str) -> bool:
    """Whether a reply only says the user's words back.

    With user words u and reply words m: m = u at any length, or |m| >= 4 and
    (WER(u, m) <= .35, or LCS(u, m)/|m| >= .8 with at most .2 of m not in u).
    """
    u, m = words_of(user_text), words_of(reply)
    if not m:
        return False
    if u == m:
        return True
    if len(m) < ECHO_MIN_WORDS:
        return False
    if word_error_rate(u, m) <= ECHO_MAX_WER:
        return True
    novel = sum(word not in set(u) for word in m) / len(m)
    return longest_common_subsequence(u, m) / len(m) >= ECHO_MIN_LCS and novel <= ECHO_MAX_NOVEL


def says_any(text: str, wordings: Sequence[str]) -> bool:
    """Whether `text` holds one of the wordings, word for word, whatever the case."""
    padded = f" {' '.join(words_of(text))} "
    spoken = (" ".join(words_of(wording)) for wording in wordings)
    return any(wording and f" {wording} " in padded for wording in spoken)


def repeated_share(text: str, order: int = REPEAT_ORDER) -> float | None:
    """seq-rep-n: 1 - different n-grams / n-grams, in words; None under `order` words.

    0 when no run of four words comes twice; near 1 for a model stuck on one phrase.
    """
    words = words_of(text)
    grams = [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


# -- counts


def proportion_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) two-sided bounds of a rate, trials taken as independent.

    No hit in 15 trials bounds the rate under .22 two-sided.

    Raises:
        ValueError: hits outside [0, trials], or no trials.
    """
    if not 0 <= hits <= trials or trials == 0:
        raise ValueError(f"hits must be in [0, trials] and trials > 0, found {hits} of {trials}")
    tail = (1 - confidence) / 2
    # In logs: of over 1 000 trials the numbers of choices are no floats.
    of_all = math.lgamma(trials + 1)
    log_choices = [
        of_all - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in range(trials + 1)
    ]

    def cumulative(rate: float, most: int) -> float:
        if rate in (0.0, 1.0):
            return float(rate == 0.0 or most >= trials)
        log_hit, log_miss = math.log(rate), math.log1p(-rate)
        return math.fsum(
            math.exp(log_choices[k] + k * log_hit + (trials - k) * log_miss)
            for k in range(most + 1)
        )

    low = 0.0 if hits == 0 else _bisect(lambda p: 1 - cumulative(p, hits - 1) < tail)
    high = 1.0 if hits == trials else _bisect(lambda p: cumulative(p, hits) > tail)
    return low, high


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's two-sided bounds of a mean: `m ± t · s / sqrt(n)`; None under two values.

    Right for small n where the values are near normal; a bootstrap over four is far too narrow.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    angle = _bisect(lambda x: _central_share(x * math.pi / 2, n - 1) < confidence) * math.pi / 2
    half = math.tan(angle) * math.sqrt(n - 1) * spread / math.sqrt(n)
    return mean - half, mean + half


def _central_share(angle: float, df: int) -> float:
    """P(|T| < t) of Student's t with `df` degrees of freedom, `t = sqrt(df) · tan(angle)`.

    Source: Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    odd = df % 2
    term = math.cos(angle) if odd else 1.0
    total = term if df > 1 else 0.0
    for k in range(2 + odd, df - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _bisect(still_low: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if still_low(middle) else (low, middle)
    return low
