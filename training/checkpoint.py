"""Checkpoints of a training run: files that are whole or not there, no pickle.

    step-00000020.safetensors   adapter and AdamW state
    best-00000010.safetensors   the adapter that scored best so far, where there is one
    step-00000020.json          written last: step, log so far, best step and score, digests of
                                both, identity

The JSON's presence says that all of it is complete, and its digests that it is undamaged; a
damaged one is passed over for the one before it, which is why two are kept. With the log
inside, going back to a checkpoint's step cannot leave lines of later steps behind.

Nothing else decides how a run goes on: learning rates, the clips of a step and the seed of its
dropout follow from (seed, step), so neither scheduler, sampler nor generator has a state to keep.
Size: adapter parameters x 12 bytes, and x 4 for the best; pocket at rank 16 9 MB and 3 MB.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from duplex.errors import WorkError
from duplex.files import atomic_path, sha256_file, write_json
from training.distributed import Ranks
from training.failures import full_disk_explained

KEPT = 2
_JSON_BYTES = 4096  # of its keys; the log comes on top


@dataclass(frozen=True)
class Best:
    """The adapter after `step` updates, whose `score` no other was below."""

    step: int
    score: float
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after `step` updates.

    tensors: float32 by name, on the CPU; log: the lines of metrics.jsonl up to here;
    stopped: why the run ended before its last step.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    log: list[str]
    best: Best | None = None
    stopped: str | None = None


def save_checkpoint(folder: Path, state: TrainState, identity: str) -> None:
    """Write a checkpoint and remove all but the last `KEPT`.

    Raises:
        WorkError: the disk is full; the checkpoints that were there are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensor_path, json_path = _paths(folder, state.step)
    with full_disk_explained(tensor_path, _num_bytes(state)):
        json_path.unlink(missing_ok=True)  # never beside tensors that it does not describe
        with atomic_path(tensor_path) as temporary:
            save_tensors(state.tensors, temporary)
        write_json(
            json_path,
            {
                "step": state.step,
                "identity": identity,
                "tensors": sha256_file(tensor_path),
                "log": state.log,
                "best": _save_best(folder, state.best),
                "stopped": state.stopped,
            },
        )
    for step in sorted(_steps(folder))[:-KEPT]:
        _remove(folder, step)
    _remove_unused_bests(folder)


def _save_best(folder: Path, best: Best | None) -> dict[str, Any] | None:
    if best is None:
        return None
    path = _best_path(folder, best.step)
    # What is there was written by this process, or checked when it went on from it.
    if not path.exists():
        with atomic_path(path) as temporary:
            save_tensors(best.tensors, temporary)
    return {"step": best.step, "score": best.score, "tensors": sha256_file(path)}


def _num_bytes(state: TrainState) -> int:
    tensors = [*state.tensors.values(), *(state.best.tensors.values() if state.best else ())]
    text = sum(len(line) + 8 for line in state.log)
    return sum(tensor.nbytes for tensor in tensors) + text + _JSON_BYTES


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """`save_file`, with a full disk as the OSError that it is: safetensors wraps it."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def latest_checkpoint(folder: Path, identity: str) -> TrainState | None:
    """The last complete checkpoint of this very run; anything else there is removed.

    Args:
        identity: digest of all that decides the run; a checkpoint with another is foreign.

    Raises:
        WorkError: a file that is there cannot be read now; nothing of that checkpoint is removed.
    """
    for leftover in folder.glob("*.tmp"):  # of a save that was killed
        leftover.unlink()
    state = None
    for step in sorted(_steps(folder), reverse=True):
        state = _read(folder, step, identity)
        if state is not None:
            break
        _remove(folder, step)
    _remove_unused_bests(folder)
    return state


def state_from_first(state: TrainState | None, ranks: Ranks) -> TrainState | None:
    """What the first rank found, on all of them: elsewhere a network file system may be late."""
    if ranks.count == 1:
        return state
    best = state.best if state else None
    plain = ranks.from_first(
        None
        if state is None
        else (state.step, state.log, state.stopped, best and (best.step, best.score))
    )
    if plain is None:
        return None
    step, log, stopped, chosen = plain
    tensors = ranks.tensors_from_first(state.tensors if state else {})
    best = None
    if chosen is not None:
        mine = state.best.tensors if state and state.best else {}
        best = Best(chosen[0], chosen[1], ranks.tensors_from_first(mine))
    return TrainState(step, tensors, log, best, stopped)


def _read(folder: Path, step: int, identity: str) -> TrainState | None:
    """None where it is incomplete, damaged or foreign: its digests say so, before it is loaded."""
    tensor_path, json_path = _paths(folder, step)
    try:
        value = json.loads(json_path.read_text())
        if value["identity"] != identity or value["step"] != step:
            return None
        if sha256_file(tensor_path) != value["tensors"]:
            return None
        best = None
        if value["best"] is not None:
            path = _best_path(folder, value["best"]["step"])
            if sha256_file(path) != value["best"]["tensors"]:
                return None
            best = Best(value["best"]["step"], value["best"]["score"], load_file(path))
        log = [str(line) for line in value["log"]]
        return TrainState(step, load_file(tensor_path), log, best, value["stopped"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    except (OSError, SafetensorError) as error:  # of the machine: the file is as it was written
        raise WorkError(
            f"{tensor_path}: a checkpoint must be readable, found {error}. It was left in place: "
            "mend the disk or mount, and run again to go on from it."
        ) from error


def _steps(folder: Path) -> Iterator[int]:
    """Steps of which any file is there, complete or not."""
    names = {path.stem for path in folder.glob("step-*") if path.suffix != ".tmp"}
    return (int(name.removeprefix("step-")) for name in names if name[5:].isdigit())


def _paths(folder: Path, step: int) -> tuple[Path, Path]:
    stem = f"step-{step:08d}"
    return folder / f"{stem}.safetensors", folder / f"{stem}.json"


def _best_path(folder: Path, step: int) -> Path:
    return folder / f"best-{step:08d}.safetensors"


def _remove(folder: Path, step: int) -> None:
    tensor_path, json_path = _paths(folder, step)
    json_path.unlink(missing_ok=True)
    tensor_path.unlink(missing_ok=True)


def _remove_unused_bests(folder: Path) -> None:
    """Those that no checkpoint here names; after those checkpoints themselves."""
    used = set()
    for path in folder.glob("step-*.json"):
        try:
            best = json.loads(path.read_text())["best"]
            used |= {best["step"]} if best else set()
        except (ValueError, KeyError, TypeError):
            continue
    kept = {_best_path(folder, step) for step in used}
    for path in folder.glob("best-*.safetensors"):
        if path not in kept:
            path.unlink()
