"""Which dialogues of a set must be written again, because another one says the same.

One after the other by id, a dialogue goes back for its conflict with one before it that stays. All
that go back are written again before the next review, which sees the same set whatever the order of
work and wherever a run was killed; so rounds are few, and the end depends on the seed alone.
"""

from __future__ import annotations

from duplex.dialogue_checks import Fault
from duplex.records import Dialogue
from duplex.wording import words
from pipeline.engines.near_duplicates import NearDuplicates

OPENING_TURNS = 3


def full_text(dialogue: Dialogue) -> str:
    return "\n".join(turn.text for turn in dialogue.turns)


def opening(dialogue: Dialogue) -> tuple[str, ...]:
    """The persona and its first turns, as words."""
    first = dialogue.turns[:OPENING_TURNS]
    return (dialogue.persona_id, *(" ".join(words(turn.text)) for turn in first))


class SetReview:
    """Keeps its index between rounds: what did not change is not measured again."""

    def __init__(self, near_duplicate: float):
        self._near = NearDuplicates(near_duplicate)

    def faults(self, dialogues: list[Dialogue]) -> dict[str, Fault]:
        """Those to be written again, by id. Empty when all may stay."""
        ordered = sorted(dialogues, key=lambda dialogue: dialogue.id)
        for name in set(self._near.names()) - {dialogue.id for dialogue in ordered}:
            self._near.remove(name)
        for dialogue in ordered:
            self._near.put(dialogue.id, full_text(dialogue))
        staying: set[str] = set()
        openings: dict[tuple[str, ...], str] = {}
        found: dict[str, Fault] = {}
        for dialogue in ordered:
            fault = self._conflict(dialogue, staying, openings)
            if fault is not None:
                found[dialogue.id] = fault
            else:
                staying.add(dialogue.id)
                openings[opening(dialogue)] = dialogue.id
        return found

    def _conflict(
        self, dialogue: Dialogue, staying: set[str], openings: dict[tuple[str, ...], str]
    ) -> Fault | None:
        near = self._near.near(dialogue.id)
        alike = min((name for name in near if name in staying), default=None)
        if alike is not None:
            return Fault(
                "near-duplicate",
                f"it says nearly the same as {alike}: {near[alike]:.0%} of their three-word "
                "shingles are shared.",
            )
        same = openings.get(opening(dialogue))
        if same is not None:
            return Fault(
                "same-opening",
                f"its first {OPENING_TURNS} turns are those of {same}, word by word.",
            )
        return None
