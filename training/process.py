"""Settings of a process that trains or merges, made before torch is imported.

With the default, OpenMP's threads spin while they wait for each other. Once anything else
runs on the machine that is dear: at a load of eight on two cores the pocket model trained 59
frames/s, on quiet cores 1 700. Sleeping threads cost nothing that was seen on quiet cores.
"""

from __future__ import annotations

import logging
import os


def prepare_process() -> None:
    """Must be called before the first import of torch; imports nothing itself."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # bitsandbytes, which PEFT imports where it is there, complains of optional kernels.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
