"""Which GPU to rent: the cheapest that holds what training needs. The table is data/gpus.yaml."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from duplex.base import Frozen, Text
from duplex.datafiles import read_yaml, validate
from duplex.errors import RequestError

# The estimate leaves out CUDA's context, kernels' work space and fragmentation; nobody has
# measured these for our models, so this is a margin and no figure.
MARGIN, CONTEXT_GB = 1.1, 1.5


class GpuType(Frozen):
    """id: as the API wants it. memory_gb, usd_h: of one GPU. date: when the price was read."""

    id: Text
    memory_gb: Annotated[float, Field(gt=0)]
    usd_h: Annotated[float, Field(gt=0, le=100)]
    source: Text
    date: datetime.date | None = None


class GpuTable(Frozen):
    gpus: Annotated[tuple[GpuType, ...], Field(min_length=1)]


def load_gpus(path: Path) -> tuple[GpuType, ...]:
    """
    Raises:
        DataFileError: no file, or it breaks the schema.
    """
    table: GpuTable = validate(GpuTable, read_yaml(path), path)
    return table.gpus


def with_margin(estimate_gb: float) -> float:
    """GB of a GPU that an estimate of `estimate_gb` asks for."""
    return estimate_gb * MARGIN + CONTEXT_GB


def holds(memory_gb: float, estimate_gb: float) -> bool:
    """Whether a GPU of `memory_gb` holds what is estimated to take `estimate_gb`. The choice of a
    pod's GPU, `duplex doctor` and the tables of costs all judge by this, so that no pod is rented
    which its own doctor then refuses."""
    return memory_gb >= with_margin(estimate_gb)


def fitting(
    gpus: Sequence[GpuType],
    memory_gb: float,
    *,
    only: Sequence[str] = (),
    max_usd_h: float | None = None,
) -> list[GpuType]:
    """Types with at least `memory_gb`, cheapest first; of equal price the larger one first.

    Args:
        only: ids that may be taken; all if empty.
        max_usd_h: dearest price of one GPU.

    Raises:
        RequestError: none fits.
    """
    unknown = sorted(set(only) - {gpu.id for gpu in gpus})
    if unknown:
        raise RequestError(
            f"--gpu must be a type of data/gpus.yaml, found {', '.join(unknown)}; "
            f"it has {', '.join(gpu.id for gpu in gpus)}"
        )
    found = [
        gpu
        for gpu in gpus
        if gpu.memory_gb >= memory_gb
        and (not only or gpu.id in only)
        and (max_usd_h is None or gpu.usd_h <= max_usd_h)
    ]
    if not found:
        limit = "" if max_usd_h is None else f" at no more than {max_usd_h:.2f} USD an hour"
        largest = max(gpu.memory_gb for gpu in gpus)
        raise RequestError(
            f"a GPU must have {memory_gb:.1f} GB{limit}, found none in data/gpus.yaml (the largest "
            f"has {largest:.0f} GB). Lower train.batch_size or train.crop_frames, raise "
            "train.accumulate, or say --gpu-memory if you know better."
        )
    return sorted(found, key=lambda gpu: (gpu.usd_h, -gpu.memory_gb))
