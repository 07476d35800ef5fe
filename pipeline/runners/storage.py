"""How blobs and inputs travel where nodes share no file system: through a store of objects.

    <url>/blobs/<sha256><suffix>                          of all stages and runs
    <url>/folders/<stage folder>-<digest>/manifest.json   of finished stages, with parts/

`url` is s3://bucket/prefix (`s3.py`) or whatever fsspec opens: gs://, file://, memory://.
The driver lends its input folders before a stage starts; a worker fetches what it reads, and puts
what it makes; the driver fetches that into the run folder before the ledger names it. Names are
digests and are checked at each end, so a store can be slow or damaged, not wrong.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from duplex.errors import CorruptFileError, StageFailedError
from duplex.files import atomic_path, sha256_file
from duplex.stage import StageContext
from duplex.store import MANIFEST, StageFolder
from pipeline.runners.s3 import advice_on, open_s3, put_object

KEPT_BLOBS = 256  # fetched ones that a worker keeps at a time
SCRATCH = "duplex-worker-"


class Storage:
    """Objects below a URL.

    Raises:
        StageFailedError: it cannot be opened, reached, read or written; names it without what
            may be a password.
    """

    def __init__(self, url: str):
        import fsspec

        self._name = url.rpartition("@")[2]
        self._is_s3 = url.startswith("s3://")
        try:
            self._files, self._root = open_s3(url) if self._is_s3 else fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise self._failed("opened", error) from None

    def put(self, path: Path, name: str) -> None:
        """A file under a name, whole or not at all; nothing where it is there already."""
        target = f"{self._root}/{name}"
        try:
            if self._is_s3:
                # By size: a write that was broken off leaves an object that is cut short.
                if self._size(target) != path.stat().st_size:
                    put_object(self._files, path, target)
                return
            if self._files.exists(target):
                return
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            if "file" not in self._files.protocol:  # objects appear whole
                self._files.put_file(str(path), target)
                return
            unfinished = f"{target}.{os.getpid()}.unfinished"
            self._files.put_file(str(path), unfinished)
            self._files.mv(unfinished, target)
        except Exception as error:  # noqa: BLE001 - each store raises errors of its own
            raise self._failed(f"written ({name})", error) from None

    def _size(self, target: str) -> int | None:
        try:
            return self._files.info(target)["size"]
        except FileNotFoundError:
            return None

    def get(self, name: str, path: Path) -> None:
        with atomic_path(path) as temporary:
            self._read(name, temporary)

    def get_blob(self, name: str, folder: Path) -> Path:
        """A blob into a folder of blobs; it gets its name there once it was found to be right.

        Raises:
            CorruptFileError: the store holds something else under that name.
        """
        path = folder / name
        if path.exists():
            return path
        with atomic_path(path) as temporary:
            self._read(f"blobs/{name}", temporary)
            if sha256_file(temporary) != name.partition(".")[0]:
                raise CorruptFileError(
                    f"{self._name}/blobs/{name}: must hold what its name says, found something "
                    "else. Remove it there and run again"
                )
        return path

    def _read(self, name: str, path: Path) -> None:
        try:
            self._files.get_file(f"{self._root}/{name}", str(path))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # this machine's disk
            raise self._failed(f"read ({name})", error) from None

    def _failed(self, what: str, error: Exception) -> StageFailedError:
        """In words of our own: a store's may hold what is secret."""
        why = type(error).__name__
        advice = "Its package and credentials must be on every node, those in the environment"
        if self._is_s3:
            why = advice_on(error) or (str(error) if isinstance(error, ValueError) else why)
            why = "there is nothing of that name" if isinstance(error, FileNotFoundError) else why
            advice = "What is finished is kept: run again"
        return StageFailedError(
            f"runner.runtime.storage must be a store that can be used: {self._name} cannot be "
            f"{what}: {why}. {advice}"
        )


class LentFolder(StageFolder):
    """A finished stage's folder on another node: manifest and parts are here, blobs are fetched."""

    def __init__(self, path: Path, folder: StageFolder, storage: Storage):
        super().__init__(path, folder.stage, folder.key)
        self._storage = storage
        self._fetched: deque[Path] = deque()

    def read_blob(self, sha256: str, suffix: str) -> bytes:
        return self.blob_path(sha256, suffix).read_bytes()

    def blob_path(self, sha256: str, suffix: str) -> Path:
        path = self._storage.get_blob(f"{sha256}{suffix}", self.path / "blobs")
        if path not in self._fetched:
            self._fetched.append(path)
        while len(self._fetched) > KEPT_BLOBS:
            self._fetched.popleft().unlink(missing_ok=True)
        return path


def name_of(folder: StageFolder) -> str:
    return f"folders/{folder.path.name}-{folder.digest[:16]}"


def lend(context: StageContext, url: str) -> None:
    """Put the inputs of a stage where its workers find them."""
    storage = Storage(url)
    for folder in context.inputs.values():
        manifest = folder.manifest()
        assert manifest is not None, "an input is complete"
        for blob in sorted((folder.path / "blobs").glob("[0-9a-f]*")):
            storage.put(blob, f"blobs/{blob.name}")
        for file in manifest["files"]:
            if file["path"].startswith("parts/"):
                storage.put(folder.path / file["path"], f"{name_of(folder)}/{file['path']}")
        storage.put(folder.path / MANIFEST, f"{name_of(folder)}/{MANIFEST}")


class Borrowed:
    """A worker's own place on its node: a run root with the inputs, and a folder to write into."""

    def __init__(self, context: StageContext, folder: StageFolder, url: str, lent: dict[str, str]):
        """`lent`: input stage -> its name in the storage."""
        self._storage = Storage(url)
        _sweep()
        self.root = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
        inputs: dict[str, StageFolder] = {}
        for name, found in context.inputs.items():
            inputs[name] = LentFolder(self.root / found.path.name, found, self._storage)
            self._fetch(inputs[name], lent[name])
        self.folder = StageFolder(self.root / folder.path.name, folder.stage, folder.key)
        self.folder.path.mkdir()
        self.context = replace(context, runs_root=self.root, inputs=inputs, folder=self.folder)

    def hand_in(self, blobs: tuple[str, ...]) -> None:
        for name in blobs:
            path = self.folder.path / "blobs" / name
            self._storage.put(path, f"blobs/{name}")
            path.unlink()

    def leave(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def _fetch(self, folder: StageFolder, name: str) -> None:
        self._storage.get(f"{name}/{MANIFEST}", folder.path / MANIFEST)
        manifest: dict[str, Any] = folder.manifest() or {}
        for file in manifest["files"]:
            if file["path"].startswith("parts/"):
                self._storage.get(f"{name}/{file['path']}", folder.path / file["path"])


def _sweep() -> None:
    """Remove what workers left here that were killed."""
    for place in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        pid = place.name.removeprefix(SCRATCH).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(place, ignore_errors=True)
