"""Who talks in which slot, and one step of the model for all whose frame is there.

    conversations (event loop)  --frame-->  waiting, by slot  --step-->  worker thread: the model

A step starts as soon as the one before is done, with every frame that came in meanwhile. So a
lone conversation is answered at once, many share their steps, and nobody waits for more than two
of them. Prompts are filled in blocks by the same thread, in between.
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
    from pipeline.serving.model import FedPrompt, ServedModel
    from pipeline.serving.prefill import FilledPrompt
    from pipeline.serving.wire import ChatRequest

Answer = tuple[np.ndarray, "int | None"]
ResultT = TypeVar("ResultT")


class FullError(Exception):
    """Every slot is taken."""


class Desk:
    """The slots of a model, for the event loop. `model` is None until it is loaded."""

    def __init__(self, worker: ThreadPoolExecutor, counts: Counts | None = None):
        self.model: ServedModel | None = None
        self.counts = counts or Counts()
        self._worker = worker
        self._taken: set[int] = set()
        self._waiting: dict[int, tuple[np.ndarray, asyncio.Future[Answer]]] = {}
        self._stepping: asyncio.Task[None] | None = None

    @property
    def num_slots(self) -> int:
        return 0 if self.model is None else self.model.slots.num_slots

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    def take(self) -> int:
        """A free slot, to be given back by `free`.

        Raises:
            FullError: there is none.
        """
        for slot in range(self.num_slots):
            if slot not in self._taken:
                self._taken.add(slot)
                self.counts.slots_taken.set(len(self._taken))
                return slot
        raise FullError

    def free(self, slot: int) -> None:
        """The next conversation of the slot starts afresh, whatever state this one left."""
        self._taken.discard(slot)
        self.counts.slots_taken.set(len(self._taken))
        waiting = self._waiting.pop(slot, None)
        if waiting is not None:
            waiting[1].cancel()

    async def run(self, function: Callable[..., ResultT], *args: Any) -> ResultT:
        """Call `function` in the one thread that touches the model."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def begin(
        self, slot: int, wanted: ChatRequest, seed: int, has_gone: Callable[[], bool]
    ) -> FedPrompt | None:
        """Feed a prompt and start a conversation; None if `has_gone` before the prompt was fed.

        Raises:
            RequestError: as `ServedModel.plan`.
        """
        model = self.model
        assert model is not None
        planned = model.plan(wanted.text_prompt, wanted.voice_prompt, wanted.greeting)
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
        return await self.run(self._open, slot, filled, wanted, seed, from_cache)

    def _open(
        self, slot: int, filled: FilledPrompt, wanted: ChatRequest, seed: int, from_cache: bool
    ) -> FedPrompt:
        assert self.model is not None
        return self.model.open(slot, filled, wanted.sampling, seed, from_cache=from_cache)

    async def step(self, slot: int, frame: np.ndarray) -> Answer:
        """What the agent says while its user says `frame`, float32 [1920]."""
        assert slot not in self._waiting, "a conversation has one frame under way"
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[slot] = frame, future
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._step_all())
        return await future

    async def _step_all(self) -> None:
        assert self.model is not None
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, {}
                heard = {slot: frame for slot, (frame, _) in waiting.items()}
                started_s = time.perf_counter()
                try:
                    answers = await self.run(self.model.step, heard)
                except Exception as error:  # noqa: BLE001 - each conversation ends by it
                    for _, future in waiting.values():
                        if not future.done():
                            future.set_exception(error)
                    continue
                self.counts.step_s.observe(time.perf_counter() - started_s)
                self.counts.frames.inc(len(heard))
                for slot, (_, future) in waiting.items():
                    if not future.done():
                        future.set_result(answers[slot])
                await asyncio.sleep(0)  # who has its next frame already joins the next step
        finally:
            self._stepping = None
