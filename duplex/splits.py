"""Which conversations are for training and which for validation. Pure.

Split by persona (held-out personas) or by conversation, never by frame. Conversations that
share their whole text count as one, since a model that saw one has seen the other.

Ranked by a hash of their own, so that one persona or conversation more moves few others.

The user's voices are held apart too: `dialogue_sides` gives the split before a dialogue is
spoken, `voice_sides` the voices of each side. The tensors stage comes to the same split, unless
the speech stage rejects a dialogue: then a conversation at the border may change sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from duplex.clips import text_digest
from duplex.records import Dialogue, TensorClip

Split = Literal["train", "valid"]
SplitBy = Literal["persona", "conversation"]


@dataclass(frozen=True)
class Member:
    """A clip as far as splits go. `text` is a digest of all its turns, `voices` the agent's."""

    id: str
    persona: str
    conversation: str
    text: str
    voices: tuple[str, ...] = ()


def member_of(clip: TensorClip) -> Member:
    """A finished clip as far as splits go."""
    return Member(
        id=clip.id,
        persona=clip.persona_id,
        conversation=clip.dialogue_id or clip.speech_id,
        text=clip.text_digest or clip.tensor,
        voices=clip.voices,
    )


def assign_splits(
    members: Sequence[Member], by: SplitBy, fraction: float, seed: int
) -> dict[str, Split]:
    """Split of each member by its id. At least one group is held out when `fraction` > 0 and
    there are two; at least one is left for training."""
    groups = _groups(members, by)
    held_out = hold_out(set(groups.values()), fraction, seed)
    return {
        member_id: "valid" if group in held_out else "train" for member_id, group in groups.items()
    }


def dialogue_sides(
    dialogues: Iterable[Dialogue],
    voices: Mapping[str, str],
    by: SplitBy,
    fraction: float,
    seed: int,
) -> dict[str, Split]:
    """Split of each dialogue by its id. Those without a voice will not be spoken: not counted.

    Args:
        voices: persona id -> id of the agent's voice.
    """
    members = [
        Member(
            id=dialogue.id,
            persona=dialogue.persona_id,
            conversation=dialogue.id,
            text=text_digest(dialogue.turns),
            voices=(voices[dialogue.persona_id],),
        )
        for dialogue in dialogues
        if dialogue.persona_id in voices
    ]
    return assign_splits(members, by, fraction, seed)


def voice_sides(voices: Iterable[str], fraction: float, seed: int) -> dict[str, Split]:
    """Side of each of the user's voices by its id; all are for training where nothing, or a lone
    voice, is to be held out."""
    names = set(voices)
    held_out = hold_out(names, fraction, seed)
    return {name: "valid" if name in held_out else "train" for name in sorted(names)}


def hold_out(names: set[str], fraction: float, seed: int) -> set[str]:
    """The names kept for validation."""
    if fraction <= 0 or len(names) < 2:
        return set()
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1)
    return set(ranked[:count])


def overlaps(members: Iterable[Member], split: Mapping[str, Split], by: SplitBy) -> list[str]:
    """What stands on both sides and must not; empty when the split is clean.

    A persona's prompts and its voice are bound to be on both sides of a split by conversation.
    """
    kinds = {"conversation": lambda m: (m.conversation,), "text": lambda m: (m.text,)}
    if by == "persona":
        kinds |= {"persona": lambda m: (m.persona,), "voice": lambda m: m.voices}
    members = list(members)
    faults = []
    for kind, values_of in kinds.items():
        sides: dict[Split, set[str]] = {"train": set(), "valid": set()}
        for member in members:
            sides[split[member.id]].update(values_of(member))
        shared = sorted(sides["train"] & sides["valid"])
        if shared:
            faults.append(f"{len(shared)} {kind}(s) in training and validation, first {shared[0]}")
    return faults


def _groups(members: Sequence[Member], by: SplitBy) -> dict[str, str]:
    """Member id -> its group, named by the least persona or conversation that it is tied to."""
    leader: dict[str, str] = {}

    def root(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    first_with: dict[str, str] = {}
    for member in sorted(members, key=lambda m: m.id):
        name = member.persona if by == "persona" else member.conversation
        ties = [f"text:{member.text}"]
        if by == "persona":
            ties += [f"voice:{voice}" for voice in member.voices]
            ties.append(f"conversation:{member.conversation}")
        for tie in ties:
            pair = sorted((root(name), root(first_with.setdefault(tie, name))))
            leader[pair[1]] = pair[0]
    return {
        member.id: root(member.persona if by == "persona" else member.conversation)
        for member in members
    }
