"""What the train stage does once its inputs are known: in its own process, or in several.

`run_job` reads and checks the clips, puts the adapters in, trains (`training/loop.py`) and leaves
in the job's work folder what the stage hands in:

    adapter/        the best adapter, as PEFT reads it
    adapter-last/   the last one, where that is another

With `train.processes` > 1 the stage starts `python -m pipeline.training_run` so many times
(`training/launch.py`); each loads the base into its own memory and keeps its share of it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.base import canonical_json
from duplex.config import Config
from duplex.config_train import TrainSection
from duplex.errors import RequestError
from duplex.files import sha256_bytes
from duplex.records import TensorClip
from duplex.store import StageFolder
from pipeline.engines.checkpoint import Checkpoint, resolve_checkpoint
from pipeline.training_data import (
    base_folders,
    check_base_split,
    check_origin,
    check_split,
    keyed_section,
    start_files,
)
from pipeline.training_model import adapted_model
from training.process import prepare_process

if TYPE_CHECKING:
    from training.batches import Clip
    from training.log import StepReport
    from training.loop import Trainer, TrainResult
    from training.lora import GroupCount

ADAPTER, LAST = "adapter", "adapter-last"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """All that a process has to know to take part in a run."""

    config: Config
    runs_root: Path
    tensors: StageFolder
    work: Path
    version: int

    def as_json(self) -> dict[str, Any]:
        """Holds the config's secrets: for a pipe, not for a file."""
        return {
            "config": self.config.model_dump(mode="json"),
            "runs_root": str(self.runs_root),
            "tensors": [str(self.tensors.path), self.tensors.key],
            "work": str(self.work),
            "version": self.version,
        }

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Job:
        path, key = value["tensors"]
        return cls(
            Config.model_validate(value["config"]),
            Path(value["runs_root"]),
            StageFolder(Path(path), "tensors", key),
            Path(value["work"]),
            value["version"],
        )


def run_job(job: Job, report: Report, rank: int = 0) -> dict[str, Any]:
    """Train; returns `facts` of the adapter and `log`, as JSON takes them.

    Raises:
        CorruptFileError: a tensor file that is damaged or not what its record says.
        RequestError: clips of another codec or tokenizer, or none to train on.
        DeadAdapterError: an adapter that would get no gradient; nothing was trained.
        WorkError: a loss that is not finite, too little memory, a full disk; the last
            checkpoint is kept.
    """
    prepare_process()
    config = job.config
    checkpoint = resolve_checkpoint(config.model, job.runs_root)
    records = _records_of(job.tensors)
    folders = base_folders(config)
    base_records = [_records_of(folder) for folder in folders]
    for found in (records, *base_records):
        check_origin(found, checkpoint)
        check_split(found)
    check_base_split(records, [record for found in base_records for record in found])
    clips = _read_clips(job.tensors, records, config.train, checkpoint)
    base = {"train": [], "valid": []}
    for folder, found in zip(folders, base_records, strict=True):
        for split, chosen in _read_clips(folder, found, config.train, checkpoint).items():
            base[split] += chosen
    if folders and not base["train"]:
        raise RequestError(
            "train.base_data.folders must hold clips of the train split, found none in "
            f"{', '.join(str(folder.path) for folder in folders)}. Leave them out, or give others."
        )

    from training.failures import base_message, out_of_memory_explained
    from training.guards import Guards
    from training.loop import Trainer
    from training.lora import count_trainable

    section = with_steps(config.train, len(clips["train"]))
    base_sha256 = checkpoint.digest("moshi")
    explained = partial(base_message, section)
    with out_of_memory_explained(explained):
        model, targets = adapted_model(config, checkpoint, base_sha256, report)
    counts = count_trainable(model, targets)
    _describe(report, model, counts, clips, base)
    with out_of_memory_explained(explained):
        trainer = Trainer(
            model,
            targets,
            section,
            seed=config.seed,
            train_clips=clips["train"],
            valid_clips=clips["valid"],
            base_train=base["train"],
            base_valid=base["valid"],
            work=job.work,
            identity=_identity(job, records, folders, base_sha256),
            name=config.name,
        )
    trainer.watch = Guards(
        model,
        trainer.forward,
        section,
        seed=config.seed,
        valid_clips=clips["valid"],
        train_clips=clips["train"],
        report=report,
        decode=checkpoint.load_tokenizer().decode,
        whole=trainer.whole_weights,
    )
    with _progress(section.steps, shown=rank == 0) as on_step:
        result = trainer.run(on_step, report)
    if result.frames_per_s:
        report(f"trained at {result.frames_per_s:.0f} frames/s")
    facts = {
        "rank": section.lora.rank,
        "alpha": section.lora.alpha,
        "trainable_parameters": sum(count.parameters for count in counts.values()),
        "adapted_modules": {group: count.modules for group, count in counts.items()},
        "alive_modules": result.live,
        "base_sha256": base_sha256,
        "steps": section.steps,
        "best_step": result.best.step if result.best else None,
        "final_step": result.final_step,
        **({"stopped": result.stopped} if result.stopped else {}),
        **validation_facts(result.log, result.best.step if result.best else None),
        "settings": settings_of(config, folders),
    }
    if rank == 0:
        _write_adapters(job, trainer, model, targets, facts, result)
        _say_best(report, facts)
    return {"facts": facts, "log": result.log}


def with_steps(section: TrainSection, num_clips: int) -> TrainSection:
    """The section with `epochs` turned into steps; slots of base data count for none.

    Raises:
        RequestError: epochs of clips that no slot is left for.
    """
    if section.epochs is None:
        return section
    own = 1.0 - (section.base_data.share if section.base_data.folders else 0.0)
    if own <= 0:
        raise RequestError(
            "train.epochs needs train.base_data.share below 1, found 1: give train.steps instead."
        )
    steps = max(1, math.ceil(section.epochs * num_clips / (section.batch_size * own)))
    return section.model_copy(update={"steps": steps})


def settings_of(config: Config, folders: Sequence[StageFolder]) -> dict[str, Any]:
    """What decides a run besides its data, without a path of this machine."""
    section = keyed_section(config)
    section["base_data"]["folders"] = [folder.digest[:12] for folder in folders]
    return {"model": config.model.base, "seed": config.seed, **section}


def validation_facts(log: list[dict[str, Any]], best_step: int | None = None) -> dict[str, Any]:
    """First, last and best validation: the loss, and each stream's likelihood in nats."""
    facts: dict[str, Any] = {}
    for kind in ("valid", "valid_base"):
        lines = [line for line in log if line["kind"] == kind]
        if not lines:
            continue
        chosen = [("initial", lines[0]), ("final", lines[-1])]
        chosen += [("best", line) for line in lines if line["step"] == best_step]
        for when, line in chosen:
            streams = {name: nll for name, nll in line["streams"].items() if nll is not None}
            facts[f"{kind}_{when}"] = {"loss": line["loss"], **streams}
    return facts


def _records_of(folder: StageFolder) -> list[TensorClip]:
    return [record for record in folder.records() if isinstance(record, TensorClip)]


def _read_clips(
    folder: StageFolder, records: list[TensorClip], section: TrainSection, checkpoint: Checkpoint
) -> dict[str, list[Clip]]:
    from training.batches import read_clips

    return {
        split: read_clips(
            folder,
            [record for record in records if record.split == split],
            crop_frames=section.crop_frames,
            card=checkpoint.config["card"],
            text_card=checkpoint.config["text_card"],
            loss_on_prompt=section.loss.prompt,
        )
        for split in ("train", "valid")
    }


def _identity(
    job: Job, records: list[TensorClip], folders: list[StageFolder], base_sha256: str
) -> str:
    """Digest of all that decides a run: a checkpoint of another run is not gone on from."""
    identity = {
        "base": base_sha256,
        "clips": [record.digest for record in records],
        "base_data": [folder.digest for folder in folders],
        "seed": job.config.seed,
        "start": sorted(start_files(job.config.train).values()),
        "section": keyed_section(job.config),
        "version": job.version,
    }
    return sha256_bytes(canonical_json(identity).encode())


def _describe(
    report: Report,
    model: Any,
    counts: dict[str, GroupCount],
    clips: dict[str, list[Clip]],
    base: dict[str, list[Clip]],
) -> None:
    """Say what trains, and on what."""
    from training.quantized import num_weights

    for group, count in counts.items():
        report(f"  {group:<9} {count.modules:4d} modules {count.parameters:12,d} parameters")
    trained = sum(count.parameters for count in counts.values())
    total = sum(num_weights(parameter) for parameter in model.parameters())
    modules = sum(count.modules for count in counts.values())
    report(
        f"  training  {modules:4d} modules {trained:12,d} parameters "
        f"({trained / (total - trained):.1%} of the base's {total - trained:,d})"
    )
    for kind, splits in (("", clips), ("base data, ", base)):
        for split, chosen in splits.items():
            if chosen or not kind:
                frames = sum(clip.num_frames for clip in chosen)
                report(f"  {kind}{split}: {len(chosen)} clips, {frames:,d} frames")
    if not clips["valid"]:
        report("  no clip is held out: there will be no validation")


def _write_adapters(
    job: Job,
    trainer: Trainer,
    model: Any,
    targets: dict[str, list[str]],
    facts: dict[str, Any],
    result: TrainResult,
) -> None:
    from training.adapter import write_adapter
    from training.lora import adapter_state, lora_config

    config = lora_config(job.config.train.lora, targets).to_dict()
    for name in (ADAPTER, LAST):  # of an attempt that was killed
        shutil.rmtree(job.work / name, ignore_errors=True)
    if result.best and result.best.step != result.final_step:
        write_adapter(job.work / LAST, adapter_state(model), config, facts["base_sha256"])
        trainer.load_adapters(result.best.tensors)
    write_adapter(job.work / ADAPTER, adapter_state(model), config, facts["base_sha256"])


def _say_best(report: Report, facts: dict[str, Any]) -> None:
    best, final = facts["best_step"], facts["final_step"]
    if best is None:
        checked = "valid_initial" in facts
        why = "no check found one to choose" if checked else "nothing was held out to choose by"
        report(f"warning: {why}: the last adapter is handed in, of step {final}")
    elif best != final:
        report(f"the adapter of step {best} is handed in, the best one; of {final}: {LAST}/")
    first, chosen = facts.get("valid_initial"), facts.get("valid_best")
    if first and chosen and chosen["loss"] >= first["loss"]:
        report(
            f"  held-out loss did not fall: {first['loss']:.3f} before training, "
            f"{chosen['loss']:.3f} at best. The adapter makes the model worse on it."
        )


@contextmanager
def _progress(steps: int, *, shown: bool) -> Iterator[Callable[[StepReport], None]]:
    """A bar on stderr with loss, frames/s, memory and the time that is left."""
    if not shown:
        yield lambda report: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    figures = "{task.fields[speed]:.0f} frames/s  {task.fields[memory]:.1f} GB"
    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  " + figures),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"), speed=0.0, memory=0.0)

        def on_step(report: StepReport) -> None:
            progress.update(
                task,
                completed=report.step,
                loss=report.loss,
                speed=report.frames_per_s,
                memory=report.memory_bytes / 1e9,
            )

        yield on_step


def _do(job: dict[str, Any], report: Report) -> dict[str, Any]:
    import os

    return run_job(Job.of_json(job), report, rank=int(os.environ["RANK"]))


def _meet(job: dict[str, Any]) -> None:
    prepare_process()
    from training.device import wants_cpu
    from training.distributed import meet

    meet(wants_cpu(Job.of_json(job).config.train.runtime.device))


if __name__ == "__main__":
    from training.launch import work

    work(_do, _meet)
