"""Voices with a throat of another length: higher or lower, and labels that fit what is heard."""

import numpy as np
import pytest

from duplex.frames import SAMPLE_RATE
from training.pocket.base_espeak import Espeak, warped
from training.pocket.base_phones import find_phones
from training.pocket.base_units import Unit
from training.pocket.base_voices import HELD_USER_VOICES, USER_VOICES, WARPS, user_speaker
from training.pocket.roles import load_grammar

TEXT = "How much is the lamp?"


def test_a_warped_tone_is_higher_by_the_warp():
    seconds = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * 500 * seconds).astype(np.float32)
    for warp in (0.87, 1.15):
        found = warped(tone, warp)
        assert abs(len(found) - SAMPLE_RATE / warp) <= 1
        middle = found[2000:14000]
        peak = np.argmax(np.abs(np.fft.rfft(middle * np.hanning(len(middle)))))
        assert peak * SAMPLE_RATE / len(middle) == pytest.approx(500 * warp, abs=3)
    assert warped(tone, 1.0) is tone


def test_only_voices_of_training_are_warped_and_within_limits():
    assert not any("warp" in params for params in HELD_USER_VOICES.values())
    warps = [float(params["warp"]) for params in USER_VOICES.values() if "warp" in params]
    assert 0.7 < len(warps) / len(USER_VOICES) < 0.9
    assert min(warps) >= WARPS[0] and max(warps) <= WARPS[1] and len(set(warps)) > 50


def test_labels_of_a_warped_voice_end_where_its_speech_does(tmp_path):
    slow = min(USER_VOICES, key=lambda name: float(USER_VOICES[name].get("warp", 1.0)))
    params = USER_VOICES[slow]
    with Espeak() as espeak:
        samples = espeak(TEXT, params)
        own = {k: v for k, v in params.items() if k != "warp"}
        plain = espeak(TEXT, own)
        num_samples, phones, ends_s = espeak.sounds(TEXT, params)
        _, plain_phones, plain_ends_s = espeak.sounds(TEXT, own)
    warp = float(params["warp"])
    assert warp < 0.9 and len(samples) == num_samples
    assert len(samples) == pytest.approx(len(plain) / warp, abs=2)
    assert len(ends_s) == 5 and list(ends_s) == sorted(ends_s)
    # Times are longer as the speech is.
    assert list(ends_s) == pytest.approx([end_s / warp for end_s in plain_ends_s])
    assert [phone.name for phone in phones] == [phone.name for phone in plain_phones]
    starts_s = [phone.start_s for phone in phones]
    assert starts_s == pytest.approx([phone.start_s / warp for phone in plain_phones])
    unit = Unit(user_speaker(slow, "quiet"), "ask/price", TEXT)
    found = find_phones([unit], load_grammar(), tmp_path, "revision", lambda line: None)
    assert len(found.sounds[0].phones) == -(-num_samples // 1920)
    assert found.sounds[0].word_ends[-1] == int(ends_s[-1] * 12.5)
