"""The page of the voices stage: who sounds how, from where, and by what right."""

from __future__ import annotations

import json
from typing import Any

from duplex.characters import Persona, VoiceTraits
from duplex.records import Dialogue, Voice, parse_record
from duplex.splits import dialogue_sides, voice_sides
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.pages.drawing import rendered

Rejected = tuple[str, str]  # a recording and why it was refused


def render(folder: StageFolder, context: StageContext, refused: tuple[Rejected, ...]) -> str:
    config = context.config
    voices = finished_voices(folder)
    personas = {p.id: p for p in context.records("personas", Persona)}
    sides = _sides(voices, context)
    rows = [_row(voice, personas, sides.get(voice.id, [])) for voice in voices]
    return rendered(
        "voices.html.j2",
        {
            "config": config.name,
            "agents": [row for row in rows if row["voice"].role == "agent"],
            "users": [row for row in rows if row["voice"].role == "user"],
            "refused": refused,
            "rejected": list(folder.rejected().values()),
            "split": config.tensors.split,
            "fraction": config.tensors.valid_fraction,
        },
    )


def finished_voices(folder: StageFolder) -> list[Voice]:
    """The folder's records by id, also while its manifest is still to come."""
    lines = (line for entry in folder.ledger().values() for line in entry.lines)
    records = (
        folder.records() if folder.manifest() else (parse_record(json.loads(x)) for x in lines)
    )
    return sorted((r for r in records if isinstance(r, Voice)), key=lambda r: r.id)


def _sides(voices: list[Voice], context: StageContext) -> dict[str, list[str]]:
    """Sides of the split on which each voice will be heard, by its id."""
    section, seed = context.config.tensors, context.config.seed
    found: dict[str, set[str]] = {}
    for language in {voice.language for voice in voices}:
        users = [v.id for v in voices if v.role == "user" and v.language == language]
        for voice_id, side in voice_sides(users, section.valid_fraction, seed).items():
            found.setdefault(voice_id, set()).add(side)
    agents = {v.persona_id: v.id for v in voices if v.role == "agent" and v.persona_id}
    dialogues: list[Dialogue] = list(context.records("dialogues", Dialogue))
    split = dialogue_sides(dialogues, agents, section.split, section.valid_fraction, seed)
    for dialogue in dialogues:
        if dialogue.id in split:
            found.setdefault(agents[dialogue.persona_id], set()).add(split[dialogue.id])
    return {voice_id: sorted(sides) for voice_id, sides in found.items()}


def _row(voice: Voice, personas: dict[str, Persona], sides: list[str]) -> dict[str, Any]:
    persona = personas.get(voice.persona_id or "")
    return {
        "voice": voice,
        "persona": persona,
        "traits": _traits(persona.voice) if persona else "",
        "params": ", ".join(f"{name} {value}" for name, value in sorted(voice.params.items())),
        "sides": sides,
    }


def _traits(traits: VoiceTraits) -> str:
    return f"{traits.gender}, {traits.age}, {traits.accent}"
