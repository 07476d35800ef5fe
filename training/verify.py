"""Does a merged checkpoint compute what base + unmerged adapter computes?

The adapter goes on by PEFT's own loader and runs by PEFT's own layers, so that a mistake in
the merge's formula, naming or scale cannot hide in both. Everything runs in float32 on a
batch of seeded random codes: T = 24 frames, one clip. One model at a time in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from duplex.streams import NUM_ROWS, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from training.embedding import register

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
    from peft import PeftConfig, PeftModel

    lm = source.load_lm()
    codes = seeded_codes(lm)
    config = register(PeftConfig.from_pretrained(str(adapter_folder)))
    tuned: Any = PeftModel.from_pretrained(lm, str(adapter_folder), config=config).eval()  # pyright: ignore
    reference = all_logits(tuned, codes)
    with tuned.disable_adapter():
        untuned = all_logits(tuned, codes)
    del tuned, lm
    result = all_logits(merged.load_lm(), codes)
    scale = _rms(reference)
    return _rms(result - reference) / scale, _rms(untuned - reference) / scale


def seeded_codes(lm: LMModel) -> torch.Tensor:
    """int64 [1, 17, T] within the model's vocabularies."""
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(0, lm.card, (1, NUM_ROWS, NUM_FRAMES), generator=generator)
    codes[:, TEXT_ROW] = torch.randint(0, lm.text_card, (1, NUM_FRAMES), generator=generator)
    return codes


def all_logits(lm: Any, codes: torch.Tensor) -> torch.Tensor:
    """All text and audio logits that count, flat: float32."""
    from moshi.utils.compile import no_compile

    with torch.no_grad(), no_compile():
        output = lm(codes)
    return torch.cat(
        [output.text_logits[output.text_mask].flatten(), output.logits[output.mask].flatten()]
    ).float()


def _rms(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()
