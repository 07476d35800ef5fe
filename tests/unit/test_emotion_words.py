"""Emotions, intensity and confidence of sentences, worked out by hand from the definition."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.base import Emotion
from duplex.emotion_words import INTENSIFIERS, KEYWORDS, NEGATORS, emotion_of


@pytest.mark.parametrize(
    ("text", "emotion", "intensity", "confidence"),
    [
        ("I am so happy today!", "happy", 1.0, 1 / 2),
        ("That is TERRIBLE.", "sad", 1.0, 1 / 2),
        ("I hate this, it's disgusting.", "angry", 1.0, 2 / 3),
        ("I'm thrilled, this is amazing, wow.", "excited", 1.0, 3 / 4),
        ("That's fine.", "neutral", 1.0, 1 / 2),
        ("A large coffee, please.", "neutral", 1.0, 0.0),
        ("", "neutral", 1.0, 0.0),
        # intensifiers
        ("I am very happy.", "happy", 1.5, 1 / 2),
        ("I am really, very happy.", "happy", 1.5, 1 / 2),  # the comma ends the window
        ("I am really very happy.", "happy", 2.0, 1 / 2),
        ("I am really very extremely happy.", "happy", 2.0, 1 / 2),
        ("Really I am happy.", "happy", 1.0, 1 / 2),  # three words before it
        ("I'm absolutely furious and I hate it.", "angry", 1.25, 2 / 3),
        # negators
        ("I am not happy.", "sad", 0.5, 1 / 2),
        ("I'm not very happy.", "sad", 0.5, 1 / 2),
        ("I don’t love it.", "sad", 0.5, 1 / 2),
        ("I am not angry.", "neutral", 1.0, 0.0),
        ("Nobody is sad.", "neutral", 1.0, 0.0),
        ("Never excited.", "neutral", 1.0, 0.0),
        ("No, I love it.", "happy", 1.0, 1 / 2),
        ("I did not say I am happy.", "happy", 1.0, 1 / 2),  # four words before it
        ("It isn't fine.", "neutral", 1.0, 0.0),
        # two minds: the heavier one, of equals the first, and neutral never wins
        ("I'm happy but I'm very angry.", "angry", 1.5, 1.5 / 2.5 * 2 / 3),
        ("I'm angry but happy.", "angry", 1.0, 1 / 2 * 2 / 3),
        ("I'm happy but angry.", "happy", 1.0, 1 / 2 * 2 / 3),
        ("Okay, fine, okay, I hate it.", "angry", 1.0, 1 / 4 * 4 / 5),
    ],
)
def test_emotion_intensity_and_confidence(text, emotion, intensity, confidence):
    found = emotion_of(text)
    assert (found.emotion, found.intensity) == (emotion, intensity)
    assert found.confidence == pytest.approx(confidence, abs=1e-4)


def test_counts_are_of_what_is_left_after_negation():
    found = emotion_of("I am not happy, I am not sad, I am furious and mad. Nobody is excited. OK.")
    assert found.counts == {"sad": 1, "angry": 2, "neutral": 1}
    assert found.emotion == "angry"
    assert found.confidence == pytest.approx(2 / 3.5 * 4 / 5, abs=1e-4)


def test_the_seeds_words_are_all_there():
    wanted = {
        "happy": "happy wonderful fantastic love beautiful excellent awesome",
        "sad": "sad terrible awful disappointed lonely depressed miserable",
        "angry": "angry furious mad hate disgusted outraged hostile",
        "excited": "excited thrilled amazing energetic pumped passionate dynamic",
        "neutral": "okay fine normal calm peaceful regular standard",
    }
    for emotion, words in wanted.items():
        assert {KEYWORDS[word] for word in words.split()} == {emotion}
    assert {"very", "extremely", "incredibly", "absolutely", "really"} == INTENSIFIERS
    assert {"not", "no", "never", "neither", "nobody"} <= NEGATORS


def test_no_word_is_of_two_kinds():
    from duplex.emotion_words import _WORDS

    words = [word for text in _WORDS.values() for word in text.split()]
    assert len(words) == len(set(words)) == len(KEYWORDS)
    assert not (NEGATORS | INTENSIFIERS) & set(words)


PIECES = [*sorted(KEYWORDS)[::7], "not", "very", "really", "never", ",", ".", "coffee", "don't"]


@given(st.lists(st.sampled_from(PIECES), max_size=25).map(" ".join))
def test_ranges_hold_for_any_text(text):
    found = emotion_of(text)
    assert found.emotion in get_args(Emotion)
    assert 0.5 <= found.intensity <= 2.0
    assert 0.0 <= found.confidence < 1.0
    assert (found.confidence == 0) == (not found.counts)
    assert all(count > 0 for count in found.counts.values())
