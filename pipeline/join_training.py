"""A node of a training run that is not the first: it joins, trains along, and writes nothing.

It takes no lock and leaves the run folder to the first node, whose outcome is its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from duplex.config import Config
from duplex.config_train import split_address
from duplex.errors import RequestError, StageFailedError
from duplex.store import StageFolder
from pipeline.run import (
    STAGE_NAMES,
    Step,
    check_request,
    context_for,
    describe_step,
    plan,
    run_folder_of,
)
from pipeline.train import WORKER, TrainStage
from pipeline.training_nodes import claims_of
from pipeline.training_run import Job
from training.launch import run_workers
from training.nodes import SEEN_WITHIN_S, OtherNode, connect

CLOSED_WITHIN_S = 60.0  # after it was trained, for the first node's manifest to be seen here


def take_part(config: Config, runs_root: Path, report: Callable[[str], None]) -> None:
    """
    Raises:
        RequestError: the first node refuses this one; says why.
        WorkError: it did not come, is gone, or ended with an error.
        StageFailedError: it ended without a manifest.
    """
    check_request(config)
    runtime = config.train.runtime
    assert runtime.main_address is not None, "the schema asks for it"
    report(f"node {runtime.node_rank} of {runtime.nodes}: joining {runtime.main_address}")
    link = connect(
        runtime.main_address,
        runtime.join_timeout_s,
        wait=lambda: not _train_step(config, runs_root).done,
    )
    if link is None:
        report(describe_step(_train_step(config, runs_root)))
        return
    with OtherNode(
        link,
        processes=config.train.processes,
        nodes=runtime.nodes,
        node=runtime.node_rank,
        join_timeout_s=runtime.join_timeout_s,
        host=split_address(runtime.main_address)[0],
    ) as team:
        folder, tensors = _folders_soon(config, runs_root)
        team.introduce(folder.path.parent, claims_of(config, folder, tensors), report)
        report(f"training in {team.place.here} of {team.place.world} processes")
        job = Job(config, runs_root, tensors, folder.work, TrainStage.version)
        run_workers(WORKER, job.as_json(), config.train.processes, report, team=team)
        report("trained; node 0 hands it in")
        team.wait_for_end()
    deadline = time.monotonic() + CLOSED_WITHIN_S
    while not (step := _train_step(config, runs_root)).done:
        if time.monotonic() > deadline:
            raise StageFailedError(
                f"node 0 must hand in what was trained, found no manifest in {folder.path} "
                f"{CLOSED_WITHIN_S:g} s after. Its message says why; the last checkpoint is kept."
            )
        time.sleep(0.2)
    report(describe_step(step))


def _train_step(config: Config, runs_root: Path) -> Step:
    return plan(config, runs_root)[STAGE_NAMES.index("train")]


def _folders_soon(config: Config, runs_root: Path) -> tuple[StageFolder, StageFolder]:
    """The train stage's folder and its input, as the first node has them.

    Raises:
        RequestError: they are not to be seen here.
    """
    deadline = time.monotonic() + SEEN_WITHIN_S
    while (step := _train_step(config, runs_root)).folder is None:
        if time.monotonic() > deadline:
            raise RequestError(
                "all nodes must share the run root: node 0 has begun to train, and "
                f"{run_folder_of(config, runs_root)} holds no finished tensors here. Give it by "
                "--runs where it is mounted, with the config that node 0 has."
            )
        time.sleep(0.5)
    assert step.folder is not None
    return step.folder, context_for(step, plan(config, runs_root), config, runs_root).inputs[
        "tensors"
    ]
