"""Each measure of the pocket base's free runs on made-up rows, where it must say yes and no."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.pocket_base import Run, shares, told_facts
from duplex.frames import FRAME_SAMPLES
from duplex.streams import TEXT_EPAD, TEXT_PAD
from training.pocket.base_measures import (
    Question,
    collapsed,
    judge,
    place_to_cut,
    says_value,
    spoken_turns,
    yields,
)

WORDS = ["It", "is", "three", "dollars", "Sorry", "four", "not", "sure", "I'm"]
FIRST = 10  # id of the first word
REFUSALS = ("I'm not sure",)
ASKED = Question(10, 30, "price", "three dollars")
NEXT = Question(70, 90, "name", "Carl")


def decode(tokens):
    return " ".join(WORDS[token - FIRST] for token in tokens)


def row(*placed, num_frames=150):
    """A text row with words from a frame on, one a frame."""
    text = np.full(num_frames, TEXT_PAD)
    for start, words in placed:
        for place, word in enumerate(words.split()):
            text[start + place] = FIRST + WORDS.index(word)
    return text


def judged(text, question=ASKED):
    return judge([question, NEXT], text, decode, REFUSALS)[0]


def test_an_answer_stands_behind_its_question():
    assert judged(row((33, "It is three dollars"))).answered
    assert judged(row((28, "It"))).answered
    assert not judged(row()).answered
    assert not judged(row((12, "It is"))).answered, "that was before the question was asked"
    assert not judged(row((71, "It is"))).answered, "that is behind the next question"


def test_a_fact_is_right_word_for_word():
    assert judged(row((33, "It is three dollars"))).right is True
    assert judged(row((33, "It is four dollars"))).right is False
    assert judged(row((33, "three"), (40, "dollars"))).right is True
    early = row((11, "three dollars"), (33, "It is four dollars"))
    assert judged(early).right is False, "that was said before the question was out"
    assert judged(row()).right is None


def test_what_the_prompt_lacks_must_be_refused():
    lacking = Question(10, 30, "price", None)
    assert judged(row((33, "I'm not sure Sorry")), lacking).right is True
    assert judged(row((33, "It is three dollars")), lacking).right is False
    assert judged(row((33, "Sorry")), lacking).right is False, "that is no refusal"


def test_a_value_within_a_longer_one_was_not_said():
    times = ("half past seven", "eight", "half past eight")
    assert says_value("We open at seven.", "seven", times)
    assert not says_value("We open at half past seven.", "seven", times)
    assert says_value("Not at half past seven, at seven.", "seven", times)
    assert says_value("Half past seven.", "half past seven", ("seven",))
    assert not says_value("Twenty five dollars.", "five dollars", ("twenty five dollars",))


def test_padding_is_no_word():
    text = row()
    text[35:40] = TEXT_EPAD
    assert not judged(text).answered


def test_a_take_over_is_more_than_a_backchannel():
    assert judged(row((15, "It is three dollars"))).premature
    assert not judged(row((15, "It is"))).premature
    assert not judged(row((33, "It is three dollars"))).premature
    assert not judged(row((28, "It is three dollars"))).premature, "two frames early is in time"


def test_speech_that_was_under_way_is_no_take_over():
    assert not judged(row((6, " ".join(["It is three dollars"] * 4)))).premature
    assert judged(row((6, "It is"), (20, "It is three"))).premature


def speech(*spans, num_frames=100):
    active = np.zeros(num_frames, dtype=bool)
    for start, end in spans:
        active[start:end] = True
    return active


def test_who_stops_soon_yields():
    alone = speech((10, 60))
    assert yields(alone, speech((10, 25)), 20) is True
    assert yields(alone, speech((10, 29)), 20) is True
    assert yields(alone, speech((10, 60)), 20) is False
    assert yields(alone, speech((10, 32), (36, 60)), 20) is False
    assert yields(alone, speech((10, 25), (27, 60)), 20) is False, "a breath is no yielding"


def test_who_would_have_stopped_anyway_shows_nothing():
    assert yields(speech((10, 30)), speech((10, 22)), 20) is None


def test_the_cut_falls_into_speech_that_goes_on():
    assert place_to_cut(speech((5, 12), (30, 60)), 0, 100, into=8) == 38
    assert place_to_cut(speech((5, 12)), 0, 100, into=8) is None
    assert place_to_cut(speech((30, 60)), 35, 100, into=8) is None
    assert place_to_cut(speech((30, 60)), 0, 45, into=8) is None


def test_silence_is_a_collapse():
    questions = [ASKED, NEXT]
    assert collapsed(questions, row())
    assert collapsed([ASKED, NEXT, Question(110, 120, "name", "Carl")], row((33, "It is")))
    assert not collapsed(questions, row((33, "It is")))
    assert not collapsed([Question(10, 30, "a", "b")], row((33, "It")))


def test_text_and_sound_are_one_turn():
    text = row((10, "It is"), (60, "four"))
    turns = spoken_turns(text, speech((14, 30), (62, 70), num_frames=150))
    assert [(start, end) for start, end, _ in turns] == [(10, 30), (60, 70)]
    assert [decode(tokens) for *_, tokens in turns] == ["It is", "four"]


@pytest.mark.parametrize("num_frames", [1, 150])
def test_an_empty_run_has_no_turns(num_frames):
    assert spoken_turns(row(num_frames=num_frames), np.zeros(num_frames, dtype=bool)) == []


def a_run(*placed):
    """A run of two questions, whose sound names its frame, and what became of them."""
    text = row(*placed)
    samples = np.repeat(np.arange(len(text), dtype=np.float32), FRAME_SAMPLES)
    probe = SimpleNamespace(questions=(ASKED, NEXT), agent_voice="ada", sample=None)
    run = Run(probe, text, samples, np.zeros(len(text), dtype=bool))
    return run, judge(probe.questions, text, decode, REFUSALS)


def test_a_fact_that_is_told_sounds_from_its_question_to_the_next():
    run, answers = a_run((32, "It is three dollars"), (95, "It is four"))
    ((value, (text, samples, voice)),) = told_facts([run], [answers])
    assert (value, text, voice) == ("three dollars", "It is three dollars", "ada")
    assert (samples[0], samples[-1]) == (28, 69)
    assert told_facts(*zip(a_run((32, "It is four")), strict=True)) == []


def test_who_says_that_it_does_not_know_what_it_was_told_is_counted():
    run, answers = a_run((32, "I'm not sure"), (95, "It is four"))
    found = shares([run], [answers], [], REFUSALS)["refuses what the prompt holds"]
    assert (found["hits"], found["of"]) == (1, 2)
