"""Measures of a free run, worked out by hand, and the verdict over them."""

import numpy as np
import pytest

from duplex.streams import TEXT_EPAD, TEXT_PAD, ZERO_TOKEN
from training.collapse import judge, longest_loop, measure_speech, repeated_share

SILENCE = np.arange(8)


def spoken(tokens, frames=50, due=0, codes=None):
    """A run of `frames` frames that says `tokens`, one a frame, after two frames of padding."""
    text = np.full(frames, TEXT_PAD)
    text[2 : 2 + len(tokens)] = tokens
    if codes is None:
        codes = np.random.default_rng(len(tokens)).integers(20, 60, (8, frames))
    return measure_speech(text, codes, due_frame=due, silence=SILENCE)


QUIET = np.repeat(SILENCE[:, None], 50, axis=1)
SENTENCE = list(range(10, 30))  # 20 different tokens


def test_measures_of_a_run_by_hand():
    text = np.array([TEXT_PAD, TEXT_EPAD, 9, 8, ZERO_TOKEN, 9, TEXT_PAD, TEXT_PAD])
    codes = np.repeat(SILENCE[:, None], 8, axis=1)
    codes[0, :2] = 5  # two frames of another semantic code
    codes[3, 2] = 5  # one frame that differs in another codebook alone
    found = measure_speech(text, codes, due_frame=4, silence=SILENCE)
    assert (found.num_frames, found.text_tokens) == (8, 3)
    assert found.tokens_per_s == pytest.approx(3 / 0.64)
    assert found.padding_share == pytest.approx(5 / 8)
    assert found.silent_share == pytest.approx(5 / 8)
    assert found.commonest_code_share == pytest.approx(6 / 8)
    assert found.first_word_frames == -2, "it began two frames before its turn"
    assert found.repeated_share is None and found.loop_tokens == 1


def test_silence_and_unknown_silence():
    found = measure_speech(np.full(4, TEXT_PAD), np.zeros((8, 4), dtype=int))
    assert found.silent_share is None and found.first_word_frames is None
    assert found.text_tokens == 0 and found.padding_share == 1
    for text, codes in ((np.zeros(0), np.zeros((8, 0))), (np.zeros(3), np.zeros((8, 4)))):
        with pytest.raises(ValueError, match="text must be"):
            measure_speech(text, codes)


def test_repeats_by_hand():
    assert repeated_share([1, 2, 3]) is None
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert longest_loop([1, 2, 1, 2, 1]) == 3
    assert longest_loop([5, 5, 5, 5]) == 3
    assert longest_loop(list(range(9)) * 2) == 0, "a period of nine is longer than looked for"
    assert longest_loop([]) == 0


@pytest.mark.parametrize(
    ("runs", "references", "collapse"),
    [
        ([SENTENCE], [SENTENCE], None),
        ([[]], [SENTENCE], "silence"),
        ([SENTENCE[:2]], [SENTENCE], None),  # a tenth of it is still speech
        ([SENTENCE[:1]], [SENTENCE], "silence"),
        ([[]], [[]], None),  # nothing was to be said
        ([[]], [[7, 8, 9]], None),  # a reference too short to miss
        ([SENTENCE, [], []], [SENTENCE] * 3, "silence"),
        ([SENTENCE, SENTENCE, []], [SENTENCE] * 3, None),
        ([[7] * 20], [SENTENCE], "repetition"),
        ([[7, 8, 9] * 7], [SENTENCE], "repetition"),
        ([[7] * 20], [[7] * 20], None),  # so are the data
        ([[7] * 15], [SENTENCE], None),  # too short to say
        ([[7] * 20, SENTENCE], [SENTENCE] * 2, None),  # half is not most
    ],
)
def test_the_verdict(runs, references, collapse):
    found = judge([spoken(run) for run in runs], [spoken(ref) for ref in references])
    assert found.collapse == collapse, found.reason


def test_text_without_speech_is_a_silence():
    mute, loud = spoken(SENTENCE, codes=QUIET), spoken(SENTENCE)
    assert judge([mute], [loud]).collapse == "silence"
    assert "100% of the agent's frames" in judge([mute], [loud]).reason
    assert judge([mute], [mute]).collapse is None, "so are the data"


def test_no_run_is_no_collapse():
    assert judge([], []).collapse is None
