"""What engines spoke, kept by what was asked for: nothing is paid for, or computed, twice.

A dialogue is finished as a whole. Without this a turn that fails for now, a kill or another
mixing would speak all of its other turns again. The name of an utterance covers the engine's
revision, the voice (without its proof), text, language, emotion, intensity, the parameters that
come of them, seed, number of the try, and what was heard before by an engine that listens to it.

    file    sha256 of the rest; one line of JSON with key, words and dtype; samples, little endian

Samples are int16 where they lie on its grid, as those of servers mostly do (2.9 MB a minute), and
float32 elsewhere: what is read is what was written, bit by bit. A file that is damaged, or is not
what its name says, is as good as none. `duplex clean` removes what nobody asked for in a month.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from duplex.base import canonical_json
from duplex.files import write_atomic
from duplex.frames import SAMPLE_RATE
from duplex.records import Word
from pipeline.engines.sound_reply import LONGEST_S
from pipeline.engines.speaking import SpeechRequest, Utterance

FOLDER = ".cache/speech"  # in the folder of runs
SUFFIX = ".utterance"
STORE_VERSION = 1  # raised when a file is written in another way
UNSTORED = frozenset({"espeak"})  # speaks as quickly as a disk reads
DIGEST_BYTES = 32
LARGEST_BYTES = 4 * LONGEST_S * SAMPLE_RATE + (4 << 20)
GRID = 32768  # of 16-bit samples
_DTYPES = {"<i2": 2, "<f4": 4}
_WORDS = TypeAdapter(tuple[Word, ...] | None)


class UtteranceStore:
    """Safe for threads and processes: a file is whole or not there."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, key: str) -> Utterance | None:
        """None: never spoken, or its file is damaged."""
        path = self._path(key)
        try:
            if path.is_symlink() or path.stat().st_size > LARGEST_BYTES:
                return None
            utterance = _unpacked(path.read_bytes(), key)
            path.touch()  # which is how `duplex clean` knows that it is still of use
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return utterance

    def write(self, key: str, utterance: Utterance) -> None:
        write_atomic(self._path(key), _packed(key, utterance))

    def forget(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{SUFFIX}"


def key_of(revision: str, request: SpeechRequest, number: int, *, hears_context: bool) -> str:
    """The name of what an engine says to a request.

    Args:
        revision: of the engine, with its name.
        number: of the try; 0 is the first.
        hears_context: whether the engine is given what was said before.
    """
    heard = [_digest_of(text, said) for text, said in request.context] if hears_context else []
    material = {
        "store": STORE_VERSION,
        "engine": revision,
        "voice": request.voice.model_copy(update={"proof": None}).digest,
        "text": request.text,
        "language": request.language,
        "emotion": request.emotion,
        "intensity": request.intensity,
        "settings": dict(request.settings),
        "seed": request.seed,
        "try": number,
        "context": heard,
    }
    return hashlib.sha256(canonical_json(material).encode()).hexdigest()


def _digest_of(text: str, said: Utterance) -> list[str | None]:
    samples = np.ascontiguousarray(said.samples, dtype="<f4")
    return [text, said.speaker, hashlib.sha256(samples.tobytes()).hexdigest()]


def _packed(key: str, utterance: Utterance) -> bytes:
    samples = np.asarray(utterance.samples, dtype=np.float32)
    coarse = np.clip(np.round(samples * GRID), -GRID, GRID - 1).astype("<i2")
    exact = bool(np.array_equal(_from_grid(coarse), samples))
    content = coarse if exact else samples.astype("<f4")
    header: dict[str, Any] = {
        "key": key,
        "dtype": "<i2" if exact else "<f4",
        "words": _WORDS.dump_python(utterance.words, mode="json"),
    }
    body = json.dumps(header).encode() + b"\n" + content.tobytes()
    return hashlib.sha256(body).digest() + body


def _unpacked(content: bytes, key: str) -> Utterance:
    """
    Raises:
        ValueError, KeyError, TypeError: it is not the utterance of that key.
    """
    digest, body = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("it is damaged")
    line, _, sound = body.partition(b"\n")
    header = json.loads(line)
    size = _DTYPES[header["dtype"]]
    if header["key"] != key or not sound or len(sound) % size:
        raise ValueError("it is another one's")
    found = np.frombuffer(sound, dtype=header["dtype"])
    samples = _from_grid(found) if size == 2 else found.astype(np.float32)
    if not np.isfinite(samples).all():
        raise ValueError("it is no sound")
    try:
        words = _WORDS.validate_python(header["words"])
    except ValidationError as error:
        raise ValueError("it has no words") from error
    if words is not None and not all(max(w.start_s, w.end_s) <= LONGEST_S for w in words):
        raise ValueError("its words are beyond all sound")
    return Utterance(samples, words)


def _from_grid(samples: np.ndarray) -> np.ndarray:
    return samples.astype(np.float32) / np.float32(GRID)
