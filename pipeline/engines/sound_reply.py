"""Sound that a server or another process sent: bytes of some format -> mono at 24 kHz. Pure.

What it is, is read from its first bytes; the Content-Type counts for raw samples alone. WAV
headers are checked against what came, since libsndfile reads a cut file without a word; a header
that leaves its sizes open (0, or all ones), as servers write that stream, is taken as it is.
"""

from __future__ import annotations

import io
import re
import struct

import numpy as np

from duplex.frames import SAMPLE_RATE

MIN_RATE, MAX_RATE = 8_000, 192_000
LONGEST_S = 600
OPEN_SIZES = (0, 0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF)
OPEN_FROM = 0x7FFFFF00  # writers subtract their headers from "all ones"


class NotSoundError(ValueError):
    """What came instead of sound; another request may do better."""


def samples_of(content: bytes, content_type: str = "") -> np.ndarray:
    """float32 [S] at 24 kHz, of WAV, FLAC, Ogg, MP3 or raw 16-bit samples.

    Of several channels the loudest: their mean may cancel.

    Raises:
        NotSoundError: text, an unknown format, a cut or empty file, an absurd rate or length.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if not content:
        raise NotSoundError("an empty body")
    if content[:4] == b"RIFF":
        samples, rate = _decoded(_whole_wav(content))
    elif content[:4] in (b"fLaC", b"OggS") or content[:3] == b"ID3" or _is_mp3(content):
        samples, rate = _decoded(content)
    elif kind in ("audio/pcm", "audio/raw", "audio/x-raw"):
        samples, rate = _raw(content, content_type)
    else:
        raise NotSoundError(f"{kind or 'bytes'} that begin with {_shown(content)}")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise NotSoundError(f"a sample rate of {rate} Hz")
    if not len(samples):
        raise NotSoundError("no samples")
    if len(samples) > LONGEST_S * rate:
        raise NotSoundError(f"{len(samples) / rate:.0f} s of sound, at most {LONGEST_S} are taken")
    if not np.isfinite(samples).all():
        raise NotSoundError("samples that are NaN or infinite")
    mono = samples[:, int(np.argmax((samples.astype(np.float64) ** 2).sum(axis=0)))]
    return at_our_rate(mono, rate)


def at_our_rate(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 [S] at 24 kHz.

    Args:
        samples: float32 [S'] at `rate`.
    """
    import soxr

    if rate == SAMPLE_RATE:
        return np.ascontiguousarray(samples, dtype=np.float32)
    return soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)


def _is_mp3(content: bytes) -> bool:
    return len(content) > 1 and content[0] == 0xFF and content[1] & 0xE0 == 0xE0


def _decoded(content: bytes) -> tuple[np.ndarray, int]:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            frames = min(file.frames, (LONGEST_S + 1) * file.samplerate)
            return file.read(frames, dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise NotSoundError(f"a file that cannot be decoded: {error}") from None


def _raw(content: bytes, content_type: str) -> tuple[np.ndarray, int]:
    """16-bit little-endian mono, as OpenAI's `pcm`; 24 kHz unless the Content-Type says."""
    if len(content) % 2:
        raise NotSoundError("raw samples of which the last one is cut")
    said = re.search(r"rate=(\d{4,6})", content_type)
    samples = np.frombuffer(content, dtype="<i2").astype(np.float32) / 32768
    return samples[:, None], int(said[1]) if said else SAMPLE_RATE


def _whole_wav(content: bytes) -> bytes:
    """A WAV whose header says what came.

    Raises:
        NotSoundError: it says that more was to come, or has no samples.
    """
    position, form = 12, b""
    while position + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, position)
        body = position + 8
        if name == b"data":
            left = len(content) - body
            if size in OPEN_SIZES or size >= OPEN_FROM:
                return _wav(form, content[body:])
            if size > left:
                raise NotSoundError(f"a WAV that was cut: {left} bytes of samples of {size}")
            return _wav(form, content[body : body + size])
        if name == b"fmt ":
            form = content[body : body + size]
        position = body + size + size % 2
    raise NotSoundError("a WAV that was cut before its samples")


def _wav(form: bytes, data: bytes) -> bytes:
    if len(form) < 16:
        raise NotSoundError("a WAV without its format")
    block = struct.unpack_from("<H", form, 12)[0] or 1
    data = data[: len(data) // block * block]  # an open end may fall within a sample
    parts = [b"fmt ", struct.pack("<I", len(form)), form, b"data", struct.pack("<I", len(data))]
    body = b"WAVE" + b"".join(parts) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _shown(content: bytes) -> str:
    return repr(content[:160].decode("utf-8", errors="replace"))
