"""Recordings -> codes: read from disk, encoded by the codec, kept in a cache by content.

The cache's name for codes covers the audio's sha256, the codec's, the part of the recording
and the manner of encoding, so another alignment or prompt encodes nothing again. A damaged
entry is made anew. An hour of conversation takes 1.4 MB.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.base import canonical_json
from duplex.errors import RecordError
from duplex.files import write_atomic
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.streams import CODEBOOKS
from pipeline.engines.codec import WINDOW_FRAMES, encode, encode_batch, encode_long

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel

CACHE_VERSION = 1  # raised when the same part of the same audio gets other codes
DIGEST_BYTES = 32
PEAK_BLOCK = 60 * SAMPLE_RATE


@dataclass(frozen=True)
class Recording:
    """A stereo 24 kHz file, to be encoded from frame `start_frame` on.

    num_samples: of the whole file. locate: gives its path, its content checked.
    """

    locate: Callable[[], Path]
    sha256: str
    num_samples: int
    start_frame: int = 0

    @cached_property
    def path(self) -> Path:
        return self.locate()

    @property
    def length(self) -> int:
        """Samples from `start_frame` on."""
        return self.num_samples - self.start_frame * FRAME_SAMPLES

    @property
    def num_frames(self) -> int:
        return frames_covering_samples(self.length)

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [2, stop - start], samples counted from `start_frame`."""
        offset = self.start_frame * FRAME_SAMPLES
        return read_stereo(self.path, offset + start, offset + stop)

    def peaks(self) -> np.ndarray:
        """float [2]: the loudest sample of each channel, read block by block."""
        blocks = range(0, self.length, PEAK_BLOCK)
        return np.max(
            [np.abs(self.read(s, min(s + PEAK_BLOCK, self.length))).max(axis=1) for s in blocks],
            axis=0,
        )


class Encoder:
    """The codec with its cache."""

    def __init__(self, mimi: MimiModel, codec_digest: str, card: int, cache: Path | None):
        self.mimi = mimi
        self._codec_digest = codec_digest
        self._card = card
        self._cache = cache
        self._batch: dict[str, np.ndarray] = {}  # of the latest batch, by name in the cache

    def conversation(self, recording: Recording) -> np.ndarray:
        """int64 [2, 8, T], agent first: the whole recording from its start frame on."""
        what = ["conversation", recording.start_frame]
        codes = self._look_up(recording, what)
        if codes is not None:
            return codes
        codes = encode_long(self.mimi, recording.read, recording.length)
        return self._keep(recording, what, codes)

    def conversation_of_batch(
        self, recording: Recording, planned: Sequence[str], batch: Callable[[], Sequence[Recording]]
    ) -> np.ndarray:
        """The same, encoded in one pass with its fixed batch: bytes repeat, whatever is done.

        Args:
            planned: audio digests of the whole batch, part of the codes' name in the cache,
                since a batch of another make may round otherwise.
            batch: gives those of it that can be encoded, `recording` among them, in a fixed
                order. Not asked where the codes are known.
        """

        def what(mate: Recording) -> list[Any]:
            return ["batch", mate.start_frame, list(planned)]

        codes = self._look_up(recording, what(recording))
        if codes is not None:
            return codes
        mates = [mate for mate in batch() if mate.num_frames <= WINDOW_FRAMES]
        if recording.num_frames > WINDOW_FRAMES:
            return self.conversation(recording)
        made = encode_batch(self.mimi, [mate.read(0, mate.length) for mate in mates])
        self._batch = {}
        for mate, mate_codes in zip(mates, made, strict=True):
            self._batch[self._name(mate, what(mate))] = self._keep(mate, what(mate), mate_codes)
        return self._batch[self._name(recording, what(recording))]

    def turns(
        self, recording: Recording, spans: Sequence[tuple[int, int, int]], silence: tuple[int, ...]
    ) -> np.ndarray:
        """int64 [2, 8, T]: each turn encoded by itself, constant silence between.

        Args:
            spans: (channel, first frame, end frame) of each turn, counted from `start_frame`.
        """
        what = ["turns", recording.start_frame, [list(span) for span in spans], list(silence)]
        codes = self._look_up(recording, what)
        if codes is not None:
            return codes
        constant = np.asarray(silence, dtype=np.int64)[None, :, None]
        codes = np.repeat(np.repeat(constant, 2, axis=0), recording.num_frames, axis=2)
        for channel, start, end in spans:
            last = min(end * FRAME_SAMPLES, recording.length)
            samples = recording.read(start * FRAME_SAMPLES, last)[channel]
            turn = encode(self.mimi, samples[None])[0]
            codes[channel, :, start : start + turn.shape[1]] = turn
        return self._keep(recording, what, codes)

    def mono(self, samples: np.ndarray) -> np.ndarray:
        """int64 [8, T] of float32 [S], encoded by itself: a voice sample, a greeting."""
        return encode(self.mimi, samples[None])[0]

    # -- the cache

    def _name(self, recording: Recording, what: list[Any]) -> str:
        name = canonical_json([CACHE_VERSION, self._codec_digest, recording.sha256, what])
        return hashlib.sha256(name.encode()).hexdigest()

    def _path(self, name: str) -> Path | None:
        return None if self._cache is None else self._cache / name[:2] / f"{name}.codes"

    def _look_up(self, recording: Recording, what: list[Any]) -> np.ndarray | None:
        name = self._name(recording, what)
        path = self._path(name)
        codes = self._batch.get(name)
        if codes is None and path is not None and path.exists():
            codes = read_cached(path, self._card)
            path.touch()  # `duplex clean` removes what nobody has asked for in a month
        if codes is None or codes.shape != (2, CODEBOOKS, recording.num_frames):
            return None
        return codes

    def _keep(self, recording: Recording, what: list[Any], codes: np.ndarray) -> np.ndarray:
        path = self._path(self._name(recording, what))
        if path is not None:
            write_cached(path, codes)
        return codes


def write_cached(path: Path, codes: np.ndarray) -> None:
    """int64 [C, 8, T] as int16 (int32 beyond it), after the sha256 of what follows."""
    dtype = np.int16 if codes.max(initial=0) <= np.iinfo(np.int16).max else np.int32
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(dtype), allow_pickle=False)
    content = buffer.getvalue()
    write_atomic(path, hashlib.sha256(content).digest() + content)


def read_cached(path: Path, card: int) -> np.ndarray | None:
    """What `write_cached` wrote; None where the file is damaged or of another codec."""
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
