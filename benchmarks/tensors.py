"""What encoding costs, and what the manner of encoding changes.

    python -m benchmarks.tensors                 # prints
    python -m benchmarks.tensors --write         # and writes docs/results/tensors.{json,md}
    python -m benchmarks.tensors --write --only memory      # measures that part again

Speed: audio-hours an hour (a conversation's two channels are one audio) of the codec, one file
and channel at a time being 1. Differences: whole against frame by frame as the server encodes,
and against turn by turn as the predecessor did. Memory: peak of the process that encodes an
hour, against one that encodes four minutes.

The speech is that of configs/pocket-full.yaml, by espeak-ng: all of it for the stage, some of it
for the rest. The codec is that of `--base`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duplex.clips import turn_frames
from duplex.config import Config, ModelSection
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE, frames_covering_samples
from duplex.memory import keep_freed_memory
from duplex.records import Speech
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.engines.checkpoint import resolve_checkpoint
from pipeline.engines.codec import (
    encode,
    encode_batch,
    encode_long,
    measure_tokens,
)
from pipeline.engines.encoding import read_stereo
from pipeline.run import plan
from pipeline.runners.local import execute
from pipeline.tensors import TensorsStage
from training.device import cpu_name

BATCH = 8
QUIET = 1e-4  # RMS below which a frame counts as silent, with the frames that it still rings in
RINGING_FRAMES = 6
RESULTS = CHECKOUT / "docs" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=["memory"], help="the rest as in docs/results")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(measure_memory(args.base, args.memory_of)))
        return
    if args.only:
        result = json.loads((RESULTS / "tensors.json").read_text())
        result["memory"] = _memories(args.base)
    else:
        with tempfile.TemporaryDirectory(prefix="duplex-bench-") as name:
            result = measure(args, Path(name))
    text = describe(result)
    print(text)
    if args.write:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "tensors.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "tensors.md").write_text(text)


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    import torch

    keep_freed_memory()
    config_path = CHECKOUT / "configs" / "pocket-full.yaml"
    command = [sys.executable, "-m", "duplex.cli", "run", str(config_path)]
    command += ["--to", "speech", "--runs", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=CHECKOUT)
    config = load_config(config_path, [f"model.base={args.base}"])
    speech = plan(config, root)[3].folder
    assert speech is not None
    chosen = [r for r in speech.records() if isinstance(r, Speech)][: args.conversations]
    mimi = resolve_checkpoint(ModelSection(base=args.base), root).load_mimi()
    audio = [read_stereo(speech.blob_path(r.audio, ".wav")) for r in chosen]
    encode(mimi, audio[0][:, : 20 * FRAME_SAMPLES])  # warm
    whole = [encode(mimi, one) for one in audio]
    return {
        "machine": {"cores": os.cpu_count(), "cpu": cpu_name(), "torch": torch.__version__},
        "codec": args.base,
        "workers": args.workers,
        "conversations": len(chosen),
        "stage_conversations": sum(1 for record in speech.records()),
        "audio_minutes": sum(one.shape[1] for one in audio) / SAMPLE_RATE / 60,
        "speed": _speeds(mimi, audio) | _stage_speeds(config, speech, root, args.workers),
        "streaming": _against_streaming(mimi, audio[:4], whole[:4]),
        "turns": _against_turns(mimi, chosen, audio, whole),
        "memory": _memories(args.base),
    }


# -- speed


def _speeds(mimi: Any, audio: list[np.ndarray]) -> dict[str, float]:
    hours = sum(one.shape[1] for one in audio) / SAMPLE_RATE / 3600
    ways: dict[str, Callable[[], object]] = {
        "one channel at a time": lambda: [
            encode(mimi, one[c : c + 1]) for one in audio for c in (0, 1)
        ],
        "two channels as one batch": lambda: [encode(mimi, one) for one in audio],
        f"batches of {BATCH} conversations": lambda: [
            encode_batch(mimi, audio[i : i + BATCH]) for i in range(0, len(audio), BATCH)
        ],
    }
    return {name: hours / _hours_of(way) for name, way in ways.items()}


def _hours_of(way: Callable[[], object], repeats: int = 2) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        way()
        best = min(best, time.perf_counter() - started)
    return best / 3600


def _stage_speeds(
    config: Config, speech: StageFolder, root: Path, workers: int
) -> dict[str, float]:
    """The whole stage, start of the processes, prompt, alignment and files included."""
    hours = sum(r.num_samples for r in speech.records() if isinstance(r, Speech))
    hours = hours / SAMPLE_RATE / 3600
    speeds = {}
    for name, runtime in (
        ("the stage, one process", {"workers": 1, "cache": False}),
        (f"the stage, {workers} processes", {"workers": workers, "cache": False}),
        ("the stage, filling its cache", {"workers": 1, "cache": True}),
        ("the stage, from its cache", {"workers": 1, "cache": True}),
    ):
        section = config.tensors.model_dump() | {"runtime": runtime | {"device": "cpu"}}
        run = Config.model_validate(config.model_dump() | {"tensors": section})
        folder = StageFolder(root / f"05-tensors-{len(speeds)}", "tensors", f"k{len(speeds)}")
        context = StageContext(run, root, {"speech": speech})
        started = time.perf_counter()
        execute(_Fresh(), context, folder)
        speeds[name] = hours / ((time.perf_counter() - started) / 3600)
    return speeds


class _Fresh(TensorsStage):
    """Adopts nothing from the benchmark's other folders."""

    def record_key(self, config: Config, task: Any) -> str:
        runtime = config.tensors.runtime
        return super().record_key(config, task) + f"{runtime.workers}{runtime.cache}{id(self)}"


# -- differences


def _against_streaming(
    mimi: Any, audio: list[np.ndarray], whole: list[np.ndarray]
) -> dict[str, float]:
    """Shares of codes that differ between the whole and frame-by-frame encoding."""
    import torch
    from moshi.utils.compile import no_compile

    differs, silent = [], []
    for one, codes in zip(audio, whole, strict=True):
        padded = _whole_frames(one)
        with torch.no_grad(), no_compile(), mimi.streaming(2):
            parts = [
                mimi.encode(torch.from_numpy(padded[:, None, s : s + FRAME_SAMPLES]))
                for s in range(0, padded.shape[1], FRAME_SAMPLES)
            ]
        streamed = torch.cat(parts, dim=2)[:, :8].numpy()
        differs.append((streamed != codes).mean(axis=1).ravel())
        silent.append(_silent_frames(one).ravel())
    different, quiet = np.concatenate(differs), np.concatenate(silent)
    return {
        "codes that differ where there is sound": float(different[~quiet].mean()),
        "codes that differ in digital silence": float(different[quiet].mean()),
    }


def _against_turns(
    mimi: Any, speeches: list[Speech], audio: list[np.ndarray], whole: list[np.ndarray]
) -> dict[str, float]:
    """Shares of codes that differ between the whole and each turn by itself, by distance from
    the turn's start; and how much of encoded silence is the constant that stands for it."""
    silence = np.asarray(measure_tokens(mimi).silence)
    bands = {"frames 1-3": (0, 3), "frames 4-12": (3, 12), "frames 13-25": (12, 25),
             "later frames": (25, 10**6)}  # fmt: skip
    seen: dict[str, list[float]] = {name: [] for name in bands}
    constant = []
    for speech, one, codes in zip(speeches, audio, whole, strict=True):
        for turn in speech.turns:
            start, end = turn_frames(turn)
            channel = 0 if turn.role == "agent" else 1
            alone = encode(
                mimi, one[channel : channel + 1, start * FRAME_SAMPLES : end * FRAME_SAMPLES]
            )[0]
            within = codes[channel, :, start : start + alone.shape[1]]
            differs = (alone != within).mean(axis=0)
            for name, (low, high) in bands.items():
                seen[name] += differs[low:high].tolist()
        quiet = _silent_frames(one)
        equal = (codes == silence[None, :, None]).mean(axis=1)
        constant += equal[quiet].tolist()
    shares = {
        f"codes that differ in a turn's {name}": float(np.mean(v)) for name, v in seen.items()
    }
    return shares | {"codes of digital silence that are the constant": float(np.mean(constant))}


def _silent_frames(audio: np.ndarray) -> np.ndarray:
    """bool [C, T]: frames without sound for as long as the codec's convolutions look back."""
    frames = _whole_frames(audio).reshape(audio.shape[0], -1, FRAME_SAMPLES)
    quiet = np.sqrt((frames**2).mean(axis=2)) < QUIET
    run = np.ones(RINGING_FRAMES)
    counts = [np.convolve(row, run)[: row.size] for row in quiet.astype(float)]
    return np.stack(counts) >= RINGING_FRAMES


def _whole_frames(audio: np.ndarray) -> np.ndarray:
    length = frames_covering_samples(audio.shape[1]) * FRAME_SAMPLES
    return np.pad(audio, ((0, 0), (0, length - audio.shape[1])))


# -- memory


def _memories(base: str) -> dict[str, float]:
    """Peak resident GB of a process that encodes so many minutes of two channels."""
    peaks = {}
    for minutes in (4, 60):
        command = [sys.executable, "-m", "benchmarks.tensors", "--base", base]
        command += ["--memory-of", str(minutes)]
        result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=CHECKOUT)
        peaks[f"{minutes} minutes"] = json.loads(result.stdout)["peak_gb"]
    return peaks


def measure_memory(base: str, minutes: int) -> dict[str, float]:
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        mimi = resolve_checkpoint(ModelSection(base=base), Path(name)).load_mimi()
        num_samples = minutes * 60 * SAMPLE_RATE

        def read(start: int, stop: int) -> np.ndarray:
            rng = np.random.default_rng(start)
            return (0.05 * rng.standard_normal((2, stop - start), dtype=np.float32)).astype(
                np.float32
            )

        codes = encode_long(mimi, read, num_samples)
    assert codes.shape[2] == frames_covering_samples(num_samples)
    return {"peak_gb": _peak_bytes() / 1e9}


def _peak_bytes() -> int:
    """Linux's VmHWM, which is this program's own: `ru_maxrss` keeps the parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# -- the page


def describe(result: dict[str, Any]) -> str:
    machine, speed = result["machine"], result["speed"]
    first, _, batch, alone, several, _, from_cache = speed.values()
    batched, spread, cached = batch / first, several / alone, from_cache / alone
    lines = [
        "# Encoding conversations",
        "",
        f"`python -m benchmarks.tensors --write`: {result['conversations']} conversations, "
        f"{result['audio_minutes']:.1f} minutes ({result['stage_conversations']} for the stage), "
        f"codec of `{result['codec']}`, "
        f"{machine['cores']} cores ({machine['cpu']}), one thread a process, "
        f"torch {machine['torch']}.",
        "",
        "| way | audio-hours an hour | against the first |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {value:.1f} | {value / first:.2f} |" for name, value in speed.items()),
        "",
        f"On this CPU batches of {BATCH} ran at {batched:.2f} times the speed of one channel at a "
        "time, so `tensors.batch` stays 1 unless there is a GPU, where nobody has measured it "
        f"yet. The stage ran at {spread:.2f} times the speed of one process with "
        f"{result['workers']} of them, and at {cached:.1f} times with its codes in the cache.",
        "",
        "| difference | share |",
        "| --- | ---: |",
        *(f"| {name} | {value:.2%} |" for part in ("streaming", "turns")
          for name, value in result[part].items()),
        "",
        "| peak memory of encoding | GB |",
        "| --- | ---: |",
        *(f"| {name} | {value:.2f} |" for name, value in result["memory"].items()),
        "",
        "Whole conversations are encoded because that is what a server hears: its codec runs on "
        "without a break, so the first frames of a turn follow the silence before it, and silence "
        "is what the codec makes of it there. Turn by turn each turn starts from nothing. What "
        "differs between the whole and frame by frame is rounding where two codes are all but "
        "equally near; random weights have many such ties in digital silence.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
