"""What each of several processes does of a checkpoint's conversations: every N-th of them.

The calls and the user's audio come in files, and so do the answers go back: audio is too large for
the pipe that a worker speaks through.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from duplex.config import SamplingSection
from pipeline.evaluation.batch import Call, converse_together
from pipeline.evaluation.client import Conversation, Wall
from training.launch import work


def write_call(folder: Path, index: int, call: Call) -> None:
    facts = {key: value for key, value in vars(call).items() if key != "user"}
    np.savez(folder / f"{index}.call.npz", user=call.user, facts=np.array(json.dumps(facts)))


def _read_call(folder: Path, index: int) -> Call:
    with np.load(folder / f"{index}.call.npz", allow_pickle=False) as held:
        return Call(user=held["user"], **json.loads(str(held["facts"])))


def _write_conversation(folder: Path, index: int, found: Conversation) -> None:
    facts = {"text": found.text, "metadata": found.metadata, "wall": asdict(found.wall)}
    np.savez(folder / f"{index}.npz", agent=found.agent, facts=np.array(json.dumps(facts)))


def read_conversation(folder: Path, index: int) -> Conversation:
    with np.load(folder / f"{index}.npz", allow_pickle=False) as held:
        facts = json.loads(str(held["facts"]))
        wall = Wall(**facts["wall"] | {"frame_s": tuple(facts["wall"]["frame_s"])})
        text = tuple((frame, piece) for frame, piece in facts["text"])
        return Conversation(held["agent"], text, tuple(facts["metadata"]), wall)


def hold(job: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """This rank's share. job: `checkpoint`, `device`, `voices`, `bare`, `slots`, `sampling`,
    `folder` of the calls, `names` to report them by; `again`: the first is held once more."""
    import os

    from pipeline.serving.model import ServedModel

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(job["folder"])
    mine = range(rank, len(job["names"]), ranks)
    model = ServedModel.load(
        Path(job["checkpoint"]),
        job["device"],
        {name: Path(path) for name, path in job["voices"].items()},
        bare=job["bare"],
        num_slots=job["slots"],
    )
    again = rank == 0 and job["again"]
    names = [job["names"][index] for index in mine]
    found = converse_together(
        model,
        [_read_call(folder, index) for index in mine],
        SamplingSection.model_validate(job["sampling"]),
        lambda place: report([*names, f"{names[0]}, again"][place]),
        again=again,
    )
    places = [*mine, len(job["names"])] if again else mine
    for index, conversation in zip(places, found, strict=True):
        _write_conversation(folder, index, conversation)
    return {"device": str(model.device)}


if __name__ == "__main__":
    work(hold)
