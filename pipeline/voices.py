"""Stage 3: a voice for each persona, and some for the person on the other side.

A persona's voice follows its traits: gender and age choose the variants, accent the language,
pitch and rate the numbers; a hash of its id picks among the variants and moves the numbers a
little. So it depends on nothing but id and traits: editing what a persona says, or adding
another one, changes no voice. Two ids with equal traits meet in the same voice less than once
in 20 000 times; then the later id draws again.

User voices come from variants of their own, chosen for their distance: mean log-mel spectra of
two sentences lie at least 4.6 dB from every persona variant and 5.1 dB from each other, while
a persona variant's nearest lies at 1.6 to 4.9 dB. Variants that clip (antonio, paul) or halve
the first formant (travis) are left out. Each voice is proven by speaking a word: 10 ms.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from duplex.base import Record, Role, canonical_json
from duplex.characters import Persona, VoiceTraits
from duplex.config import Config
from duplex.errors import RequestError
from duplex.records import Dialogue, Voice
from duplex.stage import BlobSink, MapStage, StageContext, Task
from pipeline.engines import espeak

ENGINE = "espeak"
LICENCE = "GPL-3.0-or-later (the engine)"
PROOF_TEXT = "Hello."
LONGEST_ID = 96  # of a record

PERSONA_VARIANTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("female", "young"): ("f2", "f3", "f5", "Annie"),
    ("female", "adult"): ("f2", "f3", "f5", "Annie"),
    ("female", "old"): ("f1", "aunty", "grandma"),
    ("male", "young"): ("m3", "m6", "m7", "Alex"),
    ("male", "adult"): ("m3", "m4", "m6", "m7", "max", "robert"),
    ("male", "old"): ("m1", "m8", "grandpa"),
}
PITCH_SPREAD, RATE_SPREAD = 5, 8  # each way
RANGE_LOW, RANGE_HIGH = 35, 70

USER_VARIANTS = ("steph", "michel", "belinda", "Andy", "anika", "edward")
USER_ACCENTS = ("en-us", "en-gb")
USER_PITCHES = (50, 42, 58, 38, 62, 46)  # 6 variants x 2 accents x 6 pitches: 72 voices
USER_RATES = (175, 165, 185, 170, 180)

Params = dict[str, str | int | float]


@dataclass(frozen=True)
class VoicePlan:
    """What a voice will be."""

    role: Role
    persona_id: str | None
    params: Params


class VoicesStage(MapStage):
    name = "voices"
    number = 3
    reads = ("personas", "dialogues")
    set_only = frozenset({"user_voices"})

    def __init__(self) -> None:
        self._engine: espeak.EspeakEngine | None = None

    def engine(self, config: Config) -> str:
        return espeak.revision()

    def tasks(self, context: StageContext) -> list[Task]:
        traits = {p.id: p.voice for p in context.records("personas", Persona)}
        for dialogue in context.records("dialogues", Dialogue):
            if dialogue.persona_id not in traits:  # imported: somebody else's persona
                traits[dialogue.persona_id] = default_traits(dialogue.persona_id)
        users = range(context.config.voices.user_voices)
        return [
            *agent_tasks(sorted(traits.items())),
            *(
                Task(f"user-{index:02d}", (), VoicePlan("user", None, user_params(index)))
                for index in users
            ),
        ]

    def setup(self, context: StageContext) -> None:
        self._engine = espeak.EspeakEngine()

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        assert self._engine is not None, "setup comes first"
        plan: VoicePlan = task.payload
        try:
            self._engine.synthesize(PROOF_TEXT, plan.params)
        except RequestError as error:
            raise RequestError(
                f"{task.id}: {error}. Look at `voice` of persona {plan.persona_id}; "
                "accent must be a voice of espeak-ng, such as en-us, en-gb or en-gb-scotland."
            ) from error
        return [
            Voice(
                id=task.id,
                engine=ENGINE,
                role=plan.role,
                persona_id=plan.persona_id,
                params=plan.params,
                licence=LICENCE,
            )
        ]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def agent_tasks(traits: Iterable[tuple[str, VoiceTraits]]) -> list[Task]:
    """A task for each persona; no two get equal parameters."""
    tasks: list[Task] = []
    taken: set[str] = set()
    for persona_id, voice in traits:
        attempt = 0
        while canonical_json(params := agent_params(persona_id, voice, attempt)) in taken:
            attempt += 1
        taken.add(canonical_json(params))
        material: dict[str, object] = {
            "persona": persona_id,
            "voice": voice.model_dump(mode="json"),
        }
        # Only a voice that had to give way depends on more than its own persona.
        if attempt:
            material["attempt"] = attempt
        plan = VoicePlan("agent", persona_id, params)
        tasks.append(Task(agent_voice_id(persona_id), (_digest(material),), plan))
    return tasks


def agent_voice_id(persona_id: str) -> str:
    voice_id = f"agent-{persona_id}"
    if len(voice_id) <= LONGEST_ID:
        return voice_id
    short = hashlib.sha256(persona_id.encode()).hexdigest()[:12]
    return f"{voice_id[: LONGEST_ID - 13]}-{short}"


def agent_params(persona_id: str, traits: VoiceTraits, attempt: int = 0) -> Params:
    draw = _Draw(f"{persona_id}\x00{attempt}")
    pitch = traits.pitch + draw.between(-PITCH_SPREAD, PITCH_SPREAD)
    variants = PERSONA_VARIANTS[traits.gender, traits.age]
    return {
        "voice": traits.accent,
        "variant": variants[draw.between(0, len(variants) - 1)],
        "pitch": min(max(pitch, 0), 99),
        "range": draw.between(RANGE_LOW, RANGE_HIGH),
        "rate_wpm": traits.rate_wpm + draw.between(-RATE_SPREAD, RATE_SPREAD),
    }


def user_params(index: int) -> Params:
    """The index-th user voice. The first six differ in variant, the next six in accent too."""
    lap, variant = divmod(index, len(USER_VARIANTS))
    pitch, accent = divmod(lap, len(USER_ACCENTS))
    return {
        "voice": USER_ACCENTS[(accent + variant) % len(USER_ACCENTS)],
        "variant": USER_VARIANTS[variant],
        "pitch": USER_PITCHES[pitch],
        "range": 50,
        "rate_wpm": USER_RATES[index % len(USER_RATES)],
    }


def default_traits(persona_id: str) -> VoiceTraits:
    """Traits of a persona of which only dialogues are known."""
    gender = ("female", "male")[_Draw(f"gender of {persona_id}").between(0, 1)]
    return VoiceTraits.model_validate({"gender": gender})


class _Draw:
    """Numbers from a hash: the same on every machine and Python."""

    def __init__(self, material: str):
        self._rest = int.from_bytes(hashlib.sha256(material.encode()).digest(), "big")

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        self._rest, offset = divmod(self._rest, high - low + 1)
        return low + offset


def _digest(material: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical_json(material).encode()).hexdigest()


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("voices")
