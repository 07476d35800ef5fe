"""What the tests of push and pull share: the command, another machine, what is finished there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from duplex.config import Config
from duplex.datafiles import CHECKOUT
from pipeline.run import plan
from tests.factories import write_yaml
from tests.stages.hub.fake_hub import TOKEN

CONFIG = {
    "name": "small",
    "personas": {"only": ["friendly-june", "nervous-mei"], "only_scenarios": ["rush-hour"]},
    "dialogues": {"per_persona": 1, "min_turns": 4, "max_turns": 5},
    "tensors": {"valid_fraction": 0.5, "max_frames": 750},
    "train": {
        "steps": 2, "batch_size": 1, "crop_frames": 256, "warmup_steps": 0, "validate_every": 1,
        "lora": {"rank": 2},
    },
}  # fmt: skip
DATA = ("personas", "dialogues", "voices", "speech", "tensors")


def environment(hub=None, **variables):
    offline = {"HF_HUB_OFFLINE": "1"} if hub is None else {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
    }  # fmt: skip
    quick = {"PYTHONPATH": str(CHECKOUT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return os.environ | quick | offline | variables


def duplex(*arguments, cwd, hub=None, **variables):
    return subprocess.run(
        [sys.executable, "-m", "duplex.cli", *map(str, arguments)],
        cwd=cwd, env=environment(hub, **variables), capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def elsewhere(trained, tmp_path, **changes):
    """Another machine: the same base model, a config, no run."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "models").symlink_to(trained / "models")
    write_yaml(place / "small.yaml", CONFIG | {"model": {"base": "models/tiny"}} | changes)
    return place


def config_of(place):
    return Config.model_validate(yaml.safe_load((place / "small.yaml").read_text()))


def steps_of(place):
    here = Path.cwd()
    os.chdir(place)
    try:
        return {step.stage.name: step for step in plan(config_of(place), place / "runs")}
    finally:
        os.chdir(here)


def digests(place):
    return {name: step.folder.digest for name, step in steps_of(place).items() if step.done}


def assert_unseen(result, hub):
    texts = [content for repo in hub.repos.values() for content, _ in repo.tree.values()]
    seen = result.stdout + result.stderr + "".join(t.decode("latin-1") for t in texts)
    assert TOKEN not in seen and "Traceback" not in result.stderr
