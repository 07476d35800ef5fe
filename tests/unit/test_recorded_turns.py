"""Turns of a recording: where they end, that nothing is lost, and what a transcript must be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.errors import RecordError
from duplex.records import Word
from pipeline.recorded_turns import (
    both_sides_note,
    recogniser_windows,
    speaker_runs,
    transcript_notes,
    turns_of_words,
    words_by_role,
    words_off_speech,
)

VOICES = {"agent": "recorded.ann", "user": "recorded.user"}


def words(*times):
    return [Word(text=f"w{n}", start_s=start, end_s=end) for n, (start, end) in enumerate(times)]


def test_a_turn_ends_at_a_long_pause_or_where_the_other_side_takes_the_floor():
    agent = [(0.0, 0.5), (0.6, 1.0), (1.9, 2.4), (3.5, 4.0)]
    assert [run[1:] for run in speaker_runs({"agent": agent, "user": []})] == [(0, 3), (3, 4)]
    taken = speaker_runs({"agent": agent, "user": [(1.2, 1.6)]})
    assert taken == [("agent", 0, 2), ("user", 0, 1), ("agent", 2, 3), ("agent", 3, 4)]


def test_a_backchannel_over_speech_splits_nothing():
    spans = {"agent": [(0.0, 2.0), (2.05, 4.0)], "user": [(1.0, 1.3), (2.02, 2.2)]}
    assert speaker_runs(spans) == [("agent", 0, 2), ("user", 0, 2)]


times = st.lists(
    st.tuples(st.floats(0, 60), st.floats(0, 3)).map(lambda t: (t[0], t[0] + t[1])), max_size=20
).map(sorted)


@given(agent=times, user=times)
def test_each_word_is_in_one_turn_and_turns_are_in_order(agent, user):
    sides = {"agent": words(*agent), "user": words(*user)}
    turns = turns_of_words(sides, VOICES)
    for role in ("agent", "user"):
        kept = [word for turn in turns if turn.role == role for word in turn.words]
        assert kept == sides[role]
    assert [turn.start_s for turn in turns] == sorted(turn.start_s for turn in turns)
    assert all(turn.voice_id == VOICES[turn.role] for turn in turns)
    assert all(w.start_s >= t.start_s and w.end_s <= t.end_s for t in turns for w in t.words)


@pytest.mark.parametrize(
    "transcript",
    [
        [], "words", None, {}, {"alignments": {}}, {"alignments": [1]},
        {"alignments": [["a", [0, 1]]]}, {"alignments": [["a", [0], "SPEAKER_MAIN"]]},
        {"alignments": [["a", ["0", "1"], "SPEAKER_MAIN"]]}, {"alignments": [[1, [0, 1], "S"]]},
        {"alignments": [["a", [0, float("nan")], "S"]]}, {"alignments": [["a", [0, 1], None]]},
        {"alignments": [["a", [True, 1], "S"]]}, {"alignments": [["a", [2, 1], "S"]]},
        {"alignments": [["a", [-1, 1], "S"]]}, {"alignments": [["a", [9, 11], "S"]]},
    ],
)  # fmt: skip
def test_a_transcript_of_another_shape_is_refused(transcript):
    with pytest.raises(RecordError, match="must"):
        words_by_role(transcript, 10.0)


def test_a_transcript_is_sorted_and_its_blank_words_are_left_out():
    items = [["b ", [2, 3], "SPEAKER_MAIN"], [" ", [1, 1], "SPEAKER_MAIN"],
             ["a", [0, 1], "SPEAKER_MAIN"], ["u", [0, 1], "SPEAKER_OTHER"]]  # fmt: skip
    found = words_by_role({"alignments": items}, 10.0)
    assert [word.text for word in found["agent"]] == ["a", "b"]
    assert [word.text for word in found["user"]] == ["u"]


@given(spans=times)
def test_windows_hold_all_speech_and_are_no_longer_than_asked(spans):
    apart = []
    for start, end in spans:
        if end > start and (not apart or start >= apart[-1][1]):
            apart.append((start, end))
    windows = recogniser_windows(apart, 10.0)
    assert all(any(w[0] <= s and e <= w[1] for w in windows) for s, e in apart)
    assert all(end - start <= 10.0 for start, end in windows)


def test_words_far_from_speech_are_named_and_swapped_sides_suspected():
    near, far = words((1.0, 1.4), (2.2, 2.6)), words((5.0, 5.4))
    speech = [(1.0, 1.5), (2.0, 2.1)]
    assert words_off_speech(near, speech) == []
    assert words_off_speech(far, speech) == far
    assert transcript_notes({"agent": near, "user": near}, {"agent": speech, "user": speech}) == []
    (note, _) = transcript_notes({"agent": far, "user": near}, {"agent": speech, "user": []})
    assert note.startswith("1 of the agent's 1 words") and "swapped" not in note
    (note,) = transcript_notes({"agent": near, "user": []}, {"agent": [], "user": speech})[:1]
    assert "swapped" in note


def test_channels_that_always_speak_together_are_noted():
    conversation = {"agent": [(0.0, 3.0), (6.0, 9.0)], "user": [(2.5, 6.5)]}
    assert both_sides_note(conversation) == []
    assert both_sides_note({"agent": [], "user": []}) == []
    (note,) = both_sides_note({"agent": [(0.0, 3.0), (4, 6)], "user": [(0.1, 2.9), (4, 6)]})
    assert "96%" in note
