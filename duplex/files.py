"""Files that are whole or not there: temporary name, fsync, rename.

fsync and rename cost about 0.4 ms a file on a local disk.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from duplex.errors import CorruptFileError, RequestError

CHUNK_BYTES = 1 << 20
SETTLED_NS = 2_000_000_000  # a file system's clock may tick this slowly
_known: dict[tuple[int, ...], str] = {}


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` so that a reader, or a kill, sees the old file or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    write_atomic(
        path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    )


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there is renamed to `path` at the end.

    On an error nothing is left behind and `path` keeps what it had.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Unnamed:
    """A file that gets its name, in its own folder, once its content is known."""

    path: Path
    name: str = ""


@contextmanager
def named_when_written(folder: Path) -> Iterator[Unnamed]:
    """As `atomic_path`, for a file that is named by its content: set `name` inside."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder, prefix=".new-", suffix=".tmp")
    os.close(handle)
    unnamed = Unnamed(Path(path))
    try:
        yield unnamed
        sync_file(unnamed.path)
        unnamed.path.chmod(0o644)
        unnamed.path.replace(folder / unnamed.name)
        sync_folder(folder)
    finally:
        unnamed.path.unlink(missing_ok=True)


def file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    sync_file(path)


def append_line(path: Path, line: str, *, durable: bool = True) -> None:
    """Append one line; with `durable` fsync. A kill in between leaves a torn last line at most."""
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            file.write(b"\n")  # closes a line that a kill tore; readers skip what does not parse
        file.write(line.encode() + b"\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of an append-only file; lines torn by a kill are left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


# libyaml's, five times as fast, where PyYAML was built with it. Both construct plain values alone.
_SafeLoader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: it is none, or names a type of Python.
    """
    return yaml.load(text, _SafeLoader)


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """`sha256_file`, read once in a process: known by device, inode, size and times.

    For keys, which are asked for again and again. What was changed within the last two seconds
    is not kept: another change may leave its times as they are. `ctime` cannot be set back.
    """
    stat = path.stat()
    name = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if name in _known:
        return _known[name]
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS
    digest = sha256_file(path)
    if settled:
        _known[name] = digest
    return digest


def read_verified(path: Path, sha256: str) -> bytes:
    """The bytes of a file whose digest is known.

    Raises:
        CorruptFileError: the file is gone or holds something else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CorruptFileError(
            f"{path}: must exist, since a finished record names it; found nothing. "
            "Remove its stage folder and run again."
        ) from None
    found = sha256_bytes(content)
    if found != sha256:
        raise CorruptFileError(
            f"{path}: must have sha256 {sha256[:12]}…, found {found[:12]}…: the file was changed "
            "or damaged. Remove it and its stage folder, then run again."
        )
    return content


def require_free(out: Path) -> None:
    """
    Raises:
        RequestError: `out` is neither free nor an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} must not exist or be empty, found something there.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and else goes.

    Raises:
        RequestError: `out` is taken.
    """
    require_free(out)
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.unfinished-"
    for leftover in out.parent.glob(f"{glob.escape(prefix)}*"):  # of a process that was killed
        if not _is_running(leftover.name.removeprefix(prefix)):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = out.parent / f"{prefix}{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            sync_file(path)
        sync_folder(folder)
        folder.replace(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()
