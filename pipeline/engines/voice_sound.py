"""What a recording of a speaker sounds like: its stretches, noise, band and pitch.

Files come from anybody: at most `MAX_FILE_BYTES`, of which the first `LONGEST_READ_S` are read,
block by block.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from duplex.errors import RecordError
from pipeline.engines.sound_file import FORMATS, MAX_RATE, MIN_RATE, check_wav_sizes
from pipeline.engines.vad import VAD_RATE
from pipeline.engines.voice_choice import Gender

CONTAINERS = (*FORMATS, "OGG", "MP3")
MAX_FILE_BYTES = 200_000_000
MAX_CHANNELS = 2
BLOCK = 1 << 16  # samples
LONGEST_READ_S = 180.0
LEAST_S, MOST_S = 4.0, 15.0
MAX_PAUSE_S = 1.5  # within a stretch
BAND_FLOOR_DB = 60.0  # below the strongest band: nothing of the voice is there
MALE_BELOW_HZ, FEMALE_ABOVE_HZ = 155.0, 180.0  # between: nobody's guess
PITCH_HZ = (65.0, 400.0)


def read_mono(content: Path | bytes) -> tuple[np.ndarray, int]:
    """float32 [S] and its rate: the first `LONGEST_READ_S` of a file, channels averaged.

    Raises:
        RecordError: not a recording, or one that cannot be a voice.
    """
    import soundfile

    if isinstance(content, Path):
        size = content.stat().st_size
        if content.suffix.lower() == ".wav" and size:
            check_wav_sizes(content)
    else:
        size = len(content)
    if not 0 < size <= MAX_FILE_BYTES:
        raise RecordError(
            f"a recording must have at most {MAX_FILE_BYTES // 1_000_000} MB, found {size} bytes"
        )
    try:
        with soundfile.SoundFile(
            content if isinstance(content, Path) else io.BytesIO(content)
        ) as file:
            _check_header(file)
            blocks = list(_blocks(file, round(LONGEST_READ_S * file.samplerate)))
            rate: int = file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"must be a recording, cannot be read: {error}") from None
    samples = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    if not len(samples) or not np.isfinite(samples).all():
        raise RecordError("must hold finite samples, found none or NaN")
    return samples, rate


def _check_header(file: Any) -> None:
    if file.format not in CONTAINERS:
        raise RecordError(f"must be one of {', '.join(CONTAINERS)}, found {file.format}")
    if file.channels > MAX_CHANNELS:
        raise RecordError(f"must be mono or stereo, found {file.channels} channels")
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise RecordError(
            f"the sample rate must lie in {MIN_RATE}-{MAX_RATE} Hz, found {file.samplerate}"
        )


def _blocks(file: Any, limit: int) -> Iterator[np.ndarray]:
    """The header's length is not believed: what comes is counted."""
    count = 0
    while count < limit:
        block = file.read(min(BLOCK, limit - count), dtype="float32", always_2d=True)
        if not len(block):
            return
        count += len(block)
        yield block.mean(axis=1)


def best_stretch(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """The stretch of `LEAST_S` to `MOST_S`, from the start of a span to the end of one, with the
    most speech and the fewest pauses; the first of equal ones. Pure.

    Raises:
        RecordError: there is none.
    """
    best: tuple[float, float, float] | None = None  # score, start, end
    for first, (start_s, _) in enumerate(spans):
        speech_s = 0.0
        for index in range(first, len(spans)):
            begin, end = spans[index]
            pause = begin - spans[index - 1][1] if index > first else 0.0
            if end - start_s > MOST_S or pause > MAX_PAUSE_S:
                break
            speech_s += end - begin
            score = speech_s - 0.5 * (end - start_s - speech_s)
            if end - start_s >= LEAST_S and (best is None or score > best[0] + 1e-9):
                best = score, start_s, end
    if best is None:
        total = sum(end - start for start, end in spans)
        raise RecordError(
            f"must hold {LEAST_S:g} s of speech without a pause over {MAX_PAUSE_S:g} s, found "
            f"{total:.1f} s of speech in {len(spans)} stretches"
        )
    return best[1], best[2]


def signal_to_noise(samples: np.ndarray, rate: int, spans: list[tuple[float, float]]) -> float:
    """dB between speech and what lies between, 99 at most; where there is nothing in between,
    the softest tenth of 50 ms stands for it."""
    inside = np.zeros(len(samples), dtype=bool)
    for start_s, end_s in spans:
        inside[round(start_s * rate) : round(end_s * rate)] = True
    power = np.square(samples, dtype=np.float64)
    speech, rest = power[inside], power[~inside]
    if len(rest) >= rate // 5:
        noise = float(rest.mean())
    else:
        window = rate // 20
        levels = speech[: len(speech) // window * window].reshape(-1, window).mean(axis=1)
        noise = float(np.quantile(levels, 0.1)) if len(levels) else 0.0
    loud = max(float(speech.mean()) - noise, 1e-20)
    return min(10 * math.log10(loud / max(noise, 1e-12)), 99.0)


def bandwidth(samples: np.ndarray, rate: int) -> float:
    """The highest frequency in Hz at which the voice is within `BAND_FLOOR_DB` of its strongest
    band (Welch's estimate, 1 024 points)."""
    from scipy.signal import welch

    hertz, power = welch(samples, fs=rate, nperseg=min(1024, len(samples)))
    power = np.convolve(power, np.ones(5) / 5, mode="same")
    return float(hertz[power >= power.max() * 10 ** (-BAND_FLOOR_DB / 10)].max())


def gender_of_pitch(samples: np.ndarray, spans: list[tuple[float, float]]) -> Gender | None:
    """A guess by the median of the voice's pitch; None between the ranges.

    samples: float32 [S] at 16 kHz. Autocorrelation in windows of 40 ms.
    """
    window, least, most = 640, int(VAD_RATE / PITCH_HZ[1]), int(VAD_RATE / PITCH_HZ[0])
    found = []
    for start_s, end_s in spans:
        for first in range(int(start_s * VAD_RATE), int(end_s * VAD_RATE) - window, window):
            frame = samples[first : first + window].astype(np.float64)
            spectrum = np.fft.rfft(frame - frame.mean(), n=2 * window)
            alike = np.fft.irfft(np.abs(spectrum) ** 2)[:most]
            lag = least + int(np.argmax(alike[least:]))
            if alike[0] > 0 and alike[lag] > 0.5 * alike[0]:  # voiced
                found.append(VAD_RATE / lag)
    if not found:
        return None
    pitch = float(np.median(found))
    if pitch < MALE_BELOW_HZ:
        return "male"
    return "female" if pitch > FEMALE_ABOVE_HZ else None
