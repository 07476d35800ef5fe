"""Where a run's data came from, for its report: what was written, kept, and why the rest was not.

The evaluation reads no dialogues, so none of this is in its key or digest: the page names the
folder that each line is from, the newest that is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from duplex.errors import CorruptFileError
from duplex.files import read_lines
from duplex.frames import SAMPLE_RATE
from duplex.records import Dialogue, Speech, TensorClip
from duplex.store import StageFolder, folders_of

DATA_STAGES = ((2, "dialogues"), (4, "speech"))


def origins_of(run_folder: Path, tensors: StageFolder) -> list[dict[str, Any]]:
    """A row for each data stage: stage, folder, what it holds, what was left out."""
    rows = []
    for number, name in DATA_STAGES:
        folders = (f for f in folders_of(run_folder, number, name) if (f.path / "parts").is_dir())
        found = next((f for f in folders if (f.path / "manifest.json").exists()), None)
        if found is not None:
            rows.append(_row(found))
    rows.append(_row(tensors))
    return rows


def _row(folder: StageFolder) -> dict[str, Any]:
    try:
        manifest = folder.manifest() or {}
        records = list(folder.records())
    except CorruptFileError as error:
        return {"stage": folder.stage, "folder": folder.path.name, "holds": str(error), "left": ""}
    provenance = manifest["provenance"]
    holds = ", ".join(_holds(records))
    if "imported_from" in provenance:
        holds += f"; imported from {provenance['imported_from']}"
    reasons = (provenance.get("funnel") or {}).get("reasons", {})
    left = [f"{count} {code}" for code, count in reasons.items()]
    rejected = manifest["counts"].get("rejected", 0)
    left += [f"{rejected} {folder.stage} rejected for good"] if rejected else []
    left += [f"“{line['message']}”" for line in list(read_lines(folder.path / "rejected.jsonl"))[:1]
             if rejected and "message" in line]  # fmt: skip
    written = (provenance.get("funnel") or {}).get("written")
    return {
        "stage": folder.stage,
        "folder": folder.path.name,
        "holds": holds + (f"; of {written} candidates" if written else ""),
        "left": ", ".join(left) or "nothing",
    }


def _holds(records: list[Any]) -> list[str]:
    dialogues = [r for r in records if isinstance(r, Dialogue)]
    speeches = [r for r in records if isinstance(r, Speech)]
    clips = [r for r in records if isinstance(r, TensorClip)]
    found = []
    if dialogues:
        writers = ", ".join(sorted({dialogue.writer for dialogue in dialogues}))
        personas = len({dialogue.persona_id for dialogue in dialogues})
        found.append(f"{len(dialogues)} dialogues of {personas} personas, written by {writers}")
    if speeches:
        minutes = sum(speech.num_samples for speech in speeches) / SAMPLE_RATE / 60
        turns = [turn for speech in speeches for turn in speech.turns]
        found.append(
            f"{minutes:.1f} minutes in {len(speeches)} recordings, "
            f"{sum(turn.cut for turn in turns)} interruptions, "
            f"{sum(turn.kind == 'backchannel' for turn in turns)} backchannels"
        )
    if clips:
        valid = sum(clip.split == "valid" for clip in clips)
        found.append(f"{len(clips)} clips, {valid} of them held out")
    return found or ["nothing"]
