"""What a push sends: files by their name in the repository, the index over them, the card.

Nothing of it is sent before all of it has been looked through: secrets, paths, consent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from duplex.base import Record, canonical_json
from duplex.config import Config
from duplex.datafiles import find_path
from duplex.errors import CorruptFileError, MissingInputError
from duplex.files import sha256_bytes, sha256_file
from duplex.records import Artifact
from duplex.store import StageFolder
from pipeline.hubs import cards
from pipeline.hubs.index import (
    ADAPTER_FILES,
    CARD,
    DATA_STAGES,
    INDEX,
    RECORD_TYPES,
    HubFile,
    HubIndex,
    HubStage,
    blobs_of,
)
from pipeline.hubs.scan import check_consent, scan_texts, strip_provenance
from pipeline.run import Step, plan, run_folder_of

What = Literal["data", "adapter"]


@dataclass
class Bundle:
    """Everything that goes up. `files`: name in the repository -> a path here, or bytes."""

    what: What
    index: HubIndex
    card: str
    files: dict[str, Path | bytes]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def repo_type(self) -> str:
        return "dataset" if self.what == "data" else "model"

    def size(self, name: str) -> int:
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def num_bytes(self) -> int:
        return sum(map(self.size, self.files))


@contextmanager
def make_bundle(
    config: Config,
    config_path: Path,
    runs: Path,
    what: What,
    *,
    view: bool,
    consent: str | None,
    overrides: list[str],
    repo: str,
) -> Iterator[Bundle]:
    """The bundle, with the files of the view while the block lasts.

    Raises:
        MissingInputError: nothing is finished that could be pushed.
        CorruptFileError: a stage folder is damaged.
        RequestError: a secret, a path or a voice without consent is in it.
    """
    steps = _finished(config, runs, what)
    files: dict[str, Path | bytes] = {}
    stages, everything = [], []
    for step in steps:
        records = _take_stage(step, files)
        everything += records
        stages.append(_stage_entry(step, records, files))
    if what == "data":
        check_consent(everything, consent)
    listed = tuple(_listed(files))
    index = HubIndex(
        format=1, kind=what, name=config.name, base=public_base(config), stages=tuple(stages),
        files=listed,
    )  # fmt: skip
    with TemporaryDirectory(prefix="duplex-push-") as temporary:
        sections = []
        if view and what == "data":
            sections, parquet = _view(config_path, Path(temporary), runs, overrides)
            files |= parquet
        if what == "data":
            card = cards.data_card(repo, index, everything, sections, consent)
        else:
            facts = next(r.facts for r in everything if r.id == "adapter")
            card = cards.adapter_card(repo, index, facts, _metrics(files["metrics.jsonl"]), config)
        files[CARD], files[INDEX] = card.encode(), index.to_bytes()
        texts = {name: content for name, content in files.items() if isinstance(content, bytes)}
        if what == "adapter":
            texts |= {name: _text_of(files[name]) for name in ADAPTER_FILES}
        scan_texts(texts)
        digests = {file.path: file.sha256 for file in listed}
        yield Bundle(what, index, card, files, digests)


def public_base(config: Config) -> str:
    """The base model by a name that means something elsewhere: a folder's path does not."""
    base = config.model.base
    return "a local folder" if base != "pocket" and find_path(base).is_dir() else base


def _finished(config: Config, runs: Path, what: What) -> list[Step]:
    wanted = DATA_STAGES if what == "data" else ("train",)
    steps = [s for s in plan(config, runs) if s.stage.name in wanted and s.done and s.folder]
    names = {step.stage.name for step in steps}
    if not names & {"dialogues", "speech", "tensors", "train"}:
        goal = "dialogues" if what == "data" else "train"
        raise MissingInputError(
            f"{goal} must be finished in {run_folder_of(config, runs)}, and is not. "
            f"Run `duplex run CONFIG --to {goal}` first"
        )
    return steps


def _take_stage(step: Step, files: dict[str, Path | bytes]) -> list[Any]:
    """The records of a stage; what they name is added to `files`."""
    folder, name = step.folder, step.stage.name
    assert folder is not None
    records = sorted(folder.records(), key=lambda record: record.id)
    strange = [r.id for r in records if not isinstance(r, RECORD_TYPES[name])]
    if strange:
        raise CorruptFileError(f"{folder.path}: holds records of another stage: {strange[:3]}")
    for record in records:
        for sha256 in blobs_of(record):
            path = _blob_path(folder, sha256, record.id)
            files[f"blobs/{sha256[:2]}/{path.name}"] = path
        if isinstance(record, Artifact) and name == "train":
            files[record.path.removeprefix("adapter/")] = folder.artifact(record.id)
    return records


def _blob_path(folder: StageFolder, sha256: str, record_id: str) -> Path:
    found = sorted((folder.path / "blobs").glob(f"{sha256}.*"))
    if len(found) != 1:
        raise CorruptFileError(
            f"{folder.path}: must hold the blob {sha256[:12]}… of {record_id}, found "
            f"{'nothing' if not found else len(found)}. Remove the stage folder and run again."
        )
    return folder.blob_path(sha256, found[0].suffix)


def _stage_entry(step: Step, records: list[Record], files: dict[str, Path | bytes]) -> HubStage:
    folder, name = step.folder, step.stage.name
    assert folder is not None
    manifest = folder.manifest()
    assert manifest is not None
    lines = _record_lines(folder, manifest)
    files[f"records/{name}.jsonl"] = "".join(f"{line}\n" for line in lines).encode()
    if work := _work_lines(folder, lines):
        files[f"work/{name}.jsonl"] = "".join(f"{line}\n" for line in work).encode()
    recorded = {record.path for record in records if isinstance(record, Artifact)}
    own = tuple(
        HubFile(path=f["path"].removeprefix("adapter/"), sha256=f["sha256"], bytes=f["bytes"])
        for f in manifest["files"]
        if f["path"] in recorded
    )
    return HubStage(
        stage=name,  # pyright: ignore[reportArgumentType]  # pydantic checks it
        key=manifest["key"],
        digest=manifest["digest"],
        counts=manifest["counts"],
        files=own,
        provenance=strip_provenance(manifest["provenance"]),
    )


def _record_lines(folder: StageFolder, manifest: dict[str, Any]) -> list[str]:
    """The lines of all parts, as they are: a digest is of lines."""
    parts = [f["path"] for f in manifest["files"] if f["path"].startswith("parts/")]
    return [
        line for part in sorted(parts) for line in _split_lines((folder.path / part).read_bytes())
    ]


def _split_lines(content: bytes) -> list[str]:
    """At newlines alone: a text may hold other signs that Python counts as line ends."""
    return [line.decode() for line in content.splitlines()]


def _work_lines(folder: StageFolder, lines: list[str]) -> list[str]:
    """Which task made which lines, by their number: `{"task", "key", "lines"}`."""
    numbers = {line: number for number, line in enumerate(lines)}
    entries = []
    for task_id, entry in sorted(folder.ledger().items()):
        if all(line in numbers for line in entry.lines):
            value = {
                "task": task_id, "key": entry.key, "lines": [numbers[x] for x in entry.lines],
                "blobs": list(entry.blobs),
            }  # fmt: skip
            entries.append(canonical_json(value))
    return entries


def _listed(files: dict[str, Path | bytes]) -> Iterator[HubFile]:
    for name, content in sorted(files.items()):
        if isinstance(content, bytes):
            yield HubFile(path=name, sha256=sha256_bytes(content), bytes=len(content))
            continue
        # A blob was checked against its name when its path was taken.
        digest = content.name.partition(".")[0]
        sha256 = digest if name.startswith("blobs/") else sha256_file(content)
        yield HubFile(path=name, sha256=sha256, bytes=content.stat().st_size)


def _view(
    config_path: Path, temporary: Path, runs: Path, overrides: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Path | bytes]]:
    """Parquet files for `datasets`, and how many rows each split has."""
    from pipeline.converters.datasets_view import convert_datasets

    try:
        outcome = convert_datasets(config_path, temporary / "view", runs=runs, overrides=overrides)
    except MissingInputError:  # neither tensors nor speech: the records are all there is
        return [], {}
    folder = temporary / "view"
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.parquet"))}
    return outcome.rows, dict(found)


def _metrics(source: Path | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text_of(source).splitlines()]


def _text_of(source: Path | bytes) -> bytes:
    """Text to look through; of weights the header, which is where text can be."""
    if isinstance(source, bytes):
        return source
    if source.suffix != ".safetensors":
        return source.read_bytes()
    with source.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), 64 << 20))
