"""What the user said, in words, and whether the model only said it again: for the page.

    user's frames --> Turns --> a recogniser in a thread of its own --> `heard`, `echo` (04)

A turn of the user's begins with speech and ends with `PAUSE_FRAMES` without. The reply is what the
model says from there until the user's next turn, or for `REPLY_FRAMES`. Best effort: a turn that
comes while `WAITING_TURNS` are being recognised is left out. Nothing is kept or logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from duplex.frames import FRAME_S, SAMPLE_RATE
from duplex.metrics import is_echo

PAUSE_FRAMES = 7
SHORTEST_FRAMES = 3
LONGEST_FRAMES = 375  # half a minute: a turn is cut there
REPLY_FRAMES = 75
LEAD_FRAMES = 2  # kept from before the turn
QUIETEST = 0.006  # RMS below which nothing is speech
OVER_NOISE = 3.0  # times the room's level
NOISE_FRAMES = 60
WAITING_TURNS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserTurn:
    """samples: float32 [S] at 24 kHz; frames [start, end) of the conversation."""

    samples: np.ndarray
    start: int
    end: int


class Turns:
    """Cuts the user's frames into turns, by their loudness over the room's."""

    def __init__(self) -> None:
        self._levels: deque[float] = deque(maxlen=NOISE_FRAMES)
        self._before: deque[np.ndarray] = deque(maxlen=LEAD_FRAMES)
        self._frames: list[np.ndarray] = []
        self._spoken = self._quiet = 0
        self._place = 0

    @property
    def is_speaking(self) -> bool:
        return self._spoken > 0

    def add(self, frame: np.ndarray) -> UserTurn | None:
        """The next frame, float32 [1920]; a turn, if it ended with it."""
        self._place += 1
        level = float(np.sqrt(np.mean(frame**2)))
        if not self._frames:  # of the room between turns: who talks on is not its noise
            self._levels.append(level)
        room = float(np.percentile(self._levels, 20))
        is_speech = level > max(QUIETEST, OVER_NOISE * room if len(self._levels) > 20 else 0)
        if not self._frames and not is_speech:
            self._before.append(frame)
            return None
        if not self._frames:
            self._frames = list(self._before)
        self._frames.append(frame)
        self._spoken += is_speech
        self._quiet = 0 if is_speech else self._quiet + 1
        if self._quiet < PAUSE_FRAMES and len(self._frames) < LONGEST_FRAMES:
            return None
        frames, spoken, quiet = self._frames, self._spoken, self._quiet
        self._frames, self._spoken, self._quiet = [], 0, 0
        self._before.clear()
        self._before.extend(frames[-min(quiet, LEAD_FRAMES) :] if quiet else ())
        if spoken < SHORTEST_FRAMES:
            return None
        end = self._place - quiet
        return UserTurn(np.concatenate(frames), self._place - len(frames), end)


class Recognition:
    """A recogniser for all conversations of a server, one turn at a time.

    Args:
        recogniser: as `pipeline.engines.recogniser` makes them.
    """

    def __init__(self, recogniser: Any, language: str = "en"):
        self._recogniser, self._language = recogniser, language
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="recogniser")
        self._waiting = 0

    async def text(self, samples: np.ndarray) -> str | None:
        """What is said in float32 [S] at 24 kHz; None where there is no time to listen."""
        if self._waiting >= WAITING_TURNS:
            return None
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._worker, self._transcribe, samples)
        finally:
            self._waiting -= 1

    def _transcribe(self, samples: np.ndarray) -> str:
        import soxr

        from pipeline.engines.recogniser import RECOGNISER_RATE

        resampled = soxr.resample(samples, SAMPLE_RATE, RECOGNISER_RATE)
        words = self._recogniser.transcribe(resampled, self._language)
        return " ".join(word.text for word in words)


Tell = Callable[[dict[str, Any]], None]


class Hearing:
    """Of one conversation: frames and words go in, messages come out by `tell`.

    Args:
        tell: gets `heard` {text, start_s, end_s} after a turn of the user's, and `echo` {text,
            reply} where the model's reply is that turn again (`duplex.metrics.is_echo`).
    """

    def __init__(self, recognition: Recognition, tell: Tell):
        self._recognition, self._tell = recognition, tell
        self._turns = Turns()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: _Exchange | None = None
        # What the model said in the last frames: an answer may begin within the user's pause.
        self._recent: deque[str] = deque(maxlen=PAUSE_FRAMES)
        self._place = 0

    def user(self, frame: np.ndarray) -> None:
        """What the user says in the next frame; `model` is told of the same frame after it."""
        self._place += 1
        turn = self._turns.add(frame)
        if self._open is not None and self._turns.is_speaking:
            self._finish()
        if turn is None:
            return
        self._finish()
        since = self._place - turn.end - 1  # frames that the model has answered since
        said = list(self._recent)[-since:] if since > 0 else []
        self._open = exchange = _Exchange(turn, reply="".join(said))
        task = asyncio.create_task(self._recognise(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def model(self, text: str) -> None:
        """What the model says in its next frame; often nothing."""
        self._recent.append(text)
        if self._open is None:
            return
        self._open.reply += text
        self._open.frames += 1
        if self._open.frames > REPLY_FRAMES:
            self._finish()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _finish(self) -> None:
        exchange, self._open = self._open, None
        if exchange is not None:
            exchange.is_over = True
            self._judge(exchange)

    async def _recognise(self, exchange: _Exchange) -> None:
        turn = exchange.turn
        try:
            text = await self._recognition.text(turn.samples)
        except Exception:  # of any recogniser: the conversation goes on without its words
            log.exception("what a user said could not be recognised")
            return
        if not text:
            return
        exchange.text = text
        at = {"start_s": round(turn.start * FRAME_S, 2), "end_s": round(turn.end * FRAME_S, 2)}
        self._tell({"type": "heard", "text": text, **at})
        self._judge(exchange)

    def _judge(self, exchange: _Exchange) -> None:
        """Once both the turn's words and the whole reply are there."""
        if exchange.is_over and exchange.text and is_echo(exchange.text, exchange.reply):
            reply = exchange.reply.strip()
            self._tell({"type": "echo", "text": exchange.text, "reply": reply})
            exchange.text = ""


@dataclass
class _Exchange:
    turn: UserTurn
    text: str = ""
    reply: str = ""
    frames: int = 0
    is_over: bool = False
