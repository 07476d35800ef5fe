"""What the pages draw: each value in its bar, gaps without those who were cut, overlaps once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.records import Speech, SpokenTurn
from pipeline.pages.drawing import HEIGHT, WIDTH, histogram, tally
from pipeline.pages.speech_page import gaps_of, overlap_of


@given(st.lists(st.floats(-50, 500, allow_nan=False), min_size=1, max_size=60))
def test_a_histogram_counts_every_value_within_its_frame(values):
    drawn = histogram("t", values)
    assert sum(int(bar.title.rsplit(": ")[1]) for bar in drawn.bars) == len(values)
    for bar in drawn.bars:
        assert bar.x >= -0.01 and bar.x + bar.width <= WIDTH + 0.01
        assert 0 <= bar.y <= HEIGHT and bar.y + bar.height == pytest.approx(HEIGHT, abs=0.02)
    assert len(drawn.bars) <= 26
    assert (drawn.zero_x is not None) == (min(values) < 0 <= max(values))


def test_nothing_is_drawn_of_nothing():
    assert histogram("t", []) is None
    assert tally("t", []) is None


def test_names_are_counted_in_their_order():
    drawn = tally("t", ["b", "a", "b", "c"], ("c",))
    assert drawn.rows == (("c", 1, 50.0), ("b", 2, 100.0), ("a", 1, 50.0))


def spoken(*rows, seconds=10):
    """Rows: (role, start_s, end_s, kind or "cut")."""
    turns = tuple(
        SpokenTurn(
            role=role, text="x", voice_id="v", start_s=start, end_s=end, words=(),
            kind="backchannel" if what == "backchannel" else "turn", cut=what == "cut",
        )
        for role, start, end, what in rows
    )  # fmt: skip
    return Speech(
        id="s", dialogue_id="s", persona_id="p", scenario_id="n", system_prompt="x",
        first_speaker="user", audio="0" * 64, num_samples=seconds * 24_000, turns=turns,
    )  # fmt: skip


def test_gaps_are_between_turns_and_not_after_a_cut():
    speech = spoken(
        ("user", 0, 2, "turn"),
        ("agent", 1, 1.5, "backchannel"),
        ("agent", 2.5, 5, "cut"),
        ("user", 4, 6, "turn"),
        ("agent", 5.5, 7, "turn"),
    )
    assert gaps_of(speech) == [0.5, -0.5]


def test_the_share_in_which_both_speak_counts_backchannels_and_cuts():
    speech = spoken(
        ("user", 0, 2, "turn"),
        ("agent", 1, 1.5, "backchannel"),
        ("agent", 2.5, 5, "cut"),
        ("user", 4, 6, "turn"),
        ("agent", 5.5, 7, "turn"),
    )
    assert overlap_of(speech) == pytest.approx((0.5 + 1 + 0.5) / 10)


def test_overlaps_are_found_whatever_spans_lie_within_others():
    speech = spoken(
        ("agent", 0, 9, "turn"),
        ("user", 1, 2, "backchannel"),
        ("user", 3, 4, "backchannel"),
        ("user", 5, 10, "turn"),
        ("agent", 9.5, 10, "turn"),
    )
    assert overlap_of(speech) == pytest.approx((1 + 1 + 4 + 0.5) / 10)
