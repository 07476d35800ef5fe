"""One finished run of the whole pipeline, small, shared by the tests that look at it."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
PERSONAS = ["angry-marcus", "friendly-june", "nervous-mei"]

SMALL = {
    "name": "small",
    "personas": {"only_scenarios": ["rush-hour", "first-visit"]},
    "dialogues": {"per_persona": 2, "min_turns": 4, "max_turns": 5},
    "tensors": {"valid_fraction": 0.3, "max_frames": 750},
    "train": {
        "steps": 6,
        "batch_size": 2,
        "crop_frames": 160,
        "learning_rate": 2e-3,
        "warmup_steps": 1,
        "validate_every": 3,
        "lora": {"rank": 4},
        "guards": {"clips": 1, "swaps": 1, "free_seconds": 2, "every": 6},
        "runtime": {"checkpoint_every": 2},
    },
    "evaluate": {"seconds": 2.4},
}


@dataclass(frozen=True)
class Workplace:
    """A folder of its own with a config, persona files and a run root."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run_folder(self) -> Path:
        return self.runs / "small"

    def persona_file(self, persona_id: str) -> Path:
        return self.folder / "personas" / f"{persona_id}.yaml"

    def duplex(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return forked.duplex(arguments, self.folder, environment())

    def started(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        """The same as a shell starts it."""
        return subprocess.run(
            [sys.executable, "-m", "duplex.cli", *arguments],
            cwd=self.folder, env=environment(), capture_output=True, text=True, **options,
        )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.duplex("run", "small.yaml", *arguments)

    def manifests(self) -> dict[str, dict]:
        """Manifest of each stage under the current config, by name."""
        rows = self.status()
        return {
            row["name"]: json.loads((Path(row["folder"]) / "manifest.json").read_text())
            for row in rows
            if row["state"] == "done"
        }

    def digests(self) -> dict[str, str]:
        return {name: manifest["digest"] for name, manifest in self.manifests().items()}

    def status(self) -> list[dict]:
        result = self.duplex("status", "small.yaml", "--json")
        assert result.returncode == 0, result.stderr
        rows = json.loads(result.stdout)["stages"]
        for row in rows:
            row["folder"] = str(self.folder / row["folder"]) if row["folder"] else None
        return rows

    def lend_models(self, runs: Path) -> None:
        """Spare another run root the four seconds that the pocket model takes to build."""
        shutil.copytree(self.runs / ".models", runs / ".models", copy_function=link_or_copy)

    def copy_to(self, folder: Path) -> Workplace:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True, copy_function=link_or_copy)
        return Workplace(folder)


def link_or_copy(source: str, target: str) -> str:
    """Blobs never change in place, so a copy may link them; what may change is copied."""
    if "/blobs/" in source or "/.models/" in source:
        os.link(source, target)
        return target
    return str(shutil.copy2(source, target))


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    return os.environ | offline


def make_workplace(folder: Path) -> Workplace:
    workplace = Workplace(folder)
    (folder / "personas").mkdir(parents=True)
    for persona_id in PERSONAS:
        shutil.copy(ROOT / "data" / "personas" / f"{persona_id}.yaml", folder / "personas")
    config = SMALL | {"personas": SMALL["personas"] | {"folder": "personas"}}
    workplace.config.write_text(yaml.safe_dump(config))
    return workplace


def compile_peft() -> None:
    """Compile what training imports, once in an environment's life: test_kills draws its moments
    from the times that the stages of the finished run took."""
    spec = importlib.util.find_spec("peft")
    if spec and spec.cached and not Path(spec.cached).exists():
        subprocess.run([sys.executable, "-c", "import peft"], env=environment(), check=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The pipeline run once from nothing to the report. Read only: copy it to change it.

    Once for all workers of a session: the first that asks runs it, another waits at its lock.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (shared / "finished").exists():
            workplace = Workplace(shared / "finished")
            assert (shared / "finished.done").exists(), "its run failed in the other worker"
            return workplace
        workplace = make_workplace(shared / "finished")
        compile_peft()
        result = workplace.started("run", "small.yaml")
        assert result.returncode == 0, result.stdout + result.stderr
        (shared / "finished.done").touch()
    return workplace


@pytest.fixture
def workplace(finished: Workplace, tmp_path: Path) -> Workplace:
    """A copy of the finished run that a test may change."""
    return finished.copy_to(tmp_path / "copy")
