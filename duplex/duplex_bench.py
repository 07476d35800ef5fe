"""The columns of Full-Duplex-Bench 1.0, as published and put right. Pure.

Two functions for a sample: `published` follows the benchmark's definitions with their faults,
`corrected` answers the question that each column asks. `summarize` pools a task's samples.
docs/full-duplex-bench.md has both worked out by hand.

    take-over   words whose extent (last end - first start) is 1 s or more, or more than 3 of them
    published   over all words of the recording (interruption: those that begin after it)
    latency     first word - user's end over take-overs, cut at 0
    backchannel verdict of the last segment; segments a second; distance of their 200 ms histogram

    corrected   take-overs count what begins within the user's turn (pause, backchannel), or what
                answers it (turn taking, interruption): a greeting before it is neither
    offset      onset of the answering speech - user's end, negative when early
    backchannel a take-over if any segment is one; only real backchannels are counted

Decided here, since the paper does not say: a word that touches a segment's edge belongs to it; an
extent of exactly 1 s is a take-over; without a reference there is no JSD; JSD is the distance (the
square root of the divergence) in nats, and 1 where nothing was counted. The scripts do the same.
All times are seconds from the start of `input.wav`.

Source: Lin et al. 2025, "Full-Duplex-Bench" (arXiv 2503.04721), and the behaviour of its scripts
of version 1.0; written anew from the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from duplex.metrics import mean_interval, proportion_interval

Task = Literal["pause_handling", "backchannel", "smooth_turn_taking", "user_interruption"]

TAKE_OVER_S, TAKE_OVER_WORDS = 1.0, 3
LONG_SEGMENT_S = 3.0
BACKCHANNEL_WORDS = 2
BIN_S = 0.2
SMOOTHING = 1e-10
TURN_GAP_S = 1.0  # a longer silence of the user parts two of his turns


class TimedWord(NamedTuple):
    text: str
    start_s: float
    end_s: float


class Span(NamedTuple):
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Sample:
    """One conversation.

    words, speech: the agent's, in order; speech from voice activity.
    user_start_s, user_end_s: the turn that the task is about: the whole of the user's speech
        (pause, backchannel), the turn that ends (turn taking), the interruption. None: unknown.
    reference: how people's backchannels are spread over the same recording, in any number of
        equal bins.
    """

    task: Task
    words: tuple[TimedWord, ...]
    speech: tuple[Span, ...]
    duration_s: float
    user_start_s: float | None = None
    user_end_s: float | None = None
    reference: tuple[float, ...] | None = None


Values = dict[str, float | int | None]


def published(sample: Sample) -> Values:
    """Column -> value of one sample by the published definitions; None where it has none.

    Raises:
        ValueError: an interruption without its end, after which words count.
    """
    if sample.task == "backchannel":
        verdict, spans = published_backchannels(sample.speech, sample.words)
        distance = None
        if sample.reference is not None:
            distance = 1.0
            if spans:
                distance = bin_distance(spans, sample.duration_s, sample.reference, SMOOTHING)
        frequency = len(spans) / sample.duration_s if sample.duration_s else None
        return {"tor": int(verdict), "frequency": frequency, "jsd": distance}
    words = sample.words
    if sample.task == "user_interruption":
        if sample.user_end_s is None:
            raise ValueError("an interruption must have its end, found none")
        words = words_from(words, sample.user_end_s)
    taken = takes_over(words)
    if sample.task == "pause_handling":
        return {"tor": int(taken)}
    latency = None
    if taken and sample.user_end_s is not None:
        latency = max(0.0, words[0].start_s - sample.user_end_s)
    return {"tor": int(taken), "latency_s": latency}


def corrected(sample: Sample) -> Values:
    """The same columns put right, with `latency_s` as the unclamped floor-transfer offset.

    Everything is None where the user's turn is unknown: then no column can be told.
    """
    start_s, end_s = sample.user_start_s, sample.user_end_s
    if start_s is None or end_s is None:
        return dict.fromkeys(column.key for column in COLUMNS[sample.task])
    if sample.task == "backchannel":
        # What begins in the last second and outlasts him is an early answer, and not asked for.
        inside = [
            s
            for s in sample.speech
            if start_s <= s.start_s < end_s
            and (s.end_s <= end_s or end_s - s.start_s >= TAKE_OVER_S)
        ]
        real = [s for s in inside if is_backchannel(s, sample.words)]
        distance = None
        if sample.reference is not None and real:
            distance = bin_distance(real, sample.duration_s, sample.reference)
        frequency = len(real) / sample.duration_s if sample.duration_s else None
        return {"tor": int(len(real) < len(inside)), "frequency": frequency, "jsd": distance}
    if sample.task == "pause_handling":
        return {"tor": int(takes_over([w for w in sample.words if start_s <= w.start_s < end_s]))}
    onset_s, words = answer(sample.speech, sample.words, start_s, end_s)
    taken = onset_s is not None and takes_over(words)
    offset_s = onset_s - end_s if taken and onset_s is not None else None
    return {"tor": int(taken), "latency_s": offset_s}


def takes_over(words: Sequence[TimedWord]) -> bool:
    """Whether these words are a turn: 1 s or more from first start to last end, or over 3."""
    if not words:
        return False
    extent_s = words[-1].end_s - words[0].start_s
    return extent_s >= TAKE_OVER_S or len(words) > TAKE_OVER_WORDS


def words_from(words: Sequence[TimedWord], start_s: float) -> tuple[TimedWord, ...]:
    """The words that begin at `start_s` or later."""
    return tuple(word for word in words if word.start_s >= start_s)


def answer(
    speech: Sequence[Span], words: Sequence[TimedWord], start_s: float, end_s: float
) -> tuple[float | None, tuple[TimedWord, ...]]:
    """(onset, words) of what answers the user's turn [start_s, end_s]; (None, ()) without one.

    The answer begins with the agent's first speech that begins at the turn's start or later and
    lasts beyond its end (`duplex.metrics.response_delays_s` has the same rule) and is no
    backchannel; it goes on over silences of up to `TURN_GAP_S`. Its words are those that begin
    after the speech before it ended, since a text stream runs a little ahead of its audio, and
    before its own ends.
    """
    before_s = 0.0
    for place, span in enumerate(speech):
        said = words_from(words, before_s)
        num_own = sum(word.start_s < span.end_s for word in said)
        is_mhm = span.seconds < TAKE_OVER_S and num_own <= BACKCHANNEL_WORDS
        if span.start_s >= start_s and span.end_s > end_s and not is_mhm:
            until_s = span.end_s
            for later in speech[place + 1 :]:
                if later.start_s - until_s > TURN_GAP_S:
                    break
                until_s = later.end_s
            return span.start_s, tuple(word for word in said if word.start_s < until_s)
        before_s = span.end_s
    return None, ()


def turn_start_s(spans: Sequence[Span], end_s: float) -> float | None:
    """Where the user's turn that ends at `end_s` began: back over silences of up to 1 s."""
    earlier = [span for span in spans if span.start_s < end_s]
    if not earlier:
        return None
    start_s = earlier[-1].start_s
    for span in reversed(earlier[:-1]):
        if start_s - span.end_s > TURN_GAP_S:
            break
        start_s = span.start_s
    return start_s


# -- backchannels


def is_backchannel(segment: Span, words: Sequence[TimedWord]) -> bool:
    """Under 1 s with at most 2 words. A longer one, or one with 3 words and more, is a turn."""
    count = sum(
        word.start_s <= segment.end_s
        and (word.end_s > segment.start_s or word.start_s >= segment.start_s)
        for word in words
    )
    return segment.seconds < TAKE_OVER_S and count <= BACKCHANNEL_WORDS


def published_backchannels(
    speech: Sequence[Span], words: Sequence[TimedWord]
) -> tuple[bool, list[Span]]:
    """(take-over, what is counted): the last segment's verdict, and all segments.

    A segment of more than 3 s is a take-over and ends the count; what came before it stays.
    """
    verdict, counted = False, []
    for segment in speech:
        if segment.seconds > LONG_SEGMENT_S:
            return True, counted
        verdict = not is_backchannel(segment, words)
        counted.append(segment)
    return verdict, counted


def bin_distance(
    spans: Sequence[Span], duration_s: float, reference: Sequence[float], smoothing: float = 0.0
) -> float | None:
    """Jensen-Shannon distance between where `spans` lie and a reference, 0 to sqrt(ln 2) = .833.

    Histogram over floor(D / 0.2) + 1 bins of 200 ms; a span counts once in each bin from that of
    its start to that of its end. The reference is stretched to as many bins by linear
    interpolation. Distance: the square root of the divergence, in nats (Endres & Schindelin 2003).
    None where either is empty.
    """
    num_bins = int(duration_s / BIN_S) + 1
    counts = np.full(num_bins, smoothing)
    for span in spans:
        counts[int(span.start_s / BIN_S) : int(span.end_s / BIN_S) + 1] += 1
    places = np.linspace(0, 1, num_bins)
    wanted = np.interp(places, np.linspace(0, 1, len(reference)), reference)
    if not counts.sum() or not wanted.sum():
        return None
    return math.sqrt(max(0.0, _divergence(counts / counts.sum(), wanted / wanted.sum())))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    middle = (p + q) / 2

    def relative_entropy(a: np.ndarray) -> float:
        held = a > 0
        return float(np.sum(a[held] * np.log(a[held] / middle[held])))

    return (relative_entropy(p) + relative_entropy(q)) / 2


# -- many samples


class Column(NamedTuple):
    """kind: `rate` of samples, or `mean`. better: which way, by the benchmark."""

    key: str
    label: str
    unit: str
    kind: Literal["rate", "mean"]
    better: Literal["low", "high"]


_LIMITS = {"frequency": (0.0, math.inf), "jsd": (0.0, 1.0)}
_LATENCY = Column("latency_s", "latency; corrected: offset", "s", "mean", "low")
COLUMNS: dict[Task, tuple[Column, ...]] = {
    "pause_handling": (Column("tor", "take-over rate", "samples", "rate", "low"),),
    "backchannel": (
        Column("tor", "take-over rate", "samples", "rate", "low"),
        Column("frequency", "backchannels", "1/s", "mean", "high"),
        Column("jsd", "JSD", "", "mean", "low"),
    ),
    "smooth_turn_taking": (Column("tor", "take-over rate", "samples", "rate", "high"), _LATENCY),
    "user_interruption": (Column("tor", "take-over rate", "samples", "rate", "high"), _LATENCY),
}


def summarize(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row for each column of one task: `published` and `corrected`, each with value, n, bounds.

    Rates have exact 95 % bounds, means Student's, and the median and 95th percentile beside
    them. n counts the samples that have a value; `value` is None where n is 0.

    Raises:
        ValueError: samples of several tasks, or an interruption without its end.
    """
    tasks: set[Task] = {sample.task for sample in samples}
    if len(tasks) > 1:
        raise ValueError(f"samples must be of one task, found {sorted(tasks)}")
    rows = []
    for column in COLUMNS[tasks.pop()] if tasks else ():
        row: dict[str, Any] = column._asdict()
        definitions: tuple[Callable[[Sample], Values], ...] = (published, corrected)
        for definition in definitions:
            values = [definition(sample)[column.key] for sample in samples]
            row[definition.__name__] = _pool(column, [v for v in values if v is not None])
        rows.append(row)
    return rows


def _pool(column: Column, values: Sequence[float]) -> dict[str, float | int | None]:
    n = len(values)
    if not n:
        return {"value": None, "n": 0, "low": None, "high": None}
    value = math.fsum(values) / n
    if column.kind == "rate":
        low, high = proportion_interval(round(math.fsum(values)), n)
        return {"value": value, "n": n, "low": low, "high": high}
    low, high = mean_interval(values) or (None, None)
    if low is not None and high is not None:  # Student's bounds know no limits
        least, most = _LIMITS.get(column.key, (-math.inf, math.inf))
        low, high = max(low, least), min(high, most)
    p50, p95 = (float(v) for v in np.quantile(values, [0.5, 0.95]))
    return {"value": value, "n": n, "low": low, "high": high, "p50": p50, "p95": p95}
