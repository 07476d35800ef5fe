"""One conversation over one WebSocket. It knows aiohttp; the model it reaches by two calls.

    reader task    WebSocket -> Opus or PCM -> frames of 1 920 samples -> inbox (64 frames)
    conversation   inbox -> `Speaker.step` in the worker thread -> text, then audio

The inbox is bounded, so a client that sends faster than the model answers is slowed down by
TCP. What arrives before `00` is decoded (an Ogg stream needs its start) and dropped: it was
said before the conversation began.

A client that vanishes frees the model within a frame: a closed socket ends the reader, and a
silent one (cable pulled, or nobody reads) fails aiohttp's heartbeat within 45 s.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import sphn
from aiohttp import WSMsgType, web

from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from pipeline.serving import wire
from pipeline.serving.text import TextAssembler
from pipeline.serving.wire import ChatRequest, Kind

if TYPE_CHECKING:
    from pipeline.serving.conversation import FedPrompt, Speaker

INBOX_FRAMES = 64
HEARTBEAT_S = 30

log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


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


class ChatDesk:
    """Lets one client at a time talk to the speaker. `busy` and `speaker` are read by routes."""

    def __init__(self, worker: ThreadPoolExecutor):
        self.speaker: Speaker | None = None
        self.busy = False
        self._worker = worker

    async def run(self, function: Callable[..., ResultT], *args: Any) -> ResultT:
        """Call `function` in the one thread that touches the model."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def welcome(self, ws: web.WebSocketResponse, wanted: ChatRequest) -> None:
        """Hold a conversation, or refuse it because there is one. Closes `ws`."""
        if self.busy:
            await _refuse(
                ws, wire.CLOSE_BUSY, "this server holds one conversation at a time and is in one"
            )
            return
        self.busy = True
        refusal: tuple[int, str] | None = None
        try:
            await Conversation(self, ws, wanted).hold()
        except BadAudioError as fault:
            refusal = wire.CLOSE_UNSUPPORTED, str(fault)
        except ConnectionError:
            pass  # the client went while we were sending
        except Exception:
            log.exception("a conversation ended by an error of the server")
            refusal = wire.CLOSE_INTERNAL, "the server failed; its log says why"
        finally:
            self.busy = False  # before closing, which waits for the client's answer
        if refusal:
            await _refuse(ws, *refusal)
        await ws.close()


class Conversation:
    def __init__(self, desk: ChatDesk, ws: web.WebSocketResponse, wanted: ChatRequest):
        assert desk.speaker is not None
        self._desk = desk
        self._speaker = desk.speaker
        self._ws = ws
        self._wanted = wanted
        self._ready = False
        self._gone = threading.Event()  # read by the worker thread too
        # A frame, what ended the reader early, or None when the client has gone.
        self._inbox: asyncio.Queue[np.ndarray | Exception | None] = asyncio.Queue(INBOX_FRAMES)

    async def hold(self) -> None:
        from pipeline.serving.conversation import Cancelled

        wanted = self._wanted
        seed = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
        reader = asyncio.create_task(self._read())
        try:
            begin = partial(
                self._speaker.begin, voice=wanted.voice_prompt, greeting=wanted.greeting
            )
            fed = await self._desk.run(
                begin, wanted.text_prompt, wanted.sampling, seed, self._gone.is_set
            )
            self._ready = True
            await self._ws.send_bytes(wire.message(Kind.READY))
            await self._ws.send_bytes(wire.message(Kind.METADATA, self._metadata(fed)))
            await self._talk()
        except Cancelled:
            pass
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _metadata(self, fed: FedPrompt) -> bytes:
        return json.dumps(
            {
                "type": "prompt",
                "protocol": wire.PROTOCOL,
                "digest": fed.digest,
                "count": fed.count,
                "frames": fed.frames.shape[1],
                "frames_digest": fed.frames_digest,
                "model_digest": self._speaker.model_digest,
                "prefill_s": round(fed.prefill_s, 4),
                "seed": fed.seed,
                "voice_prompt": self._wanted.voice_prompt,
                "greeting": self._wanted.greeting,
            }
        ).encode()

    async def _read(self) -> None:
        audio = AudioIn(self._wanted.audio_format)
        try:
            async for message in self._ws:
                if message.type != WSMsgType.BINARY or message.data[:1] != bytes([Kind.AUDIO]):
                    continue  # control, pings and kinds to come
                for frame in audio.append(message.data[1:]):
                    if self._ready:
                        await self._inbox.put(frame)
        except Exception as fault:  # noqa: BLE001 - raised again by whoever reads the inbox
            await self._inbox.put(fault)
            return
        self._gone.set()
        await self._inbox.put(None)

    async def _talk(self) -> None:
        pieces = TextAssembler(self._speaker.tokenizer)
        is_opus = self._wanted.audio_format == "opus"
        opus = sphn.OpusStreamWriter(SAMPLE_RATE) if is_opus else None
        while not self._gone.is_set():
            frame = await self._inbox.get()
            if frame is None:
                return
            if isinstance(frame, Exception):
                raise frame
            pcm, token = await self._desk.run(self._speaker.step, frame)
            text = pieces.append(token) if token is not None else ""
            if text:
                await self._ws.send_bytes(wire.message(Kind.TEXT, text.encode()))
            payload = opus.append_pcm(pcm) if opus else wire.pcm_bytes(pcm)
            if payload:
                await self._ws.send_bytes(wire.message(Kind.AUDIO, payload))


async def _refuse(ws: web.WebSocketResponse, code: int, reason: str) -> None:
    try:
        if not ws.closed:
            await ws.send_bytes(wire.message(Kind.ERROR, reason.encode()))
        await ws.close(code=code, message=reason.encode()[:120])
    except ConnectionError:
        pass
