"""A finished run, a hub on this machine, and one that holds the run's data."""

from __future__ import annotations

import shutil

import pytest

from tests.factories import write_yaml
from tests.stages.hub.fake_hub import Hub
from tests.stages.hub.helpers import CONFIG, DATA, PLANTED, at, duplex, steps_of, work


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_checkpoint):
    """A run brought to its adapter on the tiny checkpoint, all stages in this process."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_checkpoint, place / "models" / "tiny")
    write_yaml(place / "small.yaml", CONFIG | {"model": {"base": "models/tiny"}})
    for name in (*DATA, "train"):
        work(name, place)
    folder = steps_of(place)["dialogues"].folder.path
    for log in ("exchanges.jsonl", "candidates.jsonl"):
        (folder / log).write_text(f'{{"text": "{PLANTED}"}}\n')
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
def reached(shelf, tmp_path):
    """The client of this very process talks to `shelf`."""
    with at(tmp_path, shelf):
        yield shelf


@pytest.fixture
def shelf(pushed, hub):
    """An own hub with the pushed data on it."""
    repo = pushed.repos["me/data"]
    hub.repos["me/data"] = type(repo)(private=True)
    hub.repos["me/data"].commit(dict(repo.tree))
    return hub
