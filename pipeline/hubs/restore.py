"""A pulled folder becomes finished stages of a run, or an adapter's folder.

All of it is read before any of it is put in place: records by their schema, digests of stages
computed anew, tensors with `weights_only=True`, recordings by their headers.
A stage whose key is the one that the config asks for is simply found there; another one is put in
its place by a pointer, as `duplex import` does it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.base import Record
from duplex.config import Config
from duplex.datafiles import describe_faults
from duplex.errors import CorruptFileError, RecordError
from duplex.files import atomic_path, new_folder, write_json
from duplex.frames import SAMPLE_RATE
from duplex.lock import RunLock
from duplex.records import Artifact, Speech, TensorClip, Voice, VoiceSample, parse_record
from duplex.store import LedgerEntry, StageFolder, stage_digest
from duplex.streams import NUM_ROWS
from pipeline.hubs.index import ADAPTER_FILES, BLOB, RECORD_TYPES, HubIndex, HubStage, blobs_of
from pipeline.hubs.scan import strip_provenance
from pipeline.run import IMPORTS_FOLDER, plan, run_folder_of, stage_named


@dataclass(frozen=True)
class Restored:
    """A stage as it stands in the run now. `how`: found, restored or put in place."""

    stage: str
    folder: str
    digest: str
    how: str


@dataclass(frozen=True)
class _Content:
    entry: HubStage
    lines: list[str]
    records: list[Record]
    work: list[LedgerEntry]


def restore_stages(
    config: Config, runs: Path, index: HubIndex, folder: Path, origin: str
) -> list[Restored]:
    """Put the stages of a pulled folder into the config's run.

    Raises:
        CorruptFileError: something is not what the index says, or no record of ours; or the run
            holds other content under the same key. Nothing was changed.
    """
    contents = [_read_stage(entry, index, folder) for entry in index.stages]
    run_folder = run_folder_of(config, runs)
    restored = []
    with RunLock(run_folder):
        targets = [_target(run_folder, content.entry) for content in contents]
        for content, target in zip(contents, targets, strict=True):
            how = "found"
            if target.manifest() is None:
                _fill(content, target, folder, index, origin)
                how = "restored"
            step = next(s for s in plan(config, runs) if s.stage.name == content.entry.stage)
            if step.folder is None or step.folder.path != target.path or not step.done:
                pointer = {"folder": target.path.name, "key": content.entry.key}
                write_json(run_folder / IMPORTS_FOLDER / f"{content.entry.stage}.json", pointer)
                how = "put in place"
            restored.append(
                Restored(content.entry.stage, target.path.name, content.entry.digest, how)
            )
    return restored


def restore_adapter(index: HubIndex, folder: Path, out: Path) -> None:
    """Write the adapter's files to `out`, a new folder.

    Raises:
        RequestError: `out` is taken.
        CorruptFileError, MergeError: it is no plain LoRA adapter, or not what the index says.
    """
    _read_stage(index.stages[0], index, folder)
    from training.adapter import Adapter

    Adapter.open(folder)
    with new_folder(out) as target:
        for name in ADAPTER_FILES:
            shutil.copyfile(folder / name, target / name)


# -- reading


def _read_stage(entry: HubStage, index: HubIndex, folder: Path) -> _Content:
    lines = _lines(folder / "records" / f"{entry.stage}.jsonl")
    records = [_record(line, entry.stage) for line in lines]
    fixed = [
        {"path": _stage_path(file.path), "sha256": file.sha256, "bytes": file.bytes}
        for file in entry.files
    ]
    ordered = sorted(lines, key=lambda line: (json.loads(line)["id"], line))
    if stage_digest(ordered, fixed, entry.counts) != entry.digest:
        raise CorruptFileError(
            f"{entry.stage}: the records must have the digest {entry.digest[:12]}… that the index "
            "names, found another. Nothing of it was used"
        )
    blobs = {m[2]: m[0] for file in index.files if (m := BLOB.fullmatch(file.path))}
    for record in records:
        for sha256 in blobs_of(record):
            if sha256 not in blobs:
                raise CorruptFileError(f"{entry.stage}: {record.id} names a file that is not there")
            _check_content(record, folder / blobs[sha256])
    listed = {file.path: file for file in index.files}
    for file in entry.files:
        if listed.get(file.path) != file:
            raise CorruptFileError(f"{entry.stage}: {file.path} is not among the files")
    for artifact in records:
        if isinstance(artifact, Artifact) and artifact.path not in {f["path"] for f in fixed}:
            raise CorruptFileError(f"{entry.stage}: {artifact.path!r:.80} is not among its files")
    return _Content(entry, lines, records, _work(entry.stage, lines, blobs, folder))


def _stage_path(path: str) -> str:
    """Where a file of the repository stands in the stage's own folder."""
    return f"adapter/{path}" if path.startswith("adapter_") else path


def _lines(path: Path) -> list[str]:
    try:
        return [line.decode() for line in path.read_bytes().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path.name}: must be text in UTF-8: {error}") from None


def _record(line: str, stage: str) -> Record:
    try:
        record = parse_record(json.loads(line))
    except ValidationError as error:
        raise CorruptFileError(f"{stage}: not a record of ours: {describe_faults(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{stage}: not a record of ours: {error!r:.200}") from None
    if not isinstance(record, RECORD_TYPES[stage]):
        raise CorruptFileError(f"{stage}: holds no {type(record).__name__}, found {record.id}")
    return record


def _check_content(record: Record, blob: Path) -> None:
    """Whether a blob is what its record says, without running anything of it."""
    if isinstance(record, TensorClip):
        from pipeline.engines.tensor_file import read_codes

        try:
            codes, _ = read_codes(blob)
        except (RecordError, OSError) as error:
            raise CorruptFileError(f"{record.id}: {error}") from None
        if codes.shape != (NUM_ROWS, record.num_frames):
            raise CorruptFileError(
                f"{record.id}: must be [{NUM_ROWS}, {record.num_frames}], found {codes.shape}"
            )
    elif isinstance(record, Speech):
        _check_audio(record.id, blob, channels=2, num_samples=record.num_samples)
    elif isinstance(record, Voice | VoiceSample):
        _check_audio(record.id, blob, channels=1, num_samples=None)


def _check_audio(record_id: str, path: Path, *, channels: int, num_samples: int | None) -> None:
    import soundfile

    try:
        found = soundfile.info(str(path))
    except (RuntimeError, OSError) as error:
        raise CorruptFileError(f"{record_id}: must be a recording: {error}") from None
    if (found.samplerate, found.channels) != (SAMPLE_RATE, channels) or (
        num_samples is not None and found.frames != num_samples
    ):
        raise CorruptFileError(
            f"{record_id}: must have {channels} channels at {SAMPLE_RATE} Hz"
            f"{'' if num_samples is None else f' and {num_samples} samples'}, found "
            f"{found.channels} at {found.samplerate} Hz with {found.frames}"
        )


def _work(
    stage: str, lines: Sequence[str], blobs: dict[str, str], folder: Path
) -> list[LedgerEntry]:
    """The finished tasks, for other configs to adopt; none where they were not pushed."""
    path = folder / "work" / f"{stage}.jsonl"
    if not path.exists():
        return []
    names = {Path(name).name for name in blobs.values()}
    entries = []
    for line in _lines(path):
        try:
            value: dict[str, Any] = json.loads(line)
            made = tuple(lines[int(number)] for number in value["lines"] if int(number) >= 0)
            task, key, used = str(value["task"]), str(value["key"]), tuple(value["blobs"])
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CorruptFileError(f"{path.name}: not a list of tasks: {error!r:.200}") from None
        if set(used) - names:
            raise CorruptFileError(f"{path.name}: {task} names a file that is not there")
        entries.append(LedgerEntry(task, key, made, used, 0.0))
    return entries


# -- putting in place


def _target(run_folder: Path, entry: HubStage) -> StageFolder:
    """
    Raises:
        CorruptFileError: the run has other content under the same key.
    """
    target = StageFolder.of(run_folder, stage_named(entry.stage).number, entry.stage, entry.key)
    manifest = target.manifest()
    if manifest is not None and manifest["digest"] != entry.digest:
        raise CorruptFileError(
            f"{target.path}: must have the digest {entry.digest[:12]}… of what was pulled, found "
            f"{manifest['digest'][:12]}… under the same key. One of the two is not what its key "
            "says: remove that folder, or do not pull. Nothing was changed"
        )
    return target


def _fill(
    content: _Content, target: StageFolder, folder: Path, index: HubIndex, origin: str
) -> None:
    """Everything of a stage, the manifest last."""
    entry = content.entry
    target.path.mkdir(parents=True, exist_ok=True)
    wanted = {sha256 for record in content.records for sha256 in blobs_of(record)}
    for file in index.files:
        match = BLOB.fullmatch(file.path)
        if match and match[2] in wanted:
            _link(folder / file.path, target.path / "blobs" / Path(file.path).name)
    files = []
    for file in entry.files:
        name = _stage_path(file.path)
        _link(folder / file.path, target.path / name)
        files.append({"path": name, "sha256": file.sha256, "bytes": file.bytes})
    known = target.ledger()
    for task in content.work:
        if task.task_id not in known:
            target.finish_task(task)
    provenance = strip_provenance(entry.provenance) | {"pulled_from": origin}
    manifest = target.complete(
        content.lines, files=files, counts=dict(entry.counts), provenance=provenance
    )
    assert manifest["digest"] == entry.digest, "it was computed before"


def _link(source: Path, target: Path) -> None:
    """By hard link where the file system allows it; a copy is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
