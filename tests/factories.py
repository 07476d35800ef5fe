"""Small valid records for tests; each takes what a test wants to differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from duplex.characters import Fact, GapRange, Persona, Scenario, VoiceTraits
from duplex.records import Dialogue, Turn


def slow(*values: Any) -> Any:
    """A parameter that `make test-all` alone tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


def persona(persona_id: str = "angry-ann", **changes: Any) -> Persona:
    fields: dict[str, Any] = {
        "id": persona_id,
        "name": persona_id.rsplit("-", 1)[-1].title(),
        "type": "angry",
        "traits": ("impatient",),
        "speech_patterns": ("Come on",),
        "facts": (Fact(key="order", value="a large latte", says=("large latte",)),),
        "gap_after_user": GapRange(low=1, high=3),
        "gap_other": GapRange(low=1, high=4),
        "voice": VoiceTraits(gender="female"),
        "prompts": ("You are Ann, a customer in a coffee shop. You want a large latte.",),
    }
    return Persona.model_validate(fields | changes)


def scenario(scenario_id: str = "rush-hour", **changes: Any) -> Scenario:
    arc = [
        {"role": "user", "intent": "greet"},
        {"role": "agent", "intent": "give-order"},
        {"role": "user", "intent": "state-price"},
        {"role": "agent", "intent": "pay"},
    ]
    fields: dict[str, Any] = {
        "id": scenario_id,
        "title": "Rush hour",
        "setting": "A queue.",
        "arc": arc,
    }
    return Scenario.model_validate(fields | changes)


def dialogue(dialogue_id: str = "angry-ann.rush-hour.00", **changes: Any) -> Dialogue:
    fields: dict[str, Any] = {
        "id": dialogue_id,
        "persona_id": "angry-ann",
        "persona_name": "Ann",
        "scenario_id": "rush-hour",
        "system_prompt": "You are Ann, a customer in a coffee shop. You want a large latte.",
        "mood": "angry",
        "first_speaker": "user",
        "gap_after_user": GapRange(low=1, high=3),
        "gap_other": GapRange(low=1, high=4),
        "turns": (Turn(role="user", text="Good morning."), Turn(role="agent", text="A latte.")),
        "writer": "scripted",
    }
    return Dialogue.model_validate(fields | changes)


def write_yaml(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path
