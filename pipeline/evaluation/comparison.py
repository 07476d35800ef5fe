"""Reports of other times and places, compared: only what was asked alike can be.

A report says what its numbers hang on besides the models: seeds, sampling, pace, lead-in silence,
pauses, the user's voice and audio, codec, prompts. Where two differ in any of it, a difference
between their numbers need not be the models'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from duplex.errors import RequestError
from pipeline.evaluation.verdicts import verdicts

MAX_BYTES = 256 << 20
OF_ITEMS = ("prompt", "first_speaker", "user", "user_audio", "frames", "judged_by")


class _Read(BaseModel):
    """What else stands there is passed over."""

    model_config = ConfigDict(extra="ignore")


class _Item(BaseModel):
    model_config = ConfigDict(extra="allow")
    item: str


class _Conversation(_Read):
    item: str
    seed: int
    model: str
    sums: dict[str, tuple[FiniteFloat, FiniteFloat]]


class _Model(_Read):
    label: str


class _Clip(_Read):
    group: str
    clip: str
    model: str
    content: str
    values: dict[str, FiniteFloat | None]


class _Likelihood(_Read):
    clips: list[_Clip]


class Report(_Read):
    """What is read of a report.json."""

    models: list[_Model] = Field(min_length=1)
    protocol: dict[str, Any]
    items: list[_Item]
    conversations: list[_Conversation]
    likelihood: _Likelihood | None = None


def read_report(path: Path) -> Report:
    """
    Args:
        path: a report.json, or the folder that it is in.

    Raises:
        RequestError: there is none, or it is not one of this version.
    """
    path = path / "report.json" if path.is_dir() else path
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{path}: a report must be under {MAX_BYTES >> 20} MB")
        return Report.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RequestError(f"{path}: a report must be there: {error.strerror}") from None
    except (ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise RequestError(
            f"{path}: must be a report.json of this version, is none ({first}). Evaluate again."
        ) from None


def differences(one: Report, other: Report) -> dict[str, str]:
    """Where two protocols differ: key -> what the two say, or which items."""
    found = {}
    for key in sorted({*one.protocol, *other.protocol}):
        said = [report.protocol.get(key) for report in (one, other)]
        if said[0] != said[1]:
            found[key] = f"{json.dumps(said[0])} and {json.dumps(said[1])}"
    items = [{item.item: item.model_dump() for item in report.items} for report in (one, other)]
    if apart := sorted(items[0].keys() ^ items[1].keys()):
        found["items"] = f"only one has {_some(apart)}"
    for key in OF_ITEMS:
        apart = sorted(
            name
            for name in items[0].keys() & items[1].keys()
            if items[0][name].get(key) != items[1][name].get(key)
        )
        if apart:
            found[key] = f"differs in {_some(apart)}"
    return found


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def compare_reports(
    reports: Mapping[str, Report], allow: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Verdicts on the last model of each report, against that of the first (`verdicts`).

    Args:
        reports: by name. allow: keys of `differences` that are what is to be compared.

    Raises:
        RequestError: protocols that differ otherwise; names all that does.
    """
    first_name, first = next(iter(reports.items()))
    known = {"items", *OF_ITEMS, *(key for one in reports.values() for key in one.protocol)}
    if unknown := sorted(set(allow) - known):
        raise RequestError(
            f"--allow must be of what reports can differ in ({', '.join(sorted(known))}), found "
            f"{', '.join(unknown)}"
        )
    shared = {item.item for item in first.items}
    for name, report in reports.items():
        found = {k: v for k, v in differences(first, report).items() if k not in allow}
        if found:
            listing = "\n".join(f"  - {key}: {value}" for key, value in found.items())
            raise RequestError(
                f"reports are compared only where the protocol is the same; {first_name} and "
                f"{name} differ in\n{listing}\nEvaluate again under one protocol, or say that "
                f"this is what you compare: --allow {','.join(found)}"
            )
        shared &= {item.item for item in report.items}
    clips = _shared_clips(reports)
    if not shared and not clips:
        raise RequestError("reports must have an item in common, found none")
    conversations = [
        {"item": one.item, "model": name, "sums": one.sums}
        for name, report in reports.items()
        for one in report.conversations
        if one.model == report.models[-1].label and one.item in shared
    ]
    for name in reports:
        missing = shared - {one["item"] for one in conversations if one["model"] == name}
        if missing:
            raise RequestError(
                f"{name}: each item must have its conversations, found none of "
                f"{_some(sorted(missing))}"
            )
    conversations.sort(key=lambda one: one["item"])
    return verdicts(conversations, list(reports), clips)


def _shared_clips(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Clips of each report's last model that all have scored, with the same content and prompts:
    two runs may hold out different ones."""
    by_report = {
        name: {
            (one.group, one.content): one.values
            for one in (report.likelihood.clips if report.likelihood else ())
            if one.model == report.models[-1].label
        }
        for name, report in reports.items()
    }
    shared = set.intersection(*(set(found) for found in by_report.values()))
    return [
        {"group": key[0], "clip": key[1], "model": name, "values": found[key]}
        for name, found in by_report.items()
        for key in sorted(shared)
    ]
