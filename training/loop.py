"""The training loop: AdamW on the adapters, by accelerate, on one process.

Each step is a function of the state before it and of (seed, step): the batch by
`batch_of_step`, dropout by a seed of its own, the learning rate by linear warm-up and a
cosine to zero. So a run that was killed goes on from its last checkpoint and ends with the
same bytes. Validation is teacher-forced likelihood over all validation clips, before the
first step, every `validate_every` steps and at the end.

`metrics.jsonl` holds what is determined by the inputs; on one type of CPU two runs agree bit
for bit, with one thread or two (AVX2 and AVX-512 differ). `timing.jsonl` holds the rest.

Speed: pocket model, 101 adapters of rank 16, batch 4 x 450 frames, 2 cores: 1 700 frames/s,
about a second a step. On CUDA operations without a deterministic kernel only warn.
Source of betas .9/.95: FACTS, section 4, and moshi-finetune.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from moshi.utils.compile import no_compile
from torch import nn

from duplex.base import canonical_json
from duplex.config_train import TrainSection
from duplex.errors import RequestError, WorkError
from duplex.files import write_atomic
from duplex.stage import record_seed
from training.batches import Batch, Clip, batch_of_step, make_batch
from training.checkpoint import TrainState, latest_checkpoint, save_checkpoint
from training.forward import LibraryForward
from training.lora import adapter_parameters, liveness
from training.loss import StreamSums, coefficients, part_counts, stream_means, training_loss

BETAS = (0.9, 0.95)
METRICS, TIMING, CHECKPOINTS = "metrics.jsonl", "timing.jsonl", "checkpoints"
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepReport:
    """What a progress bar shows. `frames_per_s` counts training alone, without padding."""

    step: int
    loss: float
    frames_per_s: float


@dataclass(frozen=True)
class TrainResult:
    """log: the lines of metrics.jsonl; live: live adapters of each group."""

    log: list[dict[str, Any]]
    live: dict[str, int]
    resumed_from: int
    frames_per_s: float


class Trainer:
    """One run. The model's adapters are trained in place; files are written to `work`.

    Args:
        model: an `LMModel` with adapters (`training.lora.add_adapters`).
        targets: the adapted modules by group.
        identity: digest of all that decides the run; checkpoints of another are not used.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, list[str]],
        section: TrainSection,
        *,
        seed: int,
        train_clips: Sequence[Clip],
        valid_clips: Sequence[Clip],
        work: Path,
        identity: str,
        name: str = "train",
    ):
        if not train_clips:
            raise RequestError("training needs at least one clip of the train split, found none.")
        self._section, self._seed, self._targets = section, seed, targets
        self._train_clips, self._valid_clips = train_clips, valid_clips
        self._work, self._identity, self._name = work, identity, name
        self._accelerator = Accelerator(
            cpu=_wants_cpu(section.runtime.device), mixed_precision="no"
        )
        model.to(self._accelerator.device)
        self._parameters = adapter_parameters(model)
        self._adam = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=section.learning_rate,
            betas=BETAS,
            weight_decay=section.weight_decay,
            fused=True,
        )
        self._model, self._optimizer = self._accelerator.prepare(model, self._adam)
        self._step_forward = LibraryForward(self._model)
        self._log: list[str] = []
        self._frames, self._seconds = 0, 0.0

    def run(
        self,
        on_step: Callable[[StepReport], None] = lambda report: None,
        report: Callable[[str], None] = lambda message: None,
    ) -> TrainResult:
        """Preflight, resume, train, validate.

        Raises:
            DeadAdapterError: an adapter would not train; nothing was.
            WorkError: a loss or gradient that is not finite; the last checkpoint is kept.
        """
        section = self._section
        with _deterministic(self._accelerator.device), no_compile():
            live = self._preflight()
            report(f"preflight: {sum(live.values())} of {sum(live.values())} adapters are alive")
            start = self._resume()
            if start:
                report(f"going on from the checkpoint of step {start}")
            wandb_run = self._start_wandb(start)
            if not start:
                self._validate(0, wandb_run)
            for step in range(start, section.steps):
                done = step + 1
                on_step(self._train_step(step, wandb_run))
                if done % section.validate_every == 0 or done == section.steps:
                    self._validate(done, wandb_run)
                if done % section.runtime.checkpoint_every == 0 or done == section.steps:
                    self._save(done)
            if wandb_run is not None:
                wandb_run.finish()
        speed = self._frames / self._seconds if self._seconds else 0.0
        return TrainResult([json.loads(line) for line in self._log], live, start, speed)

    # -- a step

    def _preflight(self) -> dict[str, int]:
        started = time.monotonic()
        clips = self._clips_of(0)
        batch = self._to_device(make_batch(clips))
        torch.manual_seed(record_seed(self._seed, "train", "preflight"))
        self._model.train()

        def compute_loss() -> torch.Tensor:
            loss, _ = self._forward(batch)
            self._check_finite("the loss of the preflight pass", loss.item(), 0, clips)
            return loss

        live = liveness(
            self._model, self._targets, compute_loss, record_seed(self._seed, "train", "liveness")
        )
        self._note_time(0, "preflight", batch.num_frames, time.monotonic() - started)
        return live

    def _train_step(self, step: int, wandb_run: Any) -> StepReport:
        """Update number `step` + 1."""
        started = time.monotonic()
        clips = self._clips_of(step)
        batch = self._to_device(make_batch(clips))
        torch.manual_seed(record_seed(self._seed, "train", f"step-{step}"))
        rate = learning_rate(step, self._section)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._model.train()
        loss, sums = self._forward(batch)
        value = loss.item()
        self._check_finite("the loss", value, step + 1, clips)
        self._accelerator.backward(loss)
        norm = self._accelerator.clip_grad_norm_(self._parameters.values(), self._section.clip_norm)
        assert norm is not None, "one process without FSDP always has a norm"
        self._check_finite("the gradient norm", float(norm), step + 1, clips)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        self._frames += batch.num_frames
        self._seconds += seconds
        line = {
            "kind": "train",
            "step": step + 1,
            "lr": rate,
            "loss": value,
            "grad_norm": float(norm),
            "streams": stream_means(sums.detached()),
        }
        self._note(line, wandb_run)
        self._note_time(step + 1, "train", batch.num_frames, seconds)
        return StepReport(step + 1, value, self._frames / self._seconds)

    def _validate(self, step: int, wandb_run: Any) -> None:
        """Log the teacher-forced NLL of all validation clips; nothing without any."""
        if not self._valid_clips:
            return
        started = time.monotonic()
        self._model.eval()
        total: StreamSums | None = None
        frames = 0
        size = self._section.batch_size
        with torch.no_grad():
            for first in range(0, len(self._valid_clips), size):
                batch = self._to_device(make_batch(self._valid_clips[first : first + size]))
                sums = self._forward(batch)[1].detached()
                total = sums if total is None else total + sums
                frames += batch.num_frames
        assert total is not None
        loss = training_loss(total, self._section.loss).item()
        self._check_finite("the validation loss", loss, step, self._valid_clips)
        line = {"kind": "valid", "step": step, "loss": loss, "streams": stream_means(total)}
        self._note(line, wandb_run)
        self._note_time(step, "valid", frames, time.monotonic() - started)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, StreamSums]:
        weights = coefficients(part_counts(batch.codes, batch.loss_mask), self._section.loss)
        return self._step_forward(batch.codes, batch.loss_mask, weights)

    def _clips_of(self, step: int) -> list[Clip]:
        return batch_of_step(self._train_clips, self._seed, step, self._section.batch_size)

    def _to_device(self, batch: Batch) -> Batch:
        device = self._accelerator.device
        return Batch(batch.codes.to(device), batch.loss_mask.to(device), batch.num_frames)

    def _check_finite(self, what: str, value: float, step: int, clips: Sequence[Clip]) -> None:
        if math.isfinite(value):
            return
        names = ", ".join(clip.id for clip in clips[:8])
        raise WorkError(
            f"{what} must be finite, found {value} at step {step}, on the clips {names}. "
            f"The last checkpoint is kept in {self._work / CHECKPOINTS}. "
            "Lower train.learning_rate, or look at these clips with `duplex inspect`."
        )

    # -- what a kill must not lose

    def _resume(self) -> int:
        """Go back to the last checkpoint of this run, if there is one; returns its step."""
        state = latest_checkpoint(self._work / CHECKPOINTS, self._identity)
        self._log = state.log if state else []
        write_atomic(self._work / METRICS, "".join(f"{line}\n" for line in self._log).encode())
        if state is None:
            return 0
        adam: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self._parameters.items()):
                parameter.copy_(state.tensors[f"adapter.{name}"])
                adam[index] = {key: state.tensors[f"{key}.{name}"] for key in ADAM_STATE}
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": adam, "param_groups": groups})
        return state.step

    def _save(self, step: int) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"adapter.{name}"] = parameter.detach().cpu().contiguous()
            for key in ADAM_STATE:
                tensors[f"{key}.{name}"] = self._adam.state[parameter][key].cpu().contiguous()
        state = TrainState(step, tensors, self._log)
        save_checkpoint(self._work / CHECKPOINTS, state, self._identity)

    # -- what is written down

    def _note(self, line: dict[str, Any], wandb_run: Any) -> None:
        self._log.append(canonical_json(line))
        with (self._work / METRICS).open("a") as file:
            file.write(self._log[-1] + "\n")
        if wandb_run is not None:
            values = {name: value for name, value in line["streams"].items() if value is not None}
            values |= {key: line[key] for key in ("loss", "lr", "grad_norm") if key in line}
            wandb_run.log({f"{line['kind']}/{key}": v for key, v in values.items()}, line["step"])

    def _note_time(self, step: int, kind: str, frames: int, seconds: float) -> None:
        line = {"step": step, "kind": kind, "frames": frames, "seconds": round(seconds, 4)}
        line["frames_per_s"] = round(frames / seconds, 1)
        with (self._work / TIMING).open("a") as file:
            file.write(canonical_json(line) + "\n")

    def _start_wandb(self, start: int) -> Any:
        if not self._section.runtime.wandb:
            return None
        import wandb

        return wandb.init(
            project="duplex-workbench",
            name=self._name,
            id=self._identity[:16],
            resume="allow" if start else None,
            dir=str(self._work),
            config=self._section.model_dump(mode="json", exclude={"runtime"}),
        )


def learning_rate(step: int, section: TrainSection) -> float:
    """Rate of update `step` (from 0): linear warm-up to the peak, then a cosine to zero."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    return section.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _wants_cpu(device: str) -> bool:
    """
    Raises:
        RequestError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            "train.runtime.device is cuda, but torch finds no GPU here. "
            "Use auto or cpu, or mend the driver."
        )
    return device == "cpu" or not torch.cuda.is_available()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels while a run lasts; what was set before comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # pyright: ignore
