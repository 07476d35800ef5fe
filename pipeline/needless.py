"""Keeps out of a process what other packages import beside what they are asked for."""

from __future__ import annotations

import sys
from typing import Any


def keep_out_bitsandbytes() -> None:
    """For a stage that trains or merges: PEFT finds no bitsandbytes, which comes with moshi.

    PEFT imports it wherever it is, for layers in 4 and 8 bits, which no adapter here is put on;
    it brings the whole of torch's compiler: 2.8 s of the 6 s that `import peft` takes.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)  # None: not found, neither by import nor find_spec
