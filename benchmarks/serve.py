"""What the server costs, and how many conversations it holds at real time.

    python -m benchmarks.serve            # prints
    python -m benchmarks.serve --write    # and writes docs/results/serve.*

slots     one step of the batch (codec in, model, codec out) with all slots talking, by their number
server    frames a second over a WebSocket with Opus, against a plain loop of Opus in, step, Opus
          out in one process; in turns, so that both meet the same machine
load      a server with four slots and as many clients, each with a frame every 80 ms at its own
          phase: from a frame sent to its answer received
prefill   a prompt in blocks, against one call a frame

The model is the pocket base, one thread. What a 7B does on a GPU is not measured here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
import sphn
import torch
from yarl import URL

from duplex.config import SamplingSection
from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic, write_json
from duplex.frames import FRAME_S, FRAME_SAMPLES, SAMPLE_RATE
from pipeline.engines.pocket import pocket_folder
from pipeline.serving import prefill, wire
from pipeline.serving.chat import AudioIn
from pipeline.serving.launch import running_server
from pipeline.serving.model import ServedModel
from pipeline.serving.wire import Kind

RESULTS = CHECKOUT / "docs" / "results"
PROMPT = (
    "You work for Baker Motors which is a car rental and your name is Anna. Information: The small "
    "car costs forty dollars. We open at nine. Parking is behind the house. The manager is Paul."
)
SLOTS = (1, 2, 4, 8)
STEPS, WARM_UP = 80, 10
ROUNDS, ROUND_FRAMES = 7, 60  # in all less than the model's context
LOAD_SLOTS, LOAD_S = 4, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="docs/results/serve.*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = pocket_folder(CHECKOUT / "runs" / ".models")
    result = {
        "slots": {str(number): slot_ms(folder, number) for number in SLOTS},
        "prefill": prefill_ms(folder),
        "server": asyncio.run(server_ratio(folder)),
        "load": asyncio.run(load(folder)),
    }
    page = describe(result)
    print(page)
    if arguments.write:
        write_json(RESULTS / "serve.json", result)
        write_atomic(RESULTS / "serve.md", page.encode())


def speech(num_frames: int, seed: int = 0) -> np.ndarray:
    """float32 [num_frames, 1920]: a tone in noise, as loud as speech."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(num_frames * FRAME_SAMPLES) / SAMPLE_RATE
    tone = 0.1 * np.sin(2 * np.pi * rng.uniform(100, 300) * time_s)
    return (tone + 0.02 * rng.standard_normal(len(time_s))).astype(np.float32).reshape(-1, 1920)


# -- slots, prefill


def slot_ms(folder: Path, num_slots: int) -> dict[str, float]:
    """Milliseconds of a step in which all slots talk."""
    model = ServedModel.load(folder, "cpu", num_slots=num_slots)
    for slot in range(num_slots):
        model.begin(PROMPT, SamplingSection(), seed=slot, slot=slot)
    audio = [speech(STEPS + WARM_UP, slot) for slot in range(num_slots)]
    taken = []
    for frame in range(STEPS + WARM_UP):
        heard = {slot: audio[slot][frame] for slot in range(num_slots)}
        started_s = time.perf_counter()
        model.step(heard)
        taken.append(1000 * (time.perf_counter() - started_s))
    kept = taken[WARM_UP:]
    return {"median": median(kept), "p95": float(np.percentile(kept, 95))}


def prefill_ms(folder: Path) -> dict[str, float]:
    """Milliseconds of a prompt, in blocks and a frame at a time; in turns, medians."""
    model = ServedModel.load(folder, "cpu")
    planned = model.plan(PROMPT)
    taken: dict[int, list[float]] = {}
    usual = prefill.BLOCK_FRAMES["cpu"]
    for size in (usual, 1) * 5:
        prefill.BLOCK_FRAMES["cpu"] = size
        run = model.prefill(planned)
        started_s = time.perf_counter()
        while run.advance() is None:
            pass
        taken.setdefault(size, []).append(1000 * (time.perf_counter() - started_s))
    prefill.BLOCK_FRAMES["cpu"] = usual
    return {
        "frames": planned.prompt.num_frames,
        "block_frames": usual,
        "blocks_ms": median(taken[usual]),
        "frames_ms": median(taken[1]),
    }


# -- the server's own share


def opus_pages(num_frames: int) -> list[bytes]:
    """An Ogg-Opus stream as a client sends it, what each frame gave."""
    writer = sphn.OpusStreamWriter(SAMPLE_RATE)
    return [writer.append_pcm(frame) for frame in speech(num_frames)]


class Loop:
    """Opus in, step, Opus out: what a conversation costs without a server."""

    def __init__(self, folder: Path, pages: list[bytes]):
        self._model = ServedModel.load(folder, "cpu")
        self._model.begin(PROMPT, SamplingSection(), seed=1)
        self._audio, self._out = AudioIn("opus"), sphn.OpusStreamWriter(SAMPLE_RATE)
        self._pages = iter(pages)

    def frames(self, count: int) -> float:
        """Seconds a frame."""
        started_s, done = time.perf_counter(), 0
        while done < count:
            for frame in self._audio.append(next(self._pages)):
                pcm, _ = self._model.step({0: frame})[0]
                self._out.append_pcm(pcm)
                done += 1
        return (time.perf_counter() - started_s) / done


async def server_ratio(folder: Path) -> dict[str, Any]:
    """Time of a frame, server over loop, in turns."""
    total = (ROUNDS + 1) * (ROUND_FRAMES + 20)
    pages = opus_pages(total)
    loop = Loop(folder, pages)
    ratios, loops, servers = [], [], []
    with one_thread(), running_server(folder, device="cpu", slots=1) as url:
        chat = wire.chat_url(url, text_prompt=PROMPT, seed=1)
        target = URL(chat, encoded=True)
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(target, max_msg_size=0) as ws,
        ):
            client = Pipelined(ws, pages)
            await client.ready()
            for round_ in range(ROUNDS + 1):
                one, other = loop.frames(ROUND_FRAMES), await client.frames(ROUND_FRAMES)
                if round_:  # the first warms both up
                    loops.append(1000 * one)
                    servers.append(1000 * other)
                    ratios.append(other / one)
    return {
        "loop_ms": median(loops),
        "server_ms": median(servers),
        "ratio": median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


class Pipelined:
    """A client that always has a few frames under way, so that the server never waits for it."""

    AHEAD = 8

    def __init__(self, ws: aiohttp.ClientWebSocketResponse, pages: list[bytes]):
        self._ws, self._pages, self._reader = ws, iter(pages), AudioIn("opus")

    async def ready(self) -> None:
        while (await self._ws.receive()).data[0] != Kind.READY:
            pass
        for _ in range(self.AHEAD):
            await self._send()

    async def frames(self, count: int) -> float:
        """Seconds a frame, by the messages of audio that come back."""
        started_s, done = time.perf_counter(), 0
        while done < count:
            message = await self._ws.receive()
            if message.data[0] == Kind.AUDIO:
                done += sum(1 for _ in self._reader.append(message.data[1:]))
                await self._send()
        return (time.perf_counter() - started_s) / done

    async def _send(self) -> None:
        await self._ws.send_bytes(wire.message(Kind.AUDIO, next(self._pages)))


# -- load


async def load(folder: Path) -> dict[str, Any]:
    """Latency of frames with every slot taken, at real time."""
    with one_thread(), running_server(folder, device="cpu", slots=LOAD_SLOTS) as url:
        async with aiohttp.ClientSession() as session:
            rng = np.random.default_rng(0)
            found = await asyncio.gather(
                *(talk(session, url, number, rng.random()) for number in range(LOAD_SLOTS))
            )
    latencies = 1000 * np.concatenate([latency for latency, _ in found])
    return {
        "slots": LOAD_SLOTS,
        "seconds": LOAD_S,
        "frames": len(latencies),
        "sent": int(sum(sent for _, sent in found)),
        "p50_ms": float(np.percentile(latencies, 50)),
        "p95_ms": float(np.percentile(latencies, 95)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "max_ms": float(latencies.max()),
    }


async def talk(
    session: aiohttp.ClientSession, url: str, number: int, phase: float
) -> tuple[np.ndarray, int]:
    """Seconds from each frame sent to its answer, and how many were sent."""
    num_frames = int(LOAD_S / FRAME_S)
    content = [wire.message(Kind.AUDIO, wire.pcm_bytes(f)) for f in speech(num_frames, number)]
    chat = wire.chat_url(url, text_prompt=PROMPT, seed=number, format="pcm")
    sent_s: list[float] = []
    latencies: list[float] = []
    async with session.ws_connect(URL(chat, encoded=True), max_msg_size=0) as ws:
        while (await ws.receive()).data[0] != Kind.READY:
            pass
        start_s = time.perf_counter() + phase * FRAME_S

        async def send() -> None:
            for place, message in enumerate(content):
                await asyncio.sleep(max(0.0, start_s + place * FRAME_S - time.perf_counter()))
                sent_s.append(time.perf_counter())
                await ws.send_bytes(message)

        sending = asyncio.create_task(send())
        while len(latencies) < num_frames:
            message = await ws.receive()
            if message.data[0] == Kind.AUDIO:
                latencies.append(time.perf_counter() - sent_s[len(latencies)])
        await sending
    return np.array(latencies), len(sent_s)


@contextmanager
def one_thread() -> Iterator[None]:
    """A server that is started within computes with one thread, as the loop here does."""
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def describe(result: dict[str, Any]) -> str:
    server, filled, loaded = result["server"], result["prefill"], result["load"]
    lines = [
        "# The server: its own cost, and how many talk at once",
        "",
        "`python -m benchmarks.serve --write`: pocket base on a CPU, one thread for the model. A "
        "frame lasts 80 ms.",
        "",
        "| slots, all talking | a step, median ms | p95 ms | ms a conversation |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for number, step in result["slots"].items():
        share = step["median"] / int(number)
        lines.append(f"| {number} | {step['median']:.1f} | {step['p95']:.1f} | {share:.1f} |")
    lines += [
        "",
        f"**Server over loop**: {server['ratio']:.3f} (median of {len(server['ratios'])} turns of "
        f"{ROUND_FRAMES} frames, {min(server['ratios']):.3f} to {max(server['ratios']):.3f}): "
        f"{server['server_ms']:.1f} ms a frame over a WebSocket with Opus, {server['loop_ms']:.1f} "
        "ms in a plain loop of Opus in, step, Opus out.",
        "",
        f"**Load**: {loaded['slots']} clients at real time for {loaded['seconds']:g} s, "
        f"{loaded['frames']} of {loaded['sent']} frames answered; from sent to answered "
        f"{loaded['p50_ms']:.0f} ms in the median, p95 {loaded['p95_ms']:.0f} ms, p99 "
        f"{loaded['p99_ms']:.0f} ms, at most {loaded['max_ms']:.0f} ms.",
        "",
        f"**Prefill** of {filled['frames']} frames: {filled['blocks_ms']:.0f} ms in blocks of "
        f"{filled['block_frames']}, {filled['frames_ms']:.0f} ms one frame at a time: "
        f"{filled['frames_ms'] / filled['blocks_ms']:.1f} times as long.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
