"""What a training run gives back, and who watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from training.checkpoint import Best

Streams = Mapping[str, float | None]
# (updates done, streams of the validation just made or None) -> a line for the log. Its `score`
# (lower is better, None: not to be chosen) picks the best.
Watch = Callable[[int, Streams | None], dict[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """log: the lines of metrics.jsonl; live: live adapters of each group; best: the adapter to
    hand in, None: the last; stopped: why it ended before its last step."""

    log: list[dict[str, Any]]
    live: dict[str, int]
    resumed_from: int
    frames_per_s: float
    final_step: int
    best: Best | None = None
    stopped: str | None = None
