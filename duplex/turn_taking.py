"""Interruptions and backchannels of a conversation, from the speech activity of both sides. Pure.

An interruption is a user turn that begins while the agent has been speaking for `BEGUN_S` and more:
nobody wrote it down as one, it is one. The agent yields when it falls silent before that turn
ends; the delay is how long it went on. A backchannel is an agent's stretch of speech of at most
`BACKCHANNEL_S` that begins and ends within a user turn.

Shapes: segments are frames [start, end) of 80 ms, in order. Cost: linear in segments times turns.
Sources: Heldner & Edlund 2010 (overlaps); Lin et al. 2025, Full-Duplex-Bench (a backchannel lasts
    a second at most); Yngve 1970 for the word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from duplex.frames import FRAME_S
from duplex.metrics import Segment

BEGUN_S = 0.24
BACKCHANNEL_S = 1.0


class Interruption(NamedTuple):
    """turn: its index; yield_s: None when the agent spoke on until the turn's end."""

    turn: int
    yield_s: float | None


def interruptions(agent: Sequence[Segment], turns: Sequence[Segment]) -> tuple[Interruption, ...]:
    """The user turns that begin while the agent speaks."""
    found = []
    for index, turn in enumerate(turns):
        cut = next((s for s in agent if s.start + BEGUN_S / FRAME_S <= turn.start < s.end), None)
        if cut is not None:
            ends = cut.end < turn.end
            delay_s = round((cut.end - turn.start) * FRAME_S, 6) if ends else None
            found.append(Interruption(index, delay_s))
    return tuple(found)


def backchannels(agent: Sequence[Segment], turns: Sequence[Segment]) -> int:
    """Short stretches of agent speech that begin and end within a user turn."""
    return sum(
        segment.seconds <= BACKCHANNEL_S + 1e-9
        and any(turn.start <= segment.start and segment.end <= turn.end for turn in turns)
        for segment in agent
    )
