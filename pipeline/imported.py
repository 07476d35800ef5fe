"""What an import brings in, and what its readers share."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duplex.base import Record
from duplex.errors import CorruptFileError, RequestError
from duplex.stage import BlobSink

MAX_JSON_BYTES = 1 << 28


@dataclass(frozen=True)
class Blob:
    """Content that a record names by its sha256; `chunks` reads it anew each time."""

    sha256: str
    suffix: str
    chunks: Callable[[], Iterable[bytes]]

    def store(self, sink: BlobSink) -> None:
        """
        Raises:
            CorruptFileError: the source is not what it was when its record was made.
        """
        if sink.put_chunks(self.chunks(), self.suffix) != self.sha256:
            raise CorruptFileError(
                f"what is imported must stay as it is meanwhile: the source of {self.sha256[:12]}… "
                "was changed after it was read. Import it again"
            )


@dataclass
class Imported:
    """What came in: records with the blobs that they need, and what was refused and why."""

    records: list[Record] = field(default_factory=list)
    blobs: list[Blob] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def add_bytes(self, content: bytes, suffix: str) -> str:
        """Keep a small blob in memory; returns its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs.append(Blob(sha256, suffix, lambda: (content,)))
        return sha256

    def refuse_doubles(self) -> None:
        seen: set[str] = set()
        for record in list(self.records):
            if record.id in seen:
                self.records.remove(record)
                why = "each record needs an id of its own, found twice"
                self.refused.append((record.id, why))
            seen.add(record.id)


def slug(name: str) -> str:
    """A name as a record id: lower case, everything else a hyphen."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-._")[:96] or "unnamed"


def read_json(text: str) -> Any:
    """
    Raises:
        ValueError: not JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_text(path: Path) -> str:
    """
    Raises:
        OSError, ValueError: not there, no file, not UTF-8, or too long to be what it should.
    """
    if path.exists() and not path.is_file():  # reading a pipe would never end
        raise ValueError("it must be a file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"it must be at most {MAX_JSON_BYTES >> 20} MiB long")
    return path.read_text(encoding="utf-8")


def json_values(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, or of the list that a .json file holds.

    Raises:
        RequestError: it holds something else.
    """
    try:
        text = read_text(path)
        values = (
            [read_json(line) for line in text.split("\n") if line.strip()]
            if path.suffix == ".jsonl"
            else read_json(text)
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: must be JSON or JSON lines in UTF-8: {error}") from None
    if isinstance(values, dict):
        values = next((v for v in values.values() if isinstance(v, list)), [values])
    if not isinstance(values, list):
        raise RequestError(f"{path}: must hold a list of records, found {values!r:.80}")
    for value in values:
        if not isinstance(value, dict):
            raise RequestError(f"{path}: each record must be an object, found {value!r:.80}")
        yield value
