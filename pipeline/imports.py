"""`duplex import`: dialogues, recordings or tensors from outside, as a stage's finished work.

    dialogues   .json (a list) or .jsonl; the predecessor's records or our own
    speech      stereo recordings (left = model), with word times beside them or without: a
                folder, one file, or a moshi-finetune set's .jsonl (see pipeline/recordings.py)
    tensors     a folder of bare `[17, T]` .pt files; a TensorClip record beside one, as
                `duplex convert` writes it, is taken over

The folder gets a key of its content, a manifest like any other, and a pointer in
`<run>/imports/`, which `duplex run` follows instead of working the stage off.
Everything is read with `weights_only=True` or as JSON: files from outside are hostile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from duplex.base import canonical_json
from duplex.config import Config
from duplex.errors import RecordError, RequestError, StageFailedError
from duplex.files import write_json
from duplex.lock import RunLock
from duplex.records import record_line
from duplex.sinks import FolderBlobs
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.engines.dialogue_file import read_dialogues
from pipeline.foreign_tensors import read_tensors
from pipeline.imported import Imported
from pipeline.recordings import RecordingOptions, read_recordings
from pipeline.run import IMPORTS_FOLDER, STAGE_NAMES, run_folder_of, stage_named
from pipeline.runners.local import describe_environment

IMPORTABLE = ("dialogues", "speech", "tensors")


def import_stage(
    config: Config,
    runs_root: Path,
    stage_name: str,
    path: Path,
    *,
    recording: RecordingOptions | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Imported]:
    """Bring `path` in as the output of a stage; returns the stage folder and what came in.

    Args:
        recording: for the stage speech; None: its defaults.
        report: is told of each recording as it begins.

    Raises:
        RequestError: nothing at `path` can be imported; nothing was written.
        StageFailedError: more was refused than the stage's max_reject_rate allows.
    """
    readers: dict[str, Callable[[], Imported]] = {
        "dialogues": lambda: read_dialogues(path),
        "speech": lambda: read_recordings(path, recording or RecordingOptions(), report),
        "tensors": lambda: read_tensors(path, config, runs_root),
    }
    if stage_name not in IMPORTABLE:
        raise RequestError(f"--stage must be one of {', '.join(IMPORTABLE)}; found {stage_name}")
    if not path.exists():
        raise RequestError(f"{path}: must exist, found nothing there")
    if recording is not None and stage_name != "speech":
        raise RequestError(
            "--persona, --prompt, --recogniser, --recogniser-model and --language are for "
            f"--stage speech, found --stage {stage_name}"
        )
    imported = readers[stage_name]()
    total = len(imported.records) + len(imported.refused)
    reasons = "\n".join(f"  - {name}: {why}" for name, why in imported.refused[:10])
    if not imported.records:
        raise RequestError(
            f"{path}: holds no record that can be imported; nothing was written.\n{reasons}"
        )
    stage = stage_named(stage_name)
    limit = config.section(stage_name).runtime.max_reject_rate
    if len(imported.refused) > limit * total:
        raise StageFailedError(
            f"{path}: at most {limit:.0%} of the records may be refused, found "
            f"{len(imported.refused)} of {total}; nothing was written.\n{reasons}"
        )
    lines = sorted(record_line(record) for record in imported.records)
    key = hashlib.sha256(canonical_json([stage_name, "import", lines]).encode()).hexdigest()
    run_folder = run_folder_of(config, runs_root)
    with RunLock(run_folder):
        folder = StageFolder.of(run_folder, stage.number, stage.name, key)
        folder.path.mkdir(parents=True, exist_ok=True)
        sink = FolderBlobs(folder)
        for blob in imported.blobs:
            blob.store(sink)
        for name, why in imported.refused:
            folder.reject_task(name, key, RecordError(why))
        counts = {"records": len(lines), "rejected": len(imported.refused)}
        provenance = describe_environment(StageContext(config, runs_root))
        provenance |= {"imported_from": path.name, "notes": imported.notes}
        provenance |= imported.provenance
        folder.complete(lines, files=[], counts=counts, provenance=provenance)
        pointer = {"folder": folder.path.name, "key": key}
        write_json(run_folder / IMPORTS_FOLDER / f"{stage_name}.json", pointer)
    return folder.path, imported


def forget_import(config: Config, runs_root: Path, stage_name: str) -> bool:
    """Let the stage do its own work again; the imported folder stays until `duplex clean`."""
    if stage_name not in STAGE_NAMES:  # `duplex pull` puts others in place too
        raise RequestError(f"--stage must be one of {', '.join(STAGE_NAMES)}; found {stage_name}")
    run_folder = run_folder_of(config, runs_root)
    pointer = run_folder / IMPORTS_FOLDER / f"{stage_name}.json"
    if not pointer.exists():
        return False
    with RunLock(run_folder):
        pointer.unlink()
    return True
