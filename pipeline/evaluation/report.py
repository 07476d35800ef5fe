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
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from duplex.frames import FRAME_S
from duplex.metrics import (
    DEAD_AIR_S,
    HANGOVER_FRAMES,
    MIN_SPEECH_FRAMES,
    THRESHOLD_DBFS,
    segments,
    speech_activity,
)
from duplex.verdict import least_items
from pipeline.evaluation.audio import opus_bytes, wav_bytes
from pipeline.evaluation.drawing import Track, curves, timeline
from pipeline.evaluation.play import Played, same_answer
from pipeline.evaluation.scoring import Measured, summarize, timed_words
from pipeline.evaluation.verdicts import verdicts

TEMPLATES = Path(__file__).parent / "templates"
AUDIO_BUDGET_BYTES = 7_000_000  # as base64: the page stays under 10 MB
CURVES = {
    "loss": "Loss that was minimised",
    "text": "Text, all frames",
    "text_nonpad": "Text, words only",
    "semantic": "Semantic code",
    "acoustic": "Acoustic codes, mean of 7",
}


def wav_name(measured: Measured) -> str:
    return f"conversations/{measured.spoken.item.id}.{measured.model}.wav"


def recordings(played: Sequence[Played]) -> dict[str, bytes]:
    """Stereo WAV of each conversation, by the file name that the report gives it."""
    return {
        wav_name(measured): wav_bytes(measured.conversation.agent, measured.spoken.samples)
        for model in played
        for measured in model.conversations
    }


def page_files(
    played: Sequence[Played],
    started_s: Mapping[str, float],
    *,
    about: dict[str, Any],
    protocol: dict[str, Any],
    training: Sequence[dict[str, Any]],
    origins: Sequence[dict[str, Any]] = (),
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files by name: those whose bytes repeat, and those that hold times or Ogg streams.

    `origins`: where the data came from (`origins_of`); on the page only.
    """
    data = report_data(played, about=about, protocol=protocol, training=training)
    times = timings(played, started_s)
    return (
        {"report.json": _json(data)},
        {
            "timings.json": _json({"models": times}),
            "report.html": render(data, played, times, origins).encode(),
            "index.html": _environment().get_template("index.html.j2").render(data=data).encode(),
        },
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


# -- what was found


def report_data(
    played: Sequence[Played],
    *,
    about: dict[str, Any],
    protocol: dict[str, Any],
    training: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of report.json: no wall-clock time, no host, no path of this machine.

    Args:
        about: what was run: config, base, items; shown as it is.
        protocol: how; the constants of the measures are added.
        training: the lines of metrics.jsonl.
    """
    labels = [model.label for model in played]
    conversations = [measured for model in played for measured in model.conversations]
    return {
        "about": about,
        "models": [
            {"label": model.label, "digest": model.model_digest, "repeats": model.repeats}
            for model in played
        ],
        "changed": _changed(played),
        "verdict": verdicts(played[0].conversations, played[-1].conversations)
        if len(played) > 1
        else [],
        "summary": summarize(conversations, labels),
        "protocol": {
            **protocol,
            "speech_threshold_dbfs": THRESHOLD_DBFS,
            "speech_hangover_frames": HANGOVER_FRAMES,
            "speech_min_frames": MIN_SPEECH_FRAMES,
            "dead_air_over_s": DEAD_AIR_S,
        },
        "training": training_curves(training),
        "conversations": [_conversation(measured) for measured in conversations],
    }


def _changed(played: Sequence[Played]) -> dict[str, Any] | None:
    """In how many conversations the last model answered otherwise than the first."""
    if len(played) < 2:
        return None
    first, last = played[0], played[-1]
    pairs = list(zip(first.conversations, last.conversations, strict=True))
    return {
        "from": first.label,
        "to": last.label,
        "conversations": len(pairs),
        "differ": sum(not same_answer(a.conversation, b.conversation) for a, b in pairs),
        "texts_differ": sum(a.conversation.text != b.conversation.text for a, b in pairs),
        "attributable": first.repeats is True and last.repeats is True,
    }


def _conversation(measured: Measured) -> dict[str, Any]:
    spoken = measured.spoken
    return {
        "item": spoken.item.id,
        "model": measured.model,
        "persona_type": spoken.item.persona_type,
        "first_speaker": spoken.item.first_speaker,
        "prompt": spoken.item.text_prompt,
        "prompt_proven": measured.proof.proven,
        "proof": measured.proof.note,
        "turns_left_out": spoken.dropped,
        "turns_frames": [list(turn) for turn in spoken.turns],
        "transcript": measured.conversation.transcript,
        "opening": measured.opening,
        "exchanges": [exchange._asdict() for exchange in measured.exchanges],
        "text": [list(piece) for piece in measured.conversation.text],
        "facts": measured.facts,
        "metrics": measured.metrics(),
        "audio": wav_name(measured),
    }


def training_curves(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """metrics.jsonl -> for each curve, the points [step, loss] of `train` and `valid`."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for line in lines:
        streams = line.get("streams") or {}
        acoustic = [v for k, v in streams.items() if k.startswith("acoustic_") and v is not None]
        values = {
            "loss": line.get("loss"),
            **{key: streams.get(key) for key in ("text", "text_nonpad", "semantic")},
            "acoustic": statistics.fmean(acoustic) if acoustic else None,
        }
        for key, value in values.items():
            if value is not None and line.get("kind") in ("train", "valid"):
                points = found.setdefault(key, {}).setdefault(line["kind"], [])
                points.append([line["step"], round(value, 6)])
    return found


def timings(played: Sequence[Played], started_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """Wall-clock times of each model: medians over its conversations.

    Args:
        started_s: label -> seconds until its server was ready, where it was started here.
    """
    rows = []
    for model in played:
        walls = [measured.conversation.wall for measured in model.conversations]
        frame_s = np.concatenate([wall.frame_s for wall in walls]) if walls else np.zeros(0)
        median, late, slowest = (
            (float(np.quantile(frame_s, q)) for q in (0.5, 0.95, 1)) if len(frame_s) else (0, 0, 0)
        )
        row = {
            "model": model.label,
            "server_start_s": started_s.get(model.label),
            "ready_s": statistics.median(wall.ready_s for wall in walls) if walls else None,
            "frame_ms_median": 1000 * median,
            "frame_ms_p95": 1000 * late,
            "frame_ms_max": 1000 * slowest,
            "times_real_time": FRAME_S / float(np.mean(frame_s)) if len(frame_s) else None,
            "wall_s": model.wall_s,
        }
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


# -- the page


def render(
    data: dict[str, Any],
    played: Sequence[Played],
    times: Sequence[dict[str, Any]],
    origins: Sequence[dict[str, Any]] = (),
) -> str:
    """The page as HTML. `data` is of `report_data`, `times` of `timings`."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    labels = [model.label for model in played]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            labels=labels,
            times=times,
            origins=origins,
            rows=[_row(row, labels) for row in data["summary"]],
            verdict=[_verdict_row(row) for row in data["verdict"]],
            least_items=least_items(sum(row["p"] is not None for row in data["verdict"])),
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


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"show": show, "in_words": in_words}
    return environment


def _points(curve: dict[str, list[list[float]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: [(step, loss) for step, loss in points] for name, points in curve.items()}


def _items(data: dict[str, Any], played: Sequence[Played]) -> list[dict[str, Any]]:
    """One entry for each item: what was asked, and each model's conversation."""
    found = {(c["item"], c["model"]): c for c in data["conversations"]}
    left = AUDIO_BUDGET_BYTES
    items = []
    for index, measured in enumerate(played[0].conversations if played else ()):
        spoken = measured.spoken
        sides = []
        for model in played:
            side = model.conversations[index]
            audio = base64.b64encode(opus_bytes(side.conversation.agent, spoken.samples)).decode()
            left -= len(audio)
            sides.append(
                {
                    **found[spoken.item.id, model.label],
                    "label": model.label,
                    "timeline": _timeline(side),
                    "player": audio if left >= 0 else None,
                }
            )
        items.append({"item": spoken.item, "texts": spoken.texts, "dropped": spoken.dropped,
                      "sides": sides})  # fmt: skip
    return items


def _timeline(side: Measured) -> Any:
    agent, user = side.conversation.agent, side.spoken.samples
    track = Track(
        agent=agent,
        user=user,
        agent_speech=segments(speech_activity(agent)),
        user_speech=segments(speech_activity(user)),
        turns=side.spoken.turns,
        words=timed_words(side.conversation.text),
    )
    return timeline(track, f"{side.spoken.item.id}, {side.model}: both channels over time")


def _row(row: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
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
            span = f"{show(pooled['low'])} to {show(pooled['high'])}"
            cells.append({"value": show(value), "detail": f"n = {n} · {span}"})
    values = [row["by_model"][label]["value"] for label in labels]
    difference = ""
    if len(values) > 1 and values[0] is not None and values[-1] is not None:
        gap = values[-1] - values[0]
        is_rate = row["kind"] == "rate"
        difference = f"{show(float(round(100 * gap)), True)} pp" if is_rate else show(gap, True)
    unit = {"rate": row["unit"], "median": f"{row['unit']}, median", "mean": f"{row['unit']}, mean"}
    return {**row, "cells": cells, "difference": difference, "unit": unit[row["kind"]]}


def _verdict_row(row: dict[str, Any]) -> dict[str, Any]:
    """A verdict as text: the difference with its interval, and how sure it is."""
    is_rate = row["kind"] == "rate"
    scale, unit = (100, " pp") if is_rate else (1, "")

    def scaled(value: float | None, signed: bool = True) -> str:
        return show(None if value is None else float(round(scale * value, 2)), signed)

    span = f"{scaled(row['low'])} to {scaled(row['high'])}{unit}" if row["low"] is not None else ""
    return {
        **row,
        "unit": "share" if is_rate else f"{row['unit']}, mean",
        "shown": scaled(row["difference"]) + (unit if row["difference"] is not None else ""),
        "span": span,
        "sure": "" if row["p_holm"] is None else f"p = {row['p_holm']:.2g}",
    }


def show(value: Any, signed: bool = False) -> str:
    """A number for reading: at most three figures behind the point, a true minus sign."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        text = f"{value:{'+' if signed else ''}{'.2f' if isinstance(value, float) else 'd'}}"
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
