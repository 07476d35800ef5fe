"""Which stages the rest of a run still needs. Reads manifests only."""

from __future__ import annotations

from pathlib import Path

from duplex.config import Config
from duplex.errors import DuplexError
from pipeline.run import STAGES, plan


def needed_stages(config: Config, runs_root: Path) -> frozenset[str]:
    """Stages whose work is still to be done for the rest: not done, and the last of their line or
    read by one of these. Before tensors that were imported, for one, nothing is needed."""
    try:
        done = {step.stage.name: step.done for step in plan(config, runs_root)}
    except (DuplexError, OSError):  # `_data` says what is wrong
        done = dict.fromkeys((stage.name for stage in STAGES), False)
    needed: set[str] = set()
    for stage in reversed(STAGES):
        readers = {other.name for other in STAGES if stage.name in other.reads}
        if not done[stage.name] and (not readers or readers & needed):
            needed.add(stage.name)
    return frozenset(needed)
