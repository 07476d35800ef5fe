"""A stage for the Ray runner: what a record does is written in its payload."""

import os
import signal
import sys
import time
from pathlib import Path

from duplex.config import Config
from duplex.errors import RecordError
from duplex.records import Voice
from duplex.stage import MapStage, StageContext, Task
from duplex.store import StageFolder
from pipeline.runners.local import execute
from pipeline.runners.work import LOCAL

NUM_TASKS = 12


class Counted(list):
    """A list that knows how many of it were drawn."""

    drawn = 0

    def __iter__(self):
        for item in super().__iter__():
            self.drawn += 1
            yield item


class ToyStage(MapStage):
    """Borrows the section of `speech`. Payloads: a word, and a pause in seconds or a path.

    reject; die: always; die-once: the first worker that meets it, which leaves a file;
    setup notes its process in `<run folder>/setups`.
    """

    name = "speech"
    number = 4
    behaviours: dict = {}  # noqa: RUF012 - set by a test, for the driver alone

    def tasks(self, context):
        return [
            Task(f"r-{index:02d}", ("source",), self.behaviours.get(index, ("make", 0)))
            for index in range(NUM_TASKS)
        ]

    def setup(self, context):
        self._root = context.runs_root
        with (context.runs_root / "setups").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def process(self, task, seed, blobs):
        what, more = task.payload
        with (self._root / "processed").open("a") as file:
            file.write(f"{task.id}\n")
        if what == "make":
            time.sleep(more)
        elif what == "reject":
            raise RecordError("not this one")
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "die-once" and not Path(more).exists():
            Path(more).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        sha = blobs.put(f"{task.id} {seed}".encode(), ".bin")
        params = {"seed": seed, "blob": sha}
        return [Voice(id=task.id, engine="toy", role="agent", params=params, licence="none")]


class UnfitStage(ToyStage):
    """Whose setup takes its worker with it."""

    def setup(self, context):
        os.kill(os.getpid(), signal.SIGKILL)


class OtherStage(ToyStage):
    """Whose engine is another on each machine, here: in each process."""

    def engine(self, config):
        return "engine 1" if os.environ.get("AT_THE_DRIVER") else "engine 2"


def config_of(**runtime):
    return Config.model_validate(
        {
            "name": "toy",
            "speech": {"runtime": {"max_reject_rate": 0.5, "api_key": "hush"}},
            "runner": {"runtime": {"workers": 2} | runtime},
        }
    )


def folder_of(root):
    return StageFolder.of(root / "toy", 4, "speech", "ab" * 32)


def run(root, behaviours=None, stage_type=ToyStage, runner=LOCAL, **runtime):
    """(manifest, folder) of a toy run at `root`."""
    root.mkdir(parents=True, exist_ok=True)
    stage_type.behaviours = behaviours or {}
    context, folder = StageContext(config_of(**runtime), root), folder_of(root)
    return execute(stage_type(), context, folder, runner=runner), folder


def lines(path):
    return path.read_text().split() if path.exists() else []


if __name__ == "__main__":
    from pipeline.runners.ray import RayRunner

    run(Path(sys.argv[1]), dict.fromkeys(range(NUM_TASKS), ("make", 0.15)), runner=RayRunner())
