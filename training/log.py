"""What a run writes down, and what it tells whoever watches.

    metrics.jsonl   what is determined by the inputs, the same bytes on every run; kinds `train`,
                    `valid` (held-out clips), `valid_base` (held-out clips of the base data) and
                    `guards`. NLL in nats a prediction; perplexity = exp(NLL).
    timing.jsonl    the rest: seconds, frames/s, memory, frames with and without padding

Weights & Biases gets the same figures when `train.runtime.wandb` is set, also offline, and the
train section without paths (`training.wandb_run`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from duplex.base import canonical_json
from duplex.config_train import TrainSection
from duplex.files import append_line, write_atomic
from training.loss import StreamSums, stream_means
from training.wandb_run import open_run

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
PERPLEXITY_STREAMS = ("text", "text_nonpad")
_LARGEST_EXPONENT = 700  # exp of more is no float64
_PATHS = {"continue_from": True, "base_data": {"folders"}, "runtime": True}


def training_speed(timing: Iterable[Mapping[str, Any]]) -> float | None:
    """Frames a second over all training steps of a timing.jsonl; None without one."""
    steps = [line for line in timing if line["kind"] == "train"]
    seconds = sum(line["seconds"] for line in steps)
    return sum(line["frames"] for line in steps) / seconds if seconds else None


class StopTraining(Exception):
    """Training must end here, in order: the best adapter is handed in, with the reason.

    Args:
        reason: what was found, and what to do.
        line: what the check found, logged all the same.
    """

    def __init__(self, reason: str, line: dict[str, Any] | None = None):
        self.reason, self.line = reason, line or {}
        super().__init__(reason)


@dataclass(frozen=True)
class StepReport:
    """What a progress bar shows. `frames_per_s` counts training alone, without padding;
    `memory_bytes`: the process's on a CPU, the highest so far on a GPU."""

    step: int
    loss: float
    frames_per_s: float
    memory_bytes: int = 0


def perplexities(streams: Mapping[str, float | None]) -> dict[str, float | None]:
    """exp of the text's NLL, with padding and without; None where there is no prediction."""
    found = {name: streams.get(name) for name in PERPLEXITY_STREAMS}
    return {
        name: None if nll is None or nll > _LARGEST_EXPONENT else math.exp(nll)
        for name, nll in found.items()
    }


def valid_line(kind: str, step: int, loss: float, sums: StreamSums) -> dict[str, Any]:
    streams = stream_means(sums)
    perplexity = perplexities(streams)
    return {"kind": kind, "step": step, "loss": loss, "streams": streams, "perplexity": perplexity}


def memory_bytes(device: torch.device) -> int:
    """Resident memory of this process; on a GPU the highest that torch has held there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class TrainLog:
    """The files of one run in `work`, and Weights & Biases where it is asked for.

    Args:
        writes: False on all ranks but the first: they keep the lines and write nothing.
    """

    def __init__(self, work: Path, *, writes: bool = True):
        self._work, self._writes = work, writes
        self._wandb: Any = None
        self.lines: list[str] = []

    def restart(self, lines: list[str]) -> None:
        """Go back to these lines: those of the checkpoint that the run goes on from."""
        self.lines = list(lines)
        if self._writes:
            text = "".join(f"{line}\n" for line in self.lines)
            write_atomic(self._work / METRICS, text.encode())

    def note(self, line: dict[str, Any]) -> None:
        self.lines.append(canonical_json(line))
        if self._writes:
            append_line(self._work / METRICS, self.lines[-1], durable=False)
        if self._wandb is not None:
            self._wandb.log(_flat(line), line["step"])

    def note_time(
        self, step: int, kind: str, lengths: Sequence[Sequence[int]], seconds: float, memory: int
    ) -> None:
        """
        Args:
            lengths: frames of each clip of each forward pass, over all ranks.
            seconds: wall clock.
            memory: bytes.
        """
        frames = sum(map(sum, lengths))
        line = {
            "step": step,
            "kind": kind,
            "frames": frames,
            "padded_frames": sum(len(part) * max(part) for part in lengths),
            "seconds": round(seconds, 4),
            "frames_per_s": round(frames / seconds, 1) if seconds else 0.0,
            "memory_bytes": memory,
        }
        if self._writes:
            append_line(self._work / TIMING, canonical_json(line), durable=False)
        if self._wandb is not None:
            values = {f"{kind}/{key}": line[key] for key in ("frames_per_s", "memory_bytes")}
            self._wandb.log(values, step)

    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def start_wandb(self, section: TrainSection, name: str, identity: str, resumed: bool) -> None:
        if not section.runtime.wandb or not self._writes:
            return
        config = section.model_dump(mode="json", exclude=_PATHS)  # pyright: ignore
        self._wandb = open_run(name, self._work, config, run_id=identity[:16], resumed=resumed)

    def close(self, failed: bool = False) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """kind/name -> number, of a line and of the mappings in it."""
    found: dict[str, float] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, (int, float)):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}/{key}", inner)

    for key, value in line.items():
        if key in ("kind", "step"):
            continue
        if key == "streams":
            for name, nll in value.items():
                collect(f"{line['kind']}/{name}", nll)
        else:
            collect(f"{line['kind']}/{key}", value)
    return found
