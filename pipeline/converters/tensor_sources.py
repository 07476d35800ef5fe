"""Tensors to convert, from a file, a folder or a stage, and what a model says about them.

Files come from outside: see `pipeline.engines.tensor_file.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duplex.coffee import TextCoder
from duplex.config import ModelSection
from duplex.errors import MissingInputError, RecordError, RequestError
from duplex.files import sha256_file
from duplex.records import TensorClip
from duplex.store import MANIFEST, StageFolder
from duplex.streams import CodecTokens
from pipeline.converters.common import is_config, records_of, stage_folders
from pipeline.engines.tensor_file import read_codes
from pipeline.sidecar import record_beside


@dataclass(frozen=True)
class Source:
    """A tensor to convert: where its bytes are, and its record where there is one."""

    name: str
    path: Path
    clip: TensorClip | None = None
    sha256: str | None = None

    def read(self) -> np.ndarray:
        """int64 codes.

        Raises:
            RecordError: the file holds something else, or is not the one that its record names.
        """
        codes, _ = read_codes(self.path)
        if self.sha256 and (found := sha256_file(self.path)) != self.sha256:
            raise RecordError(
                f"must have sha256 {self.sha256[:12]}…, as its record says; found {found[:12]}…"
            )
        return codes


@dataclass(frozen=True)
class Model:
    """What a conversion needs of the model: tokenizer, constants, vocabulary, digests."""

    coder: TextCoder
    codec: CodecTokens
    card: int
    text_card: int
    codec_digest: str
    tokenizer_digest: str


def find_sources(source: Path, runs: Path, overrides: list[str] | None = None) -> list[Source]:
    """
    Raises:
        RequestError: there is no .pt file.
        CorruptFileError: a stage folder that cannot be read.
    """
    if is_config(source) or (source / MANIFEST).is_file():
        folder = stage_folders(source, ("tensors",), runs, overrides)["tensors"]
        return list(_clips_of(folder))
    if not source.exists():
        raise MissingInputError(f"{source} must exist, found nothing there")
    files = sorted(source.glob("*.pt")) if source.is_dir() else [source]
    if not files:
        raise RequestError(f"{source} must hold .pt files, found none")
    return [_file_source(file) for file in files]


def _clips_of(folder: StageFolder) -> Iterator[Source]:
    for clip in records_of(folder):
        if isinstance(clip, TensorClip):
            path = folder.path / "blobs" / f"{clip.tensor}.pt"
            yield Source(clip.id, path, clip, clip.tensor)


def _file_source(file: Path) -> Source:
    """A bare .pt, with the record beside it where there is one."""
    clip = record_beside(file)
    return Source(file.stem, file, clip, clip.tensor if clip else None)


def load_model(section: ModelSection, runs: Path) -> Model:
    """
    Raises:
        MissingInputError, CorruptFileError: the checkpoint is not there or not whole.
    """
    from pipeline.engines.checkpoint import resolve_checkpoint
    from pipeline.engines.codec import measure_tokens

    checkpoint = resolve_checkpoint(section, runs)
    tokenizer: Any = checkpoint.load_tokenizer()

    def decode(ids: list[int]) -> str:
        try:
            return tokenizer.decode(ids)
        except IndexError:
            raise ValueError("the text must be of the model's tokenizer, found other ids") from None

    return Model(
        coder=TextCoder(tokenizer.encode, decode),
        codec=measure_tokens(checkpoint.load_mimi()),
        card=checkpoint.config["card"],
        text_card=checkpoint.config["text_card"],
        codec_digest=checkpoint.digest("codec"),
        tokenizer_digest=checkpoint.digest("tokenizer"),
    )
