"""Run folders: what a stage finished, what it rejected, and the manifest that closes it.

    runs/<config name>/04-speech-9f31c2ab/
      ledger.jsonl      a line for each finished task, with its records: resume reads this
      rejected.jsonl    task id, key, error class, message
      blobs/            content-addressed: <sha256>.wav, <sha256>.pt
      work/             what a whole stage keeps for its own resume (checkpoints)
      parts/            the records, sorted by id; written when the stage is complete
      manifest.json     written last: it exists exactly when the stage is complete

A blob is durable before the ledger names it, and the ledger line before the manifest does,
so a kill at any moment loses at most the task in flight.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.base import Record, canonical_json
from duplex.errors import CorruptFileError
from duplex.files import (
    append_line,
    atomic_path,
    read_lines,
    read_verified,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from duplex.records import Artifact, parse_record

LEDGER, REJECTED, MANIFEST, FAILURE = (
    "ledger.jsonl", "rejected.jsonl", "manifest.json", "failure.json",
)  # fmt: skip
KEY_DIGITS = 8
RECORDS_PER_PART = 10_000
HASHED_BYTES = 1 << 30
LAST_KEYS = re.compile(rb'"seconds":[-+.0-9e]+,"task":("(?:[^"\\]|\\.)*")\}\n?\Z')
LONGEST_END = 1024


@dataclass(frozen=True)
class LedgerEntry:
    """A finished task: its records as JSON lines, and the blobs that they name."""

    task_id: str
    key: str
    lines: tuple[str, ...]
    blobs: tuple[str, ...]
    seconds: float
    adopted_from: str | None = None
    attempt: int = 0


class StageFolder:
    """One stage's folder. Created on the first write, so that looking leaves no trace."""

    def __init__(self, path: Path, stage: str, key: str):
        self.path = path
        self.stage = stage
        self.key = key

    @classmethod
    def of(cls, run_folder: Path, number: int, stage: str, key: str) -> StageFolder:
        return cls(run_folder / f"{number:02d}-{stage}-{key[:KEY_DIGITS]}", stage, key)

    @property
    def work(self) -> Path:
        return self.path / "work"

    # -- the manifest

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the stage is not complete.

        Raises:
            CorruptFileError: it is there and cannot be read.
        """
        path = self.path / MANIFEST
        if not path.exists():
            return None
        try:
            value = json.loads(path.read_text())
            if value["stage"] != self.stage or (self.key and value["key"] != self.key):
                raise KeyError("stage and key")
            _ = value["digest"], value["counts"], value["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{path}: must be this stage's manifest, cannot be read as one ({error}). "
                "Remove it and run again: finished records are kept."
            ) from None
        return value

    @property
    def digest(self) -> str:
        manifest = self.manifest()
        assert manifest is not None, f"{self.path} is read as an input before it is complete"
        return manifest["digest"]

    def records(self) -> Iterator[Record]:
        """The records of a complete stage, sorted by id.

        Raises:
            CorruptFileError: a part does not hold what the manifest says.
        """
        manifest = self.manifest()
        assert manifest is not None, f"{self.path} is read before it is complete"
        for file in manifest["files"]:
            if not file["path"].startswith("parts/"):
                continue
            path = self.path / file["path"]
            for line in read_verified(path, file["sha256"]).splitlines():
                try:
                    yield parse_record(json.loads(line))
                except (ValueError, KeyError, ValidationError) as error:
                    raise CorruptFileError(f"{path}: not a record of ours: {error}") from None

    def read_blob(self, sha256: str, suffix: str) -> bytes:
        """A blob's bytes, checked against its name."""
        return read_verified(self.path / "blobs" / f"{sha256}{suffix}", sha256)

    def blob_path(self, sha256: str, suffix: str) -> Path:
        """A blob's path, its content checked against its name in blocks."""
        path = self.path / "blobs" / f"{sha256}{suffix}"
        if not path.is_file() or sha256_file(path) != sha256:
            read_verified(path, sha256)  # raises, and says which of the two it is
        return path

    def artifact(self, artifact_id: str) -> Path:
        """Path of a file that a whole stage made, by its record's id, checked.

        By size always, by sha256 up to `HASHED_BYTES`: a 7B model's 15 GB take half a minute.

        Raises:
            CorruptFileError: no such record, or the file is gone or cut.
        """
        for record in self.records():
            if isinstance(record, Artifact) and record.id == artifact_id:
                path = self.path / record.path
                size = path.stat().st_size if path.exists() else -1
                if size != record.num_bytes:
                    raise CorruptFileError(
                        f"{path}: must have {record.num_bytes} bytes, found "
                        f"{'nothing' if size < 0 else size}. Remove the stage folder and run again."
                    )
                if size <= HASHED_BYTES and sha256_file(path) != record.sha256:
                    raise CorruptFileError(
                        f"{path}: must have sha256 {record.sha256[:12]}…, found another: the file "
                        "was changed or damaged. Remove the stage folder and run again."
                    )
                return path
        raise CorruptFileError(f"{self.path}: holds no artifact {artifact_id}")

    # -- the ledger

    def ledger(self) -> dict[str, LedgerEntry]:
        """Finished tasks by id; the last line of an id counts."""
        entries: dict[str, LedgerEntry] = {}
        for line in read_lines(self.path / LEDGER):
            try:
                entry = LedgerEntry(
                    task_id=line["task"],
                    key=line["key"],
                    lines=tuple(canonical_json(record) for record in line["records"]),
                    blobs=tuple(line["blobs"]),
                    seconds=line["seconds"],
                    adopted_from=line.get("adopted_from"),
                    attempt=line.get("attempt", 0),
                )
            except (KeyError, TypeError):
                continue
            entries[entry.task_id] = entry
        return entries

    def num_finished(self) -> int:
        """How many tasks the ledger holds. Its records stay unread: they may be gigabytes."""
        path = self.path / LEDGER
        return len(set(_task_ids(path))) if path.exists() else 0

    def rejected(self) -> dict[str, dict[str, Any]]:
        """Rejected tasks by id; the last line of an id counts."""
        lines = (line for line in read_lines(self.path / REJECTED) if "task" in line)
        return {line["task"]: line for line in lines}

    def finished(self) -> list[LedgerEntry]:
        """What came of the tasks in the end, by id, also while the manifest is still to come."""
        faults, entries = self.rejected(), self.ledger()
        return [
            entry
            for name, entry in sorted(entries.items())
            if name not in faults or not outlives(faults[name], entry)
        ]

    def holds_blobs(self, entry: LedgerEntry) -> bool:
        return all((self.path / "blobs" / name).exists() for name in entry.blobs)

    def blobs_are_whole(self, entry: LedgerEntry) -> bool:
        """Whether each blob holds what its name says; reads them all."""
        paths = (self.path / "blobs" / name for name in entry.blobs)
        return all(sha256_file(path) == path.name.partition(".")[0] for path in paths)

    def finish_task(self, entry: LedgerEntry) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        line: dict[str, Any] = {
            "task": entry.task_id,
            "key": entry.key,
            "records": [json.loads(record) for record in entry.lines],
            "blobs": list(entry.blobs),
            "seconds": round(entry.seconds, 4),
        }
        if entry.attempt:
            line["attempt"] = entry.attempt
        if entry.adopted_from:
            line["adopted_from"] = entry.adopted_from
        append_line(self.path / LEDGER, canonical_json(line))

    def reject_task(
        self,
        task_id: str,
        key: str,
        error: Exception,
        *,
        attempt: int = 0,
        reviewed: bool = False,
    ) -> None:
        """`reviewed`: it was finished, and its stage's review turned it down for good."""
        self.path.mkdir(parents=True, exist_ok=True)
        fault = {"task": task_id, "key": key, "error": type(error).__name__, "message": str(error)}
        fault |= {"attempt": attempt} | ({"reviewed": True} if reviewed else {})
        append_line(self.path / REJECTED, canonical_json(fault))

    def adopt(self, donor: StageFolder, entry: LedgerEntry) -> None:
        """Take over a finished task of another folder: blobs by hard link, then the line."""
        for name in entry.blobs:
            source, target = donor.path / "blobs" / name, self.path / "blobs" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.link(source, target)
                except OSError:  # another file system
                    with atomic_path(target) as temporary:
                        shutil.copyfile(source, temporary)
        self.finish_task(
            LedgerEntry(
                entry.task_id, entry.key, entry.lines, entry.blobs, entry.seconds,
                adopted_from=donor.path.name,
            )
        )  # fmt: skip

    # -- the end

    def reopen(self) -> None:
        """Take the manifest back before anything beneath it changes."""
        (self.path / MANIFEST).unlink(missing_ok=True)

    def complete(
        self,
        lines: Iterable[str],
        *,
        files: list[dict[str, Any]],
        counts: dict[str, int],
        provenance: dict[str, Any],
    ) -> dict[str, Any]:
        """Write parts and manifest. `files` are those of a whole stage, already in place."""
        ordered = sorted(lines, key=lambda line: (json.loads(line)["id"], line))
        parts = []
        for index, start in enumerate(range(0, max(len(ordered), 1), RECORDS_PER_PART)):
            content = "".join(f"{line}\n" for line in ordered[start : start + RECORDS_PER_PART])
            name = f"parts/part-{index:05d}.jsonl"
            write_atomic(self.path / name, content.encode())
            parts.append(
                {
                    "path": name,
                    "sha256": sha256_bytes(content.encode()),
                    "bytes": len(content.encode()),
                }
            )
        fixed = [file for file in files if file.pop("deterministic", True)]
        digest = stage_digest(ordered, fixed, counts)
        manifest = {
            "stage": self.stage,
            "key": self.key,
            "digest": digest,
            "counts": counts,
            "files": parts + files,
            "provenance": provenance,
        }
        (self.path / FAILURE).unlink(missing_ok=True)
        write_json(self.path / MANIFEST, manifest)
        return manifest

    def note_failure(self, message: str) -> None:
        if self.path.is_dir():
            write_json(self.path / FAILURE, {"message": message})

    def failure(self) -> str | None:
        path = self.path / FAILURE
        try:
            return str(json.loads(path.read_text())["message"]) if path.exists() else None
        except (OSError, ValueError, KeyError):
            return "failed, and its note of why cannot be read"


def _task_ids(ledger: Path) -> Iterator[str]:
    """Of all whole lines. `finish_task` sorts its keys, so that `task` is the last one."""
    with ledger.open("rb") as file:
        for line in file:
            found = LAST_KEYS.search(line, max(0, len(line) - LONGEST_END))
            try:
                yield json.loads(found[1]) if found else json.loads(line)["task"]
            except (ValueError, KeyError, TypeError):  # torn by a kill
                continue


def stage_digest(ordered: list[str], files: list[dict[str, Any]], counts: Mapping[str, int]) -> str:
    """A manifest's digest: of the record lines, the deterministic files and the counts."""
    content = canonical_json({"records": ordered, "files": files, "counts": dict(counts)})
    return sha256_bytes(content.encode())


def outlives(fault: dict[str, Any], entry: LedgerEntry | None) -> bool:
    """Whether a task's reject is what became of it in the end, and not its finished record.

    Of the same attempt, it is the record: it was made when the reject was retried, unless it is
    the record itself that a review turned down.
    """
    if entry is None:
        return True
    attempt = int(fault.get("attempt", 0))
    if attempt != entry.attempt:
        return attempt > entry.attempt
    return bool(fault.get("reviewed")) and fault.get("key") == entry.key


def folders_of(run_folder: Path, number: int, stage: str) -> list[StageFolder]:
    """All folders of a stage in a run, newest first; their full keys are unknown."""
    pattern = re.compile(rf"^{number:02d}-{re.escape(stage)}-[0-9a-f]{{{KEY_DIGITS}}}$")
    if not run_folder.is_dir():
        return []
    found = [path for path in run_folder.iterdir() if path.is_dir() and pattern.match(path.name)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [StageFolder(path, stage, "") for path in found]
