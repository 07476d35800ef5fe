"""What the tests of push and pull share: the command, another machine, what is finished there."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

import yaml

from duplex import cli
from duplex.config import Config
from duplex.datafiles import CHECKOUT
from duplex.files import sha256_bytes
from pipeline.entry import main
from pipeline.run import plan
from tests.factories import write_yaml
from tests.stages.hub.fake_hub import TOKEN

CONFIG = {
    "name": "small",
    "personas": {"only": ["friendly-june", "nervous-mei"], "only_scenarios": ["rush-hour"]},
    "dialogues": {"per_persona": 1, "min_turns": 4, "max_turns": 5},
    "voices": {"user_voices": 1},
    "speech": {"checks": {"share": 0}},
    "tensors": {"valid_fraction": 0.5, "max_frames": 750},
    "train": {
        "steps": 2, "batch_size": 1, "crop_frames": 256, "warmup_steps": 0, "validate_every": 1,
        "lora": {"rank": 2},
    },
}  # fmt: skip
PLANTED = "words-of-a-model-that-nobody-kept"  # in the logs of the dialogues stage
BLOBS = 7  # 2 recordings, 2 tensors, the proofs of 3 voices
FILE_URL = "/{repo_id}/resolve/{revision}/{filename}"  # the client's own, after the endpoint
DATA = ("personas", "dialogues", "voices", "speech", "tensors")


def environment(hub=None, **variables):
    offline = {"HF_HUB_OFFLINE": "1"} if hub is None else {
        "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN,
    }  # fmt: skip
    quick = {"PYTHONPATH": str(CHECKOUT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return os.environ | quick | offline | variables


@contextmanager
def at(place, hub=None, **variables):
    """This very process at a place, with the environment of a command there."""
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import reset_sessions

    endpoint = hub.url if hub else constants.ENDPOINT
    with (
        chdir(place),
        patch.dict(os.environ, environment(hub, **variables)),
        patch.object(constants, "HF_HUB_OFFLINE", hub is None),
        patch.object(constants, "ENDPOINT", endpoint),
        patch.object(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + FILE_URL),
    ):
        reset_sessions()
        yield
    reset_sessions()


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def duplex(*arguments, cwd, hub=None, **variables):
    """The command line in this process: a process of its own costs 1 to 15 s of imports."""
    out, err = io.StringIO(), io.StringIO()
    command = ["duplex", *map(str, arguments)]
    with (
        at(cwd, hub, **variables), patch.object(sys, "argv", command),
        redirect_stdout(out), redirect_stderr(err),
    ):  # fmt: skip
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def work(name, place):
    """A stage by itself; `main` takes over a signal, which is given back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with at(place):
            assert main(name, ["small.yaml"]) == 0
    finally:
        signal.signal(signal.SIGTERM, handler)


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
    with chdir(place):
        return {step.stage.name: step for step in plan(config_of(place), place / "runs")}


def blobs_in(place, stage):
    """Content by name; the name is the content's sha256."""
    folder = steps_of(place)[stage].folder.path / "blobs"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(sha256_bytes(held) == name.split(".")[0] for name, held in found.items())
    return found


def digests(place):
    return {name: step.folder.digest for name, step in steps_of(place).items() if step.done}


def assert_unseen(result, hub):
    texts = [content for repo in hub.repos.values() for content, _ in repo.tree.values()]
    seen = result.stdout + result.stderr + "".join(t.decode("latin-1") for t in texts)
    assert TOKEN not in seen and PLANTED not in seen and "Traceback" not in result.stderr
