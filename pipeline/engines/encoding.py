"""Recordings -> codes: read from disk, encoded by the codec, kept in a cache by content.

The cache's name for codes covers the audio's sha256, the codec's, the part of the recording
and the manner of encoding, so another alignment or prompt encodes nothing again. A damaged
entry is made anew. An hour of conversation takes 1.4 MB.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.errors import RecordError
from duplex.files import write_atomic
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.records import canonical_json
from duplex.streams import CODEBOOKS
from pipeline.engines.codec import WINDOW_FRAMES, encode, encode_batch, encode_long

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel

CACHE_VERSION = 1  # raised when the same part of the same audio gets other codes
DIGEST_BYTES = 32
PEAK_BLOCK = 60 * SAMPLE_RATE


@dataclass(frozen=True)
class Recording:
    """A stereo 24 kHz file of `num_samples`, to be encoded from frame `start_frame` on."""

    path: Path
    sha256: str
    num_samples: int
    start_frame: int = 0

    @property
    def num_frames(self) -> int:
        return frames_covering_samples(self.num_samples) - self.start_frame

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [2, stop - start], samples counted from `start_frame`."""
        offset = self.start_frame * FRAME_SAMPLES
        return read_stereo(self.path, offset + start, offset + stop)

    def peaks(self) -> np.ndarray:
        """float [2]: the loudest sample of each channel, read block by block."""
        length = self.num_samples - self.start_frame * FRAME_SAMPLES
        blocks = range(0, length, PEAK_BLOCK)
        return np.max(
            [np.abs(self.read(s, min(s + PEAK_BLOCK, length))).max(axis=1) for s in blocks], axis=0
        )


class Encoder:
    """The codec with its cache. `made` counts what was encoded, `found` what was not."""

    def __init__(self, mimi: MimiModel, codec_digest: str, card: int, cache: Path | None):
        self.mimi = mimi
        self._codec_digest = codec_digest
        self._card = card
        self._cache = cache
        self.made = self.found = 0

    def conversation(self, recording: Recording, batch: Sequence[Recording] = ()) -> np.ndarray:
        """int64 [2, 8, T], agent first: the whole recording from its start frame on.

        Args:
            batch: the fixed batch that the recording belongs to, itself among them: all are
                encoded in one pass, in this order, and go into the cache.
        """
        what = ["conversation", recording.start_frame]
        codes = self._look_up(recording, what)
        if codes is not None:
            return codes
        if len(batch) < 2 or max(mate.num_frames for mate in batch) > WINDOW_FRAMES:
            num_samples = recording.num_samples - recording.start_frame * FRAME_SAMPLES
            codes = encode_long(self.mimi, recording.read, num_samples)
            return self._keep(recording, what, codes)
        audio = [
            mate.read(0, mate.num_samples - mate.start_frame * FRAME_SAMPLES) for mate in batch
        ]
        for mate, mate_codes in zip(batch, encode_batch(self.mimi, audio), strict=True):
            kept = self._keep(mate, ["conversation", mate.start_frame], mate_codes)
            codes = kept if mate == recording else codes
        assert codes is not None, "a recording is a member of its batch"
        return codes

    def turns(
        self, recording: Recording, spans: Sequence[tuple[int, int, int]], silence: tuple[int, ...]
    ) -> np.ndarray:
        """int64 [2, 8, T]: each turn encoded by itself, constant silence between.

        Args:
            spans: (channel, first frame, end frame) of each turn.
        """
        what = ["turns", recording.start_frame, [list(span) for span in spans], list(silence)]
        codes = self._look_up(recording, what)
        if codes is not None:
            return codes
        constant = np.asarray(silence, dtype=np.int64)[None, :, None]
        codes = np.repeat(np.repeat(constant, 2, axis=0), recording.num_frames, axis=2)
        for channel, start, end in spans:
            last = min(end * FRAME_SAMPLES, recording.num_samples)
            samples = recording.read(start * FRAME_SAMPLES, last)[channel]
            turn = encode(self.mimi, samples[None])[0]
            codes[channel, :, start : start + turn.shape[1]] = turn
        return self._keep(recording, what, codes)

    def mono(self, samples: np.ndarray) -> np.ndarray:
        """int64 [8, T] of float32 [S], encoded by itself: a voice sample, a greeting."""
        return encode(self.mimi, samples[None])[0]

    # -- the cache

    def _path(self, recording: Recording, what: list[Any]) -> Path | None:
        if self._cache is None:
            return None
        name = canonical_json([CACHE_VERSION, self._codec_digest, recording.sha256, what])
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._cache / digest[:2] / f"{digest}.codes"

    def _look_up(self, recording: Recording, what: list[Any]) -> np.ndarray | None:
        path = self._path(recording, what)
        codes = read_codes(path, self._card) if path is not None and path.exists() else None
        if codes is None or codes.shape != (2, CODEBOOKS, recording.num_frames):
            return None
        self.found += 1
        return codes

    def _keep(self, recording: Recording, what: list[Any], codes: np.ndarray) -> np.ndarray:
        path = self._path(recording, what)
        if path is not None:
            write_codes(path, codes)
        self.made += 1
        return codes


def write_codes(path: Path, codes: np.ndarray) -> None:
    """int64 [C, 8, T] as int16 (int32 beyond it), after the sha256 of what follows."""
    dtype = np.int16 if codes.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(dtype), allow_pickle=False)
    content = buffer.getvalue()
    write_atomic(path, hashlib.sha256(content).digest() + content)


def read_codes(path: Path, card: int) -> np.ndarray | None:
    """What `write_codes` wrote; None where the file is damaged or of another codec."""
    content = path.read_bytes()
    body = content[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != content[:DIGEST_BYTES]:
        return None
    codes = np.load(io.BytesIO(body), allow_pickle=False).astype(np.int64)
    return codes if codes.size and codes.min() >= 0 and codes.max() < card else None


# -- audio files


def read_stereo(source: Path | bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
    """float32 [2, stop - start] of a 24 kHz stereo WAV, row 0 agent.

    Raises:
        RecordError: it is not one.
    """
    import soundfile

    file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        with soundfile.SoundFile(file) as audio:
            if audio.samplerate != SAMPLE_RATE or audio.channels != 2:
                raise RecordError(
                    f"the audio must be stereo at {SAMPLE_RATE} Hz (left agent, right user), found "
                    f"{audio.channels} channel(s) at {audio.samplerate} Hz"
                )
            audio.seek(min(start, audio.frames))
            wanted = -1 if stop is None else stop - start
            samples = audio.read(wanted, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"the audio must be a WAV file, cannot be read: {error}") from None
    if not len(samples) or not np.isfinite(samples).all():
        raise RecordError("the audio must hold finite samples, found none or NaN")
    if stop is not None and len(samples) != stop - start:
        raise RecordError(
            f"the audio must have {stop} samples as its record says, found {start + len(samples)}"
        )
    return np.ascontiguousarray(samples.T)


def quantize(samples: np.ndarray) -> np.ndarray:
    """float32 [S] on the grid of 16-bit files, so that what is encoded is what is stored."""
    return (_to_int16(samples) / np.float32(32768)).astype(np.float32)


def mono_wav_bytes(samples: np.ndarray) -> bytes:
    """16-bit mono WAV at 24 kHz; reading it gives `quantize(samples)` exactly."""
    import soundfile

    target = io.BytesIO()
    soundfile.write(target, _to_int16(samples), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return target.getvalue()


def _to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
