"""Failures of the machine, said in the words of somebody who has to act on them."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from duplex.config_train import TrainSection
from duplex.errors import WorkError

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory",
    "CUDA error: out of memory", "ALLOC_FAILED",  # the driver's, and cuBLAS's and cuDNN's own
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def out_of_memory_explained(
    message: Callable[[str], str],
) -> Iterator[None]:
    """
    Args:
        message: what to say, given the first line of what torch says.

    Raises:
        WorkError: there was too little memory for what is done inside; any other error passes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise WorkError(message(first_line)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OUT_OF_MEMORY)


def base_message(section: TrainSection, found: str) -> str:
    """What to do where not even the base fits."""
    advice = []
    if section.dtype == "float32":
        advice.append("train.dtype=bfloat16 (half of it)")
    if section.quantize == "none" and section.processes == 1:
        advice.append("train.quantize=nf4 (a quarter of bfloat16)")
    if section.quantize == "none":
        advice.append(f"more train.processes, a GPU each (now {section.processes})")
    advice.append("a GPU or machine with more memory (`duplex doctor CONFIG` sums up the need)")
    return (
        f"the base and its adapters must fit into memory, found too little: {found}. Nothing was "
        f"trained. Try, in this order: {'; '.join(advice)}."
    )


def guards_message(section: TrainSection, step: int, checkpoints: Path, found: str) -> str:
    """What to do where training fits and its checks do not."""
    guards, advice = section.guards, []
    if guards.free_seconds and section.processes > 1:
        advice.append(
            "train.guards.free_seconds=0 (a free run needs the whole base on each process)"
        )
    elif guards.free_seconds:
        advice.append(f"fewer train.guards.free_seconds (now {guards.free_seconds:g})")
    if guards.clips > 1:
        advice.append(f"fewer train.guards.clips (now {guards.clips}), which speak side by side")
    if guards.budget:
        advice.append("train.guards.budget=false")
    return (
        f"a check of the guards must fit into memory, found too little at step {step}: {found}. "
        f"The last checkpoint is kept in {checkpoints}. Try, in this order: {'; '.join(advice)}."
    )


def memory_message(
    section: TrainSection, step: int, checkpoints: Path, longest_frames: int, found: str
) -> str:
    at_once = section.batch_size // (section.accumulate * section.processes)
    advice = []
    if at_once > 1:
        advice.append(
            f"train.accumulate={section.accumulate * 2} (the same batch in smaller parts; "
            f"{at_once} clips are worked at once now)"
        )
    if section.runtime.checkpointing != "full":
        advice.append(
            f"train.runtime.checkpointing=full (now {section.runtime.checkpointing}; the same "
            "result, slower)"
        )
    advice.append(f"a lower train.crop_frames (now {section.crop_frames})")
    if section.batch_size > 1:
        advice.append(f"a lower train.batch_size (now {section.batch_size})")
    return (
        f"a step of {at_once} clips of up to {longest_frames} frames must fit into memory, found "
        f"too little at step {step}: {found}. The last checkpoint is kept in {checkpoints}. "
        f"Try, in this order: {'; '.join(advice)}."
    )


def require_finite(
    what: str, value: float, step: int, clip_ids: Sequence[str], checkpoints: Path
) -> None:
    """
    Raises:
        WorkError: `value` is NaN or infinite; names the first clips it was computed on.
    """
    if math.isfinite(value):
        return
    where = f", on the clips {', '.join(clip_ids[:8])}" if clip_ids else ""
    raise WorkError(
        f"{what} must be finite, found {value} at step {step}{where}. The last "
        f"checkpoint is kept in {checkpoints}. "
        "Lower train.learning_rate, or look at these clips with `duplex inspect`."
    )


@contextmanager
def full_disk_explained(path: Path, needed_bytes: int) -> Iterator[None]:
    """
    Raises:
        WorkError: the disk has no room for what is written inside; any other error passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise WorkError(
            f"{path}: a checkpoint needs {needed_bytes:,d} bytes, found the disk full "
            f"({free:,d} bytes free). The checkpoint before it is whole: free some space "
            "(`duplex clean CONFIG --dry-run` shows what no config needs) and run again, to go on "
            "from there."
        ) from error
