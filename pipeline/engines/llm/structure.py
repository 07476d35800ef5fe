"""The form that every dialogue has, whatever it is about: roles, length, signs. Pure."""

from __future__ import annotations

import re
from itertools import pairwise

from duplex.characters import Persona, Scenario
from duplex.records import Turn
from pipeline.engines.writers import Check, Fault

# What would be read aloud as symbols, or not at all.
_UNSPEAKABLE = re.compile(r"[\d*_#<>\[\]{}()|\\/\n\r\t]")


def structure_check(min_turns: int, max_turns: int) -> Check:
    def check(persona: Persona, scenario: Scenario, turns: tuple[Turn, ...]) -> Fault | None:
        if len(turns) < min_turns:
            return Fault("too-few-turns", f"at least {min_turns} turns, found {len(turns)}")
        if len(turns) > max_turns:
            return Fault("too-many-turns", f"at most {max_turns} turns, found {len(turns)}")
        if turns[0].role != scenario.first_speaker:
            return Fault(
                "first-speaker",
                f"the first turn must be spoken by {scenario.first_speaker}, found {turns[0].role}",
            )
        for number, (before, after) in enumerate(pairwise(turns)):
            if before.role == after.role:
                return Fault(
                    "same-role-twice",
                    f"turns {number} and {number + 1} are both spoken by {after.role}",
                )
        for number, turn in enumerate(turns):
            for text in (turn.text, *(word.text for word in turn.backchannels)):
                if match := _UNSPEAKABLE.search(text):
                    return Fault(
                        "markup",
                        f"turn {number} holds {match[0]!r}, which cannot be spoken; write numbers "
                        "as words and leave out markup",
                    )
        return None

    return check
