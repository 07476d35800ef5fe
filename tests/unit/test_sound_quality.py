"""Levels, clipping and offset of signals whose answers are known; DNSMOS's wiring.

`speechmos` is not among the packages of the tests: what it is given and what is read from it is
tested on a planted module, and on the real one only where that is installed.
"""

import sys
from types import ModuleType

import numpy as np
import pytest

from duplex.errors import MissingInputError
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from duplex.metrics import speech_activity
from duplex.sound_quality import SoundQuality, clipped_share, sound_quality
from pipeline.engines.dnsmos import Dnsmos, DnsmosScore

LOUD = 10 ** (-24 / 20)
FAINT = 10 ** (-60 / 20)


def square(*amplitudes: float) -> np.ndarray:
    """A frame of a square wave for each amplitude: its RMS is the amplitude."""
    wave = np.tile([1.0, -1.0], FRAME_SAMPLES // 2)
    return np.concatenate([wave * a for a in amplitudes]).astype(np.float32)


# -- levels


def test_levels_of_speech_and_of_the_silence_around_it():
    samples = square(*[FAINT] * 4, *[LOUD] * 4, *[FAINT] * 4)
    found = sound_quality(samples, speech_activity(samples))
    assert found.speech_dbfs == pytest.approx(-24, abs=1e-4)
    assert found.floor_dbfs == pytest.approx(-60, abs=1e-4)
    assert found.dc_offset == 0
    assert found.clipped_share == 0


def test_the_level_of_speech_is_of_mean_energy_not_of_mean_decibels():
    samples = square(1.0, 0.1)
    level = sound_quality(samples, np.array([True, True])).speech_dbfs
    assert level == pytest.approx(10 * np.log10((1 + 0.01) / 2), abs=1e-4)


def test_the_floor_leaves_out_the_frames_beside_speech_and_clicks():
    fading = 10 ** (-50 / 20)
    samples = square(LOUD, fading, FAINT, 0.5, FAINT, fading, LOUD)
    active = np.array([True, False, False, False, False, False, True])
    assert sound_quality(samples, active).floor_dbfs == pytest.approx(-60, abs=1e-4)


def test_digital_silence_is_at_the_lowest_level():
    samples = np.zeros(3 * FRAME_SAMPLES, dtype=np.float32)
    found = sound_quality(samples, np.zeros(3, dtype=bool))
    assert found == SoundQuality(0.0, None, -120.0, 0.0)
    assert sound_quality(samples, np.ones(3, dtype=bool)).floor_dbfs is None
    assert sound_quality(samples[:0], np.zeros(0, dtype=bool)) == SoundQuality(0.0, None, None, 0.0)


def test_a_partial_last_frame_counts_by_what_it_has():
    samples = square(LOUD, LOUD)[: FRAME_SAMPLES + 100]
    level = sound_quality(samples, np.array([False, True])).speech_dbfs
    assert level == pytest.approx(-24, abs=1e-4)


def test_an_offset_is_found():
    samples = square(LOUD, LOUD) + np.float32(0.01)
    assert sound_quality(samples, np.ones(2, dtype=bool)).dc_offset == pytest.approx(0.01, abs=1e-6)


# -- clipping


@pytest.mark.parametrize(
    ("samples", "share"),
    [
        ([0, 1, 1, 1, 0], 3 / 5),
        ([0, 1, 1, 0, 0], 0),  # a peak that only reaches it
        ([-1, -1, -1, -1], 1),
        ([1, 1, -1, -1, 1, 1], 0),  # runs are of one side
        ([0.9991, 1.2, 0.999], 1),
        ([0.998, 1, 1, 0.998], 0),
        ([1, 1, 1, 0, -1, -1, -1, 0, 1, 1], 6 / 10),
        ([], 0),
    ],
)
def test_runs_at_full_scale_are_clipped(samples, share):
    assert clipped_share(np.array(samples)) == share


def test_a_sine_at_full_scale_is_clean_and_one_beyond_it_is_not():
    tone = np.sin(2 * np.pi * 500 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert clipped_share(0.99 * tone) == 0
    cut = clipped_share(np.clip(2 * tone, -1, 1))
    assert cut == pytest.approx(2 / 3, abs=0.05)  # |2 sin x| >= 1 in two thirds of a period


# -- what is refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_refused(bad):
    samples = square(LOUD)
    samples[[7, 9]] = bad
    with pytest.raises(ValueError, match=rf"2 of 1920 are not, the first is {bad} at sample 7"):
        sound_quality(samples, np.ones(1, dtype=bool))


def test_activity_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"must have the 2 frames of the 3840 samples, found \(3,"):
        sound_quality(square(LOUD, LOUD), np.ones(3, dtype=bool))


# -- DNSMOS


@pytest.fixture
def planted(monkeypatch):
    """A module in the place of the package's: it keeps what it is given."""
    given = []

    def run(sample, sr):
        given.append((sample, sr))
        scores = {"ovrl_mos": 3.1, "sig_mos": 3.5, "bak_mos": 4.0, "p808_mos": np.float32(3.25)}
        return {name: np.float64(score) for name, score in scores.items()}

    module = ModuleType("speechmos.dnsmos")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "speechmos", ModuleType("speechmos"))
    monkeypatch.setitem(sys.modules, "speechmos.dnsmos", module)
    return given


def test_dnsmos_is_given_16_khz_within_full_scale_and_its_scores_are_named(planted):
    seconds = 2
    tone = 1.5 * np.sin(2 * np.pi * 500 * np.arange(seconds * SAMPLE_RATE) / SAMPLE_RATE)
    found = Dnsmos().score(tone.astype(np.float32))
    assert found == DnsmosScore(overall=3.1, speech=3.5, background=4.0, p808=3.25)
    ((clip, rate),) = planted
    assert rate == 16_000 and clip.shape == (seconds * 16_000,) and clip.dtype == np.float32
    assert np.abs(clip).max() == 1.0
    crossings = np.count_nonzero(np.diff(np.signbit(clip)))
    assert crossings == pytest.approx(2 * 500 * seconds, abs=2)


def test_dnsmos_scores_nothing_of_almost_nothing_and_refuses_what_is_no_number(planted):
    engine = Dnsmos()
    assert engine.score(np.zeros(0, dtype=np.float32)) is None
    assert engine.score(np.zeros(SAMPLE_RATE // 2 - 1, dtype=np.float32)) is None
    with pytest.raises(ValueError, match="must be finite"):
        engine.score(np.full(SAMPLE_RATE, np.nan, dtype=np.float32))
    assert planted == []


@pytest.mark.parametrize("missing", ["speechmos", "speechmos.dnsmos"])
def test_dnsmos_that_is_not_installed_says_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingInputError, match=r"needs the package speechmos.*pip install speech"):
        Dnsmos()


def test_the_real_dnsmos_likes_speech_better_than_noise():
    pytest.importorskip("speechmos.dnsmos")
    from pipeline.engines.espeak import EspeakEngine

    with EspeakEngine() as engine:
        text = "Good morning, I would like a large coffee, please. How are you doing today?"
        speech = engine.synthesize(text, {"voice": "en-us"}).samples
    noise = np.random.default_rng(0).normal(0, 0.1, len(speech)).astype(np.float32)
    scorer = Dnsmos()
    clean, bad = scorer.score(speech), scorer.score(noise)
    assert clean and bad
    assert clean.overall > bad.overall + 0.5 and clean.background > bad.background + 1
