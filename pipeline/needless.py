"""Keeps out of a process what other packages import beside what they are asked for."""

from __future__ import annotations

import sys
from typing import Any


def keep_out_bitsandbytes() -> None:
    """For a merge, and for training unless its base is in 4 bits: PEFT finds no bitsandbytes.

    PEFT imports it wherever it is, and with it the whole of torch's compiler: 2.8 s of the 6 s
    that `import peft` takes. moshi brings it along, so that it is nearly everywhere.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)  # None: not found, neither by import nor find_spec
