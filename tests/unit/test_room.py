"""The room under the user's channel: levels, spectra, seeds, and nothing on the agent's side."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.characters import GapRange
from duplex.config_data import TimelineSection
from duplex.frames import SAMPLE_RATE
from duplex.mixing import PEAK_LIMIT, VoicedTurn, mix_turns
from duplex.room import LEAK_DELAYS_MS, LOUDEST_PEAK, room_of

SILENCE = np.zeros(10 * SAMPLE_RATE, dtype=np.float32)


def decibels(samples):
    return 10 * np.log10(np.mean(np.square(samples, dtype=np.float64)))


def band(samples, low_hz, high_hz):
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    return 10 * np.log10(spectrum[(hertz >= low_hz) & (hertz < high_hz)].mean())


def room(agent=SILENCE, seed=7, **section):
    return room_of(agent, TimelineSection(**section), seed)


def test_without_a_setting_there_is_no_room():
    assert room() is None


@pytest.mark.parametrize("key", ["room_tone_dbfs", "noise_dbfs"])
@pytest.mark.parametrize("level", [-70, -40])
def test_a_noise_has_its_level(key, level):
    assert decibels(room(**{key: level})) == pytest.approx(level, abs=1)


def test_room_tone_falls_three_decibels_an_octave():
    tone = room(room_tone_dbfs=-50)
    for low in (100, 400, 1600):
        assert band(tone, low, 2 * low) - band(tone, 2 * low, 4 * low) == pytest.approx(3, abs=0.7)


def test_noise_of_a_place_swells_as_room_tone_does_not():
    """Level in the band of voices, every 100 ms."""

    def unrest(samples):
        spectrum = np.fft.rfft(samples)
        hertz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
        spectrum[(hertz < 500) | (hertz > 3000)] = 0
        voices = np.fft.irfft(spectrum).reshape(-1, SAMPLE_RATE // 10)
        levels = np.sqrt(np.mean(voices**2, axis=1))
        return levels.std() / levels.mean()

    assert unrest(room(noise_dbfs=-40)) > 3 * unrest(room(room_tone_dbfs=-40))


def test_the_agent_leaks_late_soft_and_without_highs():
    click = np.zeros(SAMPLE_RATE, dtype=np.float32)
    click[1000] = 0.9
    leaked = room(click, leakage_db=-20)
    first = np.flatnonzero(np.abs(leaked) > 1e-9)[0] - 1000
    assert LEAK_DELAYS_MS[0] <= first * 1000 / SAMPLE_RATE <= LEAK_DELAYS_MS[1]
    speech = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE * 4).astype(np.float32)
    leaked = room(speech, leakage_db=-20)
    assert band(leaked, 800, 1200) - band(speech, 800, 1200) == pytest.approx(-20, abs=1)
    assert band(leaked, 9000, 11000) - band(speech, 9000, 11000) < -26
    assert not room(SILENCE, leakage_db=-20).any()


def test_each_part_draws_for_itself_and_a_longer_room_begins_alike():
    tone = room(room_tone_dbfs=-50)
    both = room(room_tone_dbfs=-50, noise_dbfs=-40)
    assert np.allclose(both - tone, room(noise_dbfs=-40), atol=1e-6)
    assert np.array_equal(room(SILENCE[:5000], room_tone_dbfs=-50), tone[:5000])
    assert not np.array_equal(room(room_tone_dbfs=-50, seed=8), tone)


@settings(deadline=None)  # sound takes long where others compute too
@given(
    st.floats(0.01, 3),
    st.floats(-30, 0),
    st.none() | st.floats(-90, -30),
    st.none() | st.floats(-80, -10),
    st.none() | st.floats(-90, -20),
    st.integers(0, 9),
)
def test_turns_keep_their_level_nothing_clips_and_the_agents_channel_stays_clean(
    scale, loudness, tone, leakage, noise, seed
):
    rng = np.random.default_rng(seed)
    turns = [
        VoicedTurn(role, "Hello.", f"voice-{role}", rng.normal(0, scale, 6000).astype(np.float32))
        for role in ("user", "agent", "user")
    ]
    section = TimelineSection(room_tone_dbfs=tone, leakage_db=leakage, noise_dbfs=noise)

    def made(section):
        gap = GapRange(low=1, high=3)
        return mix_turns(
            turns, gap_after_user=gap, gap_other=gap, rng=random.Random(seed),
            loudness_dbfs=loudness, lead_in_s=0.1, tail_s=0.1, section=section,
        )  # fmt: skip

    bare, full = made(TimelineSection()), made(section)
    assert np.array_equal(full.audio[0], bare.audio[0])
    assert full.turns == bare.turns
    assert np.abs(full.audio).max() <= PEAK_LIMIT + 1e-6
    under = room_of(full.audio[0], section, random.Random(seed).getrandbits(64))
    if under is None:
        assert np.array_equal(full.audio, bare.audio)
        return
    assert np.abs(under).max() <= LOUDEST_PEAK + 1e-6
    user = full.audio[1] - under
    for turn in full.turns:
        if turn.role == "user":
            first, end = (round(t * SAMPLE_RATE) for t in (turn.start_s, turn.end_s))
            peak = np.abs(user[first:end]).max()
            quieter = peak + np.abs(under[first:end]).max() > PEAK_LIMIT - 1e-3
            assert quieter or decibels(user[first:end]) == pytest.approx(loudness, abs=0.02)
