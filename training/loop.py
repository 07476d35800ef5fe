"""The training loop: AdamW on the adapters, by accelerate, on one process or many.

Each step is a function of the state before it and of (seed, step): its clips by
`training/sampler.py`, dropout by a seed of its own, learning rates by `training/optimizer.py`. So
a run that was killed goes on from its last checkpoint and ends with the same bytes.

**Parts.** A batch is worked through in `accumulate` parts on each of `processes` ranks. The loss
is linear in sums (`training/loss.py`), with coefficients from the counts of the whole batch, so
the gradients of parts and ranks add up to the batch's, whatever its clips' lengths.

**Checks.** Before the first step, every `validate_every` steps and at the end: teacher-forced
likelihood over all validation clips (and, apart, those of the base data), then `watch`, if there
is one. The adapter with the lowest score is kept as the best: the score that `watch` gives, or
the validation loss without it. The state before the first step is never the best.

`metrics.jsonl` holds what is determined by the inputs; on one type of CPU two runs agree bit
for bit, with one thread or two (AVX2 and AVX-512 differ). `timing.jsonl` holds the rest.
On CUDA operations without a deterministic kernel only warn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from moshi.utils.compile import no_compile
from torch import nn

from duplex.config_train import TrainSection
from duplex.errors import RequestError, WorkError
from duplex.stage import record_seed
from training.batches import Clip, make_batch
from training.checkpoint import (
    Best,
    TrainState,
    latest_checkpoint,
    save_checkpoint,
    state_from_first,
)
from training.device import deterministic, wants_cpu
from training.distributed import Ranks, gathered, shard
from training.failures import (
    guards_message,
    memory_message,
    out_of_memory_explained,
    require_finite,
)
from training.forward import make_forward
from training.log import StepReport, StopTraining, TrainLog, memory_bytes, valid_line
from training.lora import adapter_parameters, liveness
from training.loss import StreamSums, coefficients, part_counts, stream_means, training_loss
from training.optimizer import adam_tensors, load_adam, make_adam, set_rates
from training.result import Streams, TrainResult, Watch
from training.sampler import Sampler, parts_of

CHECKPOINTS = "checkpoints"


class Trainer:
    """One run. The model's adapters are trained in place; files are written to `work`.

    Each of many processes (`training/launch.py`) makes one from the same arguments.

    Args:
        model: an `LMModel` with adapters (`training.lora.add_adapters`).
        targets: the adapted modules by group.
        identity: digest of all that decides the run; checkpoints of another are not used.
        base_train, base_valid: clips of `base_data`; its share is in `section`.
        watch: called where `TrainSection.guards_due`, on every rank (the first one's answer
            counts); may raise `StopTraining` and may be set later.
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
        base_train: Sequence[Clip] = (),
        base_valid: Sequence[Clip] = (),
        watch: Watch | None = None,
    ):
        if not train_clips:
            raise RequestError("training needs at least one clip of the train split, found none.")
        self._section, self._seed, self._targets = section, seed, targets
        self._valid_clips, self._base_valid = valid_clips, base_valid
        self._work, self._identity, self._name = work, identity, name
        self._user = section.loss.user_streams
        self.watch = watch
        self._sampler = Sampler(
            train_clips,
            seed,
            section.batch_size,
            bucket_batches=section.bucket_batches,
            base=base_train,
            share=section.base_data.share,
        )
        self._accelerator = Accelerator(cpu=wants_cpu(section.runtime.device), mixed_precision="no")
        self._ranks = Ranks(
            self._accelerator.process_index,
            self._accelerator.num_processes,
            self._accelerator.device,
        )
        assert self._ranks.count == section.processes, "pipeline/train.py starts the others"
        self._model = model
        self.forward = make_forward(model, section)
        self._parameters = adapter_parameters(model)
        self._sharded = self._place_model()
        self._adam = make_adam(self._parameters, section)
        # The model is not prepared: training/distributed.py says why.
        self._optimizer = self._accelerator.prepare(self._adam)
        self._log = TrainLog(work, writes=self._ranks.first)
        self._best: Best | None = None
        self._frames, self._seconds = 0, 0.0

    def run(
        self,
        on_step: Callable[[StepReport], None] = lambda report: None,
        report: Callable[[str], None] = lambda message: None,
    ) -> TrainResult:
        """Preflight, resume, train, validate.

        Raises:
            DeadAdapterError: an adapter would not train; nothing was.
            WorkError: a loss or gradient that is not finite, too little memory, a full disk;
                the last checkpoint is kept.
        """
        section = self._section
        failed = True
        with deterministic(self._ranks.device), no_compile():
            live = self._preflight()
            report(f"preflight: {sum(live.values())} of {sum(live.values())} adapters are alive")
            state = self._resume()
            start, stopped = (state.step, state.stopped) if state else (0, None)
            if state:
                report(f"going on from the checkpoint of step {start}")
            self._log.start_wandb(section, self._name, self._identity, bool(state))
            try:
                if not start:
                    stopped = self._check(0)
                done = start
                while done < section.steps and not stopped:
                    on_step(self._train_step(done))
                    done += 1
                    stopped = self._check(done)
                    if section.is_due(section.runtime.checkpoint_every, done) or stopped:
                        self._save(done, stopped)
                failed = False
            finally:
                self._log.close(failed)
        if stopped:
            report(f"stopped after step {done}: {stopped}")
        speed = self._frames / self._seconds if self._seconds else 0.0
        return TrainResult(self._log.parsed(), live, start, speed, done, self._best, stopped)

    def load_adapters(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put adapter tensors, named as `training.lora.adapter_parameters`, into the model."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    def whole_weights(self) -> AbstractContextManager[None]:
        """The base whole on each process, for work that is not done by `forward`."""
        return gathered(self._sharded)

    # -- a step

    def _preflight(self) -> dict[str, int]:
        """On the first rank's first part, on all ranks: the same pass on each."""
        started = time.monotonic()
        clips = self._parts(0, rank=0)[0]
        batch = make_batch(clips, self._user).to(self._ranks.device)
        weights = self._weights(clips)
        torch.manual_seed(record_seed(self._seed, "train", "preflight"))
        self._set_training(True)

        def compute_loss() -> torch.Tensor:
            loss, _ = self.forward(batch.codes, batch.loss_mask, weights)
            self._check_finite("the loss of the preflight pass", loss.item(), 0, clips)
            return loss

        with self._memory_explained(0, clips):
            seed = record_seed(self._seed, "train", "liveness")
            live = liveness(self._model, self._targets, compute_loss, seed)
        self._note_time(0, "preflight", [clips], started)
        return live

    def _train_step(self, step: int) -> StepReport:
        """Update number `step` + 1."""
        started = time.monotonic()
        clips = self._sampler.batch(step)
        weights = self._weights(clips)
        # Each rank drops other units: of one seed the ranks would drop the same ones.
        rank = f"-rank-{self._ranks.rank}" if self._ranks.rank else ""
        torch.manual_seed(record_seed(self._seed, "train", f"step-{step}{rank}"))
        rates = set_rates(self._adam, step, self._section)
        self._set_training(True)
        found: list[tuple[torch.Tensor, StreamSums]] = []
        with self._memory_explained(step + 1, clips):
            for part in self._parts(step):
                batch = make_batch(part, self._user).to(self._ranks.device)
                loss, sums = self.forward(batch.codes, batch.loss_mask, weights)
                self._accelerator.backward(loss)
                found.append((loss.detach().double().cpu(), sums.detached()))
        value, total = self._add_up(found)
        self._check_finite("the loss", value, step + 1, clips)
        with self._memory_explained(step + 1, clips):
            self._ranks.sum_gradients(self._parameters.values())
            norm = self._accelerator.clip_grad_norm_(
                self._parameters.values(), self._section.clip_norm
            )
        assert norm is not None, "plain parameters always have a norm"
        self._check_finite("the gradient norm", float(norm), step + 1, clips)
        with self._memory_explained(step + 1, clips):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        line = {"kind": "train", "step": step + 1, "loss": value, "grad_norm": float(norm)}
        self._log.note(line | rates | {"streams": stream_means(total)})
        every = [part for r in range(self._ranks.count) for part in self._parts(step, rank=r)]
        self._frames += sum(clip.num_frames for clip in clips)
        self._seconds += time.monotonic() - started
        self._note_time(step + 1, "train", every, started)
        memory = memory_bytes(self._ranks.device)
        return StepReport(step + 1, value, self._frames / self._seconds, memory)

    def _parts(self, step: int, rank: int | None = None) -> list[list[Clip]]:
        """A rank's parts (this one's, if not told another) of the batch of `step`."""
        rank = self._ranks.rank if rank is None else rank
        clips = self._sampler.batch(step)
        return parts_of(clips, self._section.accumulate, self._ranks.count, rank)

    def _weights(self, clips: Sequence[Clip]) -> torch.Tensor:
        """Coefficients of the loss of `clips` together: [P]."""
        batch = make_batch(clips, self._user)
        counts = part_counts(batch.codes, batch.loss_mask)
        return coefficients(counts, self._section.loss).to(self._ranks.device)

    def _add_up(self, found: list[tuple[torch.Tensor, StreamSums]]) -> tuple[float, StreamSums]:
        """Loss and sums of a batch, over its parts and the ranks."""
        total = found[0][1]
        for _, sums in found[1:]:
            total = total + sums
        loss = torch.stack([loss for loss, _ in found]).sum().reshape(1)
        flat = self._ranks.sum(torch.cat([loss, total.nll, total.count]))
        nll, count = flat[1:].chunk(2)
        return float(flat[0]), StreamSums(nll, count)

    def _set_training(self, training: bool) -> None:
        self._model.train(training)
        self.forward.train(training)

    def _place_model(self) -> list[nn.Module]:
        """Put the model where it trains; returns what is sharded."""
        if self._ranks.count == 1:
            self._model.to(self._ranks.device)
            return []
        modules = getattr(self.forward, "shardable_modules", None)
        if modules is None:
            raise RequestError(
                f"train.processes={self._ranks.count} needs a forward pass that names what can be "
                f"sharded, {type(self.forward).__name__} does not: use train.forward=library."
            )
        return shard(modules(), self._ranks, self._parameters.values())

    # -- checks

    def _check(self, step: int) -> str | None:
        """Validate and watch after `step` updates; returns why training must end, if it must."""
        line, score, stopped = None, None, None
        if self._section.is_due(self._section.validate_every, step):
            line = self._validate(step, "valid", self._valid_clips)
            self._validate(step, "valid_base", self._base_valid)
            score = line["loss"] if line else None
        if self.watch is not None:
            score, stopped = self._ask_watch(step, line["streams"] if line else None)
        better = score is not None and (self._best is None or score < self._best.score)
        if step and better:
            self._best = Best(step, float(score), self._adapter_tensors())  # pyright: ignore
        if stopped and not step:
            raise WorkError(f"nothing was trained: {stopped}")
        return stopped

    def _ask_watch(self, step: int, streams: Streams | None) -> tuple[float | None, str | None]:
        """Score and reason to stop, each None where there is none."""
        if self.watch is None or not self._section.guards_due(step):
            return None, None
        stopped, started = None, time.monotonic()
        explained = partial(guards_message, self._section, step, self._work / CHECKPOINTS)
        with out_of_memory_explained(explained):
            try:
                line = self.watch(step, streams)
            except StopTraining as stop:
                line, stopped = stop.line, stop.reason
        line, stopped = self._ranks.from_first((line, stopped))
        # Scores compare only where they are of the same clips, all of them.
        score = line.get("score") if streams or not self._valid_clips else None
        usable = score is not None and math.isfinite(score)
        self._log.note({"kind": "guards", "step": step} | line)
        self._note_time(step, "guards", [], started)
        return (score if usable else None), stopped

    def _validate(self, step: int, kind: str, clips: Sequence[Clip]) -> dict[str, Any] | None:
        """Log the teacher-forced NLL of all `clips`; None without any."""
        if not clips:
            return None
        started = time.monotonic()
        self._set_training(False)
        ordered = sorted(clips, key=lambda clip: (clip.num_frames, clip.id))
        size = self._section.batch_size // self._section.accumulate
        chunks = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        found: list[tuple[torch.Tensor, StreamSums]] = []
        with torch.no_grad(), self._memory_explained(step, clips):
            for chunk in chunks:
                mine = chunk[self._ranks.rank :: self._ranks.count]
                # All ranks must make each pass; one without a clip makes it for nothing.
                batch = make_batch(mine or chunk[:1], self._user).to(self._ranks.device)
                weights = self._weights(mine or chunk[:1])
                sums = self.forward(batch.codes, batch.loss_mask, weights)[1].detached()
                if not mine:
                    sums = StreamSums(torch.zeros_like(sums.nll), torch.zeros_like(sums.count))
                found.append((torch.zeros((), dtype=torch.float64), sums))
        total = self._add_up(found)[1]
        loss = training_loss(total, self._section.loss).item()
        self._check_finite("the validation loss", loss, step, clips)
        line = valid_line(kind, step, loss, total)
        self._log.note(line)
        ranks = range(self._ranks.count)
        parts = [chunk[rank :: self._ranks.count] for chunk in chunks for rank in ranks]
        self._note_time(step, kind, parts, started)
        return line

    def _check_finite(self, what: str, value: float, step: int, clips: Sequence[Clip]) -> None:
        names = [clip.id for clip in clips]
        require_finite(what, value, step, names, self._work / CHECKPOINTS)

    def _memory_explained(self, step: int, clips: Sequence[Clip]) -> Any:
        longest = max((clip.num_frames for clip in clips), default=0)
        folder = self._work / CHECKPOINTS
        return out_of_memory_explained(
            partial(memory_message, self._section, step, folder, longest)
        )

    # -- what a kill must not lose

    def _resume(self) -> TrainState | None:
        """Go back to the last checkpoint of this run, if there is one."""
        state = None
        if self._ranks.first:  # which removes what cannot be used
            state = latest_checkpoint(self._work / CHECKPOINTS, self._identity)
        state = state_from_first(state, self._ranks)
        self._log.restart(state.log if state else [])
        if state is None:
            return None
        self._best = state.best
        prefix = "adapter."
        chosen = {
            k.removeprefix(prefix): t for k, t in state.tensors.items() if k.startswith(prefix)
        }
        self.load_adapters(chosen)
        load_adam(self._adam, state.tensors)
        return state

    def _adapter_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the adapters, on the CPU."""
        return {
            name: parameter.detach().to("cpu", copy=True).contiguous()
            for name, parameter in self._parameters.items()
        }

    def _save(self, step: int, stopped: str | None) -> None:
        tensors = {f"adapter.{name}": tensor for name, tensor in self._adapter_tensors().items()}
        tensors |= adam_tensors(self._adam, self._parameters)
        self._ranks.check_equal(tensors, f"adapters and AdamW's state after step {step}")
        if self._ranks.first:
            state = TrainState(step, tensors, self._log.lines, self._best, stopped)
            save_checkpoint(self._work / CHECKPOINTS, state, self._identity)

    def _note_time(
        self, step: int, kind: str, parts: Sequence[Sequence[Clip]], started: float
    ) -> None:
        """`parts`: the clips of each forward pass, over all ranks."""
        lengths = [[clip.num_frames for clip in part] for part in parts if part]
        memory = memory_bytes(self._ranks.device)
        self._log.note_time(step, kind, lengths, time.monotonic() - started, memory)
