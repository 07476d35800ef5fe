"""A server that speaks the wire format and does what a test wants: no model, no torch.

It runs in a thread of its own. By default it is silent, counts what comes in, and proves its
prompt as a good server does; a `Plan` says where it misbehaves.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import sentencepiece
from aiohttp import web

from duplex.frames import FRAME_SAMPLES
from pipeline.evaluation.items import EvaluationItem, SpokenItem, speak_item
from pipeline.serving import wire
from pipeline.serving.wire import Kind

SILENCE = bytes(FRAME_SAMPLES * 2)
TONE = (3000 * np.sin(np.arange(FRAME_SAMPLES) / 8)).astype("<i2").tobytes()
CORPUS = [
    f"<system> You are {name}, {mood} customer in a coffee shop. {fact} <system>"
    for name in ("Ann", "Marcus", "Mei", "Theo", "June", "Winston")
    for mood in ("an angry", "a nervous", "a friendly", "an indecisive")
    for fact in ("You want a large latte.", "You have five dollars.", "Hello & thanks, what else?")
]


@functools.cache
def tiny_tokenizer() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=310,
        byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@dataclass
class Plan:
    """What the server does. `seen`: the queries that came.

    echo: the user's audio comes back, this many frames later.
    says: frame -> text sent before that frame's audio.
    scripts: by prompt, what is said in place of `says`: (frame, text, frames of tone).
    watchful: it hangs up on a client that sends before it was answered.
    break_at: from this frame on, `breakage` is done instead of an answer.
    """

    tokenizer: bytes = field(default_factory=lambda: tiny_tokenizer(), repr=False)
    digest: str | None = None
    count_off_by: int = 0
    proves: bool = True
    model_digest: str = "a" * 64
    echo: int | None = None
    drift: bool = False
    says: dict[int, str] = field(default_factory=dict)
    scripts: dict[str, list[tuple[int, str, int]]] = field(default_factory=dict)
    break_at: int | None = None
    breakage: str = "close"
    refuse: str | None = None
    busy_for: int = 0
    watchful: bool = False
    device: str = "cpu"
    slots: int = 1
    seen: list[dict[str, str]] = field(default_factory=list)


class PlantedServer:
    def __init__(self, plan: Plan):
        self.plan = plan
        self.tokenizer = sentencepiece.SentencePieceProcessor()
        self.tokenizer.LoadFromSerializedProto(plan.tokenizer)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/api/tokenizer", self._give_tokenizer)
        app.router.add_get(wire.CHAT_PATH, self._chat)
        return app

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"name": "planted", "device": self.plan.device, "slots": self.plan.slots}
        )

    async def _give_tokenizer(self, request: web.Request) -> web.Response:
        return web.Response(body=self.plan.tokenizer)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        plan = self.plan
        plan.seen.append(
            dict(request.query) | {"authorization": request.headers.get("Authorization", "")}
        )
        if plan.refuse == "400":
            raise web.HTTPBadRequest(text="text_prompt must fit, found 9000 tokens")
        if plan.refuse == "401":
            raise web.HTTPUnauthorized()
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        if plan.refuse or plan.busy_for:
            plan.busy_for -= 1
            if plan.refuse == "never-ready":
                await asyncio.sleep(30)
            if plan.refuse != "busy-silently":
                await ws.send_bytes(wire.message(Kind.ERROR, b"one conversation at a time"))
            await ws.close(code=wire.CLOSE_BUSY)
            return ws
        await ws.send_bytes(wire.message(Kind.PING))
        await ws.send_bytes(wire.message(Kind.READY))
        if plan.proves:
            await ws.send_bytes(wire.message(Kind.METADATA, self._proof(request)))
        await ws.send_bytes(bytes([0x7F]) + b"of a kind to come")
        await self._talk(ws, plan.scripts.get(request.query.get("text_prompt", ""), []))
        return ws

    def _proof(self, request: web.Request) -> bytes:
        tokens = wire.prompt_tokens(self.tokenizer, request.query.get("text_prompt", ""))
        said = {
            "type": "prompt",
            "digest": self.plan.digest or wire.prompt_digest(tokens),
            "count": len(tokens) + self.plan.count_off_by,
            "model_digest": self.plan.model_digest,
        }
        return json.dumps(said).encode()

    async def _talk(self, ws: web.WebSocketResponse, script: list[tuple[int, str, int]]) -> None:
        plan, heard = self.plan, []
        says = plan.says | {frame: text for frame, text, _ in script}
        spoken = {frame + n for frame, _, length in script for n in range(length)}
        while True:
            message = await ws.receive()
            if message.type != web.WSMsgType.BINARY:
                return
            assert message.data[0] == Kind.AUDIO
            heard.append(message.data[1:])
            if plan.watchful and await self._more_comes(ws):
                return
            frame = len(heard) - 1
            if plan.break_at is not None and frame >= plan.break_at:
                if await self._break(ws):
                    return
                continue
            if frame in says:
                await ws.send_bytes(wire.message(Kind.TEXT, says[frame].encode()))
            answer = TONE if frame in spoken else self._answer(heard)
            await ws.send_bytes(wire.message(Kind.AUDIO, answer))

    async def _more_comes(self, ws: web.WebSocketResponse) -> bool:
        """Whether a further frame is sent although this one is not answered."""
        try:
            await ws.receive(timeout=0.05)
        except TimeoutError:
            return False
        return True

    def _answer(self, heard: list[bytes]) -> bytes:
        plan, frame = self.plan, len(heard) - 1
        if plan.drift:  # other audio in each conversation
            return np.full(FRAME_SAMPLES, 100 * len(plan.seen), dtype="<i2").tobytes()
        if plan.echo is None or frame < plan.echo:
            return SILENCE
        return heard[frame - plan.echo]

    async def _break(self, ws: web.WebSocketResponse) -> bool:
        kind = self.plan.breakage
        if kind == "close":
            await ws.close(code=wire.CLOSE_INTERNAL, message=b"the model fell over")
        elif kind == "error":
            await ws.send_bytes(wire.message(Kind.ERROR, b"the model fell over"))
            await ws.close(code=wire.CLOSE_INTERNAL)
        elif kind == "vanish":
            assert ws._req is not None and ws._req.transport is not None
            ws._req.transport.abort()
        elif kind == "short":
            await ws.send_bytes(wire.message(Kind.AUDIO, SILENCE[:100]))
        elif kind == "words":
            await ws.send_str("hello")
        elif kind == "latin":
            await ws.send_bytes(wire.message(Kind.TEXT, b"caf\xe9"))
        elif kind == "not-json":
            await ws.send_bytes(wire.message(Kind.METADATA, b"{"))
        elif kind == "double":
            await ws.send_bytes(wire.message(Kind.AUDIO, SILENCE))
            await ws.send_bytes(wire.message(Kind.AUDIO, SILENCE))
        elif kind == "stall":
            return False
        return kind in ("close", "error", "vanish")


@contextmanager
def planted(plan: Plan) -> Iterator[str]:
    """The server's base URL; it is up while the block runs."""
    started, loop = threading.Event(), asyncio.new_event_loop()
    found = SimpleNamespace(url="")

    async def serve() -> None:
        runner = web.AppRunner(PlantedServer(plan).app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        found.stop = asyncio.Event()
        started.set()
        await found.stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(5)
    try:
        yield found.url
    finally:
        loop.call_soon_threadsafe(found.stop.set)
        thread.join(5)
        assert not thread.is_alive()
        loop.close()


# -- what is played to it

FACTS = [{"key": "name", "value": "Ann", "says": ["Ann"]},
         {"key": "order", "value": "a latte", "says": ["large latte"]}]  # fmt: skip


class ToneEngine:
    """Says each word as three frames of tone, with silence before and after the whole."""

    def synthesize(self, text: str, params: Any) -> SimpleNamespace:
        tone = 0.3 * np.sin(
            2 * np.pi * 250 * np.arange(3 * FRAME_SAMPLES * len(text.split())) / 24_000
        )
        silence = np.zeros(4 * FRAME_SAMPLES)
        return SimpleNamespace(samples=np.concatenate([silence, tone, silence]).astype(np.float32))


def item(item_id: str = "angry-ann", **changes: Any) -> EvaluationItem:
    fields: dict[str, Any] = {
        "id": item_id,
        "persona_type": "angry",
        "text_prompt": "You are Ann, an angry customer. You want a large latte & a chair.",
        "user_turns": ["What would you like", "Your name"],
        "facts": FACTS,
    }
    return EvaluationItem.model_validate(fields | changes)


def spoken(seconds: float = 6.4, answer_s: float = 1.6, **changes: Any) -> SpokenItem:
    return speak_item(item(**changes), ToneEngine(), {}, seconds=seconds, answer_s=answer_s)
