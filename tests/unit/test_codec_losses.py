"""Spectral losses and the labels of frames."""

import numpy as np
import pytest
import torch

from duplex.frames import SAMPLE_RATE
from pipeline.engines.espeak import Phone
from training.pocket.codec_labels import (
    IGNORED,
    PhoneSet,
    frame_labels,
    phone_class,
    phones_on_grid,
)
from training.pocket.codec_losses import magnitude_spectrum, mel_distance, spectral_losses


def sound(seed: int = 0) -> torch.Tensor:
    """float32 [2, 1, 9600]: a low and a high tone in faint noise."""
    time_s = torch.arange(9600) / SAMPLE_RATE
    tones = torch.sin(2 * torch.pi * torch.tensor([[200.0], [3000.0]]) * time_s)
    noise = torch.randn(2, 9600, generator=torch.Generator().manual_seed(seed))
    return (0.3 * tones + 0.001 * noise)[:, None]


def test_equal_sounds_lose_nothing():
    assert {name: float(loss) for name, loss in spectral_losses(sound(), sound()).items()} == {
        "mel": 0.0, "magnitude": 0.0, "wave": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["mel", "magnitude", "wave"])
def test_each_loss_grows_with_the_damage(name):
    noise = torch.randn(2, 1, 9600, generator=torch.Generator().manual_seed(1))
    losses = [
        float(spectral_losses(sound() + level * noise, sound())[name])
        for level in (0.001, 0.01, 0.1)
    ]
    assert 0 < losses[0] < losses[1] < losses[2]


def test_a_shift_within_the_period_costs_the_waveform_and_hardly_the_spectrum():
    time_s = torch.arange(9600) / SAMPLE_RATE
    sine, cosine = (f(2 * torch.pi * 500 * time_s)[None, None] for f in (torch.sin, torch.cos))
    losses = spectral_losses(0.3 * cosine, 0.3 * sine)
    assert losses["mel"] < 0.1 < 1.0 < losses["wave"]


def test_half_the_level_is_the_log_of_two():
    noise = torch.randn(2, 1, 9600, generator=torch.Generator().manual_seed(1))
    assert float(mel_distance(noise, noise / 2)) == pytest.approx(np.log(2), abs=0.02)


def test_a_full_scale_tone_has_magnitude_one_half():
    time_s = torch.arange(4096) / SAMPLE_RATE
    spectrum = magnitude_spectrum(torch.sin(2 * torch.pi * 1500 * time_s)[None], 2048)
    assert float(spectrum.max()) == pytest.approx(0.5, abs=0.01)


def test_the_gradient_is_finite_at_silence():
    decoded = torch.zeros(1, 1, 4096, requires_grad=True)
    sum(spectral_losses(decoded, torch.zeros(1, 1, 4096)).values()).backward()
    assert torch.isfinite(decoded.grad).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("'oU", "oU"), ("I2", "I"), ("a#", "a"), ("0", "0"), ("'0", "0"), ("_:", "_"), (";", "")],
)
def test_marks_of_stress_and_context_are_cut_off(name, expected):
    assert phone_class(name) == expected


def test_a_phone_sounds_until_the_next_one_and_a_mark_belongs_to_the_one_before():
    phones = [Phone("'a", 0.02), Phone(";", 0.03), Phone("t", 0.05), Phone("_:", 0.07)]
    assert phones_on_grid(phones, 2400).tolist() == [
        "_", "_", "a", "a", "a", "t", "t", "_", "_", "_",
    ]  # fmt: skip


def test_a_half_frame_is_named_by_its_middle():
    steps = np.arange(16)
    assert frame_labels(steps).tolist() == [[2, 6], [10, 14]]
    assert frame_labels(np.stack([steps, steps])).shape == (2, 2, 2)


def test_rare_phones_have_no_class():
    steps = np.array(["_"] * 1000 + ["a"] * 1000 + ["x"])
    phones = PhoneSet.of([steps])
    assert phones.names == ("_", "a")
    assert set(phones.indices(np.array(["a", "_", "x"])).tolist()) == {1, 0, IGNORED}


def test_sound_where_there_should_be_silence_costs_no_more_than_its_level():
    faint = 0.01 * torch.randn(1, 1, 9600, generator=torch.Generator().manual_seed(1))
    losses = spectral_losses(faint, torch.zeros(1, 1, 9600))
    assert losses["wave"] < 1 and losses["magnitude"] < 2
