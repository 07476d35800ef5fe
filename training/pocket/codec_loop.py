"""The codec's training loop: each step a function of the state before it and of (seed, step).

So a run that was killed goes on from its last checkpoint and ends with the same bytes; no
generator or schedule has a state to keep.

The first codebook is made semantic by a linear head on its output that names the phone in each
half of a frame (`codec_labels.py`); only the training needs the head. Mimi distils a speech
model for that (Moshi, arXiv 2410.00037, section 3.3); here the synthesiser knows the phones.

Crops of 8 to 64 frames take turns, so that the transformers meet the distances that they
will see, at the same number of frames a step.

Two parts: first all of it learns, then the decoder alone. From the end of the first part on the
codes of a sound stay what they are, so that a language model can already be trained on them.

Cost: data/pocket/CODEC.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.utils.compile import no_compile
from torch import nn
from torch.nn import functional as F

from duplex.base import canonical_json
from duplex.files import sha256_bytes
from pipeline.engines import espeak
from pipeline.engines.pocket import MIMI_CONFIG
from training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from training.optimizer import adam_tensors, load_adam
from training.pocket.codec_labels import HALVES, IGNORED
from training.pocket.codec_losses import spectral_losses
from training.pocket.crops import Beds, Crops, draw_crops, make_beds
from training.pocket.initial import scale_by_speech
from training.pocket.quantizer import counters, set_counters, steer, stop_leak
from training.pocket.speech_pool import Tape, record_tape

COUNTERS = "unused_checks"
STEADY = 0.6  # of the first part's steps
SCALED_BY = (8, 12)  # crops and frames for the first weights


@dataclass(frozen=True)
class CodecRecipe:
    """All that decides a codec, besides the code and espeak's version.

    steps: in which all of it learns; decoder_steps: in which the decoder does, after those;
    crops: (crops, frames) of a step, in turn; valid: those of a validation; weights: of the
    losses; minutes: of speech.
    """

    steps: int
    decoder_steps: int
    seed: int
    minutes: float = 60.0
    crops: tuple[tuple[int, int], ...] = ((6, 8), (3, 16), (6, 8), (3, 16), (2, 32), (1, 64))
    valid: tuple[int, int] = (24, 25)
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    clip_norm: float = 2.0
    weights: dict[str, float] = field(
        default_factory=lambda: {
            "mel": 2.0, "magnitude": 0.3, "wave": 0.02, "commitment": 0.1, "phone": 0.3,
        }
    )  # fmt: skip
    config: dict[str, Any] = field(default_factory=lambda: MIMI_CONFIG)

    @property
    def all_steps(self) -> int:
        return self.steps + self.decoder_steps

    def identity(self, *tapes: Tape) -> str:
        """Digest of what decides a codec trained on these."""
        sounds = [
            [sha256_bytes(tape.samples.tobytes()), sha256_bytes(tape.labels.tobytes()),
             list(tape.phones.names)]
            for tape in tapes
        ]  # fmt: skip
        return sha256_bytes(canonical_json([asdict(self), espeak.revision(), sounds]).encode())


class PhoneHead(nn.Module):
    """Logits [B, C, F, 2] of the phones in the halves of frames, from [B, D, F]."""

    def __init__(self, dimension: int, classes: int):
        super().__init__()
        self.linear = nn.Linear(dimension, HALVES * classes)
        self._classes = classes

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        logits = self.linear(latent.transpose(1, 2))
        return logits.unflatten(-1, (self._classes, HALVES)).permute(0, 2, 1, 3)


class CodecTrainer:
    """One run; `mimi` and `head` are trained in place, checkpoints written to `work`."""

    def __init__(self, recipe: CodecRecipe, tape: Tape, valid: Tape, work: Path):
        self.recipe, self._tape, self._work = recipe, tape, work
        self._identity = recipe.identity(tape, valid)
        self._beds: Beds = make_beds(recipe.seed)
        self._valid = draw_crops(
            valid, self._beds, np.random.default_rng([recipe.seed, 1]), *recipe.valid
        )
        self.mimi, self.head = build(recipe, len(tape.phones.names))
        rng = np.random.default_rng([recipe.seed, 2])
        scale_by_speech(self.mimi, draw_crops(tape, self._beds, rng, *SCALED_BY).audio)
        self._semantic: list[torch.Tensor] = []
        self.mimi.quantizer.rvq_first.register_forward_hook(self._keep_semantic)
        self._parameters = {
            f"{part}.{name}": parameter
            for part, module in (("mimi", self.mimi), ("head", self.head))
            for name, parameter in module.named_parameters()
        }
        groups = [{"params": [*self._parameters.values()], "names": [*self._parameters]}]
        self._adam = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.log: list[dict[str, Any]] = []

    def _keep_semantic(self, module: nn.Module, inputs: Any, result: Any) -> None:
        if module.training:
            self._semantic = [result.x]

    def run(
        self, *, every: int, report: Callable[[dict[str, Any]], None], until: int | None = None
    ) -> int:
        """Train to the last step, or to `until`; returns the step that it went on from.

        Args:
            every: steps between checkpoints, each with a validation and a line for `report`.
        """
        resumed = step = self._resume()
        end = until or self.recipe.all_steps
        while step < end:
            started, first = time.monotonic(), step
            part_end = self.recipe.steps if first < self.recipe.steps else end
            step = min(first - first % every + every, part_end, end)
            losses = [self.train_step(one) for one in range(first, step)]
            self.log.append({"step": step} | _means(losses) | self.validate())
            self._save(step)
            report(self.log[-1] | {"seconds": round(time.monotonic() - started, 1)})
        return resumed

    def train_step(self, step: int) -> dict[str, float]:
        """One update; the losses before it by name."""
        recipe = self.recipe
        words = np.random.SeedSequence([recipe.seed, step]).generate_state(2)
        torch.manual_seed(int(words[0]))
        steer(self.mimi, settled(step, recipe), int(words[1]))
        for group in self._adam.param_groups:
            group["lr"] = learning_rate(step, recipe)
        num_crops, num_frames = recipe.crops[step % len(recipe.crops)]
        crops = draw_crops(
            self._tape, self._beds, np.random.default_rng([recipe.seed, 0, step]),
            num_crops, num_frames,
        )  # fmt: skip
        learns_all = step < recipe.steps
        losses = self._losses(crops) if learns_all else self._decoder_losses(crops)
        total = torch.stack([recipe.weights[name] * loss for name, loss in losses.items()]).sum()
        self._adam.zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), recipe.clip_norm)
        self._adam.step()
        return {name: loss.item() for name, loss in losses.items()} | {"norm": norm.item()}

    def _losses(self, crops: Crops) -> dict[str, torch.Tensor]:
        self.mimi.train()
        result = self.mimi(crops.audio)
        logits = self.head(self._semantic.pop())
        return spectral_losses(result.x, crops.audio) | {
            "commitment": result.penalty,
            "phone": F.cross_entropy(logits, crops.labels, ignore_index=IGNORED),
        }

    def _decoder_losses(self, crops: Crops) -> dict[str, torch.Tensor]:
        self.mimi.eval()
        with torch.no_grad():
            codes = self.mimi.encode(crops.audio)
        return spectral_losses(self.mimi.decode(codes), crops.audio)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On crops of held-out texts: mel distance, and accuracy of the phone head."""
        codes = self.valid_codes(self.mimi)
        decoded = self.mimi.decode(codes)
        logits = self.head(self.mimi.quantizer.rvq_first.decode(codes[:, :1]))
        known = self._valid.labels != IGNORED
        right = (logits.argmax(1) == self._valid.labels)[known].float().mean()
        return {
            "valid_mel": round(float(spectral_losses(decoded, self._valid.audio)["mel"]), 4),
            "valid_phone_accuracy": round(float(right), 4),
        }

    @torch.no_grad()
    def valid_codes(self, mimi: Any) -> torch.Tensor:
        """int64 [B, K, F]: what a `MimiModel` makes of the validation's crops."""
        return mimi.eval().encode(self._valid.audio)

    def _state(self) -> dict[str, torch.Tensor]:
        modules = {f"mimi.{name}": tensor for name, tensor in self.mimi.state_dict().items()}
        modules |= {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {name: tensor.detach().contiguous() for name, tensor in modules.items()}

    def _save(self, step: int) -> None:
        tensors = self._state() | adam_tensors(self._adam, self._parameters)
        tensors[COUNTERS] = counters(self.mimi)
        lines = [json.dumps(line) for line in self.log]
        save_checkpoint(self._work, TrainState(step, tensors, lines), self._identity)

    def _resume(self) -> int:
        state = latest_checkpoint(self._work, self._identity)
        if state is None:
            return 0
        for part, module in (("mimi.", self.mimi), ("head.", self.head)):
            module.load_state_dict(
                {k.removeprefix(part): v for k, v in state.tensors.items() if k.startswith(part)}
            )
        load_adam(self._adam, state.tensors)
        set_counters(self.mimi, state.tensors[COUNTERS])
        self.log = [json.loads(line) for line in state.log]
        return state.step


def _means(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(line[name] for line in lines) / len(lines), 4) for name in lines[0]}


def build(recipe: CodecRecipe, classes: int) -> tuple[Any, PhoneHead]:
    """An untrained `MimiModel` and head, all weights drawn from the recipe's seed."""
    from moshi.models.loaders import get_mimi

    with torch.random.fork_rng(devices=[]), no_compile():
        torch.manual_seed(recipe.seed)
        quantizer = recipe.config["quantizer"]
        mimi = get_mimi(None, recipe.config, num_codebooks=quantizer["n_q"])
        head = PhoneHead(quantizer["output_dimension"], classes)
    stop_leak(mimi)
    return mimi, head


def settled(step: int, recipe: CodecRecipe) -> float:
    """How far a step's schedules have come, in [0, 1]: they stand still for the first `STEADY` of
    the first part, then rise in a line to 1 at its end; in the second they rise all along."""
    if step >= recipe.steps:
        return (step - recipe.steps) / recipe.decoder_steps
    steady = round(STEADY * recipe.steps)
    return max(0.0, (step - steady) / max(1, recipe.steps - steady))


def learning_rate(step: int, recipe: CodecRecipe) -> float:
    """Of update `step` (from 0): in each part a linear warm-up, the peak, a line to 1 % of it."""
    part_step = step if step < recipe.steps else step - recipe.steps
    warm = min(1.0, (part_step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * (1 - 0.99 * settled(step, recipe))


def record_tapes(recipe: CodecRecipe) -> tuple[Tape, Tape]:
    """The training tape, and two minutes of held-out texts in voices that it has."""
    tape = record_tape(recipe.seed, recipe.minutes)
    return tape, record_tape(recipe.seed, 2.0, tape.phones, held_out=True)
