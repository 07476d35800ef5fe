"""Recordings on disk: what is refused and why, and that what is taken keeps its sound."""

import io
import os
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile

from duplex.errors import RecordError
from duplex.frames import SAMPLE_RATE
from pipeline.engines.sound_file import MONO_CORRELATION, SoundFile, faults_of


def noise(seconds=2.0, channels=2, seed=0, scale=0.1, rate=SAMPLE_RATE):
    generator = np.random.default_rng(seed)
    return generator.normal(scale=scale, size=(round(seconds * rate), channels)).astype(np.float32)


def voices(seconds=8.0):
    """Two sides that speak in turns: noise in bursts, over a floor of -60 dBFS."""
    samples = noise(seconds)
    second = np.arange(len(samples)) // SAMPLE_RATE
    samples[second % 4 >= 2, 0] *= 0.01
    samples[second % 4 < 2, 1] *= 0.01
    return samples


def write(path, samples, rate=SAMPLE_RATE, **options):
    soundfile.write(path, samples, rate, **({"subtype": "PCM_16"} | options))
    return path


def wav_bytes(samples=None, **options):
    buffer = io.BytesIO()
    samples = noise() if samples is None else samples
    soundfile.write(
        buffer, samples, SAMPLE_RATE, **({"format": "WAV", "subtype": "PCM_16"} | options)
    )
    return bytearray(buffer.getvalue())


def read(path):
    sound = SoundFile.open(path)
    fault = faults_of(sound.look())
    if fault:
        raise RecordError(fault)
    return b"".join(sound.wav_chunks())


def with_data_size(content, size):
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    return content


def with_nan(value):
    samples = noise()
    samples[30_000, 1] = value
    return wav_bytes(samples, subtype="FLOAT")


HOSTILE = {
    "mono": (wav_bytes(noise(channels=1)), "found one channel. Two speakers mixed"),
    "three": (wav_bytes(noise(channels=3)), "found 3 channels"),
    "cut": (wav_bytes()[:-5000], "must fit the file"),
    "too large": (with_data_size(wav_bytes(), 1 << 30), "must fit the file"),
    "never finished": (with_data_size(wav_bytes(), 0xFFFFFFFF), "must fit the file"),
    "size of nothing": (with_data_size(wav_bytes(), 0), "must fit the file"),
    "too small": (with_data_size(wav_bytes(), 96_000), "must fit the file"),
    "nan": (with_nan(np.nan), "found NaN or infinity"),
    "infinity": (with_nan(-np.inf), "found NaN or infinity"),
    "no samples": (wav_bytes(noise(0)), "found 0 samples"),
    "half a second": (wav_bytes(noise(0.5)), "must be 1 s to 12 h long"),
    "nothing": (b"", "found an empty file"),
    "text": (b"not a recording at all" * 100, "must be a WAV or FLAC file"),
    "vorbis": (wav_bytes(format="OGG", subtype="VORBIS"), "must be a WAV or FLAC file, found OGG"),
    "one side silent": (wav_bytes(noise() * [1, 1e-4]), "found the right silent throughout"),
    "silent": (wav_bytes(noise() * 0), "found the left and the right silent"),
    "an offset is no sound": (wav_bytes(noise() * [0, 1] + [0.2, 0]), "found the left silent"),
    "clipped": (wav_bytes(np.clip(noise(scale=0.5), -1, 1)), "it is clipped"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_recording_is_refused_with_its_reason(tmp_path, name):
    content, said = HOSTILE[name]
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=said):
        read(path)


def test_rates_past_reason_and_things_that_are_no_files_are_refused(tmp_path):
    for rate in (1, 7999, 384_000):
        with pytest.raises(RecordError, match="8000-192000 Hz"):
            read(write(tmp_path / "rate.wav", noise(rate=rate), rate))
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("pipe.wav", "absent.wav", "."):
        with pytest.raises(RecordError, match="must be a file"):
            SoundFile.open(tmp_path / name)


def test_damaged_files_are_refused_or_read_and_never_crash(tmp_path):
    """Cut anywhere, or with bytes changed: a RecordError, or sound; a cut WAV never passes."""
    generator = np.random.default_rng(5)
    path = tmp_path / "a.wav"
    flac = wav_bytes(format="FLAC")
    for base in (wav_bytes(), flac):
        for number in range(150):
            damaged = bytearray(base)
            cut = number % 3 == 0
            if cut:
                damaged = damaged[: int(generator.integers(1, len(base) - 8))]
            else:
                limit = 60 if number % 3 == 1 else len(base)
                for place in generator.integers(0, limit, 4):
                    damaged[place] = generator.integers(0, 256)
            path.write_bytes(damaged)
            try:
                read(path)
            except RecordError:
                continue
            assert not cut


def test_a_recording_in_our_form_is_taken_byte_for_byte(tmp_path):
    path = write(tmp_path / "a.wav", voices())
    assert SoundFile.open(path).fits
    assert read(path) == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("a.flac", 24_000, {}),
        ("a.wav", 24_000, {"subtype": "FLOAT"}),
        ("a.wav", 24_000, {"subtype": "PCM_24"}),
        ("a.wav", 48_000, {}),
        ("a.flac", 44_100, {}),
        ("a.wav", 8_000, {}),
        ("a.wav", 16_000, {"format": "RF64"}),
    ],
)
def test_other_rates_and_forms_keep_their_sound(tmp_path, name, rate, options):
    """A tone on each side comes out at 24 kHz with its pitch, level and length."""
    time_s = np.arange(3 * rate) / rate
    tones = 0.5 * np.stack([np.sin(2 * np.pi * hz * time_s) for hz in (440, 1000)], axis=1)
    path = write(tmp_path / name, tones, rate, **options)
    content = read(path)
    samples, found_rate = soundfile.read(io.BytesIO(content))
    assert found_rate == SAMPLE_RATE and samples.shape == (3 * SAMPLE_RATE, 2)
    at_s = np.arange(len(samples)) / SAMPLE_RATE
    expected = 0.5 * np.stack([np.sin(2 * np.pi * hz * at_s) for hz in (440, 1000)], axis=1)
    middle = slice(2400, -2400)
    assert np.abs(samples - expected)[middle].max() < 2e-3
    assert content == b"".join(SoundFile.open(path).wav_chunks()), "the same bytes each time"
    (tmp_path / "again.wav").write_bytes(content)
    assert SoundFile.open(tmp_path / "again.wav").fits


def test_samples_at_full_scale_stay_there(tmp_path):
    samples = voices()
    samples[1000, 0], samples[2000, 1] = 7.0, -7.0
    content = read(write(tmp_path / "a.wav", samples, subtype="FLOAT"))
    found, _ = soundfile.read(io.BytesIO(content), dtype="int16")
    assert (found[1000, 0], found[2000, 1]) == (32767, -32768)


def likeness(tmp_path, samples):
    return SoundFile.open(write(tmp_path / "a.wav", samples)).look()


@pytest.mark.parametrize("noise_db", [None, -40, -20, -10])
@pytest.mark.parametrize("change", ["copied", "delayed", "inverted", "quieter"])
def test_a_mono_mix_on_both_channels_is_refused(tmp_path, noise_db, change):
    """With noise of its own on each channel up to 10 dB below the speech."""
    mix = voices().sum(axis=1)
    other = {
        "copied": mix, "delayed": np.roll(mix, 200), "inverted": -mix, "quieter": 0.2 * mix
    }[change]  # fmt: skip
    channels = np.stack([mix, other], axis=1)
    if noise_db is not None:
        floor = 10 ** (noise_db / 20) * channels.std(axis=0)
        channels += noise(8.0, seed=9, scale=1.0) * floor
    look = likeness(tmp_path, channels * 0.5)
    assert look.correlation > MONO_CORRELATION
    assert "a mono mix cannot be taken apart" in (faults_of(look) or "")


@pytest.mark.parametrize(
    ("leak_db", "low", "high"), [(None, 0, 0.03), (-20, 0.15, 0.25), (-6, 0.75, 0.85)]
)
def test_two_sides_that_hear_each_other_are_taken(tmp_path, leak_db, low, high):
    sides = voices()
    leaked = sides if leak_db is None else sides + 10 ** (leak_db / 20) * sides[:, ::-1]
    look = likeness(tmp_path, leaked * 0.5)
    assert low <= look.correlation <= high
    assert faults_of(look) is None


def test_hum_on_both_channels_does_not_make_them_alike(tmp_path):
    sides = voices()
    hum = 0.3 * np.sin(2 * np.pi * 50 * np.arange(len(sides)) / SAMPLE_RATE)
    look = likeness(tmp_path, sides + hum[:, None].astype(np.float32))
    assert look.correlation < 0.1


def test_a_span_of_one_channel_is_where_it_should_be(tmp_path):
    samples = voices()
    sound = SoundFile.open(write(tmp_path / "a.wav", samples))
    part = sound.mono(1, SAMPLE_RATE, 2.5, 3.25)
    assert np.abs(part - samples[60_000:78_000, 1]).max() < 1e-4
    assert len(sound.mono(0, 16_000, 2.5, 3.25)) == 12_000
    assert len(sound.mono(0, 16_000, 7.9, 99.0)) == 1600


def test_memory_does_not_grow_with_the_recording(tmp_path):
    path = write(tmp_path / "a.wav", noise(120.0, rate=48_000), 48_000)
    tracemalloc.start()
    try:
        sound = SoundFile.open(path)
        sound.look()
        assert sum(len(chunk) for chunk in sound.wav_chunks()) == 44 + 4 * 120 * SAMPLE_RATE
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16e6, "the whole is 46 MB as float32"
