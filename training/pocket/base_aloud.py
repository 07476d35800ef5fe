"""Clips that teach to speak: the agent reads aloud what its text row holds, whatever it is.

Dialogues hold some thousand different sentences; these are words of the grammar's values and of a
dictionary in any order, prices, names and telephone numbers, so that the sound of a piece is learnt
apart from the sentence that it stands in. Each follows a sentence of dialogues in one turn: its
words are spelt in so many pieces that they are said as fast as they are written, and without that
lead 58 % of their frames come before their text. The lead's sound carries loss like any other. What
is said cannot be guessed from its fixed prompt, so the text carries no loss.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from training.pocket.base_clips import ClipMaker, TrainingClip, thinned
from training.pocket.base_dialogue import PAUSE, SAMPLED, Dialogue, Said
from training.pocket.base_prompts import Character, Prompted
from training.pocket.base_units import ALOUD_ACT, NEUTRAL, SAMPLE_ACT, UnitIndex
from training.pocket.base_voices import AGENT_VOICES, agent_speaker, users
from training.pocket.roles import Grammar

PROMPT = Prompted("Read aloud.")
UTTERANCES, GAP, TAIL = (1, 3), (3, 10), 6
LEADS = ("reply", "refusal", "feeling", "small/", "reaction/", "extra/")


class Aloud:
    """Draws such clips from what a bank's agents read aloud."""

    def __init__(self, grammar: Grammar, index: UnitIndex, maker: ClipMaker):
        self.index, self.maker = index, maker
        moods = grammar.talk.moods
        self._speakers = [agent_speaker(voice, mood) for voice in AGENT_VOICES for mood in moods]
        self._leads: dict[str, list[int]] = {}
        for place, unit in enumerate(index.units):
            if unit.speaker.side == "agent" and unit.act.startswith(LEADS):
                self._leads.setdefault(unit.speaker.id, []).append(place)
        # As often as in dialogues.
        self._weights = [moods[speaker.state].weight for speaker in self._speakers]

    def clip(self, rng: random.Random, name: str) -> TrainingClip:
        """One agent, in half of the clips behind a sample of its voice; the user is silent."""
        speaker = rng.choices(self._speakers, self._weights)[0]
        units = self.index.find(speaker, ALOUD_ACT)
        leads = self._leads[speaker.id]
        samples = self.index.find(agent_speaker(speaker.voice, NEUTRAL), SAMPLE_ACT)
        count = rng.randint(*UTTERANCES)
        user = rng.choice(users("train"))
        sample = rng.choice(samples) if samples and rng.random() < SAMPLED else None
        said = tuple(
            Said("agent", (rng.choice(leads), rng.choice(units)), rng.randint(*GAP))
            for _ in range(count)
        )
        dialogue = Dialogue(
            Character("", "", "", speaker.state),
            PROMPT,
            speaker,
            user,
            sample,
            said,
            tuple(rng.randint(*PAUSE) for one in said for _ in one.units),
            TAIL,
        )
        spoken = self.maker.clip(dialogue, rng, name)
        noise = np.random.default_rng(rng.getrandbits(32))
        one = thinned(spoken, noise)
        return replace(one, worded=False)
