"""The page of the dialogues stage: what was written, what was kept, and some of it to read.

Everything on it comes from the stage's folder, so it can be made again at any time. Texts were
written by machines: the template escapes all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from statistics import mean
from typing import Any

from duplex.characters import Persona
from duplex.dialogue_checks import CHECKS, OTHER_CODES
from duplex.records import Dialogue, Turn, parse_record
from duplex.stage import StageContext
from duplex.store import StageFolder
from duplex.wording import distinct_share, facts_told, patterns_used, said_by
from pipeline.engines.funnel import read_candidates, read_funnel
from pipeline.pages.drawing import MAX_ROWS, rendered

READ_PER_PERSONA = 2
MAX_REJECTS = 50
_LENGTHS = (5, 10, 15, 20, 30, 40, 70)  # upper ends of the bars of words a turn


def render_page(folder: StageFolder, context: StageContext) -> str | None:
    """The page as HTML; None while there is nothing to show."""
    dialogues = finished_dialogues(folder)
    if not dialogues and not read_candidates(folder):
        return None
    personas: dict[str, Persona] = {p.id: p for p in context.records("personas", Persona)}
    rejects = read_candidates(folder)
    funnel = read_funnel(folder)
    meanings = {check.code: check.catches for check in CHECKS} | OTHER_CODES
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    people = [
        (personas[persona_id], own)
        for persona_id, own in sorted(_by_persona(dialogues).items())
        if persona_id in personas
    ]
    values = {
        "config": context.config.name,
        "writers": sorted({dialogue.writer for dialogue in dialogues}),
        "num_dialogues": len(dialogues),
        "num_turns": len(turns),
        "num_words": sum(len(turn.text.split()) for turn in turns),
        "num_tasks_lost": len(folder.rejected().keys() - {e.task_id for e in folder.finished()}),
        "funnel": funnel,
        "reasons": [
            {"code": code, "count": count, "share": count / funnel.written,
             "meaning": meanings.get(code, "")}
            for code, count in funnel.reasons.items()
        ],
        "charts": [
            bars("Turns a dialogue", Counter(len(d.turns) for d in dialogues), fill=True),
            bars("Words a turn", Counter(_bucket(len(t.text.split())) for t in turns)),
            bars("Emotions of the agent", _emotions(turns, "agent")),
            bars("Emotions of the user", _emotions(turns, "user")),
        ],
        "both": performance(dialogues),
        "people": [person_row(persona, own) for persona, own in people[:MAX_ROWS]],
        "num_people": len(people),
        "rejects": [
            reject | {"rows": turn_rows(tuple(Turn.model_validate(t) for t in reject["turns"]))}
            for reject in rejects[:MAX_REJECTS]
        ],
        "num_rejects": len(rejects),
    }  # fmt: skip
    return rendered("dialogues.html.j2", values)


def finished_dialogues(folder: StageFolder) -> list[Dialogue]:
    """The folder's dialogues by id, also while its manifest is still to come."""
    lines = (line for entry in folder.finished() for line in entry.lines)
    records = (parse_record(json.loads(line)) for line in lines)
    return sorted((r for r in records if isinstance(r, Dialogue)), key=lambda r: r.id)


def performance(dialogues: list[Dialogue]) -> dict[str, float]:
    """Interruptions and backchannels of either side, a dialogue."""
    counts = {"agent_cuts": 0, "user_cuts": 0, "agent_murmurs": 0, "user_murmurs": 0}
    for dialogue in dialogues:
        for turn, after in pairwise(dialogue.turns):
            if turn.cut_after_words:
                counts[f"{after.role}_cuts"] += 1
        for turn in dialogue.turns:
            listener = "user" if turn.role == "agent" else "agent"
            counts[f"{listener}_murmurs"] += len(turn.backchannels)
    return {name: count / max(len(dialogues), 1) for name, count in counts.items()}


def person_row(persona: Persona, dialogues: list[Dialogue]) -> dict[str, Any]:
    """A persona's figures, and its first dialogues to read."""
    from pipeline.engines.near_duplicates import mean_similarity

    told = [facts_told(persona, said_by(d.turns, "agent")) for d in dialogues]
    used = [patterns_used(persona, said_by(d.turns, "agent")) for d in dialogues]
    agent_texts = [said_by(d.turns, "agent") for d in dialogues]
    return {
        "persona": persona,
        "count": len(dialogues),
        "facts": mean(len(keys) for keys in told),
        "per_fact": [
            {"fact": fact, "share": mean(fact.key in keys for keys in told)}
            for fact in persona.facts
        ],
        "patterns": mean(len(patterns) for patterns in used),
        "similarity": mean_similarity(agent_texts),
        "distinct": distinct_share(agent_texts, 2),
        **performance(dialogues),
        "read": [{"dialogue": d, "rows": turn_rows(d.turns)} for d in dialogues[:READ_PER_PERSONA]],
    }


def turn_rows(turns: tuple[Turn, ...]) -> list[dict[str, Any]]:
    """Turns as pieces to show: words, murmurs of the listener, and what a cut left unsaid."""
    rows = []
    for turn in turns:
        spelled = turn.text.split()
        cut = turn.cut_after_words or len(spelled)
        murmurs = {b.after_word: b.text for b in turn.backchannels}
        pieces: list[dict[str, str]] = []
        start = 0
        for end in sorted({*murmurs, cut, len(spelled)}):
            if end > start:
                kind = "said" if end <= cut else "unsaid"
                pieces.append({"kind": kind, "text": " ".join(spelled[start:end])})
            if end in murmurs:
                pieces.append({"kind": "murmur", "text": murmurs[end]})
            if end == cut and turn.cut_after_words:
                pieces.append({"kind": "cut", "text": ""})
            start = end
        rows.append({"turn": turn, "pieces": pieces})
    return rows


def bars(title: str, counts: Counter[Any], *, fill: bool = False) -> dict[str, Any]:
    """A bar chart's rows: label, count, share of the longest. `fill` shows empty numbers too."""
    labels = sorted(counts) if not fill or not counts else list(range(min(counts), max(counts) + 1))
    most = max(counts.values(), default=0) or 1
    rows = [
        {"label": label[1] if isinstance(label, tuple) else str(label), "count": counts[label],
         "share": counts[label] / most}
        for label in labels
    ]  # fmt: skip
    return {"title": title, "rows": rows}


def _bucket(length: int) -> tuple[int, str]:
    low = 1
    for high in _LENGTHS:
        if length <= high:
            return high, f"{low} to {high}"
        low = high + 1
    return low, f"over {low - 1}"


def _emotions(turns: list[Turn], role: str) -> Counter[tuple[int, str]]:
    order = ["angry", "sad", "neutral", "happy", "excited", "not given"]
    counts: Counter[tuple[int, str]] = Counter()
    for turn in turns:
        if turn.role == role:
            name = turn.emotion or "not given"
            counts[order.index(name), name] += 1
    return counts


def _by_persona(dialogues: list[Dialogue]) -> dict[str, list[Dialogue]]:
    grouped: dict[str, list[Dialogue]] = {}
    for dialogue in dialogues:
        grouped.setdefault(dialogue.persona_id, []).append(dialogue)
    return grouped
