"""One page that holds an evaluation: numbers, curves, timelines, and audio to listen to.

`report_data` is what was found, as JSON, the same for the same models on one machine;
`render` makes a page of it that needs nothing else: styles, script, drawings and Ogg/Opus are
inside. Everything that a model or a person wrote is escaped, and the page's own policy lets no
script run but its own. About 0.2 MB for each 12 s conversation.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from duplex.base import canonical_json
from duplex.metrics import segments, speech_activity
from duplex.verdict import can_tell, least_items
from pipeline.evaluation.audio import opus_bytes
from pipeline.evaluation.drawing import Track, curves, timeline
from pipeline.evaluation.found import (
    conversations_csv,
    failures,
    measures_csv,
    report_data,
    timings,
)
from pipeline.evaluation.likelihood import BASE_CLIPS, HELD_OUT
from pipeline.evaluation.people import told
from pipeline.evaluation.play import Played
from pipeline.evaluation.scoring import Measured, timed_words

TEMPLATES = Path(__file__).parent / "templates"
AUDIO_BUDGET_BYTES = 7_000_000  # as base64: the page stays under 10 MB
PERSONA_MEASURES = ("facts_said", "due_said", "hallucinated", "poor")
GROUP_MEASURES = ("facts_said", "due_said", "hallucinated", "out_of_role", "perfect", "poor")
NATS_DIGITS = 4
CLIP_GROUPS = {
    HELD_OUT: "Held-out clips of this run",
    BASE_CLIPS: "Base data: clips that have nothing to do with the personas",
}
CURVES = {
    "loss": "Loss that was minimised",
    "text": "Text, all frames",
    "text_nonpad": "Text, words only",
    "semantic": "Semantic code",
    "acoustic": "Acoustic codes, mean of 7",
}


def page_files(
    played: Sequence[Played],
    started_s: Mapping[str, float],
    *,
    about: dict[str, Any],
    protocol: dict[str, Any],
    training: Sequence[dict[str, Any]],
    origins: Sequence[dict[str, Any]] = (),
    trained: frozenset[str] | None = None,
    likelihood: Sequence[dict[str, Any]] = (),
    people: dict[str, Any] | None = None,
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files by name: those whose bytes repeat, and those that hold times or Ogg streams.

    `origins`: where the data came from (`origins_of`); on the page only. `people`: people's grades
    (`people_data`); on the page and in people.json.
    """
    data = report_data(
        played, about=about, protocol=protocol, training=training, trained=trained,
        likelihood=likelihood,
    )  # fmt: skip
    times = timings(played, started_s)
    # The last model's first: it is the one to mend.
    failed = [canonical_json(line) + "\n" for line in failures(data["conversations"][::-1])]
    return (
        {
            "report.json": _json(data),
            "measures.csv": measures_csv(data).encode(),
            "conversations.csv": conversations_csv(data).encode(),
            "failures.jsonl": "".join(failed).encode(),
        },
        {
            "timings.json": _json({"models": times}),
            "report.html": render(data, played, times, origins, people).encode(),
            "index.html": environment()
            .get_template("index.html.j2")
            .render(data=data, people=people)
            .encode(),
            **({"people.json": _json(people)} if people else {}),
        },
    )


def _json(value: Any) -> bytes:
    return (
        json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


# -- the page


def render(
    data: dict[str, Any],
    played: Sequence[Played],
    times: Sequence[dict[str, Any]],
    origins: Sequence[dict[str, Any]] = (),
    people: dict[str, Any] | None = None,
) -> str:
    """The page as HTML. `data` is of `report_data`, `times` of `timings`, `people` of
    `people_data`."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    labels = [model.label for model in played]
    asked = sum(can_tell(row["differ"]) for one in data["verdicts"] for row in one["rows"])
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            labels=labels,
            times=times,
            origins=origins,
            rows=[_row(row, labels) for row in data["summary"] if _counts(row)],
            empty=[row["label"] for row in data["summary"] if not _counts(row)],
            groups=_groups(data, labels),
            persona=[
                _row(row, labels) for row in data["summary"] if row["key"] in PERSONA_MEASURES
            ],
            forced=_forced(data, labels),
            people=people,
            people_told=told(people) if people else [],
            verdicts=[
                one | {"rows": [_verdict_row(row) for row in sorted(one["rows"], key=_told_first)]}
                for one in data["verdicts"]
            ],
            asked=asked,
            least_items=least_items(max(1, asked)),
            curves=[
                (key, title, curves(_points(data["training"][key]), f"{title} by step"))
                for key, title in CURVES.items()
                if key in data["training"]
            ],
            items=_items(data, played),
            style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def environment() -> Environment:
    """Templates of this package's pages: everything is escaped, nothing may be undefined."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"show": show, "in_words": in_words}
    return environment


def _points(curve: dict[str, list[list[float]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: [(step, loss) for step, loss in points] for name, points in curve.items()}


def _items(data: dict[str, Any], played: Sequence[Played]) -> list[dict[str, Any]]:
    """One entry for each item and seed, most faults of the last model first: what was asked, and
    each model's conversation."""
    found = {(c["item"], c["seed"], c["model"]): c for c in data["conversations"]}
    left = AUDIO_BUDGET_BYTES
    items = []
    last = played[-1].conversations if played else ()
    for index in sorted(range(len(last)), key=lambda index: -last[index].num_faults):
        measured = last[index]
        spoken = measured.spoken
        sides = []
        for model in played:
            side = model.conversations[index]
            audio = base64.b64encode(opus_bytes(side.conversation.agent, spoken.samples)).decode()
            left -= len(audio)
            sides.append(
                {
                    **found[spoken.item.id, side.seed, model.label],
                    "label": model.label,
                    "timeline": _timeline(side),
                    "player": audio if left >= 0 else None,
                }
            )
        items.append(
            {
                "item": spoken.item,
                "seed": measured.seed,
                "prompt": measured.prompt,
                "turns": spoken.kept,
                "dropped": spoken.dropped,
                "sides": sides,
            }
        )
    return items


def _counts(row: dict[str, Any]) -> bool:
    """Whether any model gave something to measure."""
    return any(pooled["n"] for pooled in row["by_model"].values())


def _groups(data: dict[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each group of items the cells of the measures in `GROUP_MEASURES`."""
    return [
        {
            "group": group["group"],
            "items": group["items"],
            "rows": [_row(rows[key], labels) for key in GROUP_MEASURES],
        }
        for group in data["groups"]
        if (rows := {row["key"]: row for row in group["summary"]})
    ]


def _forced(data: dict[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each group of clips that were scored teacher-forced its table."""
    if not data["likelihood"]:
        return []
    rows, clips = data["likelihood"]["summary"], data["likelihood"]["clips"]
    return [
        {
            "group": group,
            "title": title,
            "clips": len({one["clip"] for one in clips if one["group"] == group}),
            "rows": [
                _row(row, labels, NATS_DIGITS)
                for row in rows
                if row["group"] == group and _counts(row)
            ],
        }
        for group, title in CLIP_GROUPS.items()
        if any(one["group"] == group for one in clips)
    ]


def _told_first(row: dict[str, Any]) -> tuple[bool, bool]:
    return row["word"] in ("inconclusive", "not measured"), row["word"] == "not measured"


def _timeline(side: Measured) -> Any:
    agent, user = side.conversation.agent, side.spoken.samples
    track = Track(
        agent=agent,
        user=user,
        agent_speech=segments(side.activity),
        user_speech=segments(speech_activity(user)),
        turns=side.spoken.turns,
        words=timed_words(side.conversation.text),
    )
    return timeline(track, f"{side.spoken.item.id}, {side.model}: both channels over time")


def _row(row: dict[str, Any], labels: Sequence[str], digits: int = 2) -> dict[str, Any]:
    """A row of the table as text: a value, its n and its spread for each model."""
    cells = []
    for label in labels:
        pooled = row["by_model"][label]
        value, n = pooled["value"], pooled["n"]
        if value is None:
            cells.append({"value": "–", "detail": "n = 0"})
        elif row["kind"] == "rate":
            span = f"{100 * pooled['low']:.0f}–{100 * pooled['high']:.0f} %"
            cells.append(
                {"value": f"{100 * value:.0f} %", "detail": f"{pooled['hits']} of {n} · {span}"}
            )
        else:
            low, high = (show(pooled[key], digits=digits) for key in ("low", "high"))
            cells.append(
                {"value": show(value, digits=digits), "detail": f"n = {n} · {low} to {high}"}
            )
    values = [row["by_model"][label]["value"] for label in labels]
    difference = ""
    if len(values) > 1 and values[0] is not None and values[-1] is not None:
        gap = values[-1] - values[0]
        is_rate = row["kind"] == "rate"
        difference = (
            f"{show(float(round(100 * gap)), True)} pp" if is_rate else show(gap, True, digits)
        )
    unit = row["unit"] if row["kind"] == "rate" else f"{row['unit']}, {row['kind']}"
    return {**row, "cells": cells, "difference": difference, "unit": unit}


def _verdict_row(row: dict[str, Any]) -> dict[str, Any]:
    """A verdict as text: the difference with its interval, and how sure it is."""
    is_rate = row["kind"] == "rate"
    scale, unit = (100, " pp") if is_rate else (1, "")
    digits = NATS_DIGITS if row["unit"] == "nats" else 2

    def scaled(value: float | None) -> str:
        return show(None if value is None else scale * value, True, digits)

    span = f"{scaled(row['low'])} to {scaled(row['high'])}{unit}" if row["low"] is not None else ""
    return {
        **row,
        "unit": "share" if is_rate else f"{row['unit']}, mean",
        "shown": scaled(row["difference"]) + (unit if row["difference"] is not None else ""),
        "span": span,
        "sure": "" if row["p_holm"] is None else f"p = {row['p_holm']:.2g}",
    }


def show(value: Any, signed: bool = False, digits: int = 2) -> str:
    """A number for reading: at most `digits` figures behind the point, a true minus sign."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        text = (
            f"{value:{'+' if signed else ''}{f'.{digits}f' if isinstance(value, float) else 'd'}}"
        )
        if "." in text:
            text = text.rstrip("0").rstrip(".")
        return ("0" if text in ("-0", "+0") else text).replace("-", "−")
    return str(value)


def in_words(key: str) -> str:
    """A key of the data as a reader likes it: `lead_in_s` -> `lead in, s`."""
    for unit, shown in (("s", "s"), ("dbfs", "dBFS")):
        if key.endswith(f"_{unit}"):
            return f"{key.removesuffix(f'_{unit}').replace('_', ' ')}, {shown}"
    return key.replace("_", " ")
