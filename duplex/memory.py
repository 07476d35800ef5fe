"""How the C library deals with freed memory: a setting of the process."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in <malloc.h>


def keep_freed_memory() -> None:
    """Let the C library keep what is freed: activations on a CPU are hundreds of MB a pass, and
    getting them from the kernel page by page may take as long as computing (benchmarks/tensors.py).

    Linux with glibc only; nothing elsewhere.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
