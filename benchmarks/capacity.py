"""What a set of dialogues takes, from what was measured: time, money, storage, and the bottleneck.

    python -m benchmarks.capacity             # prints the plan, from docs/results/*.json
    python -m benchmarks.capacity --measure   # first measures a small run: sizes, and fixed seconds
    python -m benchmarks.capacity --write     # and writes docs/capacity.md

The model of a stage is  seconds = fixed + each · dialogues.  `each` is CPU time of a benchmark over
many records, `fixed` what a run of six dialogues took beyond that. Training is

    seconds = frames · passes / frames a second of the GPU (benchmarks/pod_costs.py)

and its memory is `training/estimate.py`'s. Nothing else is guessed: what has no source is left out,
and the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.capacity_page import page
from benchmarks.pod_costs import GPUS, frames_per_s, load_speeds
from duplex.config_train import TrainSection
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic, write_json
from duplex.frames import SAMPLE_RATE
from duplex.records import Speech, TensorClip
from pipeline.pods.gpus import GpuType, load_gpus
from pipeline.run import plan
from training.estimate import MOSHI_7B, estimate_memory

RESULTS = CHECKOUT / "docs" / "results"
DATA = RESULTS / "capacity.json"
SOURCES = ("data", "tensors", "runners", "merge", "capacity")
SCALES = (200, 20_000, 2_000_000)
WORKERS = 64
PASSES = 2  # over all clips, as the predecessor trained
SPREAD = ("speech", "tensors")  # over workers; the others are one process
SMALL = {
    "name": "small",
    "personas": {
        "only": ["angry-marcus", "friendly-june", "nervous-mei"],
        "only_scenarios": ["rush-hour", "first-visit"],
    },
    "dialogues": {"per_persona": 2, "min_turns": 8, "max_turns": 10},
    "speech": {"timeline": {"room_tone_dbfs": -62, "leakage_db": -42}},
    "tensors": {"valid_fraction": 0.3, "max_frames": 750},
}
STAGES = ("personas", "dialogues", "voices", "speech", "tensors")


@dataclass(frozen=True)
class StageCost:
    """Of one stage: seconds of one core and bytes, fixed and for each dialogue."""

    stage: str
    fixed_s: float
    each_s: float
    each_bytes: float
    source: str

    def seconds(self, dialogues: int, workers: int = 1) -> float:
        shared = workers if self.stage in SPREAD else 1
        return self.fixed_s + self.each_s * dialogues / shared

    def gigabytes(self, dialogues: int) -> float:
        return self.each_bytes * dialogues / 1e9


def stage_costs(results: Mapping[str, Any]) -> list[StageCost]:
    """Of the data stages, by the files of docs/results; a dialogue is as long as those measured."""
    data, small = results["data"], results["capacity"]
    # Others used the machine too: CPU time is what a stage itself took, and nearly all of it is one
    # process's. The share of the whole command stands for each stage's.
    own = min(1.0, data["cpu_s"] / data["wall_s"])
    minutes = data["minutes"] / data["dialogues"]
    audio_s = 60 / results["tensors"]["speed"]["the stage, one process"]  # for a minute
    each_s = {
        "personas": 0.0,
        "dialogues": data["stage_s"]["dialogues"] * own / data["dialogues"]
        + data["near_duplicates"]["cpu_s"] / data["near_duplicates"]["texts"],
        "voices": 0.0,
        "speech": data["stage_s"]["speech"] * own / data["dialogues"],
        "tensors": audio_s * minutes,
    }
    sources = {
        "dialogues": "data.json", "speech": "data.json", "tensors": "tensors.json",
    }  # fmt: skip
    scale = minutes / (small["minutes"] / small["dialogues"])  # of what grows with the audio
    costs = []
    for name in STAGES:
        taken, size = small["stage_s"][name], small["stage_bytes"][name] / small["dialogues"]
        size *= scale if name in SPREAD else 1.0
        if name in ("personas", "voices"):  # grow with personas alone
            costs.append(StageCost(name, taken, 0.0, 0.0, "capacity.json"))
            continue
        own_small = each_s[name] * small["dialogues"] / scale
        fixed_s = max(0.0, taken - own_small)
        costs.append(StageCost(name, fixed_s, each_s[name], size, sources[name]))
    return costs


def ledger_cost(results: Mapping[str, Any]) -> StageCost:
    """What the driver does for a record of each of three stages, whoever makes it."""
    runners = results["runners"]
    each_s = 3 * runners["runners"]["local"]["trivial_s"] / runners["records"]
    return StageCost("ledgers", 0.0, each_s, 0.0, "runners.json")


def gpu_rows(
    gpus: Sequence[GpuType], frames_each: float, section: TrainSection
) -> list[dict[str, Any]]:
    """For each GPU whose peak is known: hours and dollars of training by scale, memory."""
    lm = {**MOSHI_7B, "dep_q": 16}
    least = section.model_copy(
        update={
            "accumulate": section.batch_size,
            "runtime": section.runtime.model_copy(update={"checkpointing": "full"}),
        }
    )
    need_gb = estimate_memory(lm, least).total / 1e9
    rows = []
    speeds = load_speeds()
    known = {one.name for one in speeds.gpus}
    for gpu in gpus:
        if gpu.id not in known:
            continue
        speed = frames_per_s(gpu.id, speeds).value
        hours = [n * frames_each * PASSES / speed / 3600 for n in SCALES]
        rows.append(
            {
                "name": gpu.id,
                "usd_per_hour": gpu.usd_h,
                "as_of": str(gpu.date) if gpu.date else None,
                "memory_gb": gpu.memory_gb,
                "need_gb": need_gb,
                "hours": hours,
                "usd": [one * gpu.usd_h for one in hours],
            }
        )
    return rows


def demo_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Dialogues, minutes and the stages' seconds of docs/results/demo.json.

    Raises:
        ValueError: a stage is not there.
    """
    stages = {one["stage"]: one for one in found["stages"]}
    missing = [stage for stage in STAGES if stage not in stages]
    if missing:
        raise ValueError(f"the demo must have all stages, found no {', '.join(missing)}")
    return {
        "dialogues": stages["dialogues"]["records"],
        "minutes": found["minutes"],
        "stage_s": {stage: stages[stage]["seconds"] for stage in STAGES},
    }


def against_demo(
    costs: Sequence[StageCost], demo: Mapping[str, Any], minutes_each: float
) -> list[dict[str, Any]]:
    """What the model says of the demo, beside what it took."""
    rows = []
    for cost in costs:
        number = demo["dialogues"]
        if cost.stage in SPREAD:
            number = demo["minutes"] / minutes_each
        said, took = cost.fixed_s + cost.each_s * number, demo["stage_s"][cost.stage]
        rows.append({"stage": cost.stage, "model_s": said, "demo_s": took, "ratio": said / took})
    return rows


def capacity(
    results: Mapping[str, Any],
    gpus: Sequence[GpuType],
    section: TrainSection,
    demo: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the page shows."""
    data = results["data"]
    minutes = data["minutes"] / data["dialogues"]
    small = results["capacity"]
    frames = small["frames"] / small["minutes"] * minutes
    stages, ledgers = stage_costs(results), ledger_cost(results)
    merges = [one["merge_s"] for one in results["merge"]["rounds"]]
    return {
        "machine": small["machine"],
        "minutes_each": minutes,
        "frames_each": frames,
        "scales": SCALES,
        "workers": WORKERS,
        "passes": PASSES,
        "stages": [*stages, ledgers],
        "spread": SPREAD,
        "gpus": gpu_rows(gpus, frames, section),
        "merge_s": statistics.median(merges),
        "merge_gb": results["merge"]["weights_gb"],
        "demo": against_demo(stages, demo, minutes),
        "line_bytes": max(small["line_bytes"].values()) / small["dialogues"],
        "demo_set": {"dialogues": demo["dialogues"], "minutes": demo["minutes"]},
    }


# -- what is measured here


def measure() -> dict[str, Any]:
    """A run of six dialogues: each stage's seconds and bytes, and how long clips are."""
    folder = Path(tempfile.mkdtemp(prefix="capacity-benchmark-"))
    try:
        path = folder / "small.yaml"
        path.write_text(yaml.safe_dump(SMALL))
        subprocess.run(
            [sys.executable, "-m", "duplex.cli", "run", str(path), "--to", "tensors", "--runs",
             str(folder / "runs")],
            cwd=CHECKOUT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        steps = {step.stage.name: step for step in plan(load_config(path), folder / "runs")}
        folders = {name: steps[name].folder for name in STAGES}
        found = {name: one for name, one in folders.items() if one is not None}
        manifests = {name: one.manifest() or {} for name, one in found.items()}
        spoken = [r for r in found["speech"].records() if isinstance(r, Speech)]
        clips = [r for r in found["tensors"].records() if isinstance(r, TensorClip)]
        from training.device import cpu_name

        return {
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
            "dialogues": len(spoken),
            "minutes": sum(one.num_samples for one in spoken) / SAMPLE_RATE / 60,
            "frames": sum(one.num_frames for one in clips),
            "stage_s": {name: m["provenance"]["seconds"] for name, m in manifests.items()},
            "line_bytes": {name: _bytes(one.path / "parts") for name, one in found.items()},
            "stage_bytes": {name: _bytes(one.path) for name, one in found.items()},
        }
    finally:
        shutil.rmtree(folder)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="docs/results/capacity.json anew")
    parser.add_argument("--write", action="store_true", help="docs/capacity.md")
    options = parser.parse_args()
    if options.measure:
        write_json(DATA, measure())
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SOURCES}
    gpus = load_gpus(GPUS)
    section = load_config(CHECKOUT / "configs" / "coffee.yaml").train
    demo = demo_of(json.loads((RESULTS / "demo.json").read_text()))
    text = page(capacity(results, gpus, section, demo))
    print(text)
    if options.write:
        write_atomic(CHECKOUT / "docs" / "capacity.md", text.encode())


if __name__ == "__main__":
    main()
