"""Who talks in which slot, and one step of the model for all whose frame is there.

    reader  --frame-->  inbox of the seat  --step-->  outbox of the seat  -->  sender

A step takes one frame of every seat that has one, and starts as soon as the one before is done. So
a lone conversation is answered at once, many share their steps, and a frame waits for the step that
is under way and its own; where a prompt is being fed, for a block of it too, which the same thread
does in between. Seats whose outbox is not read are left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline.serving.counts import Counts

if TYPE_CHECKING:
    from duplex.config import SamplingSection
    from pipeline.serving.hearing import Recognition
    from pipeline.serving.model import FedPrompt, PlannedPrompt, ServedModel
    from pipeline.serving.prefill import FilledPrompt

INBOX_FRAMES = 64
UNSENT_FRAMES = 8
Answer = tuple[np.ndarray, "int | None"]
ResultT = TypeVar("ResultT")


class FullError(Exception):
    """Every slot is taken."""


class Seat:
    """A slot, while a conversation has it.

    inbox: float32 [1920] of the user's. outbox: answers in the same order; an exception where the
    model failed; and what the conversation puts there: metadata as bytes, None at its end.
    room: frames that the conversation may last, None without a limit.
    """

    def __init__(self, slot: int):
        self.slot = slot
        self.inbox: asyncio.Queue[np.ndarray] = asyncio.Queue(INBOX_FRAMES)
        self.outbox: asyncio.Queue[Answer | Exception | bytes | None] = asyncio.Queue()
        self.room: int | None = None
        self.stepped = 0

    @property
    def is_due(self) -> bool:
        has_room = self.room is None or self.stepped < self.room
        return has_room and not self.inbox.empty() and self.outbox.qsize() < UNSENT_FRAMES


class Desk:
    """The slots of a model, for the event loop. `model` is None until it is loaded."""

    def __init__(self, worker: ThreadPoolExecutor, counts: Counts | None = None):
        self.model: ServedModel | None = None
        self.recognition: Recognition | None = None
        self.counts = counts or Counts()
        self._worker = worker
        self._seats: dict[int, Seat] = {}
        self._stepping: asyncio.Task[None] | None = None

    @property
    def num_slots(self) -> int:
        return 0 if self.model is None else self.model.slots.num_slots

    @property
    def num_taken(self) -> int:
        return len(self._seats)

    def take(self) -> Seat:
        """A seat at a free slot, to be given back by `free`.

        Raises:
            FullError: there is none.
        """
        for slot in range(self.num_slots):
            if slot not in self._seats:
                self._seats[slot] = seat = Seat(slot)
                self.counts.slots_taken.set(len(self._seats))
                return seat
        raise FullError

    def free(self, seat: Seat) -> None:
        """The next conversation of the slot starts afresh, whatever state this one left."""
        del self._seats[seat.slot]
        self.counts.slots_taken.set(len(self._seats))

    async def run(self, function: Callable[..., ResultT], *args: Any) -> ResultT:
        """Call `function` in the one thread that touches the model."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def begin(
        self,
        seat: Seat,
        planned: PlannedPrompt,
        sampling: SamplingSection,
        seed: int,
        has_gone: Callable[[], bool],
    ) -> FedPrompt | None:
        """Feed a prompt and start a conversation; None if `has_gone` before the prompt was fed."""
        model = self.model
        assert model is not None
        filled = model.filled(planned)
        from_cache = filled is not None
        if filled is None:
            prefill = await self.run(model.prefill, planned)
            while filled is None:
                if has_gone():
                    return None
                filled = await self.run(prefill.advance)
            model.cache.put(planned.key, filled)
            self.counts.prefill_s.observe(filled.prefill_s)
        self.counts.prompts.labels("kept" if from_cache else "fed").inc()
        return await self.run(self._open, seat.slot, filled, sampling, seed, from_cache)

    def _open(
        self,
        slot: int,
        filled: FilledPrompt,
        sampling: SamplingSection,
        seed: int,
        from_cache: bool,
    ) -> FedPrompt:
        assert self.model is not None
        return self.model.open(slot, filled, sampling, seed, from_cache=from_cache)

    async def hear(self, seat: Seat, frame: np.ndarray) -> None:
        """Put the user's next frame, float32 [1920], into the inbox, once there is room."""
        await seat.inbox.put(frame)
        self.wake()

    async def answer(self, seat: Seat) -> Answer | Exception | bytes | None:
        """What comes next out of the outbox."""
        found = await seat.outbox.get()
        self.wake()
        return found

    def wake(self) -> None:
        """Step, if a seat is due and no step is under way."""
        if self._stepping is None and any(seat.is_due for seat in self._seats.values()):
            self._stepping = asyncio.create_task(self._step())

    async def _step(self) -> None:
        assert self.model is not None
        try:
            while due := [seat for seat in self._seats.values() if seat.is_due]:
                heard = {seat.slot: seat.inbox.get_nowait() for seat in due}
                started_s = time.perf_counter()
                try:
                    answers = await self.run(self.model.step, heard)
                except Exception as error:  # noqa: BLE001 - each conversation ends by it
                    for seat in due:
                        seat.outbox.put_nowait(error)
                    await asyncio.sleep(0)
                    continue
                self.counts.step_s.observe(time.perf_counter() - started_s)
                self.counts.frames.inc(len(heard))
                for seat in due:
                    seat.stepped += 1
                    seat.outbox.put_nowait(answers[seat.slot])
        finally:
            self._stepping = None
