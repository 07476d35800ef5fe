"""Interruptions and backchannels on the timeline: who stops where, and what was said at all."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.alignment import written_words
from duplex.characters import GapRange
from duplex.config_data import TimelineSection
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE, frames_covering_seconds
from duplex.mixing import (
    BACKCHANNEL_DELAY_S,
    CHANNELS,
    FINISH_WORD_S,
    HEARD_SHARE,
    VoicedBackchannel,
    VoicedTurn,
    mix_turns,
)
from duplex.records import Word

WORD_S, PAUSE_S = 0.25, 0.05
QUICK = TimelineSection(yield_ms=(100, 100))


def other(role):
    return CHANNELS[1 - CHANNELS.index(role)]


def sound(seconds, seed=0):
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE))
    noise[noise == 0] = 0.1
    return noise.astype(np.float32)


def said(role, text, seed=0, **changes):
    """A turn whose words last .25 s, .05 s apart."""
    words = tuple(
        Word(
            text=word.strip(".,"),
            start_s=round(index * (WORD_S + PAUSE_S), 6),
            end_s=round(index * (WORD_S + PAUSE_S) + WORD_S, 6),
        )
        for index, word in enumerate(text.split())
    )
    return VoicedTurn(
        role, text, f"voice-{role}", sound(words[-1].end_s + 0.04, seed), words, **changes
    )


def hum(role, after_word, seconds=0.3):
    words = (Word(text="mm-hm", start_s=0, end_s=seconds),)
    return VoicedBackchannel("Mm-hm.", f"voice-{role}", after_word, sound(seconds, 9), words)


def mixed(turns, seed=1, section=QUICK):
    return mix_turns(
        turns,
        gap_after_user=GapRange(low=2, high=5),
        gap_other=GapRange(low=7, high=9),
        rng=random.Random(seed),
        loudness_dbfs=-24.0,
        lead_in_s=0.0,
        tail_s=0.4,
        section=section,
    )


EIGHT = "one, two three four five six seven eight."


def test_the_next_turn_starts_in_the_first_frame_after_the_word_that_it_cuts():
    first, second = mixed([said("user", EIGHT, cut_after_words=3), said("agent", "No.")]).turns
    assert first.words[2].end_s == pytest.approx(0.85)
    assert second.start_s == pytest.approx(0.88)  # frame 11
    assert first.cut and not second.cut


def test_who_is_cut_goes_on_for_a_moment_and_finishes_the_word():
    turns = [said("user", EIGHT, cut_after_words=3), said("agent", "No, no.")]
    for yield_ms, end_s, text in (
        (100, 1.15, "one, two three four"),  # .98: the fourth word takes .17 s more, yet ...
        (200, 1.15, "one, two three four"),
        (300, 1.18, "one, two three four"),  # in the pause
        (400, 1.28, "one, two three four"),  # .08 of the fifth word: less than half
        (450, 1.45, "one, two three four five"),  # .12 to go: finished
    ):
        section = TimelineSection(yield_ms=(yield_ms, yield_ms))
        first = mixed(turns, section=section).turns[0]
        if yield_ms == 100:  # ... that is too long to finish it
            end_s, text = 0.98, "one, two three"
        assert (round(first.end_s, 3), first.text) == (end_s, text)
        assert [word.text for word in first.words] == text.split()


def test_a_cut_turn_ends_softly_and_silent_after_that():
    timeline = mixed([said("user", EIGHT, cut_after_words=3), said("agent", EIGHT)])
    end = round(timeline.turns[0].end_s * SAMPLE_RATE)
    user = timeline.audio[CHANNELS.index("user")]
    assert not user[end:].any()
    loudness = np.abs(user[end - 2400 : end - 300]).mean()
    assert 0 < np.abs(user[end - 20 : end]).mean() < 0.15 * loudness


def test_a_cut_at_the_last_word_cuts_nothing():
    first, second = mixed([said("user", EIGHT, cut_after_words=8), said("agent", "No.")]).turns
    assert not first.cut
    assert first.text == EIGHT
    assert second.start_s == frames_covering_seconds(first.words[-1].end_s) * 0.08


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([said("user", EIGHT, cut_after_words=3), said("user", "No.")], "other side must cut in"),
        ([said("user", EIGHT), said("agent", "No.", cut_after_words=1)], "nobody cuts in"),
        ([said("user", EIGHT, cut_after_words=9), said("agent", "No.")], "within the turn's 8"),
        (
            [replace(said("user", EIGHT, cut_after_words=3), words=()), said("agent", "No.")],
            "must spell the turn's text",
        ),
    ],
)
def test_a_cut_that_cannot_be_made_is_an_error(turns, message):
    with pytest.raises(ValueError, match=message):
        mixed(turns)


def test_a_backchannel_stands_on_the_other_channel_after_its_word_and_softer():
    turn = said("user", EIGHT, backchannels=(hum("agent", 3),))
    timeline = mixed([turn, said("agent", "No.")])
    first, heard, second = timeline.turns
    assert (heard.kind, heard.role, heard.text) == ("backchannel", "agent", "Mm-hm.")
    assert first.kind == second.kind == "turn"
    after = first.words[2].end_s
    assert after <= heard.start_s <= after + BACKCHANNEL_DELAY_S + 0.08
    assert heard.words[0].start_s == heard.start_s
    agent = timeline.audio[CHANNELS.index("agent")]
    levels = [
        np.sqrt(np.mean(agent[slice(*span_of(one))].astype(float) ** 2)) for one in (heard, second)
    ]
    assert 20 * np.log10(levels[0] / levels[1]) == pytest.approx(-6, abs=0.01)


def test_a_backchannel_changes_no_turn():
    bare = mixed([said("user", EIGHT), said("agent", "No.")]).turns
    turn = said("user", EIGHT, backchannels=(hum("agent", 2), hum("agent", 5)))
    with_them = mixed([turn, said("agent", "No.")]).turns
    assert tuple(one for one in with_them if one.kind == "turn") == bare
    assert len(with_them) == 4


def test_a_backchannel_whose_place_was_cut_away_is_left_out():
    turns = [
        said(
            "user", EIGHT, cut_after_words=3, backchannels=(hum("agent", 1, 0.1), hum("agent", 6))
        ),
        said("agent", "No."),
    ]
    kinds = [(one.kind, one.role) for one in mixed(turns).turns]
    assert kinds == [("turn", "user"), ("backchannel", "agent"), ("turn", "agent")]


def test_a_backchannel_that_would_meet_its_own_speakers_turn_is_left_out():
    turns = [
        said("user", EIGHT, backchannels=(hum("agent", 7, 2.0),)),
        said("agent", "No.", gap_frames=0),
    ]
    assert [one.kind for one in mixed(turns).turns] == ["turn", "turn"]


def span_of(turn):
    return round(turn.start_s * SAMPLE_RATE), round(turn.end_s * SAMPLE_RATE)


@st.composite
def conversations(draw):
    roles = draw(st.lists(st.sampled_from(CHANNELS), min_size=2, max_size=7))
    turns = []
    for index, role in enumerate(roles):
        count = draw(st.integers(1, 12))
        text = " ".join(draw(st.sampled_from(["well,", "yes", "a", "-", "o'clock?"]))
                        for _ in range(count - 1))  # fmt: skip
        follows = index + 1 < len(roles) and roles[index + 1] != role
        places = draw(st.lists(st.integers(1, count), max_size=3))
        turns.append(
            said(
                role,
                f"{text} end.".strip(),
                seed=index,
                gap_frames=draw(st.none() | st.integers(-20, 12)),
                cut_after_words=draw(st.none() | st.integers(1, count)) if follows else None,
                backchannels=tuple(hum(other(role), place) for place in places),
            )
        )
    return turns


SECTIONS = st.tuples(st.integers(0, 600), st.integers(0, 600)).map(
    lambda pair: TimelineSection(yield_ms=(min(pair), max(pair)))
)


@settings(deadline=None)  # sound takes long where others compute too
@given(conversations(), st.integers(0, 99), SECTIONS)
def test_what_always_holds(turns, seed, section):
    timeline = mixed(turns, seed, section)
    spoken = timeline.turns
    assert [one.start_s for one in spoken] == sorted(one.start_s for one in spoken)
    for row, role in enumerate(CHANNELS):
        inside = np.zeros(timeline.audio.shape[1], dtype=bool)
        for one in (one for one in spoken if one.role == role):
            first, end = span_of(one)
            assert first % FRAME_SAMPLES == 0
            assert not inside[first:end].any(), "a speaker talks over itself"
            inside[first:end] = True
        assert not timeline.audio[row][~inside].any(), "sound where nobody speaks"
    for one in spoken:
        timed = [(word.text, word.start_s, word.end_s) for word in one.words]
        assert len(written_words(one.text, timed)) == len(one.text.split())
        for word in one.words:
            assert one.start_s - 1e-6 <= word.start_s <= word.end_s <= one.end_s + 1e-6
    held = [one for one in spoken if one.kind == "turn"]
    assert [one.role for one in held] == [turn.role for turn in turns]
    for one, turn in zip(held, turns, strict=True):
        words = turn.text.split()
        if not one.cut:
            assert one.text == turn.text
            assert one.words[-1].text == "end"
            continue
        assert turn.cut_after_words
        kept = one.text.split()
        assert kept == words[: len(kept)]
        assert turn.cut_after_words <= len(kept) <= len(words)
        broken = len(kept) < len(words) and turn.words[: len(kept) + 1][-1]
        if broken:  # the first word that is not in the text was not half heard
            heard = one.end_s - one.start_s - broken.start_s
            assert heard < HEARD_SHARE * WORD_S + FINISH_WORD_S


@pytest.mark.slow  # the same of a whole run: stages/test_data_order.py
@settings(deadline=None)  # sound takes long where others compute too
@given(conversations(), st.integers(0, 99))
def test_equal_seeds_give_equal_bytes(turns, seed):
    section = TimelineSection(room_tone_dbfs=-60, leakage_db=-40, noise_dbfs=-50)
    once, again = mixed(turns, seed, section), mixed(turns, seed, section)
    assert once.audio.tobytes() == again.audio.tobytes()
    assert once.turns == again.turns


@settings(deadline=None)  # sound takes long where others compute too
@given(conversations(), st.integers(0, 99), st.integers(13, 40))
def test_fixing_one_turn_redraws_nothing_of_the_others(turns, seed, gap):
    """A turn that is said later moves what follows, and lengthens or shortens none of it.

    Without overlaps: where one lies decides how far it must give way to its own speaker.
    """
    turns = [
        replace(turn, backchannels=(), gap_frames=turn.gap_frames and abs(turn.gap_frames))
        for turn in turns
    ]
    before = mixed(turns, seed).turns
    later = [*turns[:1], replace(turns[1], gap_frames=gap), *turns[2:]]
    after = mixed(later, seed).turns
    assert [(one.role, one.text, one.cut) for one in after] == [
        (one.role, one.text, one.cut) for one in before
    ]
    assert [one.end_s - one.start_s for one in after] == pytest.approx(
        [one.end_s - one.start_s for one in before], abs=2e-6
    )
