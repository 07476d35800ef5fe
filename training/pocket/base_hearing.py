"""Clips that teach to hear: what the user says, written down a moment later.

Behind one fixed prompt, which no dialogue has, the text row repeats the user's words while they
are spoken, `LAG` frames behind; the agent is silent, and the text row alone carries loss. In a
dialogue a question's words show in the answer alone; here each is a target of its own. What the
base hears in the end, by voices of training and by others, stands in BASE.md.

Shapes: T frames.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from duplex.streams import AGENT_ROWS, TEXT_PAD, TEXT_ROW, USER_ROWS, build_prompt, prompt_tokens
from training.batches import Clip
from training.pocket.base_bank import Bank
from training.pocket.base_clips import TrainingClip, room_codes
from training.pocket.base_voices import users
from training.pocket.roles import Side

PROMPT = "Write down what you hear."
LAG = 4
UTTERANCES = (2, 5)
LEAD, GAP, TAIL = (2, 6), (3, 10), 8


class Hearing:
    """Draws such clips from a bank's user utterances, by the voices of either side."""

    def __init__(self, bank: Bank, tokenizer: Any):
        self.bank, self.tokenizer = bank, tokenizer
        tokens = prompt_tokens(tokenizer, PROMPT)
        self.head = build_prompt(tokens, bank.tokens).training_codes()
        self._places: dict[str, list[int]] = {}
        for place, unit in enumerate(bank.units):
            self._places.setdefault(unit.speaker.id, []).append(place)

    def clip(self, rng: random.Random, name: str, side: Side = "train") -> TrainingClip:
        """int16 [17, T] of one speaker in one room."""
        speaker = rng.choice(users(side))
        places = self._places[speaker.id]
        heard: list[tuple[int, int]] = []
        at = rng.randint(*LEAD)
        for _ in range(rng.randint(*UTTERANCES)):
            place = rng.choice(places)
            heard.append((at, place))
            at += self.bank.codes[place].shape[1] + rng.randint(*GAP)
        num_frames = at + TAIL
        codes = np.empty((17, num_frames), dtype=np.int64)
        codes[TEXT_ROW] = self._written(heard, num_frames)
        codes[AGENT_ROWS] = np.asarray(self.bank.tokens.silence)[:, None]
        codes[USER_ROWS] = room_codes(self.bank, speaker.state, num_frames, rng)
        for start, place in heard:
            part = self.bank.codes[place]
            codes[USER_ROWS, start : start + part.shape[1]] = part
        frames = self.head.shape[1]
        whole = np.concatenate([self.head, codes], axis=1).astype(np.int16)
        return TrainingClip(Clip(name, whole, frames, frames), np.zeros(whole.shape[1], dtype=bool))

    def _written(self, heard: list[tuple[int, int]], num_frames: int) -> np.ndarray:
        """The text row [T]: each utterance's pieces spread evenly over its frames, and later."""
        row = np.full(num_frames, TEXT_PAD)
        free = 0
        for start, place in heard:
            pieces = self.tokenizer.encode(self.bank.units[place].text)
            length = self.bank.speech_frames(place)
            for number, piece in enumerate(pieces):
                free = max(free, start + LAG + number * length // len(pieces))
                if free >= num_frames:
                    break
                row[free] = piece
                free += 1
        return row
