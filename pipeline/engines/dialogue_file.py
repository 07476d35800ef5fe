"""Dialogues from a file: our own records, or the predecessor's `training.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.characters import GapRange
from duplex.datafiles import describe_faults
from duplex.errors import RequestError
from duplex.records import Dialogue, Turn
from pipeline.imported import Imported, json_values, slug

UNPROMPTED = "(none was given)"  # stands for the prompt that is to be written


def read_dialogues(path: Path, *, prompted: bool = True) -> Imported:
    """
    Args:
        prompted: each must have its system prompt; without, those that have none get `UNPROMPTED`.

    Raises:
        RequestError: the file holds no list of records.
    """
    imported = Imported()
    for index, value in enumerate(json_values(path)):
        name = str(value.get("conversation_id") or value.get("id") or f"record {index}")
        try:
            given = value if prompted else _with_a_prompt(value)
            imported.records.append(_dialogue(given, index))
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            why = _describe_fault(error)
            imported.refused.append((name, why))
    imported.refuse_doubles()
    return imported


def require_records(imported: Imported, source: str) -> None:
    """
    Raises:
        RequestError: none of the file's records can be read; says why the first cannot.
    """
    if not imported.records:
        why = "; ".join(f"{name}: {reason}" for name, reason in imported.refused[:3])
        raise RequestError(f"{source}: must hold a dialogue that can be read, found none. {why}")


def _with_a_prompt(value: dict[str, Any]) -> dict[str, Any]:
    prompt = value.get("system_prompt")
    missing = prompt is None or (isinstance(prompt, str) and not prompt.strip())
    return value | {"system_prompt": UNPROMPTED} if missing else value


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
