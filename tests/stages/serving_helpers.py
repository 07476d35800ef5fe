"""A server in the test's own event loop, and a client that speaks its wire by hand."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
from aiohttp import web
from yarl import URL

from pipeline.serving import wire
from pipeline.serving.desk import Desk
from pipeline.serving.probe import probe
from pipeline.serving.routes import ServerSettings, make_runner
from pipeline.serving.wire import Kind

PROMPT = 'You work for "Sunrise" & Co. Your name is Maria + 100% ☕ #1'
FRAME_BYTES = 3840
LONG = ("The customer wants a “large latte” & a muffin; " * 50)[:2000]
# Fullwidth letters: 9 bytes each in a URL, so that the request line passes aiohttp's 8 190.
WIDE = "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalpha() else c for c in LONG)


@asynccontextmanager
async def serving(model, port=0, token=None, recognition=None, **settings):
    with ThreadPoolExecutor(1) as worker:
        desk = Desk(worker)
        desk.model = model
        desk.recognition = recognition
        runner = make_runner(desk, ServerSettings(token=token, **settings))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@asynccontextmanager
async def session_at(url, **query):
    """A WebSocket at `url`, before anything was received."""
    target = URL(wire.chat_url(url, **query), encoded=True)
    async with aiohttp.ClientSession() as session, session.ws_connect(target) as ws:
        yield ws


async def receive(ws, timeout_s: float = 20):
    message = await ws.receive(timeout_s)
    if message.type != aiohttp.WSMsgType.BINARY:
        return None, b""
    return Kind(message.data[0]), message.data[1:]


async def ready(ws):
    """Through the handshake; the first metadata."""
    assert await receive(ws) == (Kind.READY, b"")
    kind, payload = await receive(ws)
    assert kind == Kind.METADATA
    return json.loads(payload)


def user_pcm(num_frames):
    time_s = np.arange(num_frames * 1920) / 24_000
    return (0.3 * np.sin(2 * np.pi * 300 * time_s)).astype(np.float32)


async def lock_step(ws, num_frames):
    """Messages that answer each frame: [(kind, payload), …] a frame, the audio last."""
    content = wire.pcm_bytes(user_pcm(num_frames))
    answers = []
    for start in range(0, len(content), FRAME_BYTES):
        await ws.send_bytes(wire.message(Kind.AUDIO, content[start : start + FRAME_BYTES]))
        answers.append([await receive(ws)])
        while answers[-1][-1][0] == Kind.TEXT:
            answers[-1].append(await receive(ws))
    return answers


def in_loop(speaker, talk, **options):
    """Run `talk(url)` against a server in this loop."""

    async def run():
        async with serving(speaker, **options) as url:
            return await talk(url)

    return asyncio.run(run())


async def probe_when_free(url, within_s=2.0):
    deadline = time.monotonic() + within_s
    while True:
        result = await probe(url, prompt="Hello.")
        if result.proven or time.monotonic() > deadline:
            return result
        await asyncio.sleep(0.02)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return holder.getsockname()[1]
