"""When each word and phone of an utterance sounds: labels for lessons in hearing and speaking.

espeak tells both while it speaks. Codes don't hold them, so the utterances are spoken once more
(10 ms each), without being encoded, and the labels kept in a file beside the codes. A voice's
sample, which stands in the prompt alone, has none.

Shapes: T_i frames of an utterance, two halves each (`codec_labels`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from duplex.base import canonical_json
from duplex.files import atomic_path
from duplex.frames import FRAME_SAMPLES, frame_at, frames_covering_samples
from training.pocket.base_bank import params_of
from training.pocket.base_espeak import Espeak
from training.pocket.base_labels import HEARD, SPOKEN
from training.pocket.base_parallel import shared_out
from training.pocket.base_units import SAMPLE_ACT, Unit
from training.pocket.base_voices import Params
from training.pocket.codec_labels import (
    HALVES,
    IGNORED,
    PhoneSet,
    frame_labels,
    phones_on_grid,
)
from training.pocket.roles import Grammar

VERSION = 1

Uttered = tuple[int, int, int]  # first frame, place of the unit, frames of it that are said


@dataclass(frozen=True)
class Sounds:
    """Of one utterance. phones: int16 [T_i, 2], `IGNORED` where a phone is too rare for a class;
    word_ends: by word of the text, the frame in which it ends."""

    phones: np.ndarray
    word_ends: tuple[int, ...]


@dataclass(frozen=True)
class Phones:
    """names: classes, silence first; sounds: by place of the unit."""

    names: tuple[str, ...]
    sounds: dict[int, Sounds]

    def track(self, said: Sequence[Uttered], num_frames: int, between: int) -> np.ndarray:
        """int16 [num_frames, 2] of a channel.

        Args:
            said: its utterances, in order.
            between: the label where nobody speaks.
        """
        row = np.full((num_frames, HALVES), between, dtype=np.int16)
        for start, place, length in said:
            phones = self.sounds[place].phones[: max(0, min(length, num_frames - start))]
            row[start : start + len(phones)] = phones
        return row

    def label(self, labels: np.ndarray, user: Sequence[Uttered], agent: Sequence[Uttered]) -> None:
        """Fill the columns `HEARD` and `SPOKEN` of a dialogue's frames, int16 [T, 8]: in the user's
        channel silence is heard, too, in the agent's its turns are labelled."""
        labels[:, HEARD] = self.track(user, len(labels), 0)
        labels[:, SPOKEN] = self.track(agent, len(labels), IGNORED)


Heard = tuple[np.ndarray, list[int]]  # names of phones [S // 240], by word the frame of its end


def find_phones(
    units: Sequence[Unit],
    grammar: Grammar,
    folder: Path,
    revision: str,
    report: Callable[[str], None],
    processes: int = 1,
) -> Phones:
    """Labels of all units; read where `folder` has them.

    Args:
        revision: of espeak.
    """
    places = labelled(units)
    said = [(units[place].text, params_of(units[place].speaker, grammar)) for place in places]
    key = hashlib.sha256(canonical_json([VERSION, revision, said]).encode()).hexdigest()[:32]
    path = folder / f"phones-{key}.safetensors"
    if not path.exists():
        report(f"listening for the phones of {len(places)} utterances …")
        _write(path, shared_out(_listen, said, processes))
    return _read(path, places)


def labelled(units: Sequence[Unit]) -> list[int]:
    """Places of the units that have labels, in their order."""
    return [place for place, unit in enumerate(units) if unit.act != SAMPLE_ACT]


def _listen(said: Sequence[tuple[str, Params]]) -> list[Heard]:
    """What espeak tells of each text."""
    found = []
    with Espeak() as espeak:
        for text, params in said:
            num_samples, phones, ends_s = espeak.sounds(text, params)
            frames = frames_covering_samples(num_samples)
            grid = phones_on_grid(phones, frames * FRAME_SAMPLES)
            found.append((grid, [frame_at(end_s) for end_s in ends_s]))
    return found


def _write(path: Path, heard: Sequence[Heard]) -> None:
    grids, ends = zip(*heard, strict=True)
    classes = PhoneSet.of(grids)
    labels = [frame_labels(classes.indices(grid)) for grid in grids]
    metadata = {
        "names": json.dumps(classes.names),
        "lengths": json.dumps([len(one) for one in labels]),
        "word_ends": json.dumps(ends),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file({"phones": np.concatenate(labels).astype(np.int16)}, temporary, metadata=metadata)


def _read(path: Path, places: Sequence[int]) -> Phones:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        labels = file.get_tensor("phones")
    edges = np.cumsum(json.loads(metadata["lengths"]))[:-1]
    parts = np.split(labels, edges)
    ends = json.loads(metadata["word_ends"])
    sounds = {
        place: Sounds(part, tuple(own))
        for place, part, own in zip(places, parts, ends, strict=True)
    }
    return Phones(tuple(json.loads(metadata["names"])), sounds)
