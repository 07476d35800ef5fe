"""Conversations with a loaded checkpoint, many at a time: the server's own step, without sockets.

Each call has a slot of the batch for as long as it lasts; then the next one begins there. What a
slot says hangs on its own prompt, seed, sampling and audio (`pipeline.serving.slots`), and on how
sums are rounded: by the number of slots, and now and then (seen on a CPU) by which slot it is. So a
server with as many slots gives the first call bit for bit on the same machine; the others may
differ in a last bit, and a drawn token then and when. Audio goes through 16-bit PCM both ways, as
over the wire.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from duplex.config import SamplingSection
from duplex.errors import ServerError
from duplex.frames import FRAME_SAMPLES, frames_covering_samples
from pipeline.evaluation.client import Conversation, Wall
from pipeline.serving import wire
from pipeline.serving.text import TextAssembler

if TYPE_CHECKING:
    from pipeline.serving.model import ServedModel


@dataclass(frozen=True)
class Call:
    """One conversation to hold. user: float32 [S] at 24 kHz, a last partial frame padded with
    zeros; voice, greeting: names that the model was loaded with, or ""."""

    user: np.ndarray
    prompt: str
    seed: int
    voice: str = ""
    greeting: str = ""


def converse_together(
    model: ServedModel,
    calls: Sequence[Call],
    sampling: SamplingSection,
    report: Callable[[int], None] = lambda index: None,
    *,
    again: bool = False,
) -> list[Conversation]:
    """Hold all calls; their conversations in the same order.

    Args:
        report: is given the index of each call that has ended.
        again: the first call is held once more and comes last. It gets the first slot again, since
            rows of a batch may be rounded each in its own way, and other neighbours: it costs one
            conversation among many, where by itself it would cost a whole batch.

    Raises:
        RequestError: a prompt that the model does not take.
        ServerError: a call is longer than the model's context.
    """
    waiting = list(enumerate(calls))[::-1]
    talking: dict[int, _Talk] = {}
    found: dict[int, Conversation] = {}
    while waiting or talking:
        for slot in range(model.slots.num_slots):
            if waiting and slot not in talking:
                index, call = waiting.pop()
                talking[slot] = _Talk(model, slot, index, call, sampling)
        started_s = time.perf_counter()
        answers = model.step({slot: talk.next_frame for slot, talk in talking.items()})
        step_s = time.perf_counter() - started_s
        for slot, (samples, token) in answers.items():
            talk = talking[slot]
            talk.take(samples, token, step_s)
            if talk.done:
                found[talk.index] = talk.conversation()
                report(talk.index)
                del talking[slot]
                if again and talk.index == 0:
                    waiting.append((len(calls), calls[0]))  # next, for the lowest free slot
    return [found[index] for index in sorted(found)]


class _Talk:
    """A call in its slot."""

    def __init__(
        self, model: ServedModel, slot: int, index: int, call: Call, sampling: SamplingSection
    ):
        self.index, self._started_s = index, time.perf_counter()
        self._frames = _frames(call.user)
        fed = model.begin(
            call.prompt, sampling, call.seed,
            slot=slot, voice=call.voice, greeting=call.greeting,
        )  # fmt: skip
        left = model.slots.left(slot)
        if left is not None and left < len(self._frames):
            raise ServerError(
                f"a conversation must fit into the model's context behind its prompt, found "
                f"{len(self._frames)} frames and room for {left}. Lower evaluate.seconds."
            )
        self._said: dict[str, Any] = {"type": "prompt", **fed.metadata(model.model_digest)}
        self._pieces = TextAssembler(model.tokenizer)
        self._ready_s = time.perf_counter() - self._started_s
        self._agent: list[np.ndarray] = []
        self._text: list[tuple[int, str]] = []
        self._step_s: list[float] = []

    @property
    def done(self) -> bool:
        return len(self._agent) == len(self._frames)

    @property
    def next_frame(self) -> np.ndarray:
        return self._frames[len(self._agent)]

    def take(self, samples: np.ndarray, token: int | None, step_s: float) -> None:
        piece = self._pieces.append(token) if token is not None else ""
        if piece:
            self._text.append((len(self._agent), piece))
        self._agent.append(_as_sent(samples))
        self._step_s.append(step_s)

    def conversation(self) -> Conversation:
        total_s = time.perf_counter() - self._started_s
        return Conversation(
            agent=np.concatenate([np.zeros(0, np.float32), *self._agent]),
            text=tuple(self._text),
            metadata=(self._said,),
            wall=Wall(self._ready_s, total_s, tuple(self._step_s)),
        )


def _frames(user: np.ndarray) -> np.ndarray:
    """float32 [T, 1920], as they come off the wire."""
    padded = np.zeros(frames_covering_samples(len(user)) * FRAME_SAMPLES, dtype=np.float32)
    padded[: len(user)] = user
    return _as_sent(padded).reshape(-1, FRAME_SAMPLES)


def _as_sent(samples: np.ndarray) -> np.ndarray:
    return wire.pcm_samples(wire.pcm_bytes(samples))
