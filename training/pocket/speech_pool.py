"""Speech for the codec, made here: espeak's voices, one after the other on a tape.

Every utterance draws its own variant, accent, pitch, range and rate, so two hours hold a few
thousand voices. `HELD_OUT_VARIANTS` are never drawn for training; nor are the pocket model's
variants that only sing or croak.

Cost: an hour of speech in 9 s of one core, 173 MB as int16. The same seed gives the same bytes,
so nothing is cached.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from duplex.frames import SAMPLE_RATE
from pipeline.engines.espeak import EspeakEngine, Utterance
from training.pocket.codec_labels import STEP_SAMPLES, PhoneSet, phones_on_grid
from training.pocket.sentences import Vocabulary, load_vocabulary, sentence

ACCENTS = (
    "en-us", "gmw/en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)  # fmt: skip
VARIANTS = (
    "", "f1", "f2", "f3", "f5", "Annie", "aunty", "grandma", "steph", "belinda", "anika",
    "Andrea", "Alicia", "m1", "m3", "m4", "m6", "m7", "m8", "Alex", "max", "robert", "grandpa",
    "michel", "Andy", "edward", "adam", "ian", "john", "boris", "caleb", "david", "Denis", "Gene",
    "Hugo", "Lee", "Marco", "Michael", "quincy", "rob", "shelby", "norbert", "pablo", "miguel",
)  # fmt: skip
HELD_OUT_VARIANTS = ("f4", "linda", "Jacky", "m2", "m5", "Mike", "victor", "zac")
RMS = 10 ** (-24 / 20)  # of an utterance: the loudness of the project's timelines
PEAK = 0.95
GAPS_S = (0.0, 0.1, 0.3, 0.8)  # after an utterance, one drawn


@dataclass(frozen=True)
class Spoken:
    """An utterance. samples: float32 [S] at 24 kHz; phones: names [S // 240]."""

    text: str
    params: dict[str, str | int | float]
    samples: np.ndarray = field(repr=False)
    phones: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Tape:
    """samples: int16 [S], 24 kHz; labels: int16 [S // 240], classes of `phones`."""

    samples: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    phones: PhoneSet


def draw_voice(rng: random.Random, variants: tuple[str, ...]) -> dict[str, str | int | float]:
    return {
        "voice": rng.choice(ACCENTS),
        "variant": rng.choice(variants),
        "pitch": rng.randint(25, 75),
        "range": rng.randint(30, 75),
        "rate_wpm": rng.randint(140, 210),
    }


def speak(
    seed: int,
    variants: tuple[str, ...] = VARIANTS,
    *,
    held_out: bool = False,
    everyday: bool = False,
) -> Iterator[Spoken]:
    """Utterances without end, each in a voice of its own.

    Args:
        held_out: of texts that are held out, or of the others.
        everyday: as `sentences.sentence`.
    """
    rng = random.Random(f"{seed} {held_out} {variants}")
    vocabulary: Vocabulary = load_vocabulary(held_out)
    with EspeakEngine() as engine:
        while True:
            text = sentence(vocabulary, rng, everyday=everyday)
            params = draw_voice(rng, variants)
            utterance, phones = engine.synthesize_with_phones(text, params)
            samples = _levelled(utterance)
            yield Spoken(text, params, samples, phones_on_grid(phones, len(samples)))


def _levelled(utterance: Utterance) -> np.ndarray:
    samples = utterance.samples
    rms = float(np.sqrt(np.mean(np.square(samples))))
    return samples * min(RMS / rms, PEAK / float(np.abs(samples).max()))


def record_tape(
    seed: int, minutes: float, phones: PhoneSet | None = None, *, held_out: bool = False
) -> Tape:
    """`minutes` of utterances with pauses between them.

    Args:
        phones: the classes; taken from the tape itself if not given.
        held_out: whether its texts are the held-out ones.
    """
    rng = random.Random(f"gaps {seed}")
    wanted, reached = round(minutes * 60 * SAMPLE_RATE), 0
    samples, steps = [], []
    for spoken in speak(seed, held_out=held_out):
        gap = round(rng.choice(GAPS_S) * SAMPLE_RATE)
        length = -(-(len(spoken.samples) + gap) // STEP_SAMPLES) * STEP_SAMPLES
        padded = np.zeros(length, dtype=np.float32)
        padded[: len(spoken.samples)] = spoken.samples
        names = np.full(length // STEP_SAMPLES, "_", dtype=spoken.phones.dtype)
        names[: len(spoken.phones)] = spoken.phones
        samples.append(np.round(padded * 32767).astype(np.int16))
        steps.append(names)
        reached += length
        if reached >= wanted:
            break
    phones = phones or PhoneSet.of(steps)
    labels = phones.indices(np.concatenate(steps))
    return Tape(np.concatenate(samples), labels, phones)
