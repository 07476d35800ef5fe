"""Dialogues -> training clips: the units' codes on the frame grid, in the tensors stage's layout.

Prompt, text row and tensor are made by the stage's own functions (`build_prompt`, `align` by
onset, `assemble`), so that LoRA data of the pipeline fits this base. Agent rows hold the codec's
steady silence where nothing is said, user rows the codes of the speaker's room.

Where the agent is cut short its text stops with its speech: tokens that were out by then stay, the
rest is never said. (The stage leaves out what is not *spoken*, also where the text had run ahead;
no model can know that in time.)

Of the frames in which the agent is silent most carry no audio loss: they are two thirds of a
dialogue and all alike, and the depth transformer takes half of a step's time.
Legend: T frames, K = 17 rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from duplex.alignment import TextTurn, align
from duplex.clips import assemble
from duplex.streams import TEXT_ROW, USER_ROWS, build_prompt, prompt_tokens
from training.batches import Batch, Clip, make_batch
from training.pocket.base_bank import Bank
from training.pocket.base_dialogue import ANSWER_GAP, Dialogue, Said
from training.pocket.base_labels import ASKED, COLUMNS, NUM_COLUMNS, TOLD, no_labels
from training.pocket.base_phones import Phones, Uttered
from training.pocket.base_pointer import point
from training.pocket.base_prompts import told_row
from training.pocket.base_units import acts_of
from training.pocket.codec_labels import IGNORED

SILENT_SHARE = 0.2  # of the agent's silent frames carry audio loss
SETTLING_FRAMES = 3  # after speech; these carry it always
ACT_FRAMES = 3  # behind a user's unit, which carry its act; as many as no answer comes within
assert ANSWER_GAP[0] >= ACT_FRAMES
MUFFLED = 0.5  # of the clips lack a part of what the user says
ROW_LOST, FRAMES_A_GAP, LONGEST_GAP = 0.3, 60, 2
NO_INPUT = -1  # as a code: nothing is added to what the model reads

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class PlacedTurn:
    """Frames [start, end) of the dialogue, end without the tail; is_cut: by the other."""

    role: str
    start: int
    end: int
    text: str
    kind: str = "turn"
    is_cut: bool = False


@dataclass(frozen=True)
class DialogueClip:
    """A clip with its turns, frames counted from the first frame after the prompt. labels: int16
    [T, 8] (`base_labels`)."""

    clip: Clip
    turns: tuple[PlacedTurn, ...]
    labels: np.ndarray


class ClipMaker:
    """Dialogues -> clips of one bank and one tokenizer (a SentencePieceProcessor)."""

    def __init__(self, bank: Bank, tokenizer: Any, phones: Phones | None = None):
        self.bank = bank
        self.tokenizer = tokenizer
        self.phones = phones
        self.acts = {act: number for number, act in enumerate(acts_of(bank.units))}
        # A turn's text is asked for twice, and hardly ever again.
        self._encoded = lru_cache(maxsize=256)(lambda text: tuple(tokenizer.encode(text)))

    def clip(self, dialogue: Dialogue, rng: random.Random, name: str) -> DialogueClip:
        """int16 [17, T]: prompt and dialogue. rng: where in the room's noise it starts, and where
        within a long answer the user cuts in."""
        placed = place(dialogue, self.bank, rng)
        num_frames = max(turn.end for turn, _ in placed) + dialogue.tail
        agent = np.repeat(np.asarray(self.bank.tokens.silence)[:, None], num_frames, axis=1)
        user = room_codes(self.bank, dialogue.user.state, num_frames, rng)
        said: dict[str, list[Uttered]] = {"user": [], "agent": []}
        for turn, pieces in placed:
            channel = agent if turn.role == "agent" else user
            for start, codes, unit in pieces:
                length = min(codes.shape[1], num_frames - start)
                channel[:, start : start + length] = codes[:, :length]
                said[turn.role].append((start, unit, length))
        text = align(self._text_turns([turn for turn, _ in placed]), num_frames)
        prompt, told = self._prompt(dialogue)
        codes = assemble(prompt, text.row, np.stack([agent, user])).astype(np.int16)
        frames = prompt.shape[1]
        turns = tuple(turn for turn, _ in placed)
        spans = tuple((t.role, frames + t.start, frames + t.end) for t in turns)
        labels = no_labels(frames + num_frames)
        labels[:frames, TOLD] = told[:, None]
        labels[frames:, ASKED] = self._asked(said["user"], num_frames)[:, None]
        if self.phones is not None:
            self.phones.label(labels[frames:], said["user"], said["agent"])
            self._point(labels, codes[TEXT_ROW], placed, frames)
        return DialogueClip(Clip(name, codes, frames, frames, spans), turns, labels)

    def _point(
        self,
        labels: np.ndarray,
        text: np.ndarray,
        placed: Sequence[tuple[PlacedTurn, Pieces]],
        frames: int,
    ) -> None:
        """Label the word that the agent says in each frame. frames: of the prompt."""
        assert self.phones is not None
        for turn, pieces in placed:
            tokens = self._encoded(turn.text)
            first, end = frames + turn.start, frames + turn.end
            stands = text[first : first + len(tokens)]
            # Text of an earlier turn may still stand there, or this one's be cut short.
            if turn.role == "agent" and np.array_equal(stands, tokens[: len(stands)]):
                said = [(frames + start, self.phones.sounds[unit]) for start, _, unit in pieces]
                point(labels, self.tokenizer, tokens, first, end, said)

    def _asked(self, heard: Sequence[Uttered], num_frames: int) -> np.ndarray:
        """int16 [num_frames]: behind each unit of the user's what it does."""
        track = np.full(num_frames, IGNORED, dtype=np.int16)
        for start, unit, _ in heard:
            end = start + self.bank.speech_frames(unit)
            act = self.acts.get(self.bank.units[unit].act)
            if act is not None:
                track[end : end + ACT_FRAMES] = act
        return track

    def _prompt(self, dialogue: Dialogue) -> tuple[np.ndarray, np.ndarray]:
        """Its codes [17, T], and what it tells, int16 [T]."""
        voice = None
        if dialogue.sample is not None:
            voice = self.bank.codes[dialogue.sample].astype(np.int64)
        tokens = prompt_tokens(self.tokenizer, dialogue.prompt.text)
        prompt = build_prompt(tokens, self.bank.tokens, voice=voice)
        return prompt.training_codes(), told_row(self.tokenizer, prompt, dialogue.prompt, self.acts)

    def _text_turns(self, turns: Sequence[PlacedTurn]) -> list[TextTurn]:
        found = []
        for turn in turns:
            if turn.role != "agent":
                continue
            tokens = self._encoded(turn.text)
            if turn.is_cut:
                tokens = tokens[: turn.end - turn.start]
            found.append(TextTurn(turn.start, turn.end, tokens))
        return sorted(found, key=lambda turn: turn.start)


def room_codes(bank: Bank, room: str, num_frames: int, rng: random.Random) -> np.ndarray:
    """What is heard where nobody speaks: int64 [8, T], from any place of the room's noise on."""
    noise = bank.rooms[room]
    start = rng.randrange(noise.shape[1])
    places = (start + np.arange(num_frames)) % noise.shape[1]
    if room == "quiet":
        return np.repeat(np.asarray(bank.tokens.silence)[:, None], num_frames, axis=1)
    return noise[:, places].astype(np.int64)


Pieces = list[tuple[int, np.ndarray, int]]  # first frame, codes [8, n], the unit's place


def place(dialogue: Dialogue, bank: Bank, rng: random.Random) -> list[tuple[PlacedTurn, Pieces]]:
    """Each turn with its frames and its units' codes, in the order of the dialogue."""
    placed: list[tuple[PlacedTurn, Pieces]] = []
    cursor = 0  # where the latest turn ends
    cut_at: int | None = None
    pauses = iter(dialogue.pauses)
    for said in dialogue.said:
        pieces, length = _pieces(said, bank, [next(pauses) for _ in said.units])
        text = " ".join(bank.units[unit].text for unit in said.units)
        if said.kind == "backchannel":
            start = placed[-1][0].start + said.gap
            if start + length >= placed[-1][0].end:
                continue  # it would be an answer
        elif cut_at is not None:
            start = cut_at
        else:
            start = cursor + said.gap
        cut_at = None
        end = start + length
        if said.cut:
            cut_at = _cut_frame(said, bank, start, length, rng)
            end = min(end, cut_at + said.yields)
            pieces = [(at, codes[:, : max(0, end - start - at)], u) for at, codes, u in pieces]
        turn = PlacedTurn(said.role, start, end, text, said.kind, said.cut)
        placed.append((turn, [(start + at, codes, unit) for at, codes, unit in pieces]))
        if said.kind == "turn":
            cursor = max(cursor, end) if cut_at is None else cut_at
    return placed


def _pieces(said: Said, bank: Bank, pauses: Sequence[int]) -> tuple[Pieces, int]:
    """Codes of a turn's units from its own start, and its length without the tail."""
    pieces: Pieces = []
    at = end = 0
    for unit, pause in zip(said.units, pauses, strict=True):
        pieces.append((at, bank.codes[unit], unit))
        end = at + bank.speech_frames(unit)
        at = end + pause
    return pieces, end


def _cut_frame(said: Said, bank: Bank, start: int, length: int, rng: random.Random) -> int:
    """Where the user cuts in: within the last unit, from its fifth frame on."""
    last = bank.speech_frames(said.units[-1])
    return start + length - last + rng.randint(4, max(4, last - 8))


@dataclass(frozen=True)
class TrainingClip:
    """A clip; in which of its frames the agent's codes carry loss, bool [T]; its labels, int16
    [T, 8]; and whether its text carries loss."""

    clip: Clip
    audible: np.ndarray
    labels: np.ndarray
    worded: bool = True


@dataclass(frozen=True)
class Lesson:
    """A batch, with its clips' labels, int16 [B, T, 8]."""

    batch: Batch
    labels: torch.Tensor

    @property
    def by_task(self) -> dict[str, torch.Tensor]:
        """Labels of each task of `base_ear`: [B, T, labels]."""
        return {name: self.labels[..., columns] for name, columns in COLUMNS.items()}

    def to(self, device: torch.device) -> Lesson:
        return Lesson(self.batch.to(device), self.labels.to(device))


def thinned(one: DialogueClip, rng: np.random.Generator) -> TrainingClip:
    """A dialogue in which most silent frames of the agent carry no audio loss."""
    audible = rng.random(one.clip.num_frames) < SILENT_SHARE
    for role, start, end in one.clip.turns:
        if role == "agent":
            audible[start : end + SETTLING_FRAMES] = True
    return TrainingClip(one.clip, audible, one.labels)


def silenced(one: TrainingClip) -> TrainingClip:
    """The same clip, of which words alone carry loss."""
    return replace(one, audible=np.zeros_like(one.audible))


def muffled(one: TrainingClip, rng: np.random.Generator) -> TrainingClip:
    """The clip as it is half of the time; else without some of the user's acoustic codebooks, and
    without any of the user's codes for a few frames. So no single code tells an utterance of
    training from all others."""
    if rng.random() >= MUFFLED:
        return one
    codes = one.clip.codes.copy()
    for row in range(USER_ROWS.start + 1, USER_ROWS.stop):
        if rng.random() < ROW_LOST:
            codes[row, one.clip.prompt_frames :] = NO_INPUT
    first = one.clip.prompt_frames
    for _ in range(one.clip.num_frames // FRAMES_A_GAP):
        start = int(rng.integers(first, max(first + 1, one.clip.num_frames)))
        codes[USER_ROWS, start : start + int(rng.integers(1, LONGEST_GAP + 1))] = NO_INPUT
    return replace(one, clip=replace(one.clip, codes=codes))


def lesson(clips: Sequence[TrainingClip]) -> Lesson:
    """Clips side by side; the agent's codes carry loss where they are audible."""
    batch = make_batch([one.clip for one in clips])
    for row, one in enumerate(clips):
        batch.loss_mask[row, 1:, : len(one.audible)] &= torch.from_numpy(one.audible)
        batch.loss_mask[row, 0] &= one.worded
    return _labelled(batch, clips)


def whole_lesson(clips: Sequence[DialogueClip | TrainingClip]) -> Lesson:
    """Clips side by side; every frame behind the prompt carries loss."""
    return _labelled(make_batch([one.clip for one in clips]), clips)


def unlabelled(batch: Batch) -> Lesson:
    """A batch of which nothing is told."""
    shape = (len(batch.codes), batch.codes.shape[2], NUM_COLUMNS)
    return Lesson(batch, torch.full(shape, IGNORED, dtype=torch.int16))


def _labelled(batch: Batch, clips: Sequence[DialogueClip | TrainingClip]) -> Lesson:
    made = unlabelled(batch)
    for row, one in enumerate(clips):
        made.labels[row, : len(one.labels)] = torch.from_numpy(one.labels)
    return made


def joined(lessons: Sequence[Lesson]) -> Lesson:
    """All clips of a step in one batch: one pass instead of several."""
    longest = max(one.batch.codes.shape[2] for one in lessons)

    def padded(rows: torch.Tensor, value: int) -> torch.Tensor:
        return functional.pad(rows, (0, longest - rows.shape[-1]), value=value)

    codes = torch.cat([padded(one.batch.codes, NO_INPUT) for one in lessons])
    mask = torch.cat([padded(one.batch.loss_mask, 0) for one in lessons])
    rows = [padded(one.labels.transpose(1, 2), IGNORED) for one in lessons]
    frames = sum(one.batch.num_frames for one in lessons)
    return Lesson(Batch(codes, mask, frames), torch.cat(rows).transpose(1, 2))
