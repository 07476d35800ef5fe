"""Clips that teach to hear: what the user says, written down a moment later.

Behind one fixed prompt, which no dialogue has, the text row repeats the user's words, each when it
has ended; the agent is silent, and the text row alone carries loss. In a dialogue a question's
words show in the answer alone; here each is a target of its own. Half of the clips are of words
in an order that says nothing, so that none can be guessed from those before it. What the base
hears in the end, by voices of training and by others, stands in BASE.md.

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
from training.pocket.base_labels import no_labels
from training.pocket.base_phones import Phones
from training.pocket.base_pointer import pieces_by_word
from training.pocket.base_units import WORDS_ACT
from training.pocket.base_voices import users
from training.pocket.roles import Side

PROMPT = "Write down what you hear."
LAG = 1  # frames behind a word's last
OF_WORDS = 0.5  # of the clips are of words without a sentence
UTTERANCES = (2, 5)
LEAD, GAP, TAIL = (2, 6), (3, 10), 8


class Hearing:
    """Draws such clips from a bank's user utterances, by the voices of either side."""

    def __init__(self, bank: Bank, tokenizer: Any, phones: Phones):
        self.bank, self.tokenizer, self.phones = bank, tokenizer, phones
        tokens = prompt_tokens(tokenizer, PROMPT)
        self.head = build_prompt(tokens, bank.tokens).training_codes()
        self._places: dict[tuple[str, bool], list[int]] = {}
        for place, unit in enumerate(bank.units):
            key = (unit.speaker.id, unit.act == WORDS_ACT)
            self._places.setdefault(key, []).append(place)

    def clip(self, rng: random.Random, name: str, side: Side = "train") -> TrainingClip:
        """int16 [17, T] of one speaker in one room."""
        speaker = rng.choice(users(side))
        places = self._places[speaker.id, rng.random() < OF_WORDS]
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
        labels = no_labels(whole.shape[1])
        spans = [(start, place, self.bank.codes[place].shape[1]) for start, place in heard]
        self.phones.label(labels[frames:], spans, [])
        silent = np.zeros(whole.shape[1], dtype=bool)
        return TrainingClip(Clip(name, whole, frames, frames), silent, labels)

    def _written(self, heard: list[tuple[int, int]], num_frames: int) -> np.ndarray:
        """The text row [T]: each word's pieces from the frame behind its end on."""
        row = np.full(num_frames, TEXT_PAD)
        free = 0
        for start, place in heard:
            ends = self.phones.sounds[place].word_ends
            for word, end in zip(self._pieces(place, len(ends)), ends, strict=True):
                free = max(free, start + end + LAG)
                for piece in word[: max(0, num_frames - free)]:
                    row[free] = piece
                    free += 1
        return row

    def _pieces(self, place: int, num_words: int) -> list[list[int]]:
        """The pieces of an utterance by its words, as the whole text is cut."""
        pieces = list(self.tokenizer.encode(self.bank.units[place].text))
        words = [pieces[word] for word in pieces_by_word(self.tokenizer, pieces)]
        # A word of the script may be two of the text ("o'clock", "7"): what is over joins the last.
        while len(words) > num_words:
            last = words.pop()
            words[-1] += last
        return words + [[] for _ in range(num_words - len(words))]
