"""Stereo recordings on disk, read in blocks: what is wrong with one, and its samples at any rate.

An hour at 48 kHz is 1.4 GB as float32, so nothing here holds more than `BLOCK` frames.
One look at an hour (levels, clipping, likeness of the channels) takes some seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duplex.errors import RecordError
from duplex.frames import SAMPLE_RATE

BLOCK = 1 << 16  # frames; also the window of the channels' correlation
FORMATS = ("WAV", "WAVEX", "RF64", "FLAC")
MIN_RATE, MAX_RATE = 8_000, 192_000
MIN_SECONDS, MAX_SECONDS = 1.0, 12 * 3600.0
SILENT_DBFS = -60.0  # RMS of the loudest 100 ms
FULL_SCALE = 0.9995
MAX_CLIPPED = 0.01  # share of a channel's samples at full scale
MAX_LAG_S = 0.01
LOW_CUT_HZ = 80.0  # below: mains hum, which both channels may share
# Two microphones that each hear the other speaker 4 dB below its own reach .9; a mono mix on
# both channels, each with noise of its own 10 dB below it, has .91.
MONO_CORRELATION = 0.9
LEAK_CORRELATION = 0.5
SIDES = ("left", "right")


@dataclass(frozen=True)
class SoundLook:
    """What a look at all samples measured; each pair is (left, right).

    `correlation` is the greatest magnitude of the channels' normalised cross-correlation
    above 80 Hz, within 10 ms either way.
    """

    loudest_dbfs: tuple[float, float]
    clipped: tuple[float, float]
    correlation: float


@dataclass(frozen=True)
class SoundFile:
    """A readable stereo recording. `num_frames` and `rate` are those of the file."""

    path: Path
    rate: int
    num_frames: int
    fits: bool  # 24 kHz 16-bit WAV: the pipeline's own form, taken byte for byte

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.rate

    @classmethod
    def open(cls, path: Path) -> SoundFile:
        """Look at the header only.

        Raises:
            RecordError: not a stereo WAV or FLAC of sensible rate and length.
        """
        import soundfile

        if not path.is_file():
            raise RecordError("the recording must be a file, found none of that name")
        if path.stat().st_size == 0:
            raise RecordError("the recording must hold sound, found an empty file")
        check_wav_sizes(path)
        try:
            info = soundfile.info(str(path))
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise RecordError(f"must be a WAV or FLAC file, cannot be read: {error}") from None
        if info.format not in FORMATS:
            raise RecordError(f"must be a WAV or FLAC file, found {info.format}")
        if info.channels == 1:
            raise RecordError(
                "must be stereo (left the model's side, right the user's), found one channel. Two "
                "speakers mixed into one channel cannot be taken apart into the two streams that "
                "the model needs: record each side on a channel of its own"
            )
        if info.channels != 2:
            raise RecordError(
                f"must be stereo (left the model's side, right the user's), found {info.channels} "
                "channels: write the two sides into a stereo file"
            )
        if not MIN_RATE <= info.samplerate <= MAX_RATE:
            raise RecordError(
                f"the sample rate must lie in {MIN_RATE}-{MAX_RATE} Hz, found {info.samplerate}"
            )
        if not MIN_SECONDS <= info.frames / info.samplerate <= MAX_SECONDS:
            raise RecordError(
                f"must be {MIN_SECONDS:g} s to {MAX_SECONDS / 3600:g} h long, found "
                f"{info.frames} samples at {info.samplerate} Hz"
            )
        fits = (info.format, info.subtype, info.samplerate) == ("WAV", "PCM_16", SAMPLE_RATE)
        return cls(path, info.samplerate, info.frames, fits)

    def blocks(
        self, rate: int | None = None, start_s: float = 0.0, end_s: float | None = None
    ) -> Iterator[np.ndarray]:
        """float32 [n, 2] in [-1, 1], left first, at `rate` (None: the file's own).

        Raises:
            RecordError: the file ends early, is damaged, or holds NaN or infinities.
        """
        start = min(round(start_s * self.rate), self.num_frames)
        end = self.num_frames if end_s is None else round(end_s * self.rate)
        source = self._own_blocks(start, min(max(end, start), self.num_frames))
        return source if rate in (None, self.rate) else _resampled(source, self.rate, rate)

    def _own_blocks(self, start: int, end: int) -> Iterator[np.ndarray]:
        import soundfile

        try:
            with soundfile.SoundFile(str(self.path)) as file:
                file.seek(start)
                while start < end:
                    block = file.read(min(BLOCK, end - start), dtype="float32", always_2d=True)
                    if not len(block):
                        raise RecordError(
                            f"must hold the {self.num_frames} samples that its header names, "
                            f"found {start}: the file was cut"
                        )
                    if not np.isfinite(block).all():
                        raise RecordError(
                            f"must hold finite samples, found NaN or infinity after "
                            f"{start / self.rate:.1f} s"
                        )
                    yield np.clip(block, -1.0, 1.0)
                    start += len(block)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            if isinstance(error, RecordError):
                raise
            raise RecordError(f"cannot be read to its end: {error}") from None

    def look(self) -> SoundLook:
        """Levels, clipping and likeness of the channels, over the whole file."""
        loudest, clipped = np.zeros(2), np.zeros(2)
        cross = np.zeros(BLOCK // 2 + 1, dtype=np.complex128)
        power = np.zeros((BLOCK // 2 + 1, 2))
        window = self.rate // 10
        for block in self.blocks():
            clipped += (np.abs(block) >= FULL_SCALE).sum(axis=0)
            for first in range(0, len(block), window):
                part = block[first : first + window]
                if len(part) >= window // 2:
                    loudest = np.maximum(loudest, part.std(axis=0, dtype=np.float64))
            spectrum = np.fft.rfft(block, n=BLOCK, axis=0)
            cross += spectrum[:, 0] * spectrum[:, 1].conj()
            power += np.abs(spectrum) ** 2
        low = int(LOW_CUT_HZ / self.rate * BLOCK)
        cross[:low], power[:low] = 0, 0
        energy = [float(np.fft.irfft(power[:, side], n=BLOCK)[0]) for side in range(2)]
        lags = np.fft.irfft(cross, n=BLOCK)
        reach = int(MAX_LAG_S * self.rate)
        peak = float(np.abs(np.concatenate([lags[: reach + 1], lags[-reach:]])).max())
        bound = float(np.sqrt(energy[0] * energy[1]))
        decibels = 20 * np.log10(np.maximum(loudest, 1e-10))
        return SoundLook(
            loudest_dbfs=(float(decibels[0]), float(decibels[1])),
            clipped=(float(clipped[0]) / self.num_frames, float(clipped[1]) / self.num_frames),
            correlation=peak / bound if bound > 0 else 0.0,
        )

    def wav_chunks(self) -> Iterator[bytes]:
        """The recording as the pipeline holds it: the bytes of a 24 kHz 16-bit stereo WAV.

        A file of that form already is passed on byte for byte.
        """
        if self.fits:
            from duplex.files import file_chunks

            yield from file_chunks(self.path)
            return
        num_samples = sum(len(block) for block in self.blocks(SAMPLE_RATE))
        yield _wav_header(num_samples)
        for block in self.blocks(SAMPLE_RATE):
            scaled = np.rint(block * 32768.0)
            yield np.clip(scaled, -32768, 32767).astype("<i2").tobytes()

    def mono(self, side: int, rate: int, start_s: float, end_s: float) -> np.ndarray:
        """float32 [S]: a span of one channel, 0 left, 1 right. For spans that fit in memory."""
        parts = [block[:, side] for block in self.blocks(rate, start_s, end_s)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)


def faults_of(look: SoundLook) -> str | None:
    """Why a recording is not fit for training, or None."""
    silent = [s for s, level in zip(SIDES, look.loudest_dbfs, strict=True) if level < SILENT_DBFS]
    if silent:
        return (
            f"each channel must hold one speaker, found the {' and the '.join(silent)} silent "
            f"throughout (under {SILENT_DBFS:g} dBFS): check which inputs were recorded"
        )
    if look.correlation >= MONO_CORRELATION:
        return (
            "the channels must hold one speaker each, found the same sound on both (correlation "
            f"{look.correlation:.2f}, at most {MONO_CORRELATION:g} is taken): a mono mix cannot be "
            "taken apart into the two streams that the model needs. Record each side on a channel "
            "of its own"
        )
    for side, share in zip(SIDES, look.clipped, strict=True):
        if share > MAX_CLIPPED:
            return (
                f"at most {MAX_CLIPPED:.0%} of a channel's samples may be at full scale, found "
                f"{share:.1%} of the {side}: it is clipped. Record again at a lower level"
            )
    return None


def check_wav_sizes(path: Path) -> None:
    """Whether a RIFF file's chunks fill the file: libsndfile reads a cut file without a word.

    Raises:
        RecordError: the header and the file differ.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return
        position = 12
        while position + 8 <= size:
            file.seek(position)
            name, length = struct.unpack("<4sI", file.read(8))
            position += 8 + length
            if position > size or not all(32 <= byte < 127 for byte in name):
                raise RecordError(
                    f"the WAV header must fit the file, found a chunk {name!r} of {length} bytes "
                    f"where {max(size - position + length, 0)} are left: the file was cut, or its "
                    "writer never finished it. Record or convert it again"
                )
            position += length % 2


def _resampled(source: Iterator[np.ndarray], from_rate: int, to_rate: int) -> Iterator[np.ndarray]:
    import soxr

    stream = soxr.ResampleStream(from_rate, to_rate, 2, dtype="float32", quality="HQ")
    for block in source:
        if len(resampled := stream.resample_chunk(block)):
            yield resampled
    last = stream.resample_chunk(np.zeros((0, 2), dtype=np.float32), last=True)
    if len(last):
        yield last


def _wav_header(num_samples: int) -> bytes:
    num_bytes = 4 * num_samples
    if num_bytes > 0xFFFFFFFF - 36:
        raise RecordError(
            "must be at most 12 h long, since a WAV holds no more: cut it into several recordings"
        )
    form = struct.pack("<HHIIHH", 1, 2, SAMPLE_RATE, 4 * SAMPLE_RATE, 4, 16)
    data = b"data" + struct.pack("<I", num_bytes)
    return b"RIFF" + struct.pack("<I", 36 + num_bytes) + b"WAVEfmt \x10\0\0\0" + form + data
