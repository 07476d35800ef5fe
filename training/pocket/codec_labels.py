"""What sounds in each half of a frame, from the synthesiser's own phoneme events. Pure.

F frames of 80 ms, two halves each. A half's label is the phone that sounds at its middle: at 175
words a minute a phone lasts 80 ms, so a frame holds one or two. espeak marks stress and context
(`'oU`, `I2`, `a#`); these marks are cut off, and what is left (about 50 sounds for all accents
of English) are the classes. Silence is the class "_".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from pipeline.engines.espeak import Phone

STEP_SAMPLES = 240  # 10 ms: the grid on which phones are kept
FRAME_STEPS = FRAME_SAMPLES // STEP_SAMPLES
HALVES = 2
SILENCE = "_"
IGNORED = -100  # a phone too rare to have a class: torch's own `ignore_index`
MIN_SHARE = 0.001  # of all steps, for a phone to get a class


def phone_class(name: str) -> str:
    """`'oU` -> `oU`, `I2` -> `I`, `_:` and `_|` -> `_`; what only marks a joint is "" ."""
    if name.startswith(SILENCE):
        return SILENCE
    return name.strip("',%=").rstrip("0123456789#[]-^;|?") or ("0" if "0" in name else "")


@dataclass(frozen=True)
class PhoneSet:
    """The classes, silence first. `index` of a name that has none is `IGNORED`."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, steps: Iterable[np.ndarray]) -> PhoneSet:
        """The phones that fill at least `MIN_SHARE` of the steps (arrays of names)."""
        names, counts = np.unique(np.concatenate(list(steps)), return_counts=True)
        frequent = names[counts >= MIN_SHARE * counts.sum()]
        return cls((SILENCE, *(str(name) for name in frequent if name not in (SILENCE, ""))))

    def indices(self, steps: np.ndarray) -> np.ndarray:
        """int16 [N] of an array of N names."""
        found = {name: index for index, name in enumerate(self.names)}
        names, places = np.unique(steps, return_inverse=True)
        table = np.array([found.get(str(name), IGNORED) for name in names], dtype=np.int16)
        return table[places]


def phones_on_grid(phones: Sequence[Phone], num_samples: int) -> np.ndarray:
    """The phone that sounds in the middle of each 10 ms step, as names [num_samples // 240].

    A mark that is no sound belongs to the phone before it.
    """
    starts_s, names = [0.0], [SILENCE]
    for phone in phones:
        if name := phone_class(phone.name):
            starts_s.append(phone.start_s)
            names.append(name)
    middles_s = (np.arange(num_samples // STEP_SAMPLES) + 0.5) * STEP_SAMPLES / SAMPLE_RATE
    places = np.searchsorted(np.array(starts_s), middles_s, side="right") - 1
    return np.array(names)[places]


def frame_labels(steps: np.ndarray) -> np.ndarray:
    """Labels [..., F, 2] of the halves of frames, from [..., F * 8] steps of 10 ms.

    The middle of a half frame of four steps lies between its second and third: the third counts.
    """
    frames = steps.reshape(*steps.shape[:-1], -1, HALVES, FRAME_STEPS // HALVES)
    return frames[..., FRAME_STEPS // HALVES // 2]
