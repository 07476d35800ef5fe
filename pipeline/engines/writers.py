"""What every writer of dialogues offers, and what it returns.

A writer's `revision` is part of the key of each record that it wrote, so it must change
whenever the same seed would give other words. Keys are computed before any work is started:
no writer imports torch, nor anything heavy, before `write` is called.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from duplex.characters import Persona, Scenario
from duplex.dialogue_checks import Check, Fault
from duplex.records import Turn

__all__ = [
    "Candidate", "Check", "DialogueWriter", "Fault", "OnReject", "WrittenDialogue", "draw_prompt",
]  # fmt: skip


@dataclass(frozen=True)
class WrittenDialogue:
    """The words of a conversation. `mood` names the gap table that its pauses come from."""

    turns: tuple[Turn, ...]
    system_prompt: str
    mood: str


@dataclass(frozen=True)
class Candidate:
    """One that was not kept. `turns` is empty where the reply held none."""

    task_id: str
    attempt: int
    number: int
    fault: Fault
    turns: tuple[Turn, ...]


OnReject = Callable[[Candidate], None]


class DialogueWriter(Protocol):
    @property
    def revision(self) -> str: ...

    def write(
        self,
        persona: Persona,
        scenario: Scenario,
        *,
        seed: int,
        min_turns: int,
        max_turns: int,
        task_id: str = "",
        attempt: int = 0,
    ) -> WrittenDialogue:
        """A dialogue of `min_turns` to `max_turns` turns; the same seed gives the same words.

        `task_id` and `attempt` name the candidates that are not kept.
        """
        ...


def draw_prompt(persona: Persona, rng: random.Random) -> str:
    """One of the persona's paraphrases, so that no wording of the prompt is learnt by heart."""
    return rng.choice(persona.prompts)
