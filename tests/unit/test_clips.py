"""Conversations on the frame grid: cut at pauses, shifted, put together."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from duplex.clips import (
    assemble,
    cut_windows,
    shift_turns,
    text_digest,
    text_turns,
    turn_frames,
    turn_spans,
)  # fmt: skip
from duplex.records import SpokenTurn, Word


def turn(role, start, end, text="a b"):
    """A turn of frames [start, end), its words evenly spread."""
    words = text.split()
    step = (end - start) / len(words)
    return SpokenTurn(
        role=role,
        text=text,
        voice_id=f"{role}-voice",
        start_s=round(start * 0.08, 6),
        end_s=round(end * 0.08, 6),
        words=tuple(
            Word(text=w, start_s=(start + i * step) * 0.08, end_s=(start + (i + 1) * step) * 0.08)
            for i, w in enumerate(words)
        ),
    )


@st.composite
def conversations(draw):
    turns, cursor = [], draw(st.integers(0, 10))
    for index in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 40))
        turns.append(turn("agent" if index % 2 else "user", cursor, cursor + length))
        cursor += length + draw(st.integers(-3, 20))
        cursor = max(cursor, 0)
    end = max(round(t.end_s / 0.08) for t in turns)
    return tuple(sorted(turns, key=lambda t: t.start_s)), end + draw(st.integers(0, 10))


@given(conversations(), st.integers(45, 200))
def test_windows_hold_whole_turns_within_the_budget(case, budget):
    turns, num_frames = case
    windows = cut_windows(turns, num_frames, budget)
    if windows is None:
        return
    assert all(0 <= start < end <= num_frames and end - start <= budget for start, end in windows)
    assert all(a[1] <= b[0] for a, b in pairwise(windows))
    for one in turns:
        start, end = turn_frames(one)
        assert any(a <= start and end <= b for a, b in windows), (windows, start, end)


def test_only_speech_without_a_pause_cannot_be_cut():
    unbroken = (turn("user", 0, 40), turn("agent", 38, 90))
    assert cut_windows(unbroken, 100, 80) is None
    assert cut_windows(unbroken, 100, 100) == [(0, 100)]


@given(conversations(), st.integers(0, 100))
def test_shifting_keeps_durations_words_and_the_frame_grid(case, start):
    turns, _ = case
    shifted = shift_turns(turns, start * 0.08, float("inf"))
    kept = [one for one in turns if turn_frames(one)[0] >= start]
    assert [turn_frames(one) for one in shifted] == [
        (a - start, b - start) for a, b in map(turn_frames, kept)
    ]
    assert [w.text for one in shifted for w in one.words] == [
        w.text for one in kept for w in one.words
    ]


def tokens_of(text):
    return [ord(c) for c in text if c != " "]


@given(conversations())
def test_every_mode_is_given_the_same_tokens(case):
    turns, num_frames = case
    plain = text_turns(turns, num_frames, tokens_of)
    by_word = text_turns(turns, num_frames, tokens_of, by_word=True)
    assert [t.tokens for t in plain] == [t.tokens for t in by_word]
    assert all(t.start <= frame for t in by_word for _, frame in t.words)
    assert len(plain) == sum(one.role == "agent" for one in turns)


def test_spans_count_the_prompt():
    spans = turn_spans((turn("agent", 3, 9), turn("user", 10, 30)), 17, 40)
    assert [(s.label, s.start, s.end) for s in spans] == [("agent", 20, 26), ("user", 27, 40)]


def test_rows_stand_in_their_places():
    audio = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    head = np.full((17, 2), 9)
    codes = assemble(head, np.array([4, 5, 6]), audio)
    assert codes.shape == (17, 5) and (codes[:, :2] == 9).all()
    assert codes[0, 2:].tolist() == [4, 5, 6]
    assert np.array_equal(codes[1:9, 2:], audio[0]) and np.array_equal(codes[9:, 2:], audio[1])
    assert assemble(None, np.array([4, 5, 6]), audio).shape == (17, 3)


def test_texts_are_the_same_whatever_the_case_the_spaces_and_the_voice():
    one = turn("agent", 0, 5, "Two  shots")
    same = turn("agent", 9, 30, "two shots").model_copy(update={"voice_id": "other"})
    assert text_digest([one]) == text_digest([same])
    assert text_digest([one]) != text_digest([turn("user", 0, 5, "Two shots")])
