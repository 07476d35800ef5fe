"""Dialogues from a file: our own records, or the predecessor's `training.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.characters import GapRange
from duplex.datafiles import describe_faults
from duplex.records import Dialogue, Turn
from pipeline.imported import Imported, json_values, slug


def read_dialogues(path: Path) -> Imported:
    """
    Raises:
        RequestError: the file holds no list of records.
    """
    imported = Imported()
    for index, value in enumerate(json_values(path)):
        name = str(value.get("conversation_id") or value.get("id") or f"record {index}")
        try:
            imported.records.append(_dialogue(value, index))
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            why = _describe_fault(error)
            imported.refused.append((name, why))
    imported.refuse_doubles()
    return imported


def _describe_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_faults(error)
    if isinstance(error, KeyError):
        return f"{error.args[0]} must be given, found nothing"
    return str(error) or type(error).__name__


def _dialogue(value: dict[str, Any], index: int) -> Dialogue:
    if "first_speaker" in value:
        return Dialogue.model_validate({k: v for k, v in value.items() if k != "record"})
    turns = tuple(Turn(role=turn["role"], text=turn["text"]) for turn in value["turns"])
    if not turns:
        raise ValueError("turns must not be empty")
    return Dialogue(
        id=slug(str(value.get("conversation_id", f"dialogue-{index:05d}"))),
        persona_id=slug(str(value["persona_id"])),
        persona_name=str(value.get("persona_name", value["persona_id"])),
        scenario_id=slug(str(value.get("scenario", "unknown"))),
        system_prompt=value["system_prompt"],
        mood=str(value.get("mood", "")),
        first_speaker=turns[0].role,
        gap_after_user=GapRange(low=2, high=8),
        gap_other=GapRange(low=4, high=12),
        turns=turns,
        writer="import",
    )
