"""One conversation over one WebSocket. It knows aiohttp; the model it reaches through the desk.

    reader task    WebSocket -> Opus or PCM -> frames of 1 920 samples -> inbox of the seat
    conversation   outbox of the seat -> text, then audio

Nobody waits for anyone: a seat whose answers are not sent takes no part in steps, so one that does
not read is alone in standing still, and loses its slot after `Limits.stall_s`. The inbox is
bounded too: a client that sends faster than the model answers is slowed down by TCP.

What arrives before `00` is decoded (an Ogg stream needs its start) and dropped: it was said
before the conversation began. Metadata (`04`) says what was fed at first, and at the end why it
ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import sphn
from aiohttp import WSMsgType, web

from duplex.frames import FRAME_S, FRAME_SAMPLES, SAMPLE_RATE
from pipeline.serving import wire
from pipeline.serving.desk import Desk, FullError, Seat
from pipeline.serving.hearing import Hearing
from pipeline.serving.limits import Limits
from pipeline.serving.text import TextAssembler
from pipeline.serving.wire import ChatRequest, Kind

if TYPE_CHECKING:
    from pipeline.serving.model import FedPrompt, PlannedPrompt

HEARTBEAT_S = 30

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """How a conversation ended. reason: a word for metrics; code, text: for the client, None where
    it has gone itself."""

    reason: str
    code: int | None = None
    text: str = ""
    is_fault: bool = False


GONE = Ending("left")


class BadAudioError(ValueError):
    """The client sent audio that cannot be decoded."""


class AudioIn:
    """Audio messages -> whole frames. Holds less than a frame between messages."""

    def __init__(self, audio_format: str):
        self._opus = sphn.OpusStreamReader(SAMPLE_RATE) if audio_format == "opus" else None
        self._odd_byte = b""
        self._pcm = np.zeros(0, dtype=np.float32)

    def append(self, payload: bytes) -> Iterator[np.ndarray]:
        """float32 [1920] frames that `payload` completes.

        Raises:
            BadAudioError: not an Ogg-Opus stream.
        """
        self._pcm = np.concatenate([self._pcm, self._decode(payload)])
        while len(self._pcm) >= FRAME_SAMPLES:
            frame, self._pcm = self._pcm[:FRAME_SAMPLES], self._pcm[FRAME_SAMPLES:]
            yield np.ascontiguousarray(frame)

    def _decode(self, payload: bytes) -> np.ndarray:
        if self._opus is None:
            content = self._odd_byte + payload
            whole = len(content) - len(content) % 2
            self._odd_byte = content[whole:]
            return wire.pcm_samples(content[:whole])
        try:
            return self._opus.append_bytes(payload)
        except ValueError as error:
            raise BadAudioError(f"audio must be an Ogg-Opus stream: {error}") from None


async def converse(
    desk: Desk,
    request: web.Request,
    ws: web.WebSocketResponse,
    wanted: ChatRequest,
    planned: PlannedPrompt,
    limits: Limits,
) -> None:
    """Hold a conversation in a free slot, or refuse it because there is none. Closes `ws`.

    Args:
        planned: the prompt of `wanted`, in frames.
    """
    try:
        seat = desk.take()
    except FullError:
        places = f"{desk.num_slots} conversation{'s' if desk.num_slots != 1 else ''}"
        ending = Ending(
            "busy", wire.CLOSE_BUSY, f"this server holds {places} at a time and is full", True
        )
    else:
        try:
            ending = await _Conversation(desk, seat, ws, wanted, planned, limits).hold()
        finally:
            desk.free(seat)  # before closing, which waits for the client's answer
    desk.counts.ended.labels(ending.reason).inc()
    try:
        async with asyncio.timeout(0.0 if ending.reason == "stalled" else limits.stall_s):
            await _close(ws, ending)
    except TimeoutError:  # what it does not read would keep us waiting
        if request.transport is not None:
            request.transport.abort()


class _Conversation:
    def __init__(
        self,
        desk: Desk,
        seat: Seat,
        ws: web.WebSocketResponse,
        wanted: ChatRequest,
        planned: PlannedPrompt,
        limits: Limits,
    ):
        assert desk.model is not None
        self._desk, self._seat, self._model = desk, seat, desk.model
        self._ws = ws
        self._wanted, self._planned = wanted, planned
        self._limits = limits
        self._ready = self._gone = False
        self._hearing: Hearing | None = None
        self._unanswered: deque[np.ndarray] = deque()
        if desk.recognition is not None:
            self._hearing = Hearing(desk.recognition, self._tell)

    async def hold(self) -> Ending:
        """From prompt to end; never raises but on cancellation."""
        reader = asyncio.create_task(self._read())
        try:
            return await self._hold()
        except BadAudioError as fault:
            return Ending("bad audio", wire.CLOSE_UNSUPPORTED, str(fault), True)
        except _StalledError:
            return Ending("stalled")
        except ConnectionError:  # the client went while we were sending
            return GONE
        except Exception:  # whatever it is, the others go on and the client is told
            log.exception("a conversation ended by an error of the server")
            return Ending("error", wire.CLOSE_INTERNAL, "the server failed; its log says why", True)
        finally:
            if self._hearing is not None:
                self._hearing.close()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _tell(self, said: dict[str, Any]) -> None:
        """To be sent between two answers, in its turn."""
        self._seat.outbox.put_nowait(json.dumps(said).encode())

    async def _hold(self) -> Ending:
        seed = self._wanted.seed
        seed = secrets.randbelow(2**31) if seed is None else seed
        fed = await self._desk.begin(
            self._seat, self._planned, self._wanted.sampling, seed, lambda: self._gone
        )
        if fed is None:
            return GONE
        self._seat.room = None if self._limits.roll else self._model.slots.left(self._seat.slot)
        self._ready = True
        await self._send(Kind.READY)
        await self._send(Kind.METADATA, self._metadata(fed))
        return await self._talk()

    def _metadata(self, fed: FedPrompt) -> bytes:
        return json.dumps(
            {
                "type": "prompt",
                "protocol": wire.PROTOCOL,
                **fed.metadata(self._model.model_digest),
                "voice_prompt": self._wanted.voice_prompt,
                "greeting": self._wanted.greeting,
                "sampling": self._wanted.sampling.model_dump(),
                "slots": self._desk.num_slots,
                "seconds_left": None if self._seat.room is None else self._seat.room * FRAME_S,
            }
        ).encode()

    async def _read(self) -> None:
        audio = AudioIn(self._wanted.audio_format)
        try:
            async for message in self._ws:
                if message.type != WSMsgType.BINARY or message.data[:1] != bytes([Kind.AUDIO]):
                    continue  # control, pings and kinds to come
                for frame in audio.append(message.data[1:]):
                    if not self._ready:
                        continue
                    if self._hearing is not None:
                        self._unanswered.append(frame)
                    await self._desk.hear(self._seat, frame)
        except Exception as fault:  # noqa: BLE001 - raised again by whoever reads the outbox
            self._seat.outbox.put_nowait(fault)
            return
        self._gone = True
        self._seat.outbox.put_nowait(None)

    async def _talk(self) -> Ending:
        pieces = TextAssembler(self._model.tokenizer)
        is_opus = self._wanted.audio_format == "opus"
        opus = sphn.OpusStreamWriter(SAMPLE_RATE) if is_opus else None
        ends_s = time.monotonic() + self._limits.session_s
        answered = 0
        while not self._gone:
            if answered == self._seat.room:
                return await self._end("context", "the model's context is full")
            if time.monotonic() >= ends_s:
                return await self._end(
                    "time", f"a conversation lasts {self._limits.session_s:.0f} s at most here"
                )
            try:
                wait_s = max(0.0, min(self._limits.idle_s, ends_s - time.monotonic()))
                answer = await asyncio.wait_for(self._desk.answer(self._seat), wait_s)
            except TimeoutError:
                if time.monotonic() >= ends_s:
                    continue
                return await self._end(
                    "idle", f"no audio came for {self._limits.idle_s:g} s", wire.CLOSE_POLICY
                )
            if answer is None:
                return GONE
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, bytes):
                await self._send(Kind.METADATA, answer)
                continue
            pcm, token = answer
            answered += 1
            text = pieces.append(token) if token is not None else ""
            if self._hearing is not None:
                self._hearing.user(self._unanswered.popleft())
                self._hearing.model(text)
            if text:
                await self._send(Kind.TEXT, text.encode())
            payload = opus.append_pcm(pcm) if opus else wire.pcm_bytes(pcm)
            if payload:
                await self._send(Kind.AUDIO, payload)
        return GONE

    async def _end(self, reason: str, text: str, code: int = wire.CLOSE_DONE) -> Ending:
        end = {"type": "end", "reason": reason, "text": text}
        await self._send(Kind.METADATA, json.dumps(end).encode())
        return Ending(reason, code, text)

    async def _send(self, kind: Kind, payload: bytes = b"") -> None:
        """
        Raises:
            _StalledError: the client does not read.
        """
        try:
            async with asyncio.timeout(self._limits.stall_s):
                await self._ws.send_bytes(wire.message(kind, payload))
        except TimeoutError:
            raise _StalledError from None


class _StalledError(Exception):
    """The client left what it was sent unread for too long."""


async def _close(ws: web.WebSocketResponse, ending: Ending) -> None:
    try:
        if ending.is_fault and not ws.closed:
            await ws.send_bytes(wire.message(Kind.ERROR, ending.text.encode()))
        if ending.code is None:
            await ws.close()
        else:
            await ws.close(code=ending.code, message=ending.text.encode()[:120])
    except ConnectionError:
        pass
