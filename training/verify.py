"""Does a checkpoint that was written here compute what it must?

A merged one: what base + unmerged adapter computes. A cut one: the text and the agent's codes as
before. Everything runs in float32 on a batch of seeded random codes, T = 24 frames, with one
layer at a time in memory (`training/streamed.py`); the unmerged adapter acts in its own layers,
so that a mistake in the merge's formula, naming or scale cannot hide in both.

Only what the agent says counts: the text and the first eight codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from duplex.streams import CODEBOOKS, NUM_ROWS, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from training.streamed import streamed_lm

if TYPE_CHECKING:
    from moshi.models.lm import LMModel

# Relative rms error of the logits that rounding the weights may cause. Float32 measures
# 1e-6 (another order of summation), bfloat16 with 8 bits of mantissa about 5e-3.
ROUNDING = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
SEED = 20_240
NUM_FRAMES = 24


def logit_errors(
    source: Checkpoint, adapter_folder: Path, merged: Checkpoint
) -> tuple[float, float]:
    """(error, effect): rms of merged - unmerged and of base - unmerged, both relative to the
    rms of the unmerged logits.

    Raises:
        CorruptFileError: the merged folder does not load strictly.
    """
    untuned, reference = base_and_unmerged(source, adapter_folder)
    with streamed_lm(merged) as lm:
        result = all_logits(lm, seeded_codes(lm))
    scale = _rms(reference)
    return _rms(result - reference) / scale, _rms(untuned - reference) / scale


def base_and_unmerged(source: Checkpoint, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base, and of the base with its adapter on, unmerged: from one pass."""
    with streamed_lm(source, adapter) as lm:
        output = _run(lm, seeded_codes(lm).repeat(2, 1, 1))
        return _flat(output, 0), _flat(output, 1)


def cut_error(source: Checkpoint, cut: Checkpoint) -> float:
    """rms of the difference that leaving depth steps out makes, relative to that of the logits.

    Raises:
        CorruptFileError: one of them does not load strictly.
    """
    logits: list[torch.Tensor] = []
    for checkpoint in (source, cut):
        with streamed_lm(checkpoint) as lm:
            logits.append(all_logits(lm, seeded_codes(lm)))
    return _rms(logits[1] - logits[0]) / _rms(logits[0])


def seeded_codes(lm: LMModel) -> torch.Tensor:
    """int64 [1, 17, T] within the model's vocabularies."""
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(0, lm.card, (1, NUM_ROWS, NUM_FRAMES), generator=generator)
    codes[:, TEXT_ROW] = torch.randint(0, lm.text_card, (1, NUM_FRAMES), generator=generator)
    return codes


def all_logits(lm: Any, codes: torch.Tensor) -> torch.Tensor:
    """All text and agent audio logits that count, clip after clip, flat: float32."""
    output = _run(lm, codes)
    return torch.cat([_flat(output, clip) for clip in range(codes.shape[0])])


def _run(lm: Callable[[torch.Tensor], Any], codes: torch.Tensor) -> Any:
    from moshi.utils.compile import no_compile

    with torch.no_grad(), no_compile():
        return lm(codes)


def _flat(output: Any, clip: int) -> torch.Tensor:
    text, audio = output.text_logits[clip], output.logits[clip, :CODEBOOKS]
    text_mask, mask = output.text_mask[clip], output.mask[clip, :CODEBOOKS]
    return torch.cat([text[text_mask].flatten(), audio[mask].flatten()]).float()


def _rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()
