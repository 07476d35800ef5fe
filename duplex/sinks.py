"""How a stage hands in what it makes: blobs of a task, files of a whole stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duplex.files import atomic_path, named_when_written, sha256_bytes, sha256_file, write_atomic
from duplex.records import Artifact
from duplex.stage import BlobSink
from duplex.store import StageFolder


class FolderBlobs(BlobSink):
    """Blobs of one task in a stage folder; `names` are those put so far."""

    def __init__(self, folder: StageFolder):
        self._folder = folder
        self.names: list[str] = []

    def put(self, content: bytes, suffix: str) -> str:
        sha256 = sha256_bytes(content)
        name = f"{sha256}{suffix}"
        path = self._folder.path / "blobs" / name
        if not path.exists():
            write_atomic(path, content)
        self.names.append(name)
        return sha256

    def put_chunks(self, chunks: Iterable[bytes], suffix: str) -> str:
        folder = self._folder.path / "blobs"
        digest = hashlib.sha256()
        with named_when_written(folder) as temporary:
            with temporary.path.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
            sha256 = digest.hexdigest()
            temporary.name = f"{sha256}{suffix}"
        self.names.append(temporary.name)
        return sha256


class FileWriter:
    """How a whole stage hands in its files. `work` outlives a kill; the rest is made whole."""

    def __init__(self, folder: StageFolder):
        self.folder = folder
        self.files: list[dict[str, Any]] = []
        folder.work.mkdir(parents=True, exist_ok=True)

    @property
    def work(self) -> Path:
        return self.folder.work

    def add(
        self,
        artifact_id: str,
        source: Path,
        name: str,
        *,
        facts: dict[str, Any] | None = None,
        deterministic: bool = True,
    ) -> Artifact:
        """Move `source` (in `work`) to `name` in the stage folder and record it.

        `deterministic=False` keeps the file out of the stage's digest: pages, timings.
        """
        target = self.folder.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        size, sha256 = source.stat().st_size, sha256_file(source)
        with atomic_path(target) as temporary:
            source.replace(temporary)
        self.files.append(
            {"path": name, "sha256": sha256, "bytes": size, "deterministic": deterministic}
        )
        return Artifact(id=artifact_id, path=name, sha256=sha256, num_bytes=size, facts=facts or {})
