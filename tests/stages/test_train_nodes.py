"""Training on two nodes, each a `duplex run` of its own on this machine, by gloo."""

import os
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.stages.node_helpers import ROOT, Place, ended, free_address, own_host

LONGER = {"steps": 14, "validate_every": 7}
# Notes each path below $WATCHED that a process opens for writing, makes, renames or removes.
WATCH = """
import os, sys
watched, notes = os.environ["WATCHED"], os.environ["NOTES"]

def hook(event, arguments):
    if event == "open":
        path, _, flags = arguments
        changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        path, changes = arguments[0] if arguments else "", event in (
            "os.mkdir", "os.rename", "os.remove", "os.link", "os.truncate", "shutil.rmtree")
    if changes and isinstance(path, (str, bytes, os.PathLike)):
        if os.fsdecode(path).startswith(watched):
            with open(notes, "a") as file:
                file.write(f"{event} {os.fsdecode(path)}\\n")

sys.addaudithook(hook)
"""


def all_of(process):
    return [process, *psutil.Process(process.pid).children(recursive=True)]


def gone(processes, within_s=10):
    """Whether all of them end in that time."""
    deadline = time.monotonic() + within_s
    while any(psutil.pid_exists(one.pid) and not is_zombie(one.pid) for one in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_zombie(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_after_checkpoint(place, step, process):
    """SIGKILL to `process`, alone, once a checkpoint of `step` or later is there."""
    deadline = time.monotonic() + 200
    while True:
        steps = [int(p.stem[5:]) for p in place.runs.rglob("step-*.json")]
        if max(steps, default=0) >= step:
            break
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert not list(place.runs.rglob("06-train-*/manifest.json")), "it was over too soon"
    os.kill(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_train_as_two_processes_of_one_and_as_one(tiny_checkpoint, tmp_path):
    host = own_host()
    assert host is not None, "this machine must have an address besides loopback's"
    two = Place.make(tmp_path / "two", tiny_checkpoint)
    mounted = tmp_path / "mounted-elsewhere"
    mounted.symlink_to(two.runs)
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(WATCH)
    watch = [
        {"PYTHONPATH": f"{hooks}{os.pathsep}{ROOT}", "WATCHED": str(runs), "NOTES": str(notes)}
        for runs, notes in ((two.runs, hooks / "0"), (mounted, hooks / "1"))
    ]
    address = free_address(host)
    nodes = ended(
        two.start(1, address, runs=mounted, environment=watch[1]),
        two.start(0, address, environment=watch[0]),
    )
    for code, said in nodes:
        assert code == 0 and "6 train: done (3 records)" in said, said
    assert "training in 2 processes on 2 nodes" in nodes[1][1]
    assert "trained; node 0 hands it in" in nodes[0][1] and "preflight" not in nodes[0][1]
    assert "manifest" in (hooks / "0").read_text()
    assert not (hooks / "1").exists(), (hooks / "1").read_text()
    processes = Place.make(tmp_path / "processes", tiny_checkpoint)
    one = Place.make(tmp_path / "one", tiny_checkpoint)
    for place, settings in ((processes, {}), (one, {"processes": 1, "accumulate": 2})):
        ((code, said),) = ended(place.start(**settings))
        assert code == 0, said
    assert two.manifest()["digest"] == processes.manifest()["digest"]
    assert two.manifest()["key"] == processes.manifest()["key"] != one.manifest()["key"]
    for ours, theirs in zip(two.log(), one.log(), strict=True):
        if ours["kind"] != "guards":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    adapters = [load_file(place.train_folder() / "adapter/adapter_model.safetensors")
                for place in (two, one)]  # fmt: skip
    flat = [torch.cat([a[name].flatten() for name in sorted(a)]) for a in adapters]
    assert (flat[1] - flat[0]).norm() < 1e-2 * flat[0].norm()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_node_is_killed_in_turn_and_they_go_on(tiny_checkpoint, tmp_path):
    place = Place.make(tmp_path / "two", tiny_checkpoint)
    address = free_address()
    first = place.start(0, address, **LONGER)
    ((code, said),) = ended(place.start(1, address, **LONGER, learning_rate=1e-3))
    assert code == 2, said
    assert "train.learning_rate must be the same on all nodes, found 0.005 on node 0 and" in said
    assert said.count("  - ") == 1, said
    second = place.start(1, address, **LONGER)
    kill_after_checkpoint(place, 2, second)
    killed, followed = all_of(first), time.monotonic()
    ((code, said),) = ended(first)
    assert code == 1 and time.monotonic() - followed < 30, said
    assert "was turned away: train.learning_rate" in said
    assert "is gone: it was stopped" in said and "start the run again on all nodes" in said
    assert gone(killed) and list(place.runs.rglob("step-*.safetensors"))
    second.wait()

    first, second = place.start(0, address, **LONGER), place.start(1, address, **LONGER)
    kill_after_checkpoint(place, 6, first)
    followed, others = time.monotonic(), all_of(second)
    ((code, said),) = ended(second)
    assert code == 1 and time.monotonic() - followed < 30, said
    assert "node 0 is gone" in said and gone(others)
    assert "going on from the checkpoint of step" in first.communicate()[0]

    second, first = place.start(1, address, **LONGER), place.start(0, address, **LONGER)
    for code, said in ended(second, first):
        assert code == 0, said
    calm = Place.make(tmp_path / "calm", tiny_checkpoint)
    ((code, said),) = ended(calm.start(**LONGER))
    assert code == 0, said
    assert place.manifest()["digest"] == calm.manifest()["digest"]
