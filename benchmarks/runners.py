"""What the runners and the run folders cost by themselves: records that are no work at all.

    python -m benchmarks.runners              # prints
    python -m benchmarks.runners --write      # and writes docs/results/runners.{json,md}

All in one run, on one machine:

- a stage of trivial records, and one of records that wait 20 ms, by the local runner in one process
  and by Ray with two workers; Ray's start is measured apart;
- `duplex run` with nothing to do, where each of three stages has 20 000 finished records;
- `duplex status` where a stage has 200 000: complete, and under way, when its ledger is counted.

Commands are run several times and the quickest counts, since others use the machine; its load is
noted. Both limits are checked: it exits with 1 where one is exceeded.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from duplex.base import Record
from duplex.characters import GapRange
from duplex.config import Config
from duplex.datafiles import CHECKOUT
from duplex.files import sync_file, write_atomic, write_json
from duplex.records import Dialogue, Turn, Voice, record_line
from duplex.stage import BlobSink, MapStage, StageContext, Task
from duplex.store import StageFolder
from pipeline.run import STAGE_NAMES, plan
from pipeline.runners import runner_named
from pipeline.runners.local import execute
from pipeline.runners.work import Outcome, Runner

RESULTS = CHECKOUT / "docs" / "results"
RECORDS = 1000
SLOW_RECORDS, SLOW_S = 200, 0.02
WORKERS = 2
FINISHED, MANY = 20_000, 200_000
LIMIT_S, LIMIT_MB = 5.0, 300.0
TRIES = 5
GAP = GapRange(low=1, high=3)
# The highest resident memory of a process since it was loaded. Not `ru_maxrss`, which begins with
# that of the process that started it.
COMMAND = """
import atexit, sys
def say():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak kB", line.split()[1], file=sys.stderr)
atexit.register(say)
sys.argv = ["duplex", *sys.argv[1:]]
from duplex.cli import main
main()
"""


class Trivial(MapStage):
    """Borrows the section of `speech`. A task's payload: seconds that it waits."""

    name, number = "speech", 4

    def __init__(self, count: int = 0, wait_s: float = 0.0):
        self.count, self.wait_s = count, wait_s

    def tasks(self, context: StageContext) -> list[Task]:
        return [Task(f"r-{index:05d}", ("s",), self.wait_s) for index in range(self.count)]

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        if task.payload:
            time.sleep(task.payload)
        return [Voice(id=task.id, engine="none", role="agent", params={"s": seed}, licence="none")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="docs/results/runners.{json,md}")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="runners-benchmark-"))
    try:
        found = measure(root)
    finally:
        shutil.rmtree(root)
    print(page(found))
    if options.write:
        write_json(RESULTS / "runners.json", found)
        write_atomic(RESULTS / "runners.md", page(found).encode())
    if not all(one["kept"] for one in found["limits"].values()):
        sys.exit(1)


def measure(root: Path) -> dict[str, Any]:
    load = os.getloadavg()[0]
    stages = ("dialogues", "speech", "tensors")
    runs = many(root / "finished", FINISHED, stages, under_way=False)
    nothing_to_do = command(runs, "run", f"5 tensors: done ({FINISHED} records")
    runs = many(root / "complete", MANY, stages[:1], under_way=False)
    complete = command(runs, "status", f'"records": {MANY}')
    runs = many(root / "under-way", MANY, stages[:1], under_way=True)
    ledger_mb = max(path.stat().st_size for path in runs.parent.rglob("ledger.jsonl")) / 1e6
    counted = command(runs, "status", f'"finished": {MANY}')
    runners, ray_start_s = run_records(root / "records")
    most_mb = max(complete["peak_mb"], counted["peak_mb"])
    from training.device import cpu_name  # imports torch, which Ray's part should not meet

    return {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": round(load, 1)},
        "ray_start_s": round(ray_start_s, 2),
        "workers": WORKERS,
        "tries": TRIES,
        "records": RECORDS,
        "slow_records": SLOW_RECORDS,
        "slow_ms": 1000 * SLOW_S,
        "runners": runners,
        "finished": FINISHED,
        "many": MANY,
        "nothing_to_do": nothing_to_do,
        "status_complete": complete,
        "ledger_mb": round(ledger_mb),
        "status_under_way": counted,
        "limits": {
            "run_s": _limit(nothing_to_do["wall_s"], LIMIT_S),
            "status_mb": _limit(most_mb, LIMIT_MB),
        },
    }


def _limit(found: float, limit: float) -> dict[str, Any]:
    return {"limit": limit, "found": found, "kept": found < limit}


# -- runners


def run_records(root: Path) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of each runner on both stages, Ray within a cluster that is up."""
    found: dict[str, dict[str, float]] = {}
    local = runner_named("local")
    found["local"] = timed(root / "local", local)
    started = time.monotonic()
    ray_runner = runner_named("ray")
    module: Any = importlib.import_module("pipeline.runners.ray")
    settings = Config.model_validate({"name": "c", "runner": {"runtime": {"address": "local"}}})
    with module.connected(settings.runner.runtime):
        start_s = time.monotonic() - started
        found["ray"] = timed(root / "ray", ray_runner)
    return found, start_s


class Watched:
    """A runner that notes when its first outcome came."""

    def __init__(self, runner: Runner):
        self._runner = runner
        self.notes = runner.notes
        self.first_s = 0.0

    def outcomes(
        self,
        stage: MapStage,
        context: StageContext,
        folder: StageFolder,
        tasks: list[Task],
        begin: Callable[[], None],
    ) -> Generator[Outcome, None, None]:
        for outcome in self._runner.outcomes(stage, context, folder, tasks, begin):
            self.first_s = self.first_s or time.monotonic()
            yield outcome


def timed(root: Path, runner: Runner) -> dict[str, float]:
    trivial_s, first_s = execute_one(root / "trivial", Trivial(RECORDS), runner)
    slow_s, slow_first_s = execute_one(root / "slow", Trivial(SLOW_RECORDS, SLOW_S), runner)
    return {
        "trivial_s": trivial_s, "trivial_first_s": first_s,
        "slow_s": slow_s, "slow_first_s": slow_first_s,
    }  # fmt: skip


def execute_one(root: Path, stage: Trivial, runner: Runner) -> tuple[float, float]:
    """Seconds of the whole stage, and until its first record."""
    config = Config.model_validate({"name": "c", "runner": {"runtime": {"workers": WORKERS}}})
    folder = StageFolder.of(root / "c", stage.number, stage.name, "ab" * 32)
    root.mkdir(parents=True)
    watched, started = Watched(runner), time.monotonic()
    manifest = execute(stage, StageContext(config, root), folder, runner=watched)
    assert manifest["counts"]["records"] == stage.count
    return round(time.monotonic() - started, 3), round(watched.first_s - started, 3)


# -- large run folders


def many(folder: Path, count: int, stages: tuple[str, ...], *, under_way: bool) -> Path:
    """A config whose run has `count` finished records in each of `stages` and ten in the others,
    personas to tensors. With `under_way` the first of `stages` has no manifest yet.
    The records are dialogues of ten turns."""
    folder.mkdir(parents=True)
    path = folder / "many.yaml"
    path.write_text("name: many\n")
    config = Config(name="many")
    for name in STAGE_NAMES[: STAGE_NAMES.index("tensors") + 1]:
        step = next(step for step in plan(config, folder / "runs") if step.stage.name == name)
        assert step.folder is not None
        lines = [record_line(dialogue(i)) for i in range(count if name in stages else 10)]
        step.folder.path.mkdir(parents=True)
        write_ledger(step.folder, lines)
        if name in stages and under_way:
            break
        counts = {"tasks": len(lines), "records": len(lines), "rejected": 0}
        step.folder.complete(lines, files=[], counts=counts, provenance={"seconds": 1.0})
    return path


def write_ledger(folder: StageFolder, lines: list[str]) -> None:
    """As `StageFolder.finish_task` would line by line, with one fsync."""
    path = folder.path / "ledger.jsonl"
    with path.open("w") as file:
        for index, line in enumerate(lines):
            file.write(
                f'{{"blobs":[],"key":"{"ab" * 32}","records":[{line}],'
                f'"seconds":0.1,"task":"task-{index:06d}"}}\n'
            )
    sync_file(path)


def dialogue(index: int) -> Dialogue:
    text = "I would like a large flat white with oat milk, please, and be quick about it. "
    turns = tuple(
        Turn(role="user" if turn % 2 == 0 else "agent", text=text * 3) for turn in range(10)
    )
    return Dialogue(
        id=f"angry-ann.rush-hour.{index:06d}", persona_id="angry-ann", persona_name="Ann",
        scenario_id="rush-hour", system_prompt="You are Ann, a customer.", mood="angry",
        first_speaker="user", gap_after_user=GAP, gap_other=GAP, turns=turns, writer="none",
    )  # fmt: skip


def command(config: Path, name: str, shown: str) -> dict[str, float]:
    """The quickest of `TRIES` calls of `command_once`, with the largest memory of all."""
    tries = [command_once(config, name, shown) for _ in range(TRIES)]
    best = min(tries, key=lambda one: one["wall_s"])
    return best | {"peak_mb": max(one["peak_mb"] for one in tries)}


def command_once(config: Path, name: str, shown: str) -> dict[str, float]:
    """`duplex NAME` on a config, which must show `shown`: its seconds, and its largest memory."""
    more = ["--to", "tensors"] if name == "run" else ["--json"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", COMMAND, name, str(config), "--runs", str(config.parent / "runs"),
         *more],
        cwd=CHECKOUT, capture_output=True, text=True,
    )  # fmt: skip
    wall_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert result.returncode == 0 and shown in result.stdout, result.stdout + result.stderr
    assert "running" not in result.stdout, result.stdout
    peak_mb = int(result.stderr.rpartition("peak kB")[2]) / 1024
    return {"wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2), "peak_mb": round(peak_mb, 1)}


# -- the page


def page(found: dict[str, Any]) -> str:
    lines = []
    for name, one in found["runners"].items():
        trivial_s = one["trivial_s"] - one["trivial_first_s"]
        lines.append(
            f"| {name} | {one['trivial_first_s']:.1f} | {trivial_s:.1f} "
            f"| {1000 * trivial_s / found['records']:.1f} "
            f"| {one['slow_s'] - one['slow_first_s']:.1f} |"
        )
    rows = "\n".join(lines)
    run, done = found["nothing_to_do"], found["status_complete"]
    counted, limits = found["status_under_way"], found["limits"]
    return f"""# What runners and run folders cost

`python -m benchmarks.runners --write` on {found["machine"]["cpu"]}, {found["machine"]["cores"]} \
cores that others used too (load {found["machine"]["load"]:g} at the start). Seconds of the whole \
stage, from its tasks to its manifest; of a command, the quickest of {found["tries"]}.

| runner | until the first record | then {found["records"]} trivial ones | ms each | \
then {found["slow_records"]} that wait {found["slow_ms"]:g} ms |
| --- | ---: | ---: | ---: | ---: |
{rows}

Local is one process; Ray has {found["workers"]} workers on the same machine, in a cluster that \
is up, which took {found["ray_start_s"]:.1f} s. Each stage starts workers of its own, which is \
what comes before its first record.

`duplex run` with nothing to do, three stages of {found["finished"]:,} finished records each: \
{run["wall_s"]:.1f} s ({run["cpu_s"]:.1f} s of CPU time), {run["peak_mb"]:.0f} MB. The limit is \
{limits["run_s"]["limit"]:g} s: {"kept" if limits["run_s"]["kept"] else "EXCEEDED"}.

`duplex status` where a stage has {found["many"]:,} records: complete, {done["wall_s"]:.1f} s and \
{done["peak_mb"]:.0f} MB; under way, its ledger of {found["ledger_mb"]:,} MB counted, \
{counted["wall_s"]:.1f} s ({counted["cpu_s"]:.1f} s of CPU time) and \
{counted["peak_mb"]:.0f} MB. The limit is \
{limits["status_mb"]["limit"]:g} MB: {"kept" if limits["status_mb"]["kept"] else "EXCEEDED"}.
"""


if __name__ == "__main__":
    # By its module's name, which is how a worker finds the stage.
    importlib.import_module("benchmarks.runners").main()
