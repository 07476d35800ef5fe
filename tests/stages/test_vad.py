"""Voice activity: silero-vad itself on espeak's speech, and the spans made from its numbers."""

import numpy as np
import pytest
import soxr
import torch

from duplex.errors import MissingInputError
from duplex.frames import SAMPLE_RATE
from pipeline.engines import vad
from pipeline.engines.vad import (
    VAD_RATE,
    WINDOW_S,
    VadSettings,
    VoiceActivity,
    spans_of,
    speech_spans,
)
from tests.stages.recordings_helpers import speak


@pytest.fixture(scope="module")
def activity():
    return VoiceActivity()


@pytest.fixture(scope="module")
def conversation():
    samples, turns = speak()
    return soxr.resample(samples, SAMPLE_RATE, VAD_RATE).astype(np.float32), turns


def test_turns_are_found_within_a_fifth_of_a_second(activity, conversation):
    samples, turns = conversation
    for side, role in enumerate(("agent", "user")):
        spans = speech_spans(samples[:, side], activity)
        for _, start_s, end_s, _ in (turn for turn in turns if turn[0] == role):
            inside = [s for s in spans if s[1] > start_s - 0.5 and s[0] < end_s + 0.5]
            assert inside[0][0] == pytest.approx(start_s, abs=0.2)
            assert inside[-1][1] == pytest.approx(end_s, abs=0.2)
            for span in inside:
                spans.remove(span)
        assert spans == [], "nothing else is speech"


def test_blocks_of_any_length_give_the_same_numbers(activity, conversation):
    samples, _ = conversation
    whole = activity.probabilities([samples])
    generator = np.random.default_rng(2)
    cuts = np.sort(generator.integers(0, len(samples), 40))
    assert np.array_equal(activity.probabilities(np.split(samples, cuts)), whole)
    assert np.array_equal(VoiceActivity().probabilities([samples]), whole)
    assert whole.shape == (2, -(-len(samples) // 512))
    alone = activity.probabilities([samples[:, :1]])
    assert np.abs(alone - whole[:1]).max() < 1e-3


def test_silence_noise_and_clicks_are_no_speech(activity):
    generator = np.random.default_rng(0)
    silence = np.zeros(3 * VAD_RATE, dtype=np.float32)
    clicks = silence.copy()
    clicks[:: VAD_RATE // 2] = 0.8
    noise = generator.normal(scale=0.02, size=3 * VAD_RATE).astype(np.float32)
    for samples in (silence, clicks, noise, silence[:0]):
        assert speech_spans(samples, activity) == []


def test_torchs_threads_are_left_alone(activity):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        VoiceActivity().probabilities([np.zeros((512, 1), dtype=np.float32)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(vad, "MODULE", "silero_vad_that_is_not_there")
    with pytest.raises(MissingInputError, match="pip install 'silero-vad"):
        VoiceActivity()


def windows(*parts):
    return np.concatenate([np.full(count, value, dtype=np.float32) for count, value in parts])


def test_spans_follow_the_thresholds():
    settings = VadSettings(pad_s=0.0)
    numbers = windows((10, 0), (20, 0.9), (2, 0.1), (10, 0.9), (10, 0.4), (10, 0.1), (2, 0.9))
    spans = spans_of(numbers, len(numbers) * WINDOW_S, settings)
    assert spans == [(0.32, round(52 * WINDOW_S, 3))], "a dip and a weak end belong; a click not"
    padded = spans_of(numbers, len(numbers) * WINDOW_S, VadSettings())
    assert padded == [(0.29, round(52 * WINDOW_S + 0.03, 3))]
    cut = spans_of(windows((10, 0.9)), 0.3, VadSettings())
    assert cut == [(0.0, 0.3)], "never past the audio"


def test_long_speech_is_cut_where_it_is_weakest():
    numbers = windows((100, 0.9), (1, 0.4), (100, 0.9))
    settings = VadSettings(max_speech_s=150 * WINDOW_S, pad_s=0.0)
    spans = spans_of(numbers, 201 * WINDOW_S, settings)
    assert spans == [(0.0, 3.2), (3.2, round(201 * WINDOW_S, 3))]
    longest = max(end - start for start, end in spans_of(windows((5000, 0.9)), 160.0, settings))
    assert longest <= 150 * WINDOW_S + 1e-3
