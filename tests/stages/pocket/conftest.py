"""A grammar's utterances as random codes, for tests of what the pocket base is trained with."""

import numpy as np
import pytest

from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.codec import measure_tokens
from pipeline.engines.script_words import script_words
from tests.stages.conftest import TINY_CARD
from training.pocket.base_bank import Bank, Codec
from training.pocket.base_phones import Phones, Sounds, labelled
from training.pocket.base_units import Amounts, inventory
from training.pocket.base_voices import ROOMS
from training.pocket.roles import load_grammar

FEW = Amounts(2, 1, 1, 1, 4, 1, 2, 1, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def grammar():
    return load_grammar()


@pytest.fixture(scope="module")
def codec(tiny_checkpoint):
    mimi = Checkpoint.open(tiny_checkpoint).load_mimi()
    return Codec(mimi, "tiny", measure_tokens(mimi))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint).load_tokenizer()


@pytest.fixture(scope="module")
def bank(grammar, codec):
    return random_bank(grammar, codec.tokens)


@pytest.fixture(scope="module")
def phones(bank):
    return random_phones(bank)


def random_phones(bank):
    """Labels of the utterances, any phones, the words as long as each other."""
    rng, sounds = np.random.default_rng(1), {}
    for place in labelled(bank.units):
        frames, words = bank.speech_frames(place), len(script_words(bank.units[place].text))
        labels = rng.integers(0, 5, (frames, 2)).astype(np.int16)
        ends = tuple(frames * (number + 1) // words - 1 for number in range(words))
        sounds[place] = Sounds(labels, ends)
    return Phones(("_", "a", "b", "c", "d"), sounds)


def random_bank(grammar, tokens):
    """A bank of random codes: what a codec would make of them is not the matter here."""
    units, rng = inventory(grammar, FEW, 0), np.random.default_rng(0)
    codes = tuple(
        rng.integers(0, TINY_CARD, (8, 3 + len(unit.text))).astype(np.int16) for unit in units
    )
    rooms = {name: rng.integers(0, TINY_CARD, (8, 60)).astype(np.int16) for name in ROOMS}
    return Bank(tuple(units), codes, rooms, tokens)
