"""Where a run trains, and that it does so in the same way each time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from duplex.errors import RequestError


def wants_cpu(device: str) -> bool:
    """
    Raises:
        RequestError: a GPU is asked for and there is none, or none is left for this process.
    """
    place = int(os.environ.get("LOCAL_RANK", "0"))
    if device != "cpu" and torch.cuda.is_available() and place >= torch.cuda.device_count():
        raise RequestError(
            "train.processes on a node must be at most the number of its GPUs, found "
            f"{place + 1} or more and {torch.cuda.device_count()}. Lower it, or set "
            "train.runtime.device=cpu."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "train.runtime.device is cuda, but torch finds no GPU here. "
            "Use auto or cpu, or mend the driver."
        )
    return device == "cpu" or not torch.cuda.is_available()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels while a run lasts; what was set before comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore


def cpu_name() -> str:
    """The processor's name, as the kernel or Python gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
