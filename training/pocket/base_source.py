"""What each update of the pocket base's training is made of: dialogues and lessons, by its number.

A batch follows from (seed, step) alone. Dialogues are drawn for `POOL_STEPS` steps at a time and
sorted by length, so that little of a batch is padding.

Cost: 2 ms a dialogue and the clip read aloud beside it 1, on one core: it feeds any CPU; for a GPU
other processes draw ahead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from duplex.config_train import LossSection, TrainSection
from training.batches import Clip
from training.pocket.base_aloud import Aloud
from training.pocket.base_clips import (
    ClipMaker,
    DialogueClip,
    Lesson,
    TrainingClip,
    joined,
    lesson,
    muffled,
    silenced,
    thinned,
)
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_hearing import Hearing
from training.pocket.base_reading import reading_clip
from training.pocket.base_units import UnitIndex, words_of
from training.pocket.roles import Grammar, Side

LOSS = LossSection(semantic_weight=10, acoustic_weight=1, text_padding_weight=0.3)
POOL_STEPS = 4
GROUPS_AHEAD = 4  # of `POOL_STEPS` steps, drawn by each process
# A reading, a hearing clip, one read aloud to so many dialogues.
READ_ONE_TO, HEARD_ONE_TO, ALOUD_ONE_TO = 8, 2, 1
READING_CLIPS = 2  # in the place of one dialogue, while there are no others


@dataclass(frozen=True)
class LoopSettings:
    """What decides a training, besides the bank, the tokenizer and the model's configuration.

    reading_steps: how many of the first updates are of reading clips alone (base_reading.py).
    word_steps: how many follow on which the text row alone carries loss, of dialogues, half as many
    hearing clips (base_hearing.py) and a quarter as many reading ones. Later there are as many
    (`HEARD_ONE_TO`) and half as many (`READ_ONE_TO`). mixed: compute in bfloat16 over float32
    weights. muon_rate: Muon's rate as a multiple of AdamW's (base_optimizer.py); 0: no Muon.
    """

    steps: int
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    longest_frames: int = 500
    reading_steps: int = 100
    word_steps: int = 800
    seed: int = 0
    mixed: bool = True
    muon_rate: float = 0.0

    def section(self) -> TrainSection:
        """As the optimizer's and the rates' functions take it."""
        return TrainSection(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            loss=LOSS,
        )


class Source:
    """Dialogues as clips: the batch of each step, and the held-out ones."""

    def __init__(self, grammar: Grammar, maker: ClipMaker, settings: LoopSettings):
        self.grammar, self.maker, self.settings = grammar, maker, settings
        self.index = UnitIndex(maker.bank.units)
        self.aloud = Aloud(grammar, self.index, maker)
        self.words = words_of(unit for unit in maker.bank.units if unit.side == "train")
        self._pool: tuple[int, list[list[DialogueClip]]] = (-1, [])

    def clip(self, name: str, side: Side) -> DialogueClip:
        """The dialogue of a name: the same one for the same seed."""
        rng = random.Random(f"{self.settings.seed}/{side}/{name}")
        dialogue = draw_dialogue(self.grammar, self.index, rng, side)
        return cropped(self.maker.clip(dialogue, rng, name), self.settings.longest_frames)

    def batches(self, step: int) -> list[Lesson]:
        """What update `step`, from 0, is made of: dialogues, and lessons, which are shorter."""
        settings = self.settings
        if step < settings.reading_steps:
            count = READING_CLIPS * settings.batch_size
            return [lesson([self.reading(f"{step}.{number}") for number in range(count)])]
        spoken = step >= settings.reading_steps + settings.word_steps
        size = settings.batch_size
        to_read, to_hear = (READ_ONE_TO, HEARD_ONE_TO) if spoken else (4, 2)
        lessons = [self.reading(f"{step}.{number}") for number in range(max(1, size // to_read))]
        noise = np.random.default_rng([settings.seed, step])
        clips = [muffled(thinned(one, noise), noise) for one in self._dialogues(step)]
        for number in range(max(1, size // to_hear)):
            lessons.append(muffled(self.heard(f"{step}.{number}"), noise))
        if not spoken:
            return [lesson([silenced(one) for one in clips]), lesson(lessons)]
        aloud = [self.read(f"{step}.{number}") for number in range(max(1, size // ALOUD_ONE_TO))]
        return [lesson(clips), lesson(lessons), lesson(aloud)]

    def _dialogues(self, step: int) -> list[DialogueClip]:
        group, place = divmod(step, POOL_STEPS)
        if self._pool[0] != group:
            self._pool = (group, self._draw_pool(group))
        return self._pool[1][place]

    @cached_property
    def hearing(self) -> Hearing:
        maker = self.maker
        assert maker.phones is not None, "lessons in hearing need labels"
        return Hearing(maker.bank, maker.tokenizer, maker.phones)

    def heard(self, name: str, side: Side = "train") -> TrainingClip:
        """A clip that teaches to hear."""
        return self.hearing.clip(
            random.Random(f"{self.settings.seed}/hearing/{side}/{name}"), name, side
        )

    def reading(self, name: str) -> TrainingClip:
        """A clip that teaches to read."""
        rng = random.Random(f"{self.settings.seed}/reading/{name}")
        maker = self.maker
        return reading_clip(
            self.grammar, maker.tokenizer, maker.bank.tokens, self.words, rng, name, maker.acts
        )

    def read(self, name: str) -> TrainingClip:
        """A clip that teaches to speak."""
        return self.aloud.clip(random.Random(f"{self.settings.seed}/aloud/{name}"), name)

    def _draw_pool(self, group: int) -> list[list[DialogueClip]]:
        size = self.settings.batch_size
        clips = [self.clip(f"{group}.{number}", "train") for number in range(POOL_STEPS * size)]
        clips.sort(key=lambda one: one.clip.num_frames)
        batches = [clips[start : start + size] for start in range(0, len(clips), size)]
        random.Random(f"{self.settings.seed}/order/{group}").shuffle(batches)
        return batches

    def held_out_lessons(self, count: int) -> dict[str, list[TrainingClip]]:
        """Lessons by name: to hear what training holds and what other voices say, and to read."""
        return {
            "hearing, utterances of training": [self.heard(f"lesson-{n}") for n in range(count)],
            "hearing, unheard voices": [self.heard(f"lesson-{n}", "held") for n in range(count)],
            "reading": [self.reading(f"lesson-{n}") for n in range(count)],
        }

    def held_out(self, count: int) -> list[DialogueClip]:
        return [self.clip(f"held-{number}", "held") for number in range(count)]


def cropped(one: DialogueClip, longest: int) -> DialogueClip:
    """The clip cut at its end, with the turns that are left."""
    clip = one.clip
    if clip.num_frames <= longest:
        return one
    spans = tuple((r, s, min(e, longest)) for r, s, e in clip.turns if s < longest)
    codes = clip.codes[:, :longest]
    short = Clip(clip.id, codes, clip.prompt_frames, clip.loss_from, spans)
    return DialogueClip(short, one.turns[: len(spans)], one.labels[:longest])


class _Groups:
    """`POOL_STEPS` steps' batches by number, as a DataLoader's processes ask for them."""

    def __init__(self, source: Source, together: bool):
        self._source, self._together = source, together

    def __getitem__(self, group: int) -> list[list[Lesson]]:
        return [self.step(group * POOL_STEPS + place) for place in range(POOL_STEPS)]

    def step(self, step: int) -> list[Lesson]:
        batches = self._source.batches(step)
        return [joined(batches)] if self._together else batches


def drawn_ahead(
    source: Source, first: int, last: int, processes: int, *, together: bool = False
) -> Iterator[list[Lesson]]:
    """The batches of steps `first` to `last` - 1, in order.

    Args:
        processes: that draw them while others are trained on; 0: drawn here, when asked for.
        together: all clips of a step in one batch.
    """
    made = _Groups(source, together)
    if processes == 0:
        for step in range(first, last):
            yield made.step(step)
        return
    from torch.utils.data import DataLoader

    groups = range(first // POOL_STEPS, -(-last // POOL_STEPS))
    loader = DataLoader(
        made,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        sampler=groups,
        num_workers=processes,
        prefetch_factor=GROUPS_AHEAD,
        multiprocessing_context="fork",  # all share the bank's memory, and run one thread
    )
    for group, batches in zip(groups, loader, strict=True):
        for step, batch in enumerate(batches, group * POOL_STEPS):
            if first <= step < last:
                yield batch
