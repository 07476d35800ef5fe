"""Full-Duplex-Bench's columns: the document's worked examples, and what each fault comes to."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from duplex.duplex_bench import (
    COLUMNS,
    Sample,
    Span,
    TimedWord,
    bin_distance,
    corrected,
    is_backchannel,
    published,
    published_backchannels,
    summarize,
    takes_over,
    turn_start_s,
)

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "full-duplex-bench.md").read_text()
EXAMPLES = re.findall(
    r"^### ([^\n]+)\n\n```json\n(.*?)```\n(.*?)(?=^### |\Z)", DOCUMENT, re.M | re.S
)


def sample_of(example):
    start_s, end_s = example["user"]
    return Sample(
        task=example["task"],
        words=tuple(TimedWord(*word) for word in example["words"]),
        speech=tuple(Span(*span) for span in example["speech"]),
        duration_s=example["duration_s"],
        user_start_s=start_s,
        user_end_s=end_s,
        reference=tuple(example["reference"]) if "reference" in example else None,
    )


def words(*bounds):
    return tuple(TimedWord("w", *each) for each in bounds)


def spoken(task, *speech, user=(2.0, 6.0), said=(), duration_s=10.0, reference=None):
    return Sample(
        task, words(*said), tuple(Span(*s) for s in speech), duration_s,
        user_start_s=user[0], user_end_s=user[1], reference=reference,
    )  # fmt: skip


# -- the document


@pytest.mark.parametrize(("title", "block", "prose"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_an_example_of_the_document_comes_out_as_it_says(title, block, prose):
    example = json.loads(block)
    sample = sample_of(example)
    for definition in (published, corrected):
        due = example[definition.__name__]
        assert set(due) == {column.key for column in COLUMNS[sample.task]}
        assert definition(sample) == pytest.approx(due, abs=5e-5)
        for value in due.values():  # the arithmetic ends where the block does
            if value is not None:
                assert f"{value}".lstrip("-") in prose.replace("−", "-")


def test_the_document_has_an_example_of_each_task():
    assert len(EXAMPLES) == 8 == DOCUMENT.count("```json")
    assert {json.loads(block)["task"] for _, block, _ in EXAMPLES} == set(COLUMNS)


def test_two_samples_of_the_document_together():
    rows = summarize([sample_of(json.loads(block)) for _, block, _ in EXAMPLES[:2]])
    tor, latency = rows
    assert (tor["published"]["value"], tor["corrected"]["value"]) == (1.0, 0.5)
    assert (tor["published"]["low"], tor["published"]["high"]) == (
        pytest.approx(math.sqrt(0.025)),  # two of two: low**2 = .025
        1.0,
    )
    assert (latency["published"]["value"], latency["published"]["n"]) == (0.0, 2)
    assert (latency["corrected"]["value"], latency["corrected"]["n"]) == (0.25, 1)
    assert latency["corrected"]["p95"] == 0.25


# -- take-over


@pytest.mark.parametrize(
    ("bounds", "taken"),
    [
        ((), False),
        (((0, 0.9),), False),
        (((0, 1.0),), True),
        (((0, 0.1), (0.1, 0.2), (0.2, 0.3)), False),
        (((0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4)), True),
        (((0, 0.1), (5, 5.1)), True),  # the extent runs over the silence in between
    ],
)
def test_a_take_over_has_a_second_or_four_words(bounds, taken):
    assert takes_over(words(*bounds)) is taken


def test_words_before_an_interruptions_end_do_not_count():
    said = ((1.0, 1.5), (1.5, 5.9), (6.5, 6.9))
    sample = spoken("user_interruption", (1.0, 5.9), (6.5, 6.9), user=(4.0, 6.0), said=said)
    assert published(sample) == {"tor": 0, "latency_s": None}
    assert corrected(sample) == {"tor": 0, "latency_s": None}


def test_an_agent_that_talks_through_an_interruption_answers_nothing():
    said = tuple((t, t + 1) for t in range(1, 9))
    sample = spoken("user_interruption", (1.0, 9.0), user=(4.0, 6.0), said=said)
    assert published(sample) == {"tor": 1, "latency_s": 0.0}
    assert corrected(sample) == {"tor": 0, "latency_s": None}


def test_text_ahead_of_its_audio_belongs_to_the_answer():
    said = ((6.0, 6.2), (6.2, 6.3), (6.3, 6.4), (6.4, 6.5))
    sample = spoken("smooth_turn_taking", (0.5, 0.9), (6.35, 6.8), said=((0.4, 0.8), *said))
    assert corrected(sample)["tor"] == 1
    assert corrected(sample)["latency_s"] == pytest.approx(0.35)


def test_a_word_within_the_turn_is_not_its_answer():
    said = ((3.0, 3.3), (6.4, 7.6))
    sample = spoken("smooth_turn_taking", (3.0, 3.3), (6.4, 7.6), said=said)
    assert published(sample)["latency_s"] == 0
    assert corrected(sample)["latency_s"] == pytest.approx(0.4)


def test_without_the_users_turn_there_is_nothing_to_correct():
    unknown = (None, None)
    for task in ("smooth_turn_taking", "pause_handling", "backchannel"):
        sample = spoken(task, (1.0, 5.0), user=unknown, said=((1.0, 5.0),))
        assert published(sample)["tor"] == 1
        assert set(corrected(sample).values()) == {None}
    endless = spoken("smooth_turn_taking", user=unknown, said=((1, 5),))
    assert published(endless)["latency_s"] is None
    with pytest.raises(ValueError, match="must have its end"):
        published(spoken("user_interruption", user=unknown))


def test_a_turn_goes_back_over_short_silences_only():
    spans = [Span(0, 1), Span(3, 4), Span(5, 5.5), Span(7, 8)]
    assert turn_start_s(spans, 6.0) == 3
    assert turn_start_s(spans, 0.5) == 0
    assert turn_start_s(spans, 0.0) is None


# -- backchannels


@pytest.mark.parametrize(
    ("segment", "bounds", "verdict"),
    [
        ((0, 0.9), ((0, 0.4), (0.4, 0.9)), True),
        ((0, 0.9), (), True),
        ((0, 1.0), ((0, 0.4),), False),
        ((0, 0.9), ((0, 0.3), (0.3, 0.6), (0.6, 0.9)), False),
        ((1, 1.5), ((0, 1.0), (0.9, 1.2), (1.5, 2.0), (1.6, 2.0)), True),  # 2 touch it
        ((1, 1.5), ((0.9, 1.2), (1.2, 1.3), (1.5, 2.0)), False),  # and so do 3
    ],
)
def test_a_backchannel_is_short_in_time_and_words(segment, bounds, verdict):
    assert is_backchannel(Span(*segment), words(*bounds)) is verdict


def test_a_long_segment_ends_the_published_count_and_keeps_what_came_before():
    spans = [Span(0, 0.5), Span(1, 4.5), Span(5, 5.5)]
    assert published_backchannels(spans, ()) == (True, [Span(0, 0.5)])
    assert published_backchannels([Span(0, 3.0), Span(5, 5.5)], ()) == (
        False,
        [Span(0, 3.0), Span(5, 5.5)],
    )


def test_greeting_and_answer_are_no_backchannels():
    spans = ((0, 1.5), (3, 3.4), (7, 9))
    found = corrected(spoken("backchannel", *spans))
    assert found == {"tor": 0, "frequency": 0.1, "jsd": None}


# -- JSD


def test_the_distance_is_a_distance():
    left, right = [Span(0.05, 0.15)], [Span(0.85, 0.95)]
    reference = [1, 0, 0, 0, 0, 0]
    assert bin_distance(left, 1.0, reference) == pytest.approx(0)
    assert bin_distance(right, 1.0, reference) == pytest.approx(math.sqrt(math.log(2)))
    assert bin_distance(right, 1.0, reference, 1e-10) == pytest.approx(math.sqrt(math.log(2)), 1e-3)
    assert bin_distance(left, 1.0, [0, 0, 0]) is None
    assert bin_distance([], 1.0, reference) is None


def test_it_equals_scipys():
    distance = pytest.importorskip("scipy.spatial.distance")
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts = rng.uniform(0, 9, 3)
        spans = [Span(float(s), float(s + rng.uniform(0, 1))) for s in starts]
        reference = rng.uniform(0, 1, 50)
        counts = np.full(int(10 / 0.2) + 1, 1e-10)
        for span in spans:
            for place in range(int(span.start_s / 0.2), int(span.end_s / 0.2) + 1):
                if place < len(counts):
                    counts[place] += 1
        wanted = np.interp(np.linspace(0, 1, 51), np.linspace(0, 1, 50), reference)
        found = bin_distance(spans, 10.0, reference.tolist(), 1e-10)
        assert found == pytest.approx(float(distance.jensenshannon(counts, wanted)), abs=1e-9)


def test_a_reference_of_other_length_is_stretched():
    spans = [Span(0.05, 0.15), Span(0.85, 0.95)]
    stretched = np.interp(np.linspace(0, 1, 6), [0, 0.5, 1], [1, 2, 5]).tolist()
    assert bin_distance(spans, 1.0, [1, 2, 5]) == pytest.approx(bin_distance(spans, 1.0, stretched))


# -- many


def test_samples_of_two_tasks_are_not_pooled():
    with pytest.raises(ValueError, match="one task"):
        summarize([spoken("pause_handling"), spoken("backchannel")])
    assert summarize([]) == []


def test_means_over_nothing_are_empty():
    tor, latency = summarize([spoken("smooth_turn_taking")] * 3)
    assert (tor["published"]["value"], tor["published"]["n"]) == (0.0, 3)
    assert tor["published"]["high"] == pytest.approx(1 - 0.025 ** (1 / 3))
    assert latency["published"] == {"value": None, "n": 0, "low": None, "high": None}


def test_bounds_of_a_mean_stay_where_the_mean_can_be():
    some = [spoken("backchannel", *[(t, t + 0.3) for t in range(n)]) for n in (0, 0, 9)]
    _, frequency, _ = summarize(some)
    assert frequency["published"]["value"] == pytest.approx(0.3)
    assert frequency["published"]["low"] == 0
    assert (frequency["published"]["p50"], frequency["published"]["p95"]) == (
        0,
        pytest.approx(0.81),  # 0 + 0.9 of the way to 0.9
    )


def test_a_backchannel_at_the_end_of_a_turn_is_not_its_answer():
    """A "mhm" over the user's end, and what was said long after it."""
    mhm, later = TimedWord("mhm", 5.9, 6.2), TimedWord("later", 9.0, 9.3)
    speech = (Span(5.9, 6.2), Span(9.0, 9.3))
    sample = Sample("smooth_turn_taking", (mhm, later), speech, 12.0, 1.0, 6.0)
    assert corrected(sample) == {"tor": 0, "latency_s": None}
    answer = tuple(TimedWord(w, 8 + n, 8.4 + n) for n, w in enumerate(("yes", "of", "course")))
    speech = (Span(5.9, 6.2), Span(8.0, 10.4))
    found = corrected(Sample("smooth_turn_taking", (mhm, *answer), speech, 12.0, 1.0, 6.0))
    assert found == {"tor": 1, "latency_s": 2.0}


@pytest.mark.parametrize(
    ("span", "tor"),
    [
        (Span(0.5, 1.5), 0),  # a greeting that reaches into his start
        (Span(5.9, 8.0), 0),  # an answer a moment early
        (Span(3.0, 5.0), 1),
        (Span(4.5, 8.0), 1),  # begun well before his end
    ],
)
def test_only_what_begins_within_the_users_speech_can_take_it_over(span, tor):
    words = (TimedWord("a", span.start_s, span.end_s),)
    found = corrected(Sample("backchannel", words, (span,), 10.0, 1.0, 6.0))
    assert found["tor"] == tor
