"""Where nodes are in the config, in keys and in commands, and what of it they compare."""

import json
from pathlib import Path

import pytest

from duplex.config import Config
from duplex.errors import RequestError, WorkError
from duplex.store import StageFolder
from pipeline import training_nodes
from pipeline.run import Selection, run
from pipeline.training_nodes import claims_of
from tests.stages.node_helpers import Place, free_address
from tests.stages.training_factories import make_config
from training import nodes


def faults_of(**train):
    with pytest.raises(ValueError) as caught:
        Config.model_validate({"name": "c", "train": train})
    return str(caught.value)


def test_places_that_cannot_be_are_refused_by_the_schema():
    two = {"nodes": 2, "main_address": "gpu-1:29400"}
    assert "needs main_address" in faults_of(processes=2, runtime={"nodes": 2})
    assert "multiple of runtime.nodes" in faults_of(processes=1, runtime=two)
    assert "below nodes" in faults_of(processes=2, runtime=two | {"node_rank": 2})
    for wrong in ("gpu-1", "gpu-1:0", "gpu-1:70000", "http://gpu-1:29400", "::1:29400", "a b:1"):
        assert "HOST:PORT" in faults_of(processes=2, runtime=two | {"main_address": wrong})
    for right in ("gpu-1.cluster:29400", "10.0.0.1:1", "[fe80::1]:29400"):
        Config.model_validate(
            {"name": "c", "train": {"processes": 2, "runtime": two | {"main_address": right}}}
        )


def test_where_the_nodes_are_enters_no_key_and_how_many_processes_does(tiny_checkpoint, tmp_path):
    from pipeline.train import TrainStage

    def key(**train):
        return TrainStage().folder_key(make_config(tiny_checkpoint, **train), {"tensors": "d"})

    runtime = {"nodes": 2, "node_rank": 1, "main_address": "gpu-1:29400"}
    assert key(processes=2) == key(processes=2, runtime=runtime) != key()


def test_what_nodes_compare_covers_settings_code_and_packages_and_no_place(
    tiny_checkpoint, tmp_path, monkeypatch
):
    folder = StageFolder(tmp_path / "06", "train", "k" * 64)
    place = Place.make(tmp_path / "place", tiny_checkpoint)
    tensors = StageFolder(place.runs / "tiny" / "05-tensors-00000000", "tensors", "0" * 64)

    def claims(**train):
        return claims_of(make_config(tiny_checkpoint, **train), folder, tensors)

    ours = claims()
    runtime = {"device": "cpu", "checkpoint_every": 2}
    here = {"nodes": 2, "node_rank": 1, "main_address": "h:1", "wandb": True}
    assert nodes.differences(ours, claims(runtime=runtime)) == []
    moved = claims(processes=2, batch_size=2, runtime=runtime | here)
    assert {line.split(" must")[0] for line in nodes.differences(ours, moved)} == {
        "train.processes", "train.runtime.nodes",
    }  # fmt: skip
    for change in (
        {"learning_rate": 1e-3}, {"lora": {"rank": 8}}, {"runtime": {"checkpoint_every": 3}},
        {"runtime": runtime | {"checkpointing": "full"}},
    ):  # fmt: skip
        assert nodes.differences(ours, claims(**change)), change
    assert str(tmp_path) not in json.dumps(ours) and str(tiny_checkpoint) not in json.dumps(ours)
    assert {"torch", "moshi", "python", "seed"} <= ours.keys()
    before = training_nodes.code_digest(tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "loss.py").write_text("x = 1\n")
    assert training_nodes.code_digest(tmp_path) != before


def test_another_node_than_the_first_takes_part_in_training_alone(tiny_checkpoint, tmp_path):
    place = {"nodes": 2, "node_rank": 1, "main_address": free_address(), "join_timeout_s": 0.2}
    config = make_config(tiny_checkpoint, processes=2, runtime=place)
    runs = Place.make(tmp_path, tiny_checkpoint).runs
    before = sorted(runs.rglob("*"))
    with pytest.raises(RequestError, match=r"node 1 .* --only train; found tensors, train"):
        run(config, Path("c.yaml"), runs, Selection.of("tensors", "train"), overrides=[])
    with pytest.raises(WorkError, match="node 0 must answer"):
        run(config, Path("c.yaml"), runs, Selection.of(only="train"), overrides=[], report=print)
    assert sorted(runs.rglob("*")) == before  # no lock, no folder
