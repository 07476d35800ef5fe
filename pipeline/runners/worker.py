"""What runs on a node of a cluster: one stage, set up once, in a process of its own.

It says what makes a node unfit before anything is made there: a run folder that the node does not
see, or engines of another revision than the driver's, whose records would bear the wrong key.
"""

from __future__ import annotations

import os
import socket
import sys

from duplex.config import Config
from duplex.errors import DuplexError, StageFailedError
from duplex.stage import MapStage, StageContext, Task
from duplex.store import StageFolder
from pipeline.runners.storage import Borrowed
from pipeline.runners.work import Outcome, work_off


class Worker:
    """Made by the driver as an actor."""

    def begin(
        self,
        stage_type: type[MapStage],
        context: StageContext,
        folder: StageFolder,
        made_by: str,
        lent: dict[str, str],
    ) -> DuplexError | str | None:
        """Set the stage up; returns what makes this node unfit, or a note for the screen.

        Args:
            made_by: as `revision_of`.
            lent: input stage -> its name in the storage, where there is one.
        """
        node = socket.gethostname()
        storage = context.config.runner.runtime.storage
        self._borrowed: Borrowed | None = None
        if storage is None and not folder.path.is_dir():
            return StageFailedError(
                f"{stage_type.name}: every node must see {folder.path}, {node} does not. Put the "
                "run root on a file system that all nodes share, at the same path, or set "
                "runner.runtime.storage"
            )
        self._stage = stage_type()
        try:
            here = revision_of(self._stage, context.config)
            if here != made_by:
                return StageFailedError(
                    f"{stage_type.name}: every node must make records as the driver does, by "
                    f"{made_by}; {node} would by {here}. Install the same packages there, from "
                    "the same checkout"
                )
            if storage is not None:
                self._borrowed = Borrowed(context, folder, storage, lent)
                context, folder = self._borrowed.context, self._borrowed.folder
                self._stage.prepare(context)
            self._context, self._folder = context, folder
            self._stage.setup(context)
        except DuplexError as error:
            return error
        except Exception as error:  # noqa: BLE001 - raised, Ray would make a traceback of it
            return StageFailedError(
                f"{stage_type.name}: a worker must be able to start on {node}, it raised "
                f"{type(error).__name__}: {error}"
            )
        return _note_on_gpu(stage_type.name, node)

    def work(self, task: Task) -> Outcome | DuplexError:
        try:
            outcome = work_off(self._stage, self._context, self._folder, task)
            if self._borrowed is not None:
                self._borrowed.hand_in(outcome.blobs)
            return outcome
        except DuplexError as error:  # as a value: Ray would put its traceback into the message
            return error

    def close(self) -> None:
        self._stage.close()
        if self._borrowed is not None:
            self._borrowed.leave()


def _note_on_gpu(stage: str, node: str) -> str | None:
    """Ray gives out what it was told that a node has; whether torch can use it is another matter.
    Stages whose device is `auto` compute on the CPU then."""
    given, torch = os.environ.get("CUDA_VISIBLE_DEVICES"), sys.modules.get("torch")
    if not given or torch is None or torch.cuda.is_available():
        return None
    return (
        f"{stage}: Ray gave a worker on {node} a GPU, torch finds none there: it computes on the "
        "CPU. Mend the driver or torch's build there, or set the stage's device to cpu"
    )


def revision_of(stage: MapStage, config: Config) -> str:
    return f"version {stage.version}, {stage.engine(config) or 'no engine'}"
