"""What an evaluation found, as data: the content of report.json and of the tables beside it.

The same for the same models on one machine: no wall-clock time, no host, and no path but the items
files', as they were given.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from duplex.base import canonical_json, rounded
from duplex.emotion_words import emotion_of
from duplex.files import sha256_bytes
from duplex.frames import FRAME_S
from duplex.metrics import DEAD_AIR_S, HANGOVER_FRAMES, MIN_SPEECH_FRAMES, THRESHOLD_DBFS
from pipeline.evaluation.audio import wav_bytes
from pipeline.evaluation.likelihood import likelihood_data
from pipeline.evaluation.measures import MEASURES_VERSION, summarize, sums_of
from pipeline.evaluation.play import Played, same_answer
from pipeline.evaluation.scoring import Measured
from pipeline.evaluation.verdicts import verdicts

TURN_BINS = ((1, 3), (4, 8), (9, 14), (15, None))


def wav_name(measured: Measured) -> str:
    return f"conversations/{measured.name}.{measured.model}.wav"


def recordings(played: Sequence[Played]) -> dict[str, bytes]:
    """Stereo WAV of each conversation, by the file name that the report gives it."""
    return {
        wav_name(measured): wav_bytes(measured.conversation.agent, measured.spoken.samples)
        for model in played
        for measured in model.conversations
    }


def report_data(
    played: Sequence[Played],
    *,
    about: dict[str, Any],
    protocol: dict[str, Any],
    training: Sequence[dict[str, Any]] = (),
    trained: frozenset[str] | None = None,
    likelihood: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        about: what was run: config, base, items; shown as it is.
        protocol: how; the constants of the measures are added.
        training: the lines of metrics.jsonl.
        trained: ids of the personas that were trained on; None: not known.
        likelihood: clips that were scored teacher-forced, of `likelihood.teacher_force`.
    """
    labels = [model.label for model in played]
    measured = [one for model in played for one in model.conversations]
    conversations = [_conversation(one) for one in measured]
    protocol = {
        **protocol,
        "speech_threshold_dbfs": THRESHOLD_DBFS,
        "speech_hangover_frames": HANGOVER_FRAMES,
        "speech_min_frames": MIN_SPEECH_FRAMES,
        "dead_air_over_s": DEAD_AIR_S,
        "measures": MEASURES_VERSION,
        "device": sorted({str(model.info.get("device")).partition(":")[0] for model in played}),
    }
    items = items_played(played)
    content = canonical_json({"protocol": protocol, "items": items})
    return {
        "about": about,
        "models": [
            {
                "label": model.label,
                "digest": model.model_digest,
                "repeats": model.repeats,
                "served": model.served,
                "slots": model.info.get("slots"),
                "processes": model.info.get("processes"),
            }
            for model in played
        ],
        "changed": _changed(played),
        "verdicts": verdicts(conversations, labels, likelihood),
        "summary": summarize(measured, labels),
        "groups": _groups(measured, labels, trained),
        "by_turn": by_turn(measured, labels),
        "likelihood": likelihood_data(likelihood, labels),
        "protocol": protocol,
        "items": items,
        "fingerprint": sha256_bytes(content.encode()),
        "training": training_curves(training),
        "conversations": conversations,
    }


def items_played(played: Sequence[Played]) -> list[dict[str, Any]]:
    """Each item once: what was sent, down to the samples."""
    found: dict[str, dict[str, Any]] = {}
    for measured in played[0].conversations if played else ():
        spoken, item = measured.spoken, measured.spoken.item
        found[item.id] = {
            "item": item.id,
            "prompt": measured.prompt,
            "first_speaker": item.first_speaker,
            "user": list(spoken.texts),
            "user_audio": sha256_bytes(spoken.samples.tobytes()),
            "judged_by": sha256_bytes(
                canonical_json(item.model_dump(mode="json", exclude={"situation"})).encode()
            ),
            "frames": spoken.num_frames,
        }
    return list(found.values())


def _groups(
    measured: Sequence[Measured], labels: Sequence[str], trained: frozenset[str] | None
) -> list[dict[str, Any]]:
    """The table again for each sort of persona, and for those trained on and those not."""
    members: dict[str, list[Measured]] = {}
    for one in measured:
        item = one.spoken.item
        members.setdefault(item.persona_type, []).append(one)
        if trained is not None:
            known = "persona trained on" if item.persona in trained else "persona held out"
            members.setdefault(known, []).append(one)
    return [
        {
            "group": name,
            "items": len({one.spoken.item.id for one in held}),
            "summary": summarize(held, labels),
        }
        for name, held in sorted(members.items())
        if len(members) > 1
    ]


def by_turn(measured: Sequence[Measured], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Faults of replies by how late in a conversation they come, for each model (replies, hits):
    one that echoes on its first turns fails otherwise than one that does on its fifteenth."""
    rows = []
    for first, last in TURN_BINS:
        by_model = {}
        for label in labels:
            replies = [
                exchange
                for one in measured
                if one.model == label
                for exchange in one.exchanges[first - 1 : last]
                if exchange.num_words
            ]
            by_model[label] = {
                "replies": len(replies),
                "echo": sum(exchange.echo for exchange in replies),
                "out_of_role": sum(exchange.out_of_role for exchange in replies),
                "made_up": sum(exchange.made_up for exchange in replies),
            }
        if any(one.exchanges[first - 1 :] for one in measured):
            name = f"{first} to {last}" if last else f"{first} and later"
            rows.append({"turns": name, "by_model": by_model})
    return rows


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
        "attributable": all(model.repeats is True for model in played),
    }


def _conversation(measured: Measured) -> dict[str, Any]:
    spoken = measured.spoken
    return {
        "item": spoken.item.id,
        "seed": measured.seed,
        "model": measured.model,
        "persona": spoken.item.persona,
        "persona_type": spoken.item.persona_type,
        "first_speaker": spoken.item.first_speaker,
        "prompt": measured.prompt,
        "prompt_proven": measured.proof.proven,
        "proof": measured.proof.note,
        "turns_left_out": spoken.dropped,
        "turns_frames": [list(turn) for turn in spoken.turns],
        "transcript": measured.conversation.transcript,
        "opening": measured.opening,
        "exchanges": [
            exchange._asdict()
            | {"made_up": exchange.made_up, "faults": list(exchange.faults)}
            | {"emotion": _emotion(exchange.reply)}
            for exchange in measured.exchanges
        ],
        "grade": measured.grade,
        "text": [list(piece) for piece in measured.conversation.text],
        "facts": measured.facts,
        "metrics": measured.metrics(),
        "sums": {key: list(value) for key, value in sums_of(measured).items()},
        "faults": measured.num_faults,
        "audio": wav_name(measured),
    }


def _emotion(reply: str) -> dict[str, Any]:
    found = emotion_of(reply)
    return {
        "emotion": found.emotion,
        "intensity": round(found.intensity, 3),
        "confidence": round(found.confidence, 3),
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
            "prefill_s": statistics.median(_prefills_s(model)) if _prefills_s(model) else None,
            "first_frame_ms": statistics.median(1000 * wall.frame_s[0] for wall in walls)
            if walls
            else None,
            "frame_ms_median": 1000 * median,
            "frame_ms_p95": 1000 * late,
            "frame_ms_max": 1000 * slowest,
            "times_real_time": FRAME_S / float(np.mean(frame_s)) if len(frame_s) else None,
            "wall_s": model.wall_s,
        }
        rows.append(rounded(row, 3))
    return rows


def _prefills_s(model: Played) -> list[float]:
    """What servers said that feeding a prompt took; those kept from before say it again."""
    said = [measured.conversation.prompt or {} for measured in model.conversations]
    return [prompt["prefill_s"] for prompt in said if "prefill_s" in prompt]


# -- tables beside it


def failures(conversations: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each reply with a fault, with all that a better one needs: a line of failures.jsonl.

    `history`: what was said before, user and agent in turn, each reply with its own faults; a
    reply that never came has the text "". `better` is for a person to fill in: what the agent
    should have said (`pipeline/converters/failures.py` reads it).
    """
    found = []
    for one in conversations:
        history: list[dict[str, Any]] = []
        if one["opening"]:
            history.append({"role": "agent", "text": one["opening"], "faults": []})
        for turn, exchange in enumerate(one["exchanges"]):
            if exchange["faults"]:
                found.append(
                    {
                        "item": one["item"],
                        "seed": one["seed"],
                        "model": one["model"],
                        "persona": one["persona"],
                        "persona_type": one["persona_type"],
                        "turn": turn,
                        "system_prompt": one["prompt"],
                        "history": list(history),
                        "user": exchange["user"],
                        "reply": exchange["reply"],
                        "faults": exchange["faults"],
                        "due": exchange["due"],
                        "audio": one["audio"],
                        "better": None,
                    }
                )
            history.append({"role": "user", "text": exchange["user"]})
            reply, faults = exchange["reply"], exchange["faults"]
            history.append({"role": "agent", "text": reply, "faults": faults})
    return found


def measures_csv(data: Mapping[str, Any]) -> str:
    """A line for each measure and model: over all conversations, by group, and of clips that were
    scored teacher-forced."""
    clips = data["likelihood"]["summary"] if data["likelihood"] else []
    lines = [
        [group, row["key"], model, *(pooled[key] for key in ("value", "n", "low", "high"))]
        for group, summary in (
            ("all", data["summary"]),
            *((g["group"], g["summary"]) for g in data["groups"]),
            *((row["group"], [row]) for row in clips),
        )
        for row in summary
        for model, pooled in row["by_model"].items()
    ]  # fmt: skip
    return _csv(["group", "measure", "model", "value", "n", "low", "high"], lines)


def conversations_csv(data: Mapping[str, Any]) -> str:
    """A line for each conversation: what it is, its faults, and its metrics."""
    found = data["conversations"]
    keys = list(found[0]["metrics"]) if found else []
    head = ["item", "seed", "model", "persona_type", "persona", "grade", "faults"]
    return _csv(
        [*head, *keys],
        [[*(one[key] for key in head), *(one["metrics"][key] for key in keys)] for one in found],
    )


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """None is an empty cell; text that a spreadsheet would calculate with is kept from it."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(head)
    for line in lines:
        writer.writerow([_cell(value) for value in line])
    return content.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "=+-@\t\r":
        return f"'{value}"
    return value
