"""Each way to fall apart, on texts and patterns of speech whose answers are worked out by hand."""

import zlib

import numpy as np
import pytest

from duplex.degeneration import (
    Loop,
    compression_ratio,
    foreign_share,
    loops,
    silence_collapse,
    stretches,
    unspoken_share,
    unwritten_share,
)
from duplex.metrics import Segment

CLEAN = (
    "I would like a large mocha, please, and could you leave out the cream? I am allergic to it."
)


def frames(pattern: str) -> np.ndarray:
    return np.array([c == "#" for c in pattern], dtype=bool)


def turns_of(pattern: str) -> list[Segment]:
    """The user's turns: each run of one digit is one."""
    found = []
    for digit in sorted(set(pattern) - {"."}):
        found.append(Segment(pattern.index(digit), pattern.rindex(digit) + 1))
    return found


# -- text


def test_the_ratio_is_whispers():
    assert compression_ratio(CLEAN) == len(CLEAN) / len(zlib.compress(CLEAN.encode()))
    assert compression_ratio("é" * 32) == 64 / len(zlib.compress(("é" * 32).encode()))


def test_a_loop_compresses_and_a_reply_does_not():
    stuck = compression_ratio("Thank you very much. " * 12)
    clean = compression_ratio(CLEAN)
    assert stuck and clean
    assert clean < 1.6 and stuck > 2.4


def test_too_little_text_has_no_ratio():
    assert compression_ratio("a" * 63) is None
    assert compression_ratio("a" * 64) is not None
    assert compression_ratio("") is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("No, no, NO, thanks.", [Loop(("no",), 3, 0)]),
        ("No, no, thanks.", []),
        ("I want, I want, I want tea.", [Loop(("i", "want"), 3, 0)]),
        ("Well, a b c d a b c d a b c d e", [Loop(("a", "b", "c", "d"), 3, 1)]),
        ("a b c d e a b c d e a b c d e", []),  # five words are no short loop
        ("ha ha ha ha ha ha", [Loop(("ha",), 6, 0)]),  # and not three times "ha ha"
        ("a a b a a b a a b c c c", [Loop(("a", "a", "b"), 3, 0), Loop(("c",), 3, 9)]),
        ("x b a b a b a a a", [Loop(("b", "a"), 3, 1)]),  # the last three share a word with it
        ("a b a b a", []),
        ("", []),
    ],
)
def test_loops(text, found):
    assert list(loops(text)) == found


def test_how_many_times_and_how_many_words_can_be_asked():
    assert loops("very very good", times=2) == (Loop(("very",), 2, 0),)
    assert loops("a b a b a b", order=1) == ()


@pytest.mark.parametrize(
    ("text", "script", "share"),
    [
        ("Café, please! 25", "LATIN", 0.0),
        ("да ok", "LATIN", 0.5),
        ("да ok", "CYRILLIC", 0.5),
        ("咖啡", "LATIN", 1.0),
        ("\uff34\uff25\uff21", "LATIN", 0.0),  # full-width Latin
        ("e\u0301te\u0301", "LATIN", 0.0),
        ("3.50 !", "LATIN", None),
        ("", "LATIN", None),
    ],
)
def test_letters_of_another_script(text, script, share):
    assert foreign_share(text, script) == share


# -- silence

#        lead-in, then six turns of two frames with four frames behind each
SIX = "..11....22....33....44....55....66...."
ANSWERED = "....##....##....##....##....##....##.."


@pytest.mark.parametrize(
    ("agent", "user", "found"),
    [
        (ANSWERED, SIX, "speaks"),
        ("....##....##....##....##..............", SIX, "collapses"),
        ("....##....##....##....##....##........", SIX, "speaks"),  # one of the last two is met
        ("##....................................", SIX, "collapses"),  # it only greets
        ("......................................", SIX, "silent"),
        # It speaks over the fifth turn's start only, and has stopped by its end: not met.
        ("....##....##....##....#####...........", SIX, "collapses"),
        # It begins within the fifth turn and stops before its end: met.
        ("....##....##....##....##...#..........", SIX, "speaks"),
        # It talks from the fourth turn on without a pause.
        ("......................################", SIX, "speaks"),
        # It speaks behind the last turn only.
        ("....................................##", SIX, "speaks"),
        # Seven turns: the last three are asked, and the fifth was met.
        ("..#..#..#..#..#......", "11.22.33.44.55.66.77.", "speaks"),
        ("..#..#..#..#.........", "11.22.33.44.55.66.77.", "collapses"),
        ("##......", "..11.22.", "collapses"),
        ("##..", "..11", None),
        ("....", "..11", "silent"),
        ("##..", "....", None),
    ],
)
def test_whether_the_agent_keeps_talking(agent, user, found):
    assert len(agent) == len(user)
    assert silence_collapse(frames(agent), turns_of(user)) == found


# -- text and speech


def test_words_are_spoken_where_speech_is_near():
    agent = frames("..........####..........")  # speech in frames 10 to 13
    words = [(9, "a"), (4, "b"), (3, "c"), (19, "d"), (20, "e")]
    assert unspoken_share(words, agent) == 2 / 5  # c and e are seven frames off
    assert unspoken_share(words, agent, near_frames=0) == 1.0
    assert unspoken_share([(40, "behind the end")], agent) == 1.0
    assert unspoken_share([], agent) is None


def test_speech_is_written_where_a_word_is_near_its_stretch():
    #      0         10        20        30        40
    agent = frames("####......######.........................##")
    assert unwritten_share([(0, "all"), (1, "of it")], agent) == pytest.approx(2 / 12)
    assert unwritten_share([(0, "all")], agent, join_frames=5) == pytest.approx(8 / 12)
    assert unwritten_share([(21, "late")], agent) == pytest.approx(2 / 12)
    assert unwritten_share([(22, "too late")], agent) == 1.0
    assert unwritten_share([(35, "early")], agent) == pytest.approx(10 / 12)
    assert unwritten_share([], agent) == 1.0
    assert unwritten_share([(0, "silent")], frames("....")) is None


def test_stretches_bridge_short_pauses():
    active = frames("##..##...##")
    assert stretches(active, 2) == [Segment(0, 6), Segment(9, 11)]
    assert stretches(active, 1) == [Segment(0, 2), Segment(4, 6), Segment(9, 11)]
    assert stretches(active, 3) == [Segment(0, 11)]
    assert stretches(frames("..."), 3) == []
