"""Failures of the machine, said in the words of somebody who has to act on them."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from duplex.config_train import TrainSection
from duplex.errors import WorkError

_CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "Cannot allocate memory")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def out_of_memory_explained(
    section: TrainSection, step: int, checkpoints: Path, longest_frames: int
) -> Iterator[None]:
    """
    Raises:
        WorkError: there was too little memory for what is done inside; any other error passes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise WorkError(
            memory_message(section, step, checkpoints, longest_frames, first_line)
        ) from (error)


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in _CPU_OUT_OF_MEMORY
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
    raise WorkError(
        f"{what} must be finite, found {value} at step {step}, on the clips "
        f"{', '.join(clip_ids[:8])}. The last checkpoint is kept in {checkpoints}. "
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
