"""Onset alignment: order kept, no token lost while there are frames, exact length."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.alignment import TextTurn, align
from duplex.streams import TEXT_PAD


@st.composite
def turns_and_length(draw):
    """Sorted turns, some overlapping or with more tokens than frames, and a length."""
    turns, start = [], 0
    for _ in range(draw(st.integers(0, 6))):
        start += draw(st.integers(0, 20))
        length = draw(st.integers(1, 30))
        tokens = draw(st.lists(st.integers(4, 999), max_size=40))
        turns.append(TextTurn(start, start + length, tuple(tokens)))
    end = max((turn.end for turn in turns), default=1)
    return turns, end + draw(st.integers(0, 30))


@given(turns_and_length(), st.floats(0.01, 1))
def test_order_is_kept_and_what_is_missing_is_counted(case, fraction):
    turns, num_frames = case
    result = align(turns, num_frames, onset_fraction=fraction)
    said = [token for turn in turns for token in turn.tokens]
    written = [int(token) for token in result.row if token != TEXT_PAD]
    assert result.row.shape == (num_frames,)
    assert written == said[: len(written)]
    assert len(written) + result.dropped == len(said)


@given(turns_and_length())
def test_nothing_is_dropped_while_a_frame_is_left(case):
    turns, num_frames = case
    total = sum(len(turn.tokens) for turn in turns)
    last_start = turns[-1].start if turns else 0
    roomy = align(turns, max(num_frames, last_start + total), onset_fraction=0.3)
    assert roomy.dropped == 0


@given(turns_and_length())
def test_no_token_stands_before_its_turn(case):
    turns, num_frames = case
    row = align(turns, num_frames, onset_fraction=0.3).row
    frames = iter(np.flatnonzero(row != TEXT_PAD))
    for turn in turns:
        for _ in turn.tokens:
            frame = next(frames, None)
            assert frame is None or frame >= turn.start


def test_tokens_stand_one_a_frame_from_the_onset():
    result = align([TextTurn(3, 13, (7, 8, 9))], 15, onset_fraction=0.3)
    assert result.row.tolist() == [3, 3, 3, 7, 8, 9, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert (result.late, result.dropped) == (0, 0)


def test_fast_speech_goes_on_after_the_window_and_is_counted_late():
    tokens = tuple(range(10, 16))
    result = align([TextTurn(0, 10, tokens)], 10, onset_fraction=0.3)
    assert result.row[:6].tolist() == list(tokens)
    assert result.late == 3


@pytest.mark.parametrize("turn", [TextTurn(-1, 2, ()), TextTurn(2, 2, ()), TextTurn(3, 11, ())])
def test_a_turn_outside_the_frames_is_refused(turn):
    with pytest.raises(ValueError, match="must lie in"):
        align([turn], 10)
