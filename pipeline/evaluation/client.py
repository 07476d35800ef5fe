"""A conversation with a server over its WebSocket, in raw PCM, frame by frame.

Lock-step: a frame of the user is sent only after the agent's answer to the frame before came.
So the server takes every frame, in order, however slow the machine is, and with the same
prompt, seed and sampling the same tokens come back. Real time: a frame every 80 ms, as a
microphone sends them; that measures the machine as well as the model.

Wire format (`pipeline/serving/wire.py`): 1 byte of kind, then the payload. With `format=pcm`
the agent's frame i answers the user's frame i, and the text of that frame comes before it.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from yarl import URL

from duplex.config import SamplingSection
from duplex.errors import ServerError
from duplex.frames import FRAME_S, FRAME_SAMPLES, frames_covering_samples
from pipeline.serving import wire
from pipeline.serving.wire import Kind

CLOSE_TIMEOUT_S = 2.0  # for the close that follows an error message
BUSY_POLL_S, BUSY_TIMEOUT_S = 0.1, 5.0
SURPLUS_WAIT_S = 0.1  # for frames that nobody asked for
_FRAME_BYTES = FRAME_SAMPLES * 2


class BusyError(ServerError):
    """All slots of the server are taken."""


@dataclass(frozen=True)
class Wall:
    """Wall-clock times: never part of a score.

    ready_s: from connecting until the prompt was taken; frame_s: from sending a frame until
    its answer came.
    """

    ready_s: float
    total_s: float
    frame_s: tuple[float, ...]


@dataclass(frozen=True)
class Conversation:
    """What came back. agent: float32 [S], as long as what was sent; text: (frame, piece)."""

    agent: np.ndarray
    text: tuple[tuple[int, str], ...]
    metadata: tuple[dict[str, Any], ...]
    wall: Wall

    @property
    def transcript(self) -> str:
        return "".join(piece for _, piece in self.text).strip()

    @property
    def prompt(self) -> dict[str, Any] | None:
        """What the server said about the prompt that the model was fed, if it did."""
        return next((m for m in self.metadata if m.get("type") == "prompt"), None)


async def converse(
    url: str,
    user: np.ndarray,
    *,
    text_prompt: str | None = None,
    seed: int = 0,
    sampling: SamplingSection | None = None,
    lockstep: bool = True,
    token: str | None = None,
    ready_timeout_s: float = 120,
    frame_timeout_s: float = 30,
) -> Conversation:
    """Play `user` to the server and return what it answers.

    Args:
        url: of the server, its page or its socket; what its query says stays, unless given.
        user: float [S] at 24 kHz, full scale 1.0; a last partial frame is padded with zeros.
        sampling: None leaves the server's defaults.

    Raises:
        ServerError: it cannot be reached, refuses (`BusyError`: for want of a slot), reports
            an error, takes too long, closes before the end, or does not keep to the format.
    """
    target = _target(url, text_prompt, seed, sampling)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    frames = _frames(user)
    started = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=ready_timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        try:
            async with asyncio.timeout(ready_timeout_s):
                socket = await session.ws_connect(target, headers=headers)
        except aiohttp.WSServerHandshakeError as error:
            raise ServerError(await _refused(session, target, headers, error)) from None
        except TimeoutError:
            raise ServerError(
                f"{_where(target)}: must accept a connection within {ready_timeout_s:g} s, did not."
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError(
                f"{_where(target)}: must be reachable: {error}. Is `duplex serve` running there?"
            ) from None
        async with socket:
            line = _Line(socket, _where(target), len(frames))
            await line.ready(ready_timeout_s)
            ready_s = time.perf_counter() - started
            if lockstep:
                await _lockstep(line, frames, frame_timeout_s)
            else:
                await _paced(line, frames, frame_timeout_s)
            total_s = time.perf_counter() - started
            await line.finish()
    return Conversation(
        agent=np.concatenate([np.zeros(0, np.float32), *line.agent]),
        text=tuple(line.text),
        metadata=tuple(line.metadata),
        wall=Wall(ready_s, total_s, tuple(line.frame_s)),
    )


async def converse_when_free(
    url: str, user: np.ndarray, *, busy_timeout_s: float = BUSY_TIMEOUT_S, **options: Any
) -> Conversation:
    """`converse`, again and again for so long while all slots are taken: a server takes a moment
    to free that of the conversation before."""
    deadline_s = time.monotonic() + busy_timeout_s
    while True:
        try:
            return await converse(url, user, **options)
        except BusyError:
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(BUSY_POLL_S)


async def _lockstep(line: _Line, frames: list[bytes], timeout_s: float) -> None:
    for frame in frames:
        await line.send(frame)
        await line.answer(timeout_s)


async def _paced(line: _Line, frames: list[bytes], timeout_s: float) -> None:
    async def speak() -> None:
        clock = asyncio.get_running_loop()
        started = clock.time()
        for index, frame in enumerate(frames):
            # A frame is complete only when its 80 ms are over.
            await asyncio.sleep(max(0.0, started + (index + 1) * FRAME_S - clock.time()))
            await line.send(frame)

    speaker = asyncio.create_task(speak())
    try:
        for _ in frames:
            await line.answer(timeout_s + FRAME_S)
        await speaker
    finally:
        speaker.cancel()
        await asyncio.gather(speaker, return_exceptions=True)


@dataclass
class _Line:
    """The socket, and all that came over it so far."""

    socket: aiohttp.ClientWebSocketResponse
    where: str
    num_frames: int
    agent: list[np.ndarray] = field(default_factory=list)
    text: list[tuple[int, str]] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    frame_s: list[float] = field(default_factory=list)
    _sent: list[float] = field(default_factory=list)

    async def ready(self, timeout_s: float) -> None:
        """Wait for the handshake, which comes when the prompt was taken."""
        async with self._limit(timeout_s, "be ready"):
            while await self._next() != Kind.READY:
                pass

    async def send(self, frame: bytes) -> None:
        self._sent.append(time.perf_counter())
        try:
            await self.socket.send_bytes(wire.message(Kind.AUDIO, frame))
        except (ConnectionError, aiohttp.ClientError):
            # The reason stands in what the server sent before it closed.
            while True:
                await self._next()

    async def answer(self, timeout_s: float) -> None:
        """Wait for the agent's next frame."""
        async with self._limit(timeout_s, f"answer frame {len(self.agent)}"):
            while await self._next() != Kind.AUDIO:
                pass
        answered = len(self.agent) - 1
        if answered >= len(self._sent):
            raise self._too_many()
        self.frame_s.append(time.perf_counter() - self._sent[answered])

    async def finish(self) -> None:
        """See that no frame comes after the last: then each would answer an earlier one."""
        answered = len(self.agent)
        with suppress(TimeoutError, ServerError):  # it may close now: all is answered
            async with asyncio.timeout(SURPLUS_WAIT_S):
                while not self.socket.closed and len(self.agent) == answered:
                    await self._next()
        if len(self.agent) != answered:
            raise self._too_many()

    def _too_many(self) -> ServerError:
        return ServerError(
            f"{self.where}: must send one frame for each frame that it gets, found "
            f"{len(self.agent)} for {len(self._sent)}."
        )

    def _limit(self, timeout_s: float, what: str) -> _Limit:
        return _Limit(timeout_s, f"{self.where}: must {what} within {timeout_s:g} s, did not.")

    async def _next(self) -> int:
        """Take in one message; returns its kind."""
        message = await self.socket.receive()
        if message.type != aiohttp.WSMsgType.BINARY:
            if self.socket.close_code == wire.CLOSE_BUSY:
                raise BusyError(f"{self.where}: has no free slot (close code 1013): try later.")
            raise ServerError(self._ended(message))
        if not message.data:
            return -1  # a message without a kind says nothing
        kind, payload = message.data[0], message.data[1:]
        if kind == Kind.AUDIO:
            self._hear(payload)
        elif kind == Kind.TEXT:
            self.text.append((len(self.agent), _utf8(payload, self.where, "text")))
        elif kind == Kind.METADATA:
            self._note(_utf8(payload, self.where, "metadata"))
        elif kind == Kind.ERROR:
            await self._fail(payload.decode("utf-8", "replace"))
        return kind  # unknown kinds are to be passed over, says moshi's protocol

    async def _fail(self, reason: str) -> None:
        """Raise what the server reported; the close code that follows says of which sort it is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while not self.socket.closed:
                    await self.socket.receive()
        if self.socket.close_code == wire.CLOSE_BUSY:
            raise BusyError(f"{self.where}: has no free slot ({reason}): try later.")
        raise ServerError(f"{self.where}: reported an error {self._progress()}: {reason}")

    def _hear(self, payload: bytes) -> None:
        if len(payload) != _FRAME_BYTES:
            raise ServerError(
                f"{self.where}: an audio message must hold {_FRAME_BYTES} bytes of PCM, found "
                f"{len(payload)}. Does this server know format=pcm?"
            )
        self.agent.append(wire.pcm_samples(payload))

    def _note(self, payload: str) -> None:
        try:
            value = json.loads(payload)
        except ValueError as error:
            raise ServerError(f"{self.where}: metadata must be JSON: {error}") from None
        if isinstance(value, dict):
            self.metadata.append(value)

    def _ended(self, message: aiohttp.WSMessage) -> str:
        if message.type == aiohttp.WSMsgType.TEXT:
            return f"{self.where}: must send binary messages, found text."
        if message.type == aiohttp.WSMsgType.ERROR:
            return f"{self.where}: the connection broke {self._progress()}: {message.data}"
        code = self.socket.close_code
        reason = message.extra if isinstance(message.extra, str) and message.extra else "no reason"
        return f"{self.where}: closed the conversation {self._progress()} (code {code}, {reason})."

    def _progress(self) -> str:
        return f"after {len(self.agent)} of {self.num_frames} frames"


class _Limit:
    """`asyncio.timeout` with a message of its own."""

    def __init__(self, seconds: float, message: str):
        self._timeout = asyncio.timeout(seconds)
        self._message = message

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *details: Any) -> None:
        try:
            await self._timeout.__aexit__(*details)
        except TimeoutError:
            raise ServerError(self._message) from None


def _target(url: str, text_prompt: str | None, seed: int, sampling: SamplingSection | None) -> URL:
    changes: dict[str, str | int | float] = {"format": "pcm", "seed": seed}
    if text_prompt is not None:
        changes["text_prompt"] = text_prompt
    if sampling is not None:
        changes |= sampling.model_dump()
    return URL(wire.chat_url(url, **changes), encoded=True)


def _frames(user: np.ndarray) -> list[bytes]:
    padded = np.zeros(frames_covering_samples(len(user)) * FRAME_SAMPLES, dtype=np.float32)
    padded[: len(user)] = user
    return [wire.pcm_bytes(frame) for frame in padded.reshape(-1, FRAME_SAMPLES)]


def _utf8(payload: bytes, where: str, what: str) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ServerError(f"{where}: {what} must be UTF-8: {error}") from None


def _where(target: URL) -> str:
    """The address without its query: prompts are long, and a query may hold a token."""
    return str(target.with_query(None).with_user(None))


async def _refused(
    session: aiohttp.ClientSession,
    target: URL,
    headers: dict[str, str],
    error: aiohttp.WSServerHandshakeError,
) -> str:
    hints = {
        400: "",
        401: "Give its token.",
        404: "Is this a duplex server?",
        503: "It is not ready yet: try later.",
    }
    said = error.message
    with suppress(aiohttp.ClientError, TimeoutError):
        # aiohttp drops the body of a refused handshake; a plain request is refused alike.
        plain = target.with_scheme({"wss": "https"}.get(target.scheme, "http"))
        timeout = aiohttp.ClientTimeout(total=CLOSE_TIMEOUT_S)
        async with session.get(plain, headers=headers, timeout=timeout) as response:
            if response.status == error.status:
                said = (await response.text())[:500].strip() or said
    hint = hints.get(error.status, "Is this a duplex server?")
    return f"{_where(target)}: refused with HTTP {error.status}: {said}. {hint}".strip()
