"""Who gets which voice, where voices are names of an engine or recorded speakers. Pure.

Personas choose first, by id, each in an order of its own among the voices that fit; then the
user's side takes what is left. Nobody shares a voice, and gender and language must fit. Of
recorded speakers, those of the persona's age come first, then those of unknown age.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from duplex.base import Role
from duplex.characters import VoiceTraits
from duplex.errors import RequestError
from pipeline.engines.draws import ranked

Gender = Literal["female", "male"]
Age = Literal["young", "adult", "old"]
HOW_TO_ADD = "Add voices, lower voices.user_voices, or choose fewer personas (personas.only)"


@dataclass(frozen=True)
class Want:
    """A voice that is needed. `traits` is None on the user's side, which takes any."""

    id: str
    role: Role
    language: str
    persona_id: str | None = None
    traits: VoiceTraits | None = None


@dataclass(frozen=True)
class Offer:
    """A voice that can be had. None: unknown."""

    name: str
    language: str | None = None
    gender: Gender | None = None
    age: Age | None = None


def match(wants: Sequence[Want], offers: Sequence[Offer]) -> dict[str, str]:
    """The name of each want's voice by the want's id; as many as can be had."""
    free = {offer.name: offer for offer in offers}
    chosen: dict[str, str] = {}
    for want in sorted(wants, key=lambda want: (want.role, want.id)):  # agents first
        fitting = [offer.name for offer in free.values() if _fits(want, offer)]
        order = ranked(want.persona_id or "the user's side", fitting)
        best = min(order, key=lambda name: _age_distance(want, free[name]), default=None)
        if best is not None:
            chosen[want.id] = best
            del free[best]
    return chosen


def shortage(wants: Sequence[Want], chosen: Mapping[str, str]) -> str | None:
    """Which wants have no voice, in words; None where all have one."""
    without = [want for want in wants if want.id not in chosen]
    if not without:
        return None
    kinds: dict[str, int] = {}
    for want in without:
        kind = f"{want.traits.gender} of a persona" if want.traits else "of the user's side"
        kinds[f"{kind} ({want.language})"] = kinds.get(f"{kind} ({want.language})", 0) + 1
    missing = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{len(wants)} voices are needed, {len(chosen)} found; missing: {missing}"


def match_names(wants: Sequence[Want], names: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Voices from `voices.names`: of `fr-female` for French, where there is such a list, else of
    `female`.

    Raises:
        RequestError: too few, or one name twice.
    """
    listed = [name for some in names.values() for name in some]
    doubled = sorted({name for name in listed if listed.count(name) > 1})
    if doubled:
        raise RequestError(f"voices.names must name each voice once, found twice: {doubled[0]}")
    chosen: dict[str, str] = {}
    for role, language in sorted({(want.role, want.language) for want in wants}):
        offers = [
            Offer(name, language, gender)
            for gender in ("female", "male")
            for name in names.get(f"{language}-{gender}", names.get(gender, ()))
            if name not in chosen.values()
        ]
        these = [want for want in wants if (want.role, want.language) == (role, language)]
        chosen |= match(these, offers)
    if fault := shortage(wants, chosen):
        raise RequestError(f"voices.names must have a voice for each: {fault}. {HOW_TO_ADD}.")
    return chosen


def _fits(want: Want, offer: Offer) -> bool:
    if offer.language not in (None, want.language):
        return False
    return want.traits is None or offer.gender == want.traits.gender


def _age_distance(want: Want, offer: Offer) -> int:
    if want.traits is None or offer.age == want.traits.age:
        return 0
    return 1 if offer.age is None else 2
