"""The timeline: whole frames, turns on frame boundaries, silence between them, no clipping."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.characters import GapRange
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.mixing import CHANNELS, PEAK_LIMIT, VoicedTurn, mix_turns, normalize_loudness
from duplex.records import Word

AFTER_USER = GapRange(low=2, high=5)
OTHER = GapRange(low=7, high=9)  # apart from AFTER_USER: a mixed-up rule shows


def voiced(role, num_samples, gap_frames=None, seed=0, words=()):
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples).astype(np.float32)
    noise[noise == 0] = 0.1  # every sample of a turn is told from silence
    return VoicedTurn(role, "Hello.", f"voice-{role}", noise, words, gap_frames)


def mixed(turns, seed=1, **changes):
    options = {
        "gap_after_user": AFTER_USER,
        "gap_other": OTHER,
        "loudness_dbfs": -24.0,
        "lead_in_s": 0.3,
        "tail_s": 0.5,
    }
    return mix_turns(turns, rng=random.Random(seed), **(options | changes))


def first_sample(turn):
    return round(turn.start_s * SAMPLE_RATE)


def end_sample(turn):
    return round(turn.end_s * SAMPLE_RATE)


def frames_of(turn):
    start = first_sample(turn) // FRAME_SAMPLES
    return start, start + frames_covering_samples(end_sample(turn) - first_sample(turn))


def turns_strategy(least_gap):
    turn = st.tuples(
        st.sampled_from(CHANNELS),
        st.integers(1, 6000),
        st.none() | st.integers(least_gap, 12),
        st.integers(0, 3),
    )
    return st.lists(turn, min_size=1, max_size=8).map(
        lambda rows: [voiced(role, size, gap, seed) for role, size, gap, seed in rows]
    )


@given(turns_strategy(least_gap=-12), st.integers(0, 99))
def test_turns_start_on_frames_and_the_whole_is_frames(turns, seed):
    timeline = mixed(turns, seed)
    assert timeline.audio.dtype == np.float32
    assert timeline.audio.shape[0] == 2
    assert timeline.audio.shape[1] % FRAME_SAMPLES == 0
    assert [turn.role for turn in timeline.turns] == [turn.role for turn in turns]
    for spoken, turn in zip(timeline.turns, turns, strict=True):
        assert first_sample(spoken) % FRAME_SAMPLES == 0
        assert end_sample(spoken) - first_sample(spoken) == len(turn.samples)


@given(turns_strategy(least_gap=-12), st.integers(0, 99))
def test_sound_is_inside_turns_and_nowhere_else(turns, seed):
    timeline = mixed(turns, seed)
    for row, role in enumerate(CHANNELS):
        inside = np.zeros(timeline.audio.shape[1], dtype=bool)
        for turn in timeline.turns:
            if turn.role == role:
                here = slice(first_sample(turn), end_sample(turn))
                assert not inside[here].any(), "a speaker talks over itself"
                inside[here] = True
        assert np.array_equal(timeline.audio[row] != 0, inside)


@given(turns_strategy(least_gap=0), st.integers(0, 99))
def test_gaps_follow_the_rule_and_nothing_overlaps(turns, seed):
    spoken = mixed(turns, seed).turns
    assert frames_of(spoken[0])[0] == 4 + (turns[0].gap_frames or 0)  # .3 s take four frames
    for index in range(1, len(spoken)):
        gap = frames_of(spoken[index])[0] - frames_of(spoken[index - 1])[1]
        own = turns[index].gap_frames
        answers = (spoken[index - 1].role, spoken[index].role) == ("user", "agent")
        allowed = AFTER_USER if answers else OTHER
        assert gap == own if own is not None else allowed.low <= gap <= allowed.high


@given(turns_strategy(least_gap=-12), st.integers(0, 99))
def test_the_same_generator_gives_the_same_timeline(turns, seed):
    once, again = mixed(turns, seed), mixed(turns, seed)
    assert np.array_equal(once.audio, again.audio)
    assert once.turns == again.turns


def test_another_generator_draws_other_gaps():
    turns = [voiced(role, 3000) for role in ("user", "agent") * 5]
    assert len({mixed(turns, seed).turns[-1].start_s for seed in range(8)}) > 1


def test_fixing_one_gap_redraws_no_other():
    free = [voiced(role, 3000) for role in ("user", "agent", "user", "agent", "user")]
    fixed = [*free[:2], voiced("user", 3000, gap_frames=40), *free[3:]]
    before, after = mixed(free).turns, mixed(fixed).turns
    shift = after[2].start_s - before[2].start_s
    assert shift > 0
    assert [t.start_s for t in after[:2]] == [t.start_s for t in before[:2]]
    assert [t.start_s for t in after[3:]] == pytest.approx(
        [t.start_s + shift for t in before[3:]], abs=1e-9
    )


def test_a_negative_gap_overlaps_the_other_speaker_only():
    turns = [
        voiced("agent", 10 * FRAME_SAMPLES),
        voiced("user", 2 * FRAME_SAMPLES, gap_frames=-6),
        voiced("agent", FRAME_SAMPLES, gap_frames=-6),
        voiced("user", FRAME_SAMPLES, gap_frames=-500),
    ]
    spans = [frames_of(turn) for turn in mixed(turns, lead_in_s=0).turns]
    assert spans == [(0, 10), (4, 6), (10, 11), (10, 11)]


def test_lead_in_and_tail_are_silent_frames():
    timeline = mixed([voiced("user", FRAME_SAMPLES)], lead_in_s=0.8, tail_s=0.17)
    assert timeline.audio.shape[1] == (10 + 1 + 3) * FRAME_SAMPLES
    assert timeline.turns[0].start_s == 0.8


def test_word_times_become_absolute():
    words = (Word(text="Hello", start_s=0.05, end_s=0.1),)
    turns = [voiced("user", 2400), voiced("agent", 2400, gap_frames=3, words=words)]
    spoken = mixed(turns, lead_in_s=0).turns[1]
    assert spoken.start_s == pytest.approx(0.4)  # 2 frames of the user, 3 of gap
    assert spoken.words[0].start_s == pytest.approx(0.45)
    assert spoken.words[0].end_s == pytest.approx(0.5)


@given(st.floats(-60, 0), st.floats(1e-4, 1.0), st.integers(1, 500))
def test_loudness_is_met_or_the_peak_is_and_the_shape_stays(loudness_dbfs, scale, seed):
    samples = (np.random.default_rng(seed).normal(0, scale, 3000)).astype(np.float32)
    result = normalize_loudness(samples, loudness_dbfs).astype(np.float64)
    rms_dbfs = 20 * np.log10(np.sqrt(np.mean(result**2)))
    peak = np.abs(result).max()
    assert peak <= PEAK_LIMIT + 1e-6
    assert rms_dbfs == pytest.approx(loudness_dbfs, abs=1e-3) or (
        rms_dbfs < loudness_dbfs and peak == pytest.approx(PEAK_LIMIT, abs=1e-6)
    )
    assert np.corrcoef(result, samples)[0, 1] > 1 - 1e-6  # scaled, not clipped


@pytest.mark.parametrize(
    "samples", [np.zeros(100), np.zeros(0), np.full(10, np.nan), np.full(10, np.inf)]
)
def test_a_turn_without_sound_is_an_error_and_no_silence(samples):
    turn = VoicedTurn("user", "Hello.", "voice", samples.astype(np.float32))
    with pytest.raises(ValueError, match="needs samples with sound"):
        mixed([turn])


def test_no_turns_are_an_error():
    with pytest.raises(ValueError, match="at least one turn"):
        mixed([])


def test_the_global_generators_are_left_alone():
    random.seed(3)
    np.random.seed(3)
    expected = random.getstate(), np.random.get_state()[1].tolist()
    mixed([voiced("user", 100), voiced("agent", 100)])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected
