"""The voices and greetings that a server has: names on a list, never paths.

A query names one of them as `voice_prompt` (what the agent sounds like) or as `greeting` (what
the other side said first). They are encoded once, as the tensors stage encodes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from duplex.errors import RecordError, RequestError
from duplex.frames import FRAME_SAMPLES
from duplex.records import VoiceSample
from duplex.store import StageFolder
from pipeline.engines.voicesample import read_voice, voice_sample

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel
    from moshi.models.lm import LMModel

    from pipeline.serving.voice_embeddings import VoiceEmbeddings

LONGEST_S = 30.0
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}")
SUFFIXES = (".wav", ".flac", ".pt")
PACKAGED = ".pt"  # PersonaPlex's voices: see `voice_embeddings`


class VoiceList:
    """Codes int64 [8, T] by name, for either use. What is too short for a voice, or no speech,
    may still be a greeting; a packaged voice has embeddings instead, and can be no greeting."""

    def __init__(
        self,
        voices: dict[str, np.ndarray],
        greetings: dict[str, np.ndarray],
        no_voices: dict[str, str] | None = None,
        embeddings: dict[str, VoiceEmbeddings] | None = None,
    ):
        self._voices = voices
        self._greetings = greetings
        self._no_voices = no_voices or {}
        self._embeddings = embeddings or {}

    @classmethod
    def load(cls, files: dict[str, Path], mimi: MimiModel, lm: LMModel) -> VoiceList:
        """Encode all recordings, read all packaged voices; the codec must not be streaming yet.

        Raises:
            RequestError: a file that is neither a mono recording nor a voice of this model.
        """
        from pipeline.engines.codec import encode
        from pipeline.serving.voice_embeddings import read_voice_embeddings

        voices, greetings, no_voices, embeddings = {}, {}, {}, {}
        for name, path in files.items():
            if path.suffix.lower() == PACKAGED:
                embeddings[name] = read_voice_embeddings(path, lm)
                continue
            try:
                samples = read_voice(path)
            except RecordError as error:
                raise RequestError(f"voice {name}: {error}") from None
            missing = -len(samples) % FRAME_SAMPLES
            greetings[name] = encode(mimi, np.pad(samples, (0, missing))[None])[0]
            try:
                voices[name] = encode(mimi, voice_sample(samples, LONGEST_S)[None])[0]
            except RecordError as error:
                no_voices[name] = str(error)
        return cls(voices, greetings, no_voices, embeddings)

    @property
    def names(self) -> list[str]:
        return sorted([*self._greetings, *self._embeddings])

    def embeddings(self, name: str) -> VoiceEmbeddings | None:
        """Of a packaged voice; None where the name is none of those."""
        return self._embeddings.get(name)

    def voice(self, name: str) -> np.ndarray | None:
        return self._find("voice_prompt", name, self._voices)

    def greeting(self, name: str) -> np.ndarray | None:
        return self._find("greeting", name, self._greetings)

    def _find(self, key: str, name: str, table: dict[str, np.ndarray]) -> np.ndarray | None:
        if not name:
            return None
        if name in self._embeddings:
            raise RequestError(f"{key} must be a recording, {name} is a packaged voice")
        if name in self._no_voices and table is self._voices:
            raise RequestError(f"{key} {name}: {self._no_voices[name]}")
        if name not in table:
            has = ", ".join(self.names) or (
                "none: tensors.voice_prompt_s and tensors.greeting give a run some, "
                "`duplex serve --voices DIR` any"
            )
            raise RequestError(
                f"{key} must be a voice that this server has ({has}), found {name!r}"
            )
        return table[name]


def files_in(folder: Path) -> dict[str, Path]:
    """The recordings of a folder by their names.

    Raises:
        RequestError: no such folder, or names that no URL could hold.
    """
    if not folder.is_dir():
        raise RequestError(f"--voices must be a folder of mono WAV files, found none at {folder}")
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES}
    odd = [name for name in files if not NAME.fullmatch(name)]
    if odd:
        raise RequestError(f"a voice's name must be letters, digits, - and _, found {odd[0]!r}")
    return files


def files_of_run(tensors: StageFolder) -> dict[str, Path]:
    """What the tensors of a run were made with: each persona's voice sample by the persona's
    id, and `greeting`. Empty where the prompts have neither."""
    files: dict[str, Path] = {}
    for record in tensors.records():
        if isinstance(record, VoiceSample):
            name = record.persona_id if record.kind == "voice" else record.id
            # Sorted by id, so `.0` comes first: the others only stand in for it in training.
            if name not in files:
                files[name] = tensors.blob_path(record.audio, ".wav")
    return files
