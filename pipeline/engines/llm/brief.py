"""What a model is told to write, from the domain, the persona and the scenario; and in which form.

No place and no role is in this code: a restaurant or a clinic is another domain file.
"""

from __future__ import annotations

import hashlib
from typing import Any

from duplex.base import Role
from duplex.characters import Domain, Mood, Persona, Scenario

PAUSES = ("quick", "normal", "long", "overlap")

SYSTEM = """\
You write spoken dialogues that train a speech model. Two people talk {place}: the agent is the
{agent_role}, the user is the {user_role}. Language: {language} (ISO 639-1).

Write the way people speak: plain words, short turns, no stage directions, no emoji, no markup,
no digits (numbers, times and prices as words), no web addresses. Never mention that this is a
text, a test or a role. The {agent_role} never contradicts the facts and never takes the part of
the {user_role}, who knows only what has been said so far, or is told below.

Answer with one JSON object and nothing else: {{"turns": [...]}}. Each turn has
- "role": "agent" or "user";
- "text": what is said;
- "emotion": happy, sad, angry, excited or neutral, and "intensity", 0.5 (a hint of it) to 2.0;
- "pause": how soon it follows the turn before: quick, normal, long, or overlap (it begins before
  the other one has ended);
- "cut_after_words": null, or, where the next speaker cuts in, after how many words of this turn;
  write the whole turn, what comes after is not heard; never in the last turn;
- "backchannels": words that the listener says meanwhile without taking the turn, each with "text"
  and "after_word", the number of words of the turn spoken before it; mostly none: []."""

ASK = """\
The {agent_role}: {prompt}
Type: {type}. Traits: {traits}.
Speech patterns to use now and then, word for word: {patterns}
Facts, of which the {agent_role} says at least {min_facts} in these words: {facts}
Mood: {mood}.
Words of listening: {backchannel_words}.

The situation ({kind}): {title}. {setting}
It goes roughly like this: {arc}.{extras}

Write between {min_turns} and {max_turns} turns. The roles alternate, and the first turn is spoken
by the {first_speaker}. Let it differ from what anyone would write first: other words, other
details, no stock phrases."""

AGAIN = "Your last reply cannot be used: {reason}. Send the whole JSON object again."


def schema() -> dict[str, Any]:
    """The answer's JSON schema; only what strict modes everywhere take."""
    backchannel = _object({"text": {"type": "string"}, "after_word": {"type": "integer"}})
    turn = _object(
        {
            "role": {"type": "string", "enum": ["agent", "user"]},
            "text": {"type": "string"},
            "emotion": {
                "type": "string",
                "enum": ["happy", "sad", "angry", "excited", "neutral"],
            },
            "intensity": {"type": "number"},
            "pause": {"type": "string", "enum": list(PAUSES)},
            "cut_after_words": {"type": ["integer", "null"]},
            "backchannels": {"type": "array", "items": backchannel},
        }
    )
    return _object({"turns": {"type": "array", "items": turn}})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def wording() -> str:
    """Digest of everything that is said to every model: part of a writer's revision."""
    material = "\0".join((SYSTEM, ASK, AGAIN, repr(schema())))
    return hashlib.sha256(material.encode()).hexdigest()[:12]


def messages(
    domain: Domain,
    persona: Persona,
    scenario: Scenario,
    prompt: str,
    *,
    min_turns: int,
    max_turns: int,
    min_facts: int,
) -> tuple[dict[str, str], ...]:
    """The first request for a dialogue."""
    names: dict[Role, str] = {"agent": domain.agent_role, "user": domain.user_role}
    system = SYSTEM.format(
        place=domain.place,
        agent_role=domain.agent_role,
        user_role=domain.user_role,
        language=persona.language,
    )
    ask = ASK.format(
        agent_role=domain.agent_role,
        prompt=prompt,
        type=persona.type,
        traits=", ".join(persona.traits),
        patterns=" / ".join(persona.speech_patterns),
        facts="; ".join(f"{fact.key}: {fact.value}" for fact in persona.facts),
        min_facts=min(min_facts, len(persona.facts)),
        mood=_mood(domain.types.get(persona.type)),
        backchannel_words=", ".join(persona.backchannel_words),
        kind=domain.kinds.get(scenario.kind, scenario.kind),
        title=scenario.title,
        setting=scenario.setting,
        arc=", then ".join(f"{names[beat.role]} {beat.intent}" for beat in scenario.arc),
        extras="".join(f"\n{line}" for line in _extras(names, persona, scenario)),
        min_turns=min_turns,
        max_turns=max_turns,
        first_speaker=f"{scenario.first_speaker} (the {names[scenario.first_speaker]})",
    )
    return ({"role": "system", "content": system}, {"role": "user", "content": ask})


def _mood(mood: Mood | None) -> str:
    return f"{mood.emotion}, intensity {mood.intensity:g}" if mood else "as the type has it"


def _extras(names: dict[Role, str], persona: Persona, scenario: Scenario) -> list[str]:
    agent, user = names["agent"], names["user"]
    lines = [
        f"From {turn.at} on, the {agent}'s mood is {_mood(turn.mood)}." for turn in scenario.moods
    ]
    known = [f"{f.key}: {f.value}" for f in persona.facts if f.key in scenario.known]
    if known:
        lines.append(f"The {user} knows from before of the {agent}: {'; '.join(known)}.")
    if scenario.interruptions:
        lines.append(
            f"Somebody cuts in on the other one {scenario.interruptions} time(s); "
            f"of the {agent}'s chances about {persona.interrupts:.0%} are taken."
        )
    if persona.backchannels:
        lines.append(
            f"The {agent} answers about {persona.backchannels:.0%} of the {user}'s long turns with "
            "a word of listening in their midst."
        )
    if scenario.unanswerable:
        questions = " ".join(scenario.unanswerable)
        lines.append(
            f"The {user} asks what the {agent} does not know: {questions} The {agent} says so in "
            "character and makes nothing up."
        )
    return lines


def again(first: tuple[dict[str, str], ...], reply: str, reason: str) -> tuple[dict[str, str], ...]:
    """The request after a reply that could not be used; `reply` is empty where none is worth it."""
    if not reply:
        return first
    return (
        *first,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": AGAIN.format(reason=reason)},
    )
