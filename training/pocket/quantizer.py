"""The package's own quantizer training, steered: no leak, a schedule, a state that can be saved.

`moshi.quantization` learns codebooks by running means, starts them by k-means and replaces codes
that nobody uses. Three things are done to it from outside:

- Replaced codes are taken from samples without their graph; the package keeps it in its running
  sums (3.3 MB a step).
- Early on half of the sounds pass unquantized, or the codebooks starve; later fewer do, since in
  use every one is quantized. Running means grow longer: with 512 codes and some 100 frames a
  step, one of 100 steps rests on 20 frames.
- In half of the steps the later codebooks are left out from a random one on, so that the first
  ones carry most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

START_UNQUANTIZED, END_UNQUANTIZED = 0.5, 0.1
START_DECAY, END_DECAY = 0.99, 0.997
START_EXPIRY, END_EXPIRY = 0.3, 0.1  # of a code's fair share, below which it is replaced
DROPOUT_SHARE = 0.5


def codebooks(mimi: Any) -> Iterator[Any]:
    """The `EuclideanCodebook`s of a `MimiModel`, in order."""
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        for layer in part.vq.layers:
            yield layer._codebook


def stop_leak(mimi: Any) -> None:
    """Make the replacement of unused codes keep no graph."""
    for codebook in codebooks(mimi):
        codebook._check_expired_codes = _without_graph(codebook._check_expired_codes)


def _without_graph(method: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def replace(batch_samples: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return method(batch_samples.detach())

    return replace


def steer(mimi: Any, settled: float, seed: int) -> None:
    """Set the quantizer up for a step.

    Args:
        settled: in [0, 1]: 0 for as long as the run explores, 1 at its end.
        seed: of the step; decides which codebooks are left out.
    """
    for part in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
        part.no_quantization_rate = _mix(START_UNQUANTIZED, END_UNQUANTIZED, settled)
    for codebook in codebooks(mimi):
        codebook.decay = _mix(START_DECAY, END_DECAY, settled)
        codebook.threshold_usage_ratio = _mix(START_EXPIRY, END_EXPIRY, settled)
    rng = random.Random(seed)
    mimi.quantizer.rvq_rest.q_dropout = rng.random() < DROPOUT_SHARE
    mimi.quantizer.rvq_rest.rng_dropout = rng


def _mix(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def counters(mimi: Any) -> torch.Tensor:
    """int64 [K]: steps until each codebook next looks for unused codes."""
    return torch.tensor([codebook._next_unused_check for codebook in codebooks(mimi)])


def set_counters(mimi: Any, counts: torch.Tensor) -> None:
    for codebook, count in zip(codebooks(mimi), counts.tolist(), strict=True):
        codebook._next_unused_check = count
