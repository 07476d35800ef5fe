"""The pipeline: which stages there are, what each needs now, and how they are run in order.

`plan` decides without torch: a stage is done when the folder of its key holds a manifest.
`run` starts each stage with work as a process of its own, so that memory is freed between
stages and a run with nothing to do starts nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from duplex.config import Config
from duplex.datafiles import CHECKOUT
from duplex.errors import EXIT_BAD_REQUEST, MissingInputError, RequestError, StageFailedError
from duplex.lock import LOCK_FD_VARIABLE, RunLock
from duplex.stage import MapStage, StageContext, WholeStage
from duplex.store import StageFolder
from pipeline.dialogues import DialoguesStage, check_writer, estimate_cost
from pipeline.engines.checkpoint import check_base
from pipeline.evaluate import EvaluateStage
from pipeline.merge import MergeStage
from pipeline.personas import PersonasStage
from pipeline.serve import ServeStage
from pipeline.speech import SpeechStage
from pipeline.tensors import TensorsStage
from pipeline.train import TrainStage
from pipeline.voices import VoicesStage

STAGES: tuple[MapStage | WholeStage, ...] = (
    PersonasStage(),
    DialoguesStage(),
    VoicesStage(),
    SpeechStage(),
    TensorsStage(),
    TrainStage(),
    MergeStage(),
    ServeStage(),
    EvaluateStage(),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
IMPORTS_FOLDER = "imports"


@dataclass(frozen=True)
class Step:
    """One stage of a plan. `folder` is None while an input is not complete, since the key
    is made from the inputs' digests."""

    stage: MapStage | WholeStage
    folder: StageFolder | None
    done: bool
    imported: bool = False


@dataclass(frozen=True)
class Selection:
    """Which stages a request names; the others must be there already."""

    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        first: str | None = None,
        last: str | None = None,
        only: str | None = None,
        skip: tuple[str, ...] = (),
    ) -> Selection:
        """
        Raises:
            RequestError: an unknown stage, or a combination that names none.
        """
        for name in [first, last, only, *skip]:
            if name is not None and name not in STAGE_NAMES:
                raise RequestError(f"a stage must be one of {', '.join(STAGE_NAMES)}; found {name}")
        if only and (first or last):
            raise RequestError("--only names one stage by itself; leave --from and --to out")
        start = STAGE_NAMES.index(only or first or STAGE_NAMES[0])
        end = STAGE_NAMES.index(only or last or STAGE_NAMES[-1])
        names = tuple(name for name in STAGE_NAMES[start : end + 1] if name not in skip)
        if not names:
            raise RequestError("the stages from --from to --to, less --skip, must leave one")
        return cls(names)


def stage_named(name: str) -> MapStage | WholeStage:
    return STAGES[STAGE_NAMES.index(name)]


def run_folder_of(config: Config, runs_root: Path) -> Path:
    return runs_root / config.name


def plan(config: Config, runs_root: Path) -> list[Step]:
    """Where each stage stands, in order. Reads manifests only."""
    run_folder = run_folder_of(config, runs_root)
    steps: dict[str, Step] = {}
    for stage in STAGES:
        imported = imported_folder(run_folder, stage)
        if imported is not None:
            steps[stage.name] = Step(stage, imported, done=True, imported=True)
            continue
        inputs = [steps[name] for name in stage.reads]
        if not all(step.done for step in inputs):
            steps[stage.name] = Step(stage, None, done=False)
            continue
        digests = {step.stage.name: step.folder.digest for step in inputs if step.folder}
        key = stage.folder_key(config, digests)
        folder = StageFolder.of(run_folder, stage.number, stage.name, key)
        steps[stage.name] = Step(stage, folder, done=folder.manifest() is not None)
    return list(steps.values())


def imported_folder(run_folder: Path, stage: MapStage | WholeStage) -> StageFolder | None:
    """The folder that `duplex import` put in place of this stage's own work.

    Raises:
        MissingInputError: what was imported is gone. The stage's own work must not take its
            place unasked.
    """
    pointer = run_folder / IMPORTS_FOLDER / f"{stage.name}.json"
    if not pointer.exists():
        return None
    try:
        name, key = (json.loads(pointer.read_text())[field] for field in ("folder", "key"))
        folder = StageFolder(run_folder / Path(name).name, stage.name, key)
        complete = folder.manifest() is not None
    except (ValueError, KeyError, TypeError):
        complete, folder = False, None
    if folder is None or not complete:
        raise MissingInputError(
            f"{pointer} says that {stage.name} was imported, but its folder is gone or damaged. "
            f"Import it again, or let the stage do its own work: "
            f"`duplex import CONFIG --stage {stage.name} --forget`."
        )
    return folder


def context_for(step: Step, steps: list[Step], config: Config, runs_root: Path) -> StageContext:
    """
    Raises:
        MissingInputError: an input stage is not complete; says where it was looked for.
    """
    by_name = {other.stage.name: other for other in steps}
    inputs: dict[str, StageFolder] = {}
    for name in step.stage.reads:
        source = by_name[name]
        if not source.done or source.folder is None:
            place = source.folder.path if source.folder else run_folder_of(config, runs_root)
            raise MissingInputError(
                f"{step.stage.name} reads the output of {name}, which must be complete; "
                f"looked for it in {place}. Run without --from/--only/--skip, "
                f"or with --from {name}."
            )
        inputs[name] = source.folder
    return StageContext(config, runs_root, inputs)


def run(
    config: Config,
    config_path: Path,
    runs_root: Path,
    selection: Selection,
    *,
    overrides: list[str],
    retry_rejected: bool = False,
    runner: str = "local",
    report: Callable[[str], None] = print,
) -> list[Step]:
    """Run the selected stages that have work; returns the plan as it stands at the end.

    A node of training other than the first takes part in that stage alone, and takes no lock.

    Args:
        runner: who makes the records of map stages, one of `pipeline.runners.RUNNERS`.

    Raises:
        MissingInputError: a stage that was left out is needed and not complete.
        LockedError: another run holds the folder.
        StageFailedError: a stage ended without its manifest.
    """
    check_request(config)
    if config.train.runtime.node_rank:
        from pipeline.join_training import take_part

        _check_alone(selection, config.train.runtime.node_rank)
        take_part(config, runs_root, report)
        return plan(config, runs_root)
    run_folder = run_folder_of(config, runs_root)
    is_written = plan(config, runs_root)[STAGE_NAMES.index("dialogues")].done
    if "dialogues" in selection.names and not is_written:
        check_writer(config)
    with RunLock(run_folder) as lock:
        for name in selection.names:
            steps = plan(config, runs_root)
            step = steps[STAGE_NAMES.index(name)]
            if step.done and not has_rejects_to_retry(step, retry_rejected):
                report(describe_step(step))
                continue
            context_for(step, steps, config, runs_root)
            started = time.monotonic()
            report(f"{step.stage.number} {name}: running …")
            options = ["--retry-rejected"] if retry_rejected else []
            options += ["--runner", runner] if runner != "local" else []
            code = _start_stage(step, config_path, runs_root, overrides, options, lock)
            step = plan(config, runs_root)[STAGE_NAMES.index(name)]
            if code == EXIT_BAD_REQUEST:
                raise RequestError(f"{name}: the request was wrong; see its message above.")
            if code != 0 or not step.done:
                raise StageFailedError(
                    f"{name} ended with exit code {code} and no manifest; its message is above. "
                    f"What it finished is kept: mend the cause and run again."
                )
            report(describe_step(step) + f" in {time.monotonic() - started:.1f} s")
    return plan(config, runs_root)


def _check_alone(selection: Selection, node: int) -> None:
    if selection.names != ("train",):
        raise RequestError(
            f"node {node} (train.runtime.node_rank) must take part in training alone: --only "
            f"train; found {', '.join(selection.names)}. Node 0 runs the other stages."
        )


def planned_cost(config: Config, runs_root: Path, selection: Selection) -> str:
    """What a paid writer of dialogues would cost from nothing; empty where none has work.

    Replies that are in a log cost nothing again.
    """
    step = plan(config, runs_root)[STAGE_NAMES.index("dialogues")]
    cost = None if step.done or "dialogues" not in selection.names else estimate_cost(config)
    return f"dialogues: {cost.describe()}" if cost else ""


def has_rejects_to_retry(step: Step, retry_rejected: bool) -> bool:
    """Whether a complete stage is done again for `--retry-rejected`: its own work, with rejects."""
    if not retry_rejected or step.imported or not isinstance(step.stage, MapStage):
        return False
    assert step.folder is not None
    manifest = step.folder.manifest()
    return manifest is not None and manifest["counts"].get("rejected", 0) > 0


def check_request(config: Config) -> None:
    """Faults that can be seen before anything is written: files and base model.

    Raises:
        RequestError: what is wrong, and what to do.
    """
    for stage in STAGES:
        stage.files(config)
    check_base(config.model)


def describe_step(step: Step) -> str:
    assert step.folder is not None
    manifest = step.folder.manifest()
    assert manifest is not None
    counts = ", ".join(f"{number} {name}" for name, number in manifest["counts"].items())
    adopted = manifest["provenance"].get("adopted")
    more = f", {adopted} adopted" if adopted else ""
    kind = "imported" if step.imported else "done"
    return f"{step.stage.number} {step.stage.name}: {kind} ({counts}{more}) {step.folder.path.name}"


def _start_stage(
    step: Step,
    config_path: Path,
    runs_root: Path,
    overrides: list[str],
    options: list[str],
    lock: RunLock,
) -> int:
    command = [sys.executable, "-m", f"pipeline.{step.stage.name}", str(config_path.resolve())]
    command += ["--runs", str(runs_root.resolve())]
    command += [part for override in overrides for part in ("--set", override)]
    command += options
    environment = os.environ | {LOCK_FD_VARIABLE: str(lock.descriptor)}
    # OpenMP threads that spin while they wait starve each other once anything else runs here.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.set_inheritable(lock.descriptor, True)
    process = subprocess.Popen(
        command, env=environment, pass_fds=(lock.descriptor,), preexec_fn=_die_with_parent
    )
    try:
        return process.wait()
    except BaseException:
        # Interrupted: the stage gets the time to stop at a whole record.
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _die_with_parent() -> None:
    """Linux: a stage whose run was killed is killed too. Elsewhere the lock guards it."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def stage_main(name: str) -> None:
    """Entry point of `python -m pipeline.<stage>`; see pipeline/entry.py."""
    from pipeline.entry import main

    sys.exit(main(name))
