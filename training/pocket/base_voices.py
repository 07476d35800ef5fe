"""Who speaks in the pocket base's training data, and in what room. Pure.

Four agent voices, which a voice sample in the prompt chooses between; a mood moves their pitch,
range and rate by data/speech/emotions.yaml. Users have voices of other variants, four of which are
never trained on. No user speaks with an agent's variant (pipeline/engines/espeak_voices.py).
Users of training have throats of other lengths, too (`base_espeak.py`); the held-out ones speak as
espeak does.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from duplex.base import Emotion, canonical_json
from duplex.config_data import TimelineSection
from pipeline.engines.emotions import with_emotion
from training.pocket.base_espeak import WARP
from training.pocket.speech_pool import ACCENTS, VARIANTS

Params = dict[str, str | int | float]
Gender = Literal["female", "male"]


def _params(voice: str, variant: str, pitch: int, rate_wpm: int, spread: int = 50) -> Params:
    names = {"voice": voice, "variant": variant}
    return {**names, "pitch": pitch, "range": spread, "rate_wpm": rate_wpm}


AGENT_VOICES: dict[str, tuple[Gender, Params]] = {
    "ada": ("female", _params("en-us", "f2", 55, 175)),
    "bea": ("female", _params("en-gb", "f5", 45, 168, 55)),
    "cal": ("male", _params("en-us", "m3", 45, 175)),
    "dov": ("male", _params("en-us", "m7", 35, 165, 45)),
}
# Of users: variants that the codec knows and no agent has; those held out are never trained on.
HELD_USER_VARIANTS = ("anika", "edward", "Alicia", "john")
USER_VARIANTS = tuple(
    variant
    for variant in VARIANTS
    if variant not in (*HELD_USER_VARIANTS, *(v[1]["variant"] for v in AGENT_VOICES.values()))
)


# Throats of training: so many times as fast and as high.
WARPS = (0.87, 1.15)


def _user_voices(variants: tuple[str, ...], name: str, of_each: int) -> dict[str, Params]:
    """`of_each` voices of each variant, in accents in turn; pitch, range and rate are drawn."""
    rng = random.Random(name)
    return {
        f"{name}{number}": _params(
            ACCENTS[number % len(ACCENTS)], variant, rng.randint(30, 70), rng.randint(150, 195),
            rng.randint(40, 65),
        )
        for number, variant in enumerate(variants * of_each)
    }  # fmt: skip


def _warped(voices: dict[str, Params]) -> dict[str, Params]:
    """All but the first in five with a throat of another length, which is drawn."""
    rng = random.Random("throats")
    warps = [1.0 if n % 5 == 0 else round(rng.uniform(*WARPS), 3) for n in range(len(voices))]
    return {
        name: params if warp == 1.0 else {**params, WARP: warp}
        for (name, params), warp in zip(voices.items(), warps, strict=True)
    }


USER_VOICES = _warped(_user_voices(USER_VARIANTS, "u", 5))
HELD_USER_VOICES = _user_voices(HELD_USER_VARIANTS, "h", 2)
# Under the user's channel; the agent's is digital silence outside of its turns.
ROOMS: dict[str, TimelineSection] = {
    "quiet": TimelineSection(),
    "tone": TimelineSection(room_tone_dbfs=-55),
    "place": TimelineSection(room_tone_dbfs=-58, noise_dbfs=-44),
}


@dataclass(frozen=True)
class Speaker:
    """A voice as it is spoken with: an agent's in a mood, a user's in a room."""

    id: str
    side: Literal["agent", "user"]
    voice: str
    state: str

    @property
    def is_held_out(self) -> bool:
        return self.voice in HELD_USER_VOICES


def agent_speaker(voice: str, mood: str) -> Speaker:
    return Speaker(f"{voice}-{mood}", "agent", voice, mood)


def user_speaker(voice: str, room: str) -> Speaker:
    return Speaker(f"{voice}-{room}", "user", voice, room)


def users(side: Literal["train", "held"]) -> list[Speaker]:
    """Each voice of a side in one room: they take turns."""
    voices = USER_VOICES if side == "train" else HELD_USER_VOICES
    rooms = list(ROOMS)
    return [user_speaker(v, rooms[n % len(rooms)]) for n, v in enumerate(voices)]


def gender_of(voice: str) -> Gender:
    return AGENT_VOICES[voice][0]


def spoken_params(speaker: Speaker, emotion: Emotion = "neutral") -> Params:
    """What espeak is given. emotion: of the agent's mood."""
    if speaker.side == "user":
        return {**USER_VOICES, **HELD_USER_VOICES}[speaker.voice]
    own = AGENT_VOICES[speaker.voice][1]
    return dict(with_emotion("espeak", own, emotion, 1.0))


def voices_digest() -> str:
    """sha256 of all voices and rooms."""
    rooms = {name: section.model_dump(mode="json") for name, section in ROOMS.items()}
    content = [AGENT_VOICES, USER_VOICES, HELD_USER_VOICES, rooms]
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
