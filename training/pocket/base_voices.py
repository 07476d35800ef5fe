"""Who speaks in the pocket base's training data, and in what room. Pure.

Four agent voices, which a voice sample in the prompt chooses between; a mood moves their pitch,
range and rate by data/speech/emotions.yaml. Users have voices of other variants, two of which are
never trained on. No user speaks with an agent's variant (pipeline/engines/espeak_voices.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duplex.base import Emotion, canonical_json
from duplex.config_data import TimelineSection
from pipeline.engines.emotions import with_emotion

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
USER_VOICES: dict[str, Params] = {
    "u0": _params("en-us", "steph", 50, 175),
    "u1": _params("en-gb", "michel", 42, 165),
    "u2": _params("en-us", "belinda", 58, 185),
    "u3": _params("en-gb", "Andy", 38, 170),
    "u4": _params("en-gb", "steph", 62, 180, 55),
    "u5": _params("en-us", "michel", 46, 175, 45),
    "u6": _params("en-gb-scotland", "belinda", 50, 170),
    "u7": _params("en-us", "Andy", 46, 180, 55),
}
HELD_USER_VOICES: dict[str, Params] = {
    "h0": _params("en-us", "anika", 50, 175),
    "h1": _params("en-gb", "edward", 42, 170),
}
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


def gender_of(voice: str) -> Gender:
    return AGENT_VOICES[voice][0]


def spoken_params(speaker: Speaker, emotion: Emotion = "neutral") -> Params:
    """What espeak is given. emotion: of the agent's mood."""
    if speaker.side == "user":
        return {**USER_VOICES, **HELD_USER_VOICES}[speaker.voice]
    own = AGENT_VOICES[speaker.voice][1]
    return dict(with_emotion("espeak", own, emotion, 1.0))


def voices_digest() -> str:
    """Canonical text of all voices and rooms, for keys."""
    rooms = {name: section.model_dump(mode="json") for name, section in ROOMS.items()}
    return canonical_json([AGENT_VOICES, USER_VOICES, HELD_USER_VOICES, rooms])
