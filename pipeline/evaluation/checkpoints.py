"""Plays the items to checkpoints: in batches without a server, and the first over a WebSocket.

What is measured should be what is served: of each model one conversation is held over a real server
too, which has as many slots as the batch, and the report says whether it came back bit for bit.
With `sockets` all are held so.

Cost, pocket model on two cores: see benchmarks/evaluate.py and docs/results/evaluate.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.evaluation.items import SpokenItem
from pipeline.evaluation.offline import play_checkpoint
from pipeline.evaluation.play import Played, PlaySettings, describe, evaluate_urls, same_answer
from pipeline.serving.launch import running_server


@dataclass(frozen=True)
class Machine:
    """Where and how models run; of it nothing but rounding is to change what they say."""

    device: str = "auto"
    slots: int = 16
    start_timeout_s: float = 600
    voices: Mapping[str, Path] | None = None


def play_checkpoints(
    checkpoints: Mapping[str, Path],
    spoken: Sequence[SpokenItem],
    settings: PlaySettings,
    machine: Machine,
    report: Callable[[str], None],
    *,
    tokenizer: bytes,
    sockets: bool = False,
) -> tuple[list[Played], dict[str, float]]:
    """All models' conversations, and how long each server took to start.

    Raises:
        ServerError: a server did not start, or a conversation broke.
    """
    if sockets:
        slots = dict.fromkeys(checkpoints, machine.slots)
        at_once = replace(settings, at_a_time=machine.slots)
        return _play_served(checkpoints, spoken, at_once, machine, report, slots)
    played = [
        play_checkpoint(
            label, folder, spoken, settings, report,
            tokenizer=tokenizer, device=machine.device, voices=machine.voices,
            slots=machine.slots,
        )
        for label, folder in checkpoints.items()
    ]  # fmt: skip
    first = replace(settings, seeds=settings.seeds[:1], again=False)
    slots = {model.label: model.info["slots"] for model in played}
    cores = os.cpu_count() or 1
    threads = min(max(1, cores // model.info["processes"]) for model in played)
    served, started_s = _play_served(
        checkpoints, spoken[:1], first, machine, report, slots, threads
    )
    return [
        replace(
            model,
            served=same_answer(
                model.conversations[0].conversation, other.conversations[0].conversation
            ),
        )
        for model, other in zip(played, served, strict=True)
    ], started_s


def _play_served(
    checkpoints: Mapping[str, Path],
    spoken: Sequence[SpokenItem],
    settings: PlaySettings,
    machine: Machine,
    report: Callable[[str], None],
    slots: Mapping[str, int],
    threads: int | None = None,
) -> tuple[list[Played], dict[str, float]]:
    """On a CPU all servers are up at once, each with its threads; on a GPU one after
    the other, since two 7B models need not fit."""
    started_s: dict[str, float] = {}

    def start(servers: ExitStack, label: str) -> str:
        started = time.monotonic()
        url = servers.enter_context(
            running_server(
                checkpoints[label],
                device=machine.device,
                timeout_s=machine.start_timeout_s,
                voices=dict(machine.voices or {}),
                bare=settings.bare,
                slots=slots[label],
            )
        )
        started_s[label] = time.monotonic() - started
        return url

    played: list[Played] = []
    waiting = list(checkpoints)
    with _threads(threads or max(1, (os.cpu_count() or 2) // 2)):
        while waiting:
            with ExitStack() as servers:
                urls = {label: start(servers, label) for label in waiting[:1]}
                info, _ = asyncio.run(describe(urls[waiting[0]], settings))
                if info.get("device") == "cpu":
                    urls |= {label: start(servers, label) for label in waiting[1:]}
                played += evaluate_urls(urls, spoken, settings, report, at_once=True)
                waiting = waiting[len(urls) :]
    return played, started_s


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Threads of the servers' OpenMP, unless the user has set them: as many as a process of the
    batch has, since sums are rounded by their number too.

    OpenMP's threads spin while they wait, unless they are told not to: two items of 12 s took 26 s
    with one thread a server on two cores, and were not done after 140 s with two. One server with
    two threads, on two cores with other work, took 855 ms a frame in place of 53.
    """
    own = {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": "PASSIVE"}
    own = {name: value for name, value in own.items() if name not in os.environ}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
