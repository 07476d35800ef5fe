"""The page of the speech stage: what to look at and listen to before training is paid for."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

from duplex.base import Emotion
from duplex.config import Config
from duplex.frames import SAMPLE_RATE
from duplex.records import Speech, SpokenTurn, Voice, parse_record
from duplex.splits import Split
from duplex.store import StageFolder
from pipeline.pages.drawing import MAX_ROWS, histogram, rendered, tally

LISTEN_PER_PERSONA = 2
PIXELS_PER_SECOND = 10
MANY = 60  # dialogues of which the table is folded


def render(
    folder: StageFolder, config: Config, sides: Mapping[str, Split], voices: Mapping[str, Voice]
) -> str:
    speeches = finished_speech(folder)
    rows = page_rows(speeches, sides)
    rejected = list(folder.rejected().values())
    personas = persona_rows(rows, voices)
    return rendered(
        "speech.html.j2",
        {
            "config": config.name,
            "rows": rows[:MAX_ROWS],
            "num_rows": len(rows),
            "personas": personas[:MAX_ROWS],
            "num_personas": len(personas),
            "total_s": sum(row["duration_s"] for row in rows),
            "charts": [chart for chart in charts(speeches, rejected) if chart],
            "rejected": rejected[:MAX_ROWS],
            "num_rejected": len(rejected),
            "quality": quality(speeches),
            "room": _room(config),
            "folded": len(rows) > MANY,
        },
    )


def finished_speech(folder: StageFolder) -> list[Speech]:
    """The folder's records by id, also while its manifest is still to come."""
    lines = (line for entry in folder.ledger().values() for line in entry.lines)
    records = (
        folder.records() if folder.manifest() else (parse_record(json.loads(x)) for x in lines)
    )
    return sorted((r for r in records if isinstance(r, Speech)), key=lambda r: r.id)


def gaps_of(speech: Speech) -> list[float]:
    """Seconds from the end of each turn to the start of the next; below zero they overlap.
    Backchannels take no turn, and who is cut does not end by itself: those are left out."""
    turns = [turn for turn in speech.turns if turn.kind == "turn"]
    return [b.start_s - a.end_s for a, b in pairwise(turns) if not a.cut]


def overlap_of(speech: Speech) -> float:
    """Share of the conversation in which both sides speak."""
    agent, user = (
        [(turn.start_s, turn.end_s) for turn in speech.turns if turn.role == role]
        for role in ("agent", "user")
    )
    both = index = 0
    for start, end in agent:
        while index > 0 and user[index - 1][1] > start:
            index -= 1
        while index < len(user) and user[index][0] < end:
            both += max(0.0, min(end, user[index][1]) - max(start, user[index][0]))
            index += 1
    return both * SAMPLE_RATE / speech.num_samples


def page_rows(speeches: Sequence[Speech], sides: Mapping[str, Split]) -> list[dict[str, Any]]:
    """One row a dialogue: its record, figures, and the rectangles of a timeline that is shown."""
    heard: defaultdict[str, int] = defaultdict(int)
    rows = []
    for speech in speeches:
        heard[speech.persona_id] += 1
        gaps = gaps_of(speech)
        rows.append(
            {
                "speech": speech,
                "side": sides.get(speech.id, ""),
                "listen": heard[speech.persona_id] <= LISTEN_PER_PERSONA,
                "duration_s": speech.num_samples / SAMPLE_RATE,
                "turns": sum(turn.kind == "turn" for turn in speech.turns),
                "cuts": sum(turn.cut for turn in speech.turns),
                "backchannels": sum(turn.kind == "backchannel" for turn in speech.turns),
                "words": sum(len(turn.words) for turn in speech.turns),
                "voices": sorted({turn.voice_id for turn in speech.turns}),
                "gap_mean_s": sum(gaps) / len(gaps) if gaps else None,
                "gap_least_s": min(gaps, default=None),
                "gap_most_s": max(gaps, default=None),
                "overlap": overlap_of(speech),
                "width": round(speech.num_samples / SAMPLE_RATE * PIXELS_PER_SECOND, 1),
                "bars": [_bar(turn) for turn in speech.turns] if len(rows) < MAX_ROWS else [],
            }
        )
    return rows


def _bar(turn: SpokenTurn) -> dict[str, Any]:
    notes = [turn.kind] if turn.kind != "turn" else []
    notes += [turn.emotion] if turn.emotion else []
    notes += ["cut short"] if turn.cut else []
    return {
        "role": turn.role,
        "kind": "cut" if turn.cut else turn.kind,
        "x": round(turn.start_s * PIXELS_PER_SECOND, 1),
        "width": round((turn.end_s - turn.start_s) * PIXELS_PER_SECOND, 1),
        "title": f"{turn.start_s:.2f} s {turn.role}"
        f"{' (' + ', '.join(notes) + ')' if notes else ''}: {turn.text}",
    }


def persona_rows(
    rows: Sequence[dict[str, Any]], voices: Mapping[str, Voice]
) -> list[dict[str, Any]]:
    """A row a persona: how much there is of it, and two of its conversations to listen to."""
    by_persona: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_persona[row["speech"].persona_id].append(row)
    found = []
    for persona_id, own in sorted(by_persona.items()):
        turns = [turn for row in own for turn in row["speech"].turns]
        gaps = [gap for row in own for gap in gaps_of(row["speech"])]
        heard = sorted({turn.voice_id for turn in turns if turn.role == "agent"})
        found.append(
            {
                "id": persona_id,
                "dialogues": len(own),
                "minutes": sum(row["duration_s"] for row in own) / 60,
                "agent_share": sum(t.end_s - t.start_s for t in turns if t.role == "agent")
                / max(sum(t.end_s - t.start_s for t in turns), 1e-9),
                "gap_mean_s": sum(gaps) / len(gaps) if gaps else None,
                "overlap": sum(row["overlap"] for row in own) / len(own),
                "cuts": sum(row["cuts"] for row in own),
                "backchannels": sum(row["backchannels"] for row in own),
                "emotions": tally("emotions", [t.emotion for t in turns if t.emotion]),
                "sides": sorted({row["side"] for row in own if row["side"]}),
                "voices": heard,
                "users": len({t.voice_id for t in turns if t.role == "user"}),
                "engines": sorted({voices[name].engine for name in heard if name in voices}),
                "listen": [row["speech"] for row in own if row["listen"]],
            }
        )
    return found


def charts(speeches: Sequence[Speech], rejected: Sequence[dict[str, Any]]) -> list[Any]:
    turns = [turn for speech in speeches for turn in speech.turns]
    whole = [turn for turn in turns if turn.kind == "turn"]
    cut_by = {"agent": "the user cuts in", "user": "the agent cuts in"}
    events = [cut_by[turn.role] for turn in whole if turn.cut]
    events += [f"backchannel of the {t.role}" for t in turns if t.kind == "backchannel"]
    return [
        histogram("Length of a dialogue", [s.num_samples / SAMPLE_RATE for s in speeches], " s"),
        histogram("Length of a turn", [turn.end_s - turn.start_s for turn in whole], " s"),
        histogram("Gap before a turn", [gap for s in speeches for gap in gaps_of(s)], " s"),
        histogram("Both speak, of a dialogue", [100 * overlap_of(s) for s in speeches], " %"),
        tally("Emotions", [t.emotion for t in whole if t.emotion], get_args(Emotion)),
        tally("Interruptions and backchannels", events),
        histogram(
            "Worst word error rate of a dialogue",
            [
                s.quality.worst_wer
                for s in speeches
                if s.quality and s.quality.worst_wer is not None
            ],
        ),
        tally("Rejected, why", [str(fault.get("error", "error")) for fault in rejected]),
    ]


def quality(speeches: Sequence[Speech]) -> dict[str, Any]:
    known = [speech.quality for speech in speeches if speech.quality]
    rates = [q.worst_wer for q in known if q.worst_wer is not None]
    return {
        "utterances": sum(q.utterances for q in known),
        "transcribed": sum(q.transcribed for q in known),
        "retries": sum(q.retries for q in known),
        "worst_wer": max(rates, default=None),
        "timed_by": sum((Counter(q.timed_by) for q in known), Counter()),
    }


def _room(config: Config) -> list[str]:
    timeline = config.speech.timeline
    parts = {
        "room tone": (timeline.room_tone_dbfs, "dBFS"),
        "noise of the place": (timeline.noise_dbfs, "dBFS"),
        "leakage of the agent": (timeline.leakage_db, "dB"),
    }
    return [f"{n} {level:g} {unit}" for n, (level, unit) in parts.items() if level is not None]
