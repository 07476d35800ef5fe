"""The server among bad clients, for half an hour: memory, slots, and a conversation beside them.

    python -m benchmarks.soak                       # 30 minutes
    python -m benchmarks.soak --minutes 2
    python -m benchmarks.soak --write               # and writes docs/results/soak.*

A server process with four slots meets clients that come without end, each of a kind drawn by seed:

    talks       some seconds of audio at real time, then leaves
    vanishes    cuts the connection without a word, in the middle
    rubbish     sends bytes that are no message, or no audio
    silent      connects and sends nothing
    fast        sends ten times as fast as it could speak
    unread      sends, and never reads what it is answered
    slow head   sends a byte of its request now and then
    bad query   asks for what there is not

Meanwhile one conversation after the other is held at one place: greedy, the same each time. Every
byte of each must be that of the first. At the end all slots must be free, and memory no more than
it was after the first tenth of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from yarl import URL

from benchmarks.serve import one_thread, speech
from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic, write_json
from duplex.frames import FRAME_S
from pipeline.engines.pocket import pocket_folder
from pipeline.serving import wire
from pipeline.serving.launch import running_server
from pipeline.serving.wire import Kind

RESULTS = CHECKOUT / "docs" / "results"
SLOTS = 4
RUDE_AT_ONCE = 6
CONTROL_FRAMES = 60
SAMPLE_S = 2.0
KINDS = ("talks", "vanishes", "rubbish", "silent", "fast", "unread", "slow head", "bad query")
CONTROL = {
    "text_prompt": "You are Anna. You work for Baker Motors.", "seed": 1, "format": "pcm",
    "text_temperature": 0, "audio_temperature": 0,
}  # fmt: skip


@dataclass
class Seen:
    """What a soak saw. memory: (seconds, megabytes of the server)."""

    came: Counter[str] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # conversations of the control that found no slot
    memory: list[tuple[float, float]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--write", action="store_true", help="docs/results/soak.*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = asyncio.run(soak(pocket_folder(CHECKOUT / "runs" / ".models"), arguments.minutes))
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / "soak.json", result)
        write_atomic(RESULTS / "soak.md", page.encode())


async def soak(folder: Path, minutes: float) -> dict[str, Any]:
    seen, ends_s = Seen(), time.monotonic() + 60 * minutes
    with one_thread(), running_server(folder, device="cpu", slots=SLOTS) as url:
        server = _server_process()
        async with aiohttp.ClientSession() as session:
            rude = [_rude(session, url, number, ends_s, seen) for number in range(RUDE_AT_ONCE)]
            await asyncio.gather(
                _control(session, url, ends_s, seen), _watch(server, ends_s, seen), *rude
            )
            await asyncio.sleep(12)  # longer than a client may leave its answers unread
            async with session.get(f"{url}/ready") as response:
                taken = (await response.json())["taken"]
            async with session.get(f"{url}/metrics") as response:
                ended = _ended(await response.text())
    settled = [mb for at, mb in seen.memory if at >= 6 * minutes]
    return {
        "minutes": minutes,
        "came": dict(sorted(seen.came.items())),
        "ended": ended,
        "control": {
            "conversations": sum(seen.digests.values()),
            "different": sum(seen.digests.values()) - max(seen.digests.values(), default=0),
            "found_full": seen.refused,
        },
        "slots_taken_at_the_end": taken,
        "memory_mb": {
            "after_a_tenth": round(float(np.median(settled[: max(1, len(settled) // 10)])), 1),
            "at_the_end": round(float(np.median(settled[-max(1, len(settled) // 10) :])), 1),
            "most": round(max(mb for _, mb in seen.memory), 1),
        },
    }


def _server_process() -> psutil.Process:
    children = psutil.Process().children(recursive=True)
    return next(one for one in children if "pipeline.serving.app" in one.cmdline())


async def _watch(server: psutil.Process, ends_s: float, seen: Seen) -> None:
    started_s = time.monotonic()
    while time.monotonic() < ends_s:
        seen.memory.append((time.monotonic() - started_s, server.memory_info().rss / 1e6))
        await asyncio.sleep(SAMPLE_S)


async def _control(session: aiohttp.ClientSession, url: str, ends_s: float, seen: Seen) -> None:
    """The same conversation again and again, in lock-step."""
    frames = [wire.message(Kind.AUDIO, wire.pcm_bytes(f)) for f in speech(CONTROL_FRAMES, 99)]
    target = URL(wire.chat_url(url, **CONTROL), encoded=True)
    while time.monotonic() < ends_s:
        async with session.ws_connect(target) as ws:
            if (await ws.receive()).data[:1] != bytes([Kind.READY]):
                seen.refused += 1
                await asyncio.sleep(0.2)
                continue
            digest = hashlib.sha256()
            for frame in frames:
                await ws.send_bytes(frame)
                while True:
                    data = (await ws.receive()).data
                    if data[0] in (Kind.AUDIO, Kind.TEXT):
                        digest.update(data)
                    if data[0] == Kind.AUDIO:
                        break
            seen.digests[digest.hexdigest()] += 1


async def _rude(
    session: aiohttp.ClientSession, url: str, number: int, ends_s: float, seen: Seen
) -> None:
    rng = random.Random(number)
    while time.monotonic() < ends_s:
        kind = rng.choice(KINDS)
        seen.came[kind] += 1
        with suppress(aiohttp.ClientError, ConnectionError, TimeoutError, TypeError, IndexError):
            async with asyncio.timeout(20):
                await _BEHAVIOURS[kind](session, url, rng)
        await asyncio.sleep(rng.uniform(0, 0.5))


def _chat(url: str, rng: random.Random) -> URL:
    query: dict[str, Any] = {"text_prompt": f"You are number {rng.randrange(40)}.", "format": "pcm"}
    return URL(wire.chat_url(url, **query), encoded=True)


async def _talks(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    async with session.ws_connect(_chat(url, rng)) as ws:
        for frame in speech(rng.randrange(5, 60), rng.randrange(100)):
            await ws.send_bytes(wire.message(Kind.AUDIO, wire.pcm_bytes(frame)))
            with suppress(TimeoutError):
                await ws.receive(FRAME_S)


async def _vanishes(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    async with session.ws_connect(_chat(url, rng)) as ws:
        for _ in range(rng.randrange(10)):
            await ws.send_bytes(wire.message(Kind.AUDIO, bytes(3840)))
        connection = ws._response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()


async def _rubbish(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    target = _chat(url, rng) if rng.random() < 0.5 else URL(wire.chat_url(url), encoded=True)
    async with session.ws_connect(target) as ws:
        for _ in range(50):
            await ws.send_bytes(rng.randbytes(rng.randrange(600)))
            await asyncio.sleep(0.01)


async def _silent(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    async with session.ws_connect(_chat(url, rng)):
        await asyncio.sleep(rng.uniform(0, 5))


async def _fast(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    async with session.ws_connect(_chat(url, rng)) as ws:
        for _ in range(100):
            await ws.send_bytes(wire.message(Kind.AUDIO, bytes(3840)))
            await asyncio.sleep(FRAME_S / 10)


async def _unread(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    target = _chat(url, rng)
    _, writer = await asyncio.open_connection(target.host, target.port, limit=1024)
    try:
        writer.write(
            f"GET {target.raw_path_qs} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        payload = bytes([Kind.AUDIO]) + bytes(3840)
        frame = b"\x82\xfe" + len(payload).to_bytes(2, "big") + bytes(4) + payload
        for _ in range(150):
            writer.write(frame)
            await asyncio.wait_for(writer.drain(), 2)
            await asyncio.sleep(0.02)
        await asyncio.sleep(14)  # beyond what the server waits for
    finally:
        writer.close()


async def _slow_head(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    target = URL(url)
    _, writer = await asyncio.open_connection(target.host, target.port)
    try:
        for byte in b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"x" * 40:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(rng.uniform(0.05, 0.3))
    finally:
        writer.close()


async def _bad_query(session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
    key = rng.choice(["seed", "voice_prompt", "text_topk", "format", "prompt_id", "text_promt"])
    target = URL(
        wire.chat_url(url, **{key: rng.choice(["../../x", "☕" * 50, "-7"])}), encoded=True
    )
    async with session.get(target.with_scheme("http")) as response:
        assert response.status == 400, response.status


_BEHAVIOURS = {
    "talks": _talks, "vanishes": _vanishes, "rubbish": _rubbish, "silent": _silent, "fast": _fast,
    "unread": _unread, "slow head": _slow_head, "bad query": _bad_query,
}  # fmt: skip


def _ended(metrics: str) -> dict[str, int]:
    """Conversations by how they ended."""
    found = {}
    for line in metrics.splitlines():
        if line.startswith("duplex_conversations_total{"):
            name, _, value = line.partition("} ")
            found[name.split('"')[1]] = int(float(value))
    return found


def describe(result: dict[str, Any]) -> str:
    control, memory = result["control"], result["memory_mb"]
    came = ", ".join(f"{count} {kind}" for kind, count in result["came"].items())
    ended = ", ".join(f"{count} {reason}" for reason, count in sorted(result["ended"].items()))
    return "\n".join(
        [
            "# The server among bad clients",
            "",
            f"`python -m benchmarks.soak --minutes {result['minutes']:g} --write`: pocket base, "
            f"{SLOTS} slots, {RUDE_AT_ONCE} bad clients at a time. What each kind does stands in "
            "the benchmark.",
            "",
            f"- Clients that came: {came}.",
            f"- Conversations by how they ended: {ended}.",
            f"- The conversation beside them was held {control['conversations']} times; "
            f"{control['different']} differed from the others in any byte. It found the server "
            f"full {control['found_full']} times.",
            f"- Slots taken at the end: {result['slots_taken_at_the_end']}.",
            f"- Memory of the server: {memory['after_a_tenth']} MB after a tenth of the time, "
            f"{memory['at_the_end']} MB at the end, at most {memory['most']} MB.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
