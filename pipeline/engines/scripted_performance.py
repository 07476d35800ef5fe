"""How a scripted conversation is performed: emotions, interruptions, backchannels.

    mood        the type's in the domain, from each mood turn of the scenario on met with that one
    cut         in the last sentence of a long turn, past its middle and past everything that was
                filled in: no price, name or order is lost, and the question is still understood
    backchannel of the listener, where a long turn has a joint: a comma, a full stop, an `and`

All draws come from the generator that is passed in, so a seed decides them with the words.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from duplex.base import Emotion, Role
from duplex.characters import Domain, Mood, Persona, Scenario
from duplex.records import Backchannel, Turn
from duplex.wording import NUMBER_WORDS, facts_told, has_words, patterns_used, words
from pipeline.engines.scripted_grammar import Grammar

LONG_TURN_WORDS = 8  # shorter ones are over before somebody cuts in or murmurs
BARISTA_BACKCHANNELS = 0.2  # of the customer's long turns
_ANYBODY = 0.3  # how readily either side cuts in where the scene has interruptions
_LOST_WORDS = range(2, 7)  # of a cut turn; the last word alone is no interruption
_STEP = 0.1  # how much intensity wavers from turn to turn
_DARK: frozenset[Emotion] = frozenset({"angry", "sad"})
_JOINTS = frozenset({"and", "but", "so", "because", "if", "which", "when", "then"})

# What the barista feels; neutral otherwise.
_BARISTA: dict[str, Mood] = {
    "greet": Mood(emotion="happy"),
    "greet-regular": Mood(emotion="happy", intensity=1.2),
    "pitch-drink": Mood(emotion="excited", intensity=0.8),
    "describe-drink": Mood(emotion="excited", intensity=0.8),
    "excuse-wait": Mood(emotion="sad", intensity=0.8),
    "apologise": Mood(emotion="sad", intensity=1.0),
    "offer-remake": Mood(emotion="sad", intensity=0.6),
    "farewell": Mood(emotion="happy", intensity=0.8),
    "last-word": Mood(emotion="happy", intensity=0.8),
}


@dataclass(frozen=True)
class Line:
    """A turn before it is performed. `fills` is what its slots were filled with."""

    role: Role
    text: str
    intents: tuple[str, ...]
    fills: frozenset[str]


def perform(
    lines: list[Line],
    persona: Persona,
    scenario: Scenario,
    domain: Domain | None,
    grammar: Grammar,
    rng: random.Random,
) -> tuple[Turn, ...]:
    """The lines as turns. Without a domain no turn has an emotion."""
    cuts = _choose_cuts(lines, persona, scenario, rng)
    # A generator of their own: the words are the same with moods and without.
    moods = _moods(lines, persona, scenario, domain, random.Random(rng.getrandbits(64)))
    turns: list[Turn] = []
    for index, (line, mood) in enumerate(zip(lines, moods, strict=True)):
        text = line.text
        if index and (index - 1) in cuts:
            text = f"{_cut_in(line, persona, grammar, rng)} {text}"
        turns.append(
            Turn(
                role=line.role,
                text=text,
                emotion=mood.emotion if mood else None,
                intensity=mood.intensity if mood else None,
                cut_after_words=_shifted(cuts.get(index), text, line.text),
                backchannels=_backchannels(text, line, cuts.get(index), persona, grammar, rng),
            )
        )
    return tuple(turns)


def _shifted(cut: int | None, text: str, before: str) -> int | None:
    """A cut's place after words were put before the turn."""
    return None if cut is None else cut + len(text.split()) - len(before.split())


# -- emotions


def _moods(
    lines: list[Line],
    persona: Persona,
    scenario: Scenario,
    domain: Domain | None,
    rng: random.Random,
) -> list[Mood | None]:
    if domain is None or persona.type not in domain.types:
        return [None] * len(lines)
    arc = [beat.intent for beat in scenario.arc]
    own = domain.types[persona.type]
    moods: list[Mood | None] = []
    reached = -1
    for line in lines:
        # An arc that was trimmed has its turning point where it passes that place.
        reached = max([reached, *(arc.index(intent) for intent in line.intents if intent in arc)])
        if line.role == "user":
            mood = next((_BARISTA[i] for i in line.intents if i in _BARISTA), Mood())
        else:
            passed = [turn.mood for turn in scenario.moods if arc.index(turn.at) <= reached]
            mood = meet(own, passed[-1]) if passed else own
        wavering = mood.intensity + rng.choice((-_STEP, 0.0, _STEP))
        intensity = round(min(2.0, max(0.5, wavering)), 2)
        moods.append(Mood(emotion=mood.emotion, intensity=intensity))
    return moods


def meet(own: Mood, scene: Mood) -> Mood:
    """The mood of a character in a scene that has one: it stays who it is.

    A scene of its own side, dark or bright, makes it louder by half of the scene's intensity; one
    of the other side makes it neutral; a neutral one calms it. Who is neutral takes the scene's
    emotion, as strongly as the two together on average.
    """
    if scene.emotion == "neutral":
        return Mood(emotion=own.emotion, intensity=max(0.5, 0.8 * own.intensity))
    if own.emotion == "neutral":
        return Mood(emotion=scene.emotion, intensity=(own.intensity + scene.intensity) / 2)
    if (own.emotion in _DARK) == (scene.emotion in _DARK):
        return Mood(emotion=own.emotion, intensity=min(2.0, own.intensity + scene.intensity / 2))
    return Mood()


# -- interruptions


def _choose_cuts(
    lines: list[Line], persona: Persona, scenario: Scenario, rng: random.Random
) -> dict[int, int]:
    """Turn -> words before it is cut. Never two turns in a row, never the last."""
    places = {
        index: found
        for index, line in enumerate(lines[:-1])
        if (found := _cut_places(line, persona))
    }
    chosen = [i for i in places if lines[i].role == "user" and rng.random() < persona.interrupts]
    wanted = max(scenario.interruptions, len(chosen))
    others = [index for index in places if index not in chosen]
    rng.shuffle(others)
    # What the scene wants beyond the character's own: by either side, more by who does it readily.
    share = (_ANYBODY + persona.interrupts) / (2 * _ANYBODY + persona.interrupts)
    sides: dict[Role, list[int]] = {
        role: [i for i in others if lines[i].role == role] for role in ("user", "agent")
    }
    while sides["user"] or sides["agent"]:
        cut_short: Role = "user" if rng.random() < share else "agent"
        chosen += [sides[cut_short].pop()] if sides[cut_short] else []
    cuts: dict[int, int] = {}
    for index in chosen:
        if len(cuts) < wanted and index - 1 not in cuts and index + 1 not in cuts:
            cuts[index] = rng.choice(places[index])
    return cuts


def _cut_places(line: Line, persona: Persona) -> list[int]:
    """After how many words the turn may be cut."""
    spelled = line.text.split()
    if len(spelled) < LONG_TURN_WORDS:
        return []
    ends = [i for i, word in enumerate(spelled[:-1], start=1) if word[-1] in ".?!"]
    start = ends[-1] if ends else 0  # words before the last sentence
    places = []
    for lost in _LOST_WORDS:
        place = len(spelled) - lost
        said, rest = " ".join(spelled[:place]), " ".join(spelled[place:])
        if 2 * (place - start) < len(spelled) - start:
            break
        if any(has_words(line.text, fill) and not has_words(said, fill) for fill in line.fills):
            break
        if any(has_words(rest, fill) for fill in line.fills):
            break
        if not NUMBER_WORDS.isdisjoint(words(rest)):  # "we close in fifteen minutes"
            break
        if line.role == "agent" and (
            facts_told(persona, said) != facts_told(persona, line.text)
            or patterns_used(persona, said) != patterns_used(persona, line.text)
        ):
            break
        places.append(place)
    natural = [place for place in places if spelled[place - 1][-1] in ",;"]
    return natural or places


def _cut_in(line: Line, persona: Persona, grammar: Grammar, rng: random.Random) -> str:
    """The first words of the one who cuts in."""
    speaker = persona.type if line.role == "agent" else "barista"
    options = grammar.lines[speaker]["cut-in"]
    said = rng.choice(options).say({}, rng, set())
    first = re.split(r"\W", line.text, maxsplit=1)[0]
    # "Sorry to cut in. Sorry about that" is one sorry too many.
    return said if not said.startswith(first) else "Oh."


# -- backchannels


def _backchannels(
    text: str,
    line: Line,
    cut: int | None,
    persona: Persona,
    grammar: Grammar,
    rng: random.Random,
) -> tuple[Backchannel, ...]:
    spelled = text.split()
    heard = cut or len(spelled)
    share = persona.backchannels if line.role == "user" else BARISTA_BACKCHANNELS
    if len(spelled) < LONG_TURN_WORDS or rng.random() >= share:
        return ()
    inside = range(3, heard - 1)
    places = [
        place
        for place in inside
        if spelled[place - 1][-1] in ",.;?!" or spelled[place].lower() in _JOINTS
    ]
    if not places:
        return ()
    if line.role == "user":
        word = rng.choice(persona.backchannel_words)
    else:
        word = rng.choice(grammar.lines["barista"]["backchannel"]).say({}, rng, set())
    return (Backchannel(text=word, after_word=rng.choice(places)),)
