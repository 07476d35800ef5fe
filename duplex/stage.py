"""What a stage is: its name, what it reads, and how its work is keyed.

A `MapStage` makes records one task at a time; it can be killed, resumed and spread out.
A `WholeStage` makes files from all of its inputs at once (train, merge, serve, evaluate).

Keys are computed without importing torch. A record's key covers everything that decides
its content; a folder's key covers everything that decides its set of records. Equal key
means equal content, so a finished record is never made twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from duplex.base import Record, canonical_json
from duplex.config import Config
from duplex.files import file_chunks

if TYPE_CHECKING:
    from duplex.sinks import FileWriter
    from duplex.store import StageFolder


@dataclass(frozen=True)
class Task:
    """One unit of a MapStage. `sources` are the digests of what it is made from.

    `attempt` counts how often its record was sent back by the stage's `review`: a stage that
    reviews makes another one for each.
    """

    id: str
    sources: tuple[str, ...]
    payload: Any = None
    attempt: int = 0


@dataclass
class StageContext:
    """What a stage may know: the config, the finished stages that it declares, its own folder."""

    config: Config
    runs_root: Path
    inputs: dict[str, StageFolder] = field(default_factory=dict)
    report: Callable[[str], None] = print
    folder: StageFolder | None = None

    def records(self, stage: str, record_type: type[Record]) -> Iterator[Any]:
        """Records of an input stage, sorted by id."""
        return (r for r in self.inputs[stage].records() if isinstance(r, record_type))


class Stage:
    """Common ground of both kinds.

    Class attributes:
        name: as in the config and the folder.
        number: place in the order, 1 to 9.
        version: raised when the code makes other content from the same inputs.
        reads: earlier stages whose manifests it reads.
        set_only: keys of its section that choose *which* records there are, not what is in
            one; they are left out of record keys, so asking for more makes only what is new.
    """

    name: ClassVar[str]
    number: ClassVar[int]
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()
    set_only: ClassVar[frozenset[str]] = frozenset()

    def engine(self, config: Config) -> str:
        """Id and revision of what does the work; part of every key."""
        return ""

    def files(self, config: Config) -> dict[str, str]:
        """Outside files that decide the set of records: path -> sha256."""
        return {}

    def keyed(self, config: Config) -> dict[str, Any]:
        """Its own section as it enters keys. One that names outside files by their places leaves
        those out here, and gives what is in them by `files`."""
        return config.keyed(self.name)

    def beyond(self, config: Config) -> dict[str, Any]:
        """Settings of other sections that choose among the sources of its records, such as which
        voice. They are part of the folder's key; what was chosen is among a task's sources."""
        return {}

    def folder_key(self, config: Config, input_digests: dict[str, str]) -> str:
        material = {
            "stage": self.name,
            "version": self.version,
            "seed": config.seed,
            "section": self.keyed(config),
            "engine": self.engine(config),
            "files": sorted(self.files(config).values()),
            "inputs": {name: input_digests[name] for name in self.reads},
        }
        beyond = self.beyond(config)
        return _digest(material | ({"beyond": beyond} if beyond else {}))

    def record_key(self, config: Config, task: Task) -> str:
        section = {k: v for k, v in self.keyed(config).items() if k not in self.set_only}
        material = {
            "stage": self.name,
            "version": self.version,
            "seed": config.seed,
            "section": section,
            "engine": self.engine(config),
            "id": task.id,
            "sources": list(task.sources),
        }
        return _digest(material | ({"attempt": task.attempt} if task.attempt else {}))


class MapStage(Stage):
    def tasks(self, context: StageContext) -> list[Task]:
        """All tasks, in any order; ids are unique. Must not import torch."""
        raise NotImplementedError

    def takes_workers(self, config: Config) -> bool:
        """Whether tasks may be spread over processes, each with a `setup` of its own."""
        return False

    def threads(self, config: Config) -> int:
        """How many tasks may be under way at once in this process, each in a thread of its own.

        More than one is for tasks that wait for a server; `process` must then be thread-safe.
        """
        return 1

    def stop(self) -> None:
        """The run is given up while tasks are under way in threads: let them begin nothing more
        that costs. Called from another thread than theirs; what they return is dropped."""

    max_attempts: ClassVar[int] = 8  # of a task whose records `review` sends back

    def review(self, done: list[tuple[str, list[Record]]], context: StageContext) -> dict[str, str]:
        """Looks at all finished tasks together; returns those to be made again, and why.

        `done` is sorted by task id and holds every task that is not rejected. The answer must
        depend on it alone: then the end is the same in any order of work, after any kill.
        """
        return {}

    def prepare(self, context: StageContext) -> None:
        """Fetch or build what the workers' `setup` will load; called once, before they start."""

    def setup(self, context: StageContext) -> None:
        """Load what `process` needs. Called once in each process, only when there is work."""

    def notes(self, folder: StageFolder) -> dict[str, Any]:
        """What the manifest's provenance should say of this stage's work: what it cost, say."""
        return {}

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        """The records of one task. `seed` differs from attempt to attempt.

        Raises:
            RecordError: this task cannot succeed; it is rejected, with the message.
            TransientError: it may succeed next time; it stays undone.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free what `setup` took: processes, above all. Called however the stage ends."""

    def page(self, folder: StageFolder, context: StageContext) -> str | None:
        """HTML to look at and listen to, written as `index.html`; None: no page."""
        return None


class WholeStage(Stage):
    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        """Do all of the work; files go through `writer`, the records are returned."""
        raise NotImplementedError


class BlobSink:
    """Where `process` puts bytes that belong to its records."""

    def put(self, content: bytes, suffix: str) -> str:
        """Store `content` under its sha256 and return that."""
        raise NotImplementedError

    def put_chunks(self, chunks: Iterable[bytes], suffix: str) -> str:
        """As `put`, for content that is too long to be held: hashed while it is written."""
        raise NotImplementedError

    def put_file(self, path: Path, suffix: str) -> str:
        """Store a copy of a file under its sha256 and return that."""
        return self.put_chunks(file_chunks(path), suffix)


def record_seed(run_seed: int, stage: str, record_id: str, attempt: int = 0) -> int:
    """Seed of one record: the same whatever the order, the runner or the resumes."""
    again = f"\x00attempt {attempt}" if attempt else ""
    material = f"{run_seed}\x00{stage}\x00{record_id}{again}".encode()
    return int.from_bytes(hashlib.sha256(material).digest()[:4], "big")


def _digest(material: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(material).encode()).hexdigest()
