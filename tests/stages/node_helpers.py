"""Nodes of a training run on this machine: each its own `duplex run`, in its own folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.stages.training_factories import write_tensors_stage

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny"
LENGTHS = {"train": [50, 24, 40, 33, 21, 60], "valid": [45, 30, 28]}
TRAIN = {
    "steps": 6,
    "batch_size": 4,
    "processes": 2,
    "crop_frames": 60,
    "learning_rate": 5e-3,
    "warmup_steps": 1,
    "validate_every": 3,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    "guards": {"clips": 1, "swaps": 1, "free_seconds": 0.8},
    "runtime": {"checkpoint_every": 2, "device": "cpu", "join_timeout_s": 120},
}


def free_address(host: str = "127.0.0.1") -> str:
    with socket.socket() as trial:
        trial.bind((host, 0))
        return f"{host}:{trial.getsockname()[1]}"


def own_host() -> str | None:
    """An address of this machine that is not loopback's."""
    stats = psutil.net_if_stats()
    found = [
        one.address
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family == socket.AF_INET and stats[name].isup
    ]
    return next((address for address in found if not address.startswith("127.")), None)


@dataclass
class Place:
    """A run root with finished tensors, and a config for them."""

    folder: Path
    checkpoint: Path

    @classmethod
    def make(cls, folder: Path, checkpoint: Path) -> Place:
        run = folder / "runs" / NAME
        stage = write_tensors_stage(run / "05-tensors-00000000", checkpoint, LENGTHS)
        (run / "imports").mkdir(parents=True)
        pointer = {"folder": stage.path.name, "key": stage.key}
        (run / "imports" / "tensors.json").write_text(json.dumps(pointer))
        return cls(folder, checkpoint)

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def train_folder(self) -> Path:
        (found,) = (self.runs / NAME).glob("06-train-*")
        return found

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.train_folder() / "manifest.json").read_text())

    def log(self) -> list[dict[str, Any]]:
        lines = (self.train_folder() / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def start(
        self, rank: int = 0, address: str | None = None, *, runs: Path | None = None,
        environment: dict[str, str] | None = None, **train: Any,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """A node's own process, in a folder of its own; without an address, the only one."""
        home = self.folder / f"node-{rank}"
        home.mkdir(exist_ok=True)
        runtime = TRAIN["runtime"] | train.pop("runtime", {})
        if address is not None:
            runtime |= {"nodes": 2, "node_rank": rank, "main_address": address}
        section = TRAIN | train | {"runtime": runtime}
        config = {"name": NAME, "model": {"base": str(self.checkpoint)}, "train": section}
        (home / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "duplex.cli", "run", "config.yaml", "--only", "train"]
        return subprocess.Popen(
            [*command, "--runs", str(runs or self.runs)],
            cwd=home, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {}),
        )  # fmt: skip


def ended(*nodes: subprocess.Popen[str], within_s: float = 200) -> list[tuple[int, str]]:
    """(exit code, what it said) of each."""
    said = [node.communicate(timeout=within_s)[0] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]
