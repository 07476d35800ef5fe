"""A finished run, a hub on this machine, and one that holds the run's data."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.factories import write_yaml
from tests.stages.hub.fake_hub import TOKEN, Hub
from tests.stages.hub.helpers import CONFIG, DATA, duplex, environment


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_checkpoint):
    """A run brought to its adapter on the tiny checkpoint, all stages in one process."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_checkpoint, place / "models" / "tiny")
    write_yaml(place / "small.yaml", CONFIG | {"model": {"base": "models/tiny"}})
    code = "from pipeline.entry import main\n"
    code += f"for name in {(*DATA, 'train')}: assert main(name, ['small.yaml']) == 0"
    subprocess.run([sys.executable, "-c", code], cwd=place, env=environment(), check=True)
    return place


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def pushed(trained):
    """A hub that holds the data; what a test changes there it changes in its own copy."""
    hub = Hub()
    result = duplex("push", "small.yaml", "--to", "me/data", "--no-view", cwd=trained, hub=hub)
    assert result.returncode == 0, result.stderr
    yield hub
    hub.close()


@pytest.fixture
def reached(shelf, monkeypatch):
    """The client of this very process talks to `shelf`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", shelf.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    reset_sessions()
    yield shelf
    monkeypatch.undo()
    reset_sessions()


@pytest.fixture
def shelf(pushed, hub):
    """An own hub with the pushed data on it."""
    repo = pushed.repos["me/data"]
    hub.repos["me/data"] = type(repo)(private=True)
    hub.repos["me/data"].commit(dict(repo.tree))
    return hub
