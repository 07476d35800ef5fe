"""Units -> codes: spoken by espeak, encoded once, kept in files that a resumed run finds again.

One speaker's units are laid out on a *sheet*: a channel of some 40 s in which they follow each
other with short gaps, each from a frame boundary on, over the speaker's room. So each is encoded
with what stands before a turn in a dialogue: silence or noise, and speech before that. A unit's
codes are its own frames and `TAIL_FRAMES` after it, in which the codec settles.

Voice samples are encoded by themselves, as the tensors stage does it.

Cost: 1.4 ms a frame for the pocket codec and 10 ms an utterance for espeak, on one core.
Legend: T frames of a sheet, C = 8 codebooks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from duplex.base import canonical_json
from duplex.files import atomic_path
from duplex.frames import FRAME_SAMPLES, frames_covering_samples
from duplex.mixing import normalize_loudness
from duplex.room import room_of
from duplex.streams import CODEBOOKS, CodecTokens
from pipeline.engines.encoding import quantize
from pipeline.engines.voicesample import voice_sample
from training.pocket.base_units import SAMPLE_ACT, WORDS_ACT, Unit
from training.pocket.base_voices import ROOMS, Params, Speaker, spoken_params
from training.pocket.roles import Grammar

VERSION = 1
UNITS_A_SHEET = 24
LEAD_FRAMES = 8
GAP_FRAMES = 5
TAIL_FRAMES = 2
ROOM_FRAMES = 500  # of each room, for what lies between a user's turns
LOUDNESS_DBFS = -24.0  # of the speech stage
LONGEST_SAMPLE_S = 2.0


@dataclass(frozen=True)
class Bank:
    """codes: int16 [8, T_i] of each unit, its tail included; rooms: int16 [8, ROOM_FRAMES] by
    name; tokens: the codec's steady state."""

    units: tuple[Unit, ...]
    codes: tuple[np.ndarray, ...]
    rooms: dict[str, np.ndarray]
    tokens: CodecTokens

    @property
    def num_frames(self) -> int:
        return sum(codes.shape[1] for codes in self.codes)

    def speech_frames(self, place: int) -> int:
        """Frames of a unit without its tail."""
        tail = 0 if self.units[place].act == SAMPLE_ACT else TAIL_FRAMES
        return self.codes[place].shape[1] - tail


@dataclass(frozen=True)
class Codec:
    """A codec as the bank needs it. mimi: a `MimiModel`; digest: of its weights."""

    mimi: Any
    digest: str
    tokens: CodecTokens


Speak = Callable[[str, dict[str, Any]], np.ndarray]  # text, parameters -> float32 [S] at 24 kHz


def build_bank(
    units: Sequence[Unit],
    grammar: Grammar,
    codec: Codec,
    folder: Path,
    speak: Speak,
    revision: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bank:
    """The codes of all units; those that `folder` holds are read, the others made and kept there.

    Args:
        speak: the speech engine; `revision` names it and its version.
        progress: told (units done, units in all) after each sheet that was made.

    Raises:
        RecordError: an utterance without speech.
    """
    codes: dict[int, np.ndarray] = {}
    for places in _sheets(units):
        sheet = [units[place] for place in places]
        params = params_of(sheet[0].speaker, grammar)
        path = folder / f"{_key(sheet, params, codec, revision)}.safetensors"
        made = _read(path)
        if made is None:
            made = _encode_sheet(sheet, params, codec, speak)
            _write(path, made)
            progress(len(codes) + len(places), len(units))
        codes |= dict(zip(places, made, strict=True))
    rooms = {name: _room(name, codec, folder, revision) for name in ROOMS}
    ordered = tuple(codes[place] for place in range(len(units)))
    return Bank(tuple(units), ordered, rooms, codec.tokens)


def _sheets(units: Sequence[Unit]) -> Iterator[list[int]]:
    """Places of units, a speaker's at a time; samples and words apart from the others."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, unit in enumerate(units):
        apart = unit.act if unit.act in (SAMPLE_ACT, WORDS_ACT) else ""
        groups.setdefault((unit.speaker.id, apart), []).append(place)
    for places in groups.values():
        for start in range(0, len(places), UNITS_A_SHEET):
            yield places[start : start + UNITS_A_SHEET]


def params_of(speaker: Speaker, grammar: Grammar) -> Params:
    """What espeak is given: a user's voice, an agent's in its mood."""
    emotion = grammar.talk.moods[speaker.state].emotion if speaker.side == "agent" else "neutral"
    return spoken_params(speaker, emotion)


def _key(sheet: Sequence[Unit], params: Params, codec: Codec, revision: str) -> str:
    speaker = sheet[0].speaker
    room = ROOMS[speaker.state].model_dump(mode="json") if speaker.side == "user" else None
    layout = [UNITS_A_SHEET, LEAD_FRAMES, GAP_FRAMES, TAIL_FRAMES, LOUDNESS_DBFS, LONGEST_SAMPLE_S]
    said = [[unit.act == SAMPLE_ACT, unit.text] for unit in sheet]
    material = [VERSION, codec.digest, revision, speaker.id, params, room, layout, said]
    return hashlib.sha256(canonical_json(material).encode()).hexdigest()[:32]


def _encode_sheet(
    sheet: Sequence[Unit], params: Params, codec: Codec, speak: Speak
) -> list[np.ndarray]:
    """int16 [8, T_i] of each unit."""
    speaker = sheet[0].speaker
    spoken = [speak(unit.text, params) for unit in sheet]
    if sheet[0].act == SAMPLE_ACT:
        return [_sample_codes(samples, codec) for samples in spoken]
    levelled = [normalize_loudness(samples, LOUDNESS_DBFS) for samples in spoken]
    starts, cursor = [], LEAD_FRAMES
    for samples in levelled:
        starts.append(cursor)
        cursor += frames_covering_samples(len(samples)) + GAP_FRAMES
    channel = np.zeros(cursor * FRAME_SAMPLES, dtype=np.float32)
    if speaker.side == "user":
        channel += _noise(speaker, cursor, sheet[0].text)
    for start, samples in zip(starts, levelled, strict=True):
        channel[start * FRAME_SAMPLES :][: len(samples)] += samples
    codes = _encoded(codec, channel)
    ends = [
        start + frames_covering_samples(len(samples)) + TAIL_FRAMES
        for start, samples in zip(starts, levelled, strict=True)
    ]
    return [codes[:, start:end].copy() for start, end in zip(starts, ends, strict=True)]


def _noise(speaker: Speaker, num_frames: int, material: str) -> np.ndarray:
    """float32 [S]: the speaker's room; zeros where it is quiet."""
    seed = int.from_bytes(hashlib.sha256(f"{speaker.id}\0{material}".encode()).digest()[:6], "big")
    quiet = np.zeros(num_frames * FRAME_SAMPLES, dtype=np.float32)
    room = room_of(quiet, ROOMS[speaker.state], seed)
    return quiet if room is None else room


def _sample_codes(samples: np.ndarray, codec: Codec) -> np.ndarray:
    return _encoded(codec, voice_sample(samples, LONGEST_SAMPLE_S))


def _encoded(codec: Codec, channel: np.ndarray) -> np.ndarray:
    """int16 [8, T] of float32 [S], encoded by itself."""
    from pipeline.engines.codec import encode

    codes = encode(codec.mimi, quantize(channel)[None])[0]  # as if read from a 16-bit file
    assert codes.shape[0] == CODEBOOKS
    return codes.astype(np.int16)


def _room(name: str, codec: Codec, folder: Path, revision: str) -> np.ndarray:
    speaker = Speaker(f"room-{name}", "user", "room", name)
    path = folder / f"{_key([Unit(speaker, 'room', name)], {}, codec, revision)}.safetensors"
    made = _read(path)
    if made is None:
        # The first frames are the codec's start, which no place in a dialogue is.
        channel = _noise(speaker, ROOM_FRAMES + LEAD_FRAMES, "room")
        made = [_encoded(codec, channel)[:, LEAD_FRAMES:].copy()]
        _write(path, made)
    return made[0]


# -- files


def _write(path: Path, codes: Sequence[np.ndarray]) -> None:
    lengths = [part.shape[1] for part in codes]
    with atomic_path(path) as temporary:
        save_file(
            {"codes": np.concatenate(codes, axis=1)},
            temporary,
            metadata={"lengths": json.dumps(lengths)},
        )


def _read(path: Path) -> list[np.ndarray] | None:
    if not path.exists():
        return None
    with safe_open(path, framework="np") as file:
        codes = file.get_tensor("codes")
        lengths = json.loads(file.metadata()["lengths"])
    edges = np.cumsum(lengths)[:-1]
    return [np.ascontiguousarray(part) for part in np.split(codes, edges, axis=1)]
