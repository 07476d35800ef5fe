"""Words of a benchmark's conversation: of the text stream, and recognised; rows of others."""

import numpy as np
import pytest

from duplex.duplex_bench import Span, TimedWord
from duplex.records import Word
from pipeline.bench_hearing import recognised, stream_words
from pipeline.engines.recogniser import RECOGNISER_RATE
from pipeline.evaluation.bench_report import PUBLISHED_DATASETS, PUBLISHED_ROWS, elsewhere, notes_of


def test_a_word_ends_where_the_next_begins_or_its_speech_ends():
    text = [(0, " ear"), (10, " Well"), (12, " o"), (13, "kay"), (50, " Bye"), (60, " now")]
    speech = [Span(0.9, 1.5), Span(3.3, 3.6), Span(5.3, 6.0)]
    opening, words = stream_words(text, speech, 0.08, 10.0)
    assert opening == "ear"
    assert words == (
        TimedWord("Well", 0.72, 0.8),  # no sound until the next word: one frame
        TimedWord("okay", 0.88, 1.5),  # its speech ends
        TimedWord("Bye", 3.92, 4.0),
        TimedWord("now", 4.72, 4.8),  # speech more than 0.5 s later is not its own
    )


def test_recognised_words_keep_their_times_and_none_crosses_the_cut():
    heard = []

    class Spy:
        def transcribe(self, samples: np.ndarray, language: str) -> tuple[Word, ...]:
            heard.append(len(samples) / RECOGNISER_RATE)
            return (Word(text="w", start_s=0.1, end_s=0.3),)

        def revision(self):
            return "spy"

    agent = np.zeros(24_000 * 10, dtype=np.float32)
    words = recognised(Spy(), "en", agent, [Span(1, 2), Span(3, 5)], cut_s=4.0)
    assert heard == pytest.approx([3.15, 1.15])  # 0.85 to 4, 4 to 5.15
    assert [(w.start_s, w.end_s) for w in words] == [
        pytest.approx((0.95, 1.15)),
        pytest.approx((4.1, 4.3)),
    ]
    assert recognised(Spy(), "en", agent, []) == ()


def test_rows_from_elsewhere_stand_at_their_columns():
    assert all(len(values) == len(PUBLISHED_DATASETS) for values in PUBLISHED_ROWS.values())
    assert elsewhere("icc_backchannel", "jsd")["Moshi, benchmark's own"] == 0.957
    assert elsewhere("candor_turn_taking", "latency_s")["PersonaPlex, released"] == 0.170
    assert elsewhere("backchannel", "jsd") == {}


def test_notes_say_each_thing_once_with_the_samples_that_it_concerns():
    def sample(name, **changes):
        fine = {"missing": [], "prompt_proven": True, "prompt_note": "", "frame_ms": 40.0}
        return {"name": name, **fine, **changes}

    result = {
        "protocol": {"pace": "real time"},
        "left_out": [["a", "must be no link"]],
        "samples": [
            sample("b", frame_ms=81.0),
            sample("c", missing=["no JSD"], prompt_proven=False, prompt_note="25 were due"),
            *(sample(f"d{i}", missing=["no JSD"]) for i in range(6)),
        ],
    }
    assert notes_of(result) == [
        "left out: must be no link: a",
        "the server is slower than real time: a frame takes over 80 ms: b",
        "no JSD: c, d0, d1, d2, d3 and 2 more",
        "prompt not proven: 25 were due: c",
    ]
    result["protocol"]["pace"] = "lock-step"
    assert len(notes_of(result)) == 3
