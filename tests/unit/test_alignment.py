"""Alignment modes: order kept, nothing lost while there are frames, exact length, idempotent."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.alignment import TextTurn, align, written_words
from duplex.streams import TEXT_EPAD, TEXT_PAD, ZERO_TOKEN

MODES = ("onset", "word", "uniform")


@st.composite
def turns_and_length(draw):
    """Sorted turns, some overlapping or with more tokens than frames, and a length."""
    turns, start = [], 0
    for _ in range(draw(st.integers(0, 6))):
        start += draw(st.integers(0, 20))
        length = draw(st.integers(1, 30))
        words = draw(st.lists(st.lists(st.integers(4, 999), min_size=1, max_size=5), max_size=12))
        gaps = draw(st.lists(st.integers(0, 6), min_size=len(words), max_size=len(words)))
        frames = start + np.cumsum([0, *gaps[1:]])
        indices = np.cumsum([0, *(len(word) for word in words)])
        tokens = tuple(token for word in words for token in word)
        placed = tuple((int(i), int(f)) for i, f in zip(indices, frames, strict=False))[
            : len(words)
        ]
        turns.append(TextTurn(start, start + length, tokens, placed))
    end = max((turn.end for turn in turns), default=1)
    return turns, end + draw(st.integers(0, 30))


def written(row, padding=TEXT_PAD):
    return [int(token) for token in row if token not in (padding, TEXT_EPAD)]


@given(turns_and_length(), st.sampled_from(MODES), st.sampled_from([TEXT_PAD, ZERO_TOKEN]))
def test_order_is_kept_and_what_is_missing_is_counted(case, mode, padding):
    turns, num_frames = case
    result = align(turns, num_frames, mode, padding=padding)
    said = [token for turn in turns for token in turn.tokens]
    found = written(result.row, padding)
    assert result.row.shape == (num_frames,)
    assert found == said[: len(found)]
    assert len(found) + result.dropped == len(said)


@given(turns_and_length(), st.sampled_from(MODES))
def test_nothing_is_dropped_while_a_frame_is_left(case, mode):
    turns, num_frames = case
    total = sum(len(turn.tokens) for turn in turns)
    starts = [frame for turn in turns for _, frame in turn.words]
    last = max([turn.end for turn in turns] + starts, default=0)
    assert align(turns, max(num_frames, last + total + 1), mode).dropped == 0


@given(turns_and_length(), st.sampled_from(MODES))
def test_no_token_stands_before_its_turn_or_its_word(case, mode):
    turns, num_frames = case
    row = align(turns, num_frames, mode).row
    frames = iter(np.flatnonzero((row != TEXT_PAD) & (row != TEXT_EPAD)))
    for turn in turns:
        bounds = [*(index for index, _ in turn.words), len(turn.tokens)]
        for (begin, end), (_, word_frame) in zip(pairwise(bounds), turn.words, strict=True):
            for _ in range(begin, end):
                frame = next(frames, None)
                earliest = word_frame if mode == "word" else turn.start
                assert frame is None or frame >= earliest


@given(turns_and_length(), st.sampled_from(MODES))
def test_what_is_aligned_stays_where_it_is(case, mode):
    """Each token taken as a word of its own at its frame: aligned by word, it stays there."""
    turns, num_frames = case
    row = align(turns, num_frames, mode).row
    frames = np.flatnonzero((row != TEXT_PAD) & (row != TEXT_EPAD))
    again = [TextTurn(int(f), int(f) + 1, (int(row[f]),), ((0, int(f)),)) for f in frames]
    result = align(again, num_frames, "word")
    assert (result.late, result.dropped) == (0, 0)
    assert written(result.row) == written(row)
    assert np.array_equal(result.row[frames], row[frames])
    assert np.array_equal(align(again, num_frames, "onset").row[frames], row[frames])


@given(turns_and_length())
def test_padding_changes_nothing_but_the_padding(case):
    turns, num_frames = case
    for mode in MODES:
        pad, zero = (align(turns, num_frames, mode, padding=p) for p in (TEXT_PAD, ZERO_TOKEN))
        assert (pad.late, pad.dropped) == (zero.late, zero.dropped)
        assert np.array_equal(np.where(pad.row == TEXT_PAD, ZERO_TOKEN, pad.row), zero.row)


def test_tokens_stand_one_a_frame_from_the_onset():
    result = align([TextTurn(3, 13, (7, 8, 9))], 15)
    assert result.row.tolist() == [3, 3, 3, 7, 8, 9, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert (result.late, result.dropped) == (0, 0)


def test_fast_speech_goes_on_after_the_window_and_is_counted_late():
    tokens = tuple(range(10, 16))
    result = align([TextTurn(0, 10, tokens)], 10)
    assert result.row[:6].tolist() == list(tokens)
    assert result.late == 3


def test_drop_cuts_at_the_window_as_the_predecessor_did():
    turns = [TextTurn(0, 10, tuple(range(10, 16))), TextTurn(12, 14, (20, 21))]
    result = align(turns, 14, drop=True, padding=ZERO_TOKEN)
    # max(1, int(frames * 0.3)) frames of each turn: 3 of 10, 1 of 2.
    assert result.row.tolist() == [10, 11, 12] + [-1] * 9 + [20, -1]
    assert (result.late, result.dropped) == (0, 4)
    with pytest.raises(ValueError, match="onset"):
        align(turns, 14, "uniform", drop=True)


def test_uniform_is_the_predecessors_first_form():
    turn = TextTurn(2, 12, (7, 8, 9))
    row = align([turn], 14, "uniform").row
    expected = [2 + int(j * 10 / 3) for j in range(3)]
    assert np.flatnonzero(row != TEXT_PAD).tolist() == expected


def test_a_word_stands_at_its_time_with_epad_before_it():
    turn = TextTurn(2, 14, (7, 8, 9, 5), ((0, 2), (2, 8), (3, 9)))
    row = align([turn], 14, "word").row
    # EPAD only where the frame before is padding: the third word follows the second directly.
    assert row.tolist() == [3, 0, 7, 8, 3, 3, 3, 0, 9, 5, 3, 3, 3, 3]


def test_a_word_at_the_first_frame_has_no_epad():
    assert align([TextTurn(0, 4, (7,), ((0, 0),))], 4, "word").row.tolist() == [7, 3, 3, 3]


@pytest.mark.parametrize("words", [(), ((1, 0),), ((0, 3), (1, 2)), ((0, 0), (5, 2))])
def test_words_that_do_not_cover_their_tokens_are_refused(words):
    with pytest.raises(ValueError, match="must cover"):
        align([TextTurn(0, 9, (7, 8), words)], 9, "word")


@pytest.mark.parametrize("turn", [TextTurn(-1, 2, ()), TextTurn(2, 2, ()), TextTurn(3, 11, ())])
def test_a_turn_outside_the_frames_is_refused(turn):
    with pytest.raises(ValueError, match="must lie in"):
        align([turn], 10)


def test_a_texts_words_take_the_times_of_their_letters():
    text = "It's 7 o'clock — $3.50, please!"
    timed = [("its", 0.5, 0.8), ("7", 0.9, 1.1), ("o", 1.2, 1.3), ("clock", 1.4, 1.9),
             ("350", 2.0, 2.5), ("PLEASE", 3.0, 3.5)]  # fmt: skip
    words = written_words(text, timed)
    assert [word for word, *_ in words] == text.split()
    assert [start for _, start, _ in words] == [0.5, 0.9, 1.2, 1.2, 2.0, 3.0]
    assert [end for *_, end in words] == [0.8, 1.1, 1.9, 1.9, 2.5, 3.5]


def test_words_that_do_not_spell_the_text_are_refused():
    with pytest.raises(ValueError, match="spell"):
        written_words("two shots", [("too", 0.1, 0.2), ("shots", 0.4, 0.5)])


@given(st.lists(st.text("abc'., ", min_size=1, max_size=6), max_size=8))
def test_every_word_of_the_text_is_there_in_order(parts):
    text = " ".join(parts)
    timed = [(word, 0.1 * i, 0.1 * i + 0.1) for i, word in enumerate(text.split())]
    words = written_words(text, timed)
    assert [word for word, *_ in words] == text.split()
    starts = [start for _, start, _ in words]
    assert starts == sorted(starts)
    assert all(start <= end for _, start, end in words)
