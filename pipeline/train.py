"""Stage 6: LoRA training on the tensors, with proof that every adapter takes part.

Reads all clips, checks that they were made with this model's codec and tokenizer, puts the
adapters in, proves on the first batch that each of them is alive (`training/lora.py`), and
trains (`training/loop.py`). Checkpoints in `work/` outlive a kill; what the stage hands in
is the adapter as PEFT reads it, the metrics and a page of curves.

    adapter/adapter_model.safetensors, adapter/adapter_config.json
    metrics.jsonl      one line a step and a validation; the same bytes on every run
    timing.jsonl       seconds and frames/s, of killed attempts too
    index.html         curves
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from duplex.base import Record, canonical_json
from duplex.config import Config
from duplex.config_train import TrainSection
from duplex.datafiles import find_path
from duplex.errors import MissingInputError, RequestError
from duplex.files import known_sha256, sha256_bytes, write_atomic
from duplex.records import TensorClip
from duplex.sinks import FileWriter
from duplex.splits import Split, member_of, overlaps
from duplex.stage import StageContext, WholeStage, record_seed
from duplex.streams import CODEBOOKS
from pipeline.engines.checkpoint import Checkpoint, model_identity, resolve_checkpoint
from training.process import prepare_process

if TYPE_CHECKING:
    from training.batches import Clip
    from training.loop import StepReport, TrainResult
    from training.lora import GroupCount

PAGE = "index.html"
# As in `training/adapter.py`, written out so that planning imports no torch.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


class TrainStage(WholeStage):
    name = "train"
    number = 6
    reads = ("tensors",)

    def engine(self, config: Config) -> str:
        return model_identity(config.model)

    def files(self, config: Config) -> dict[str, str]:
        """The adapter that is gone on from, where there is one: other weights, another key."""
        return start_files(config.train)

    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        """
        Raises:
            CorruptFileError: a tensor file that is damaged or not what its record says.
            RequestError: clips of another codec or tokenizer, or none to train on.
            DeadAdapterError: an adapter that would get no gradient; nothing was trained.
            WorkError: a loss that is not finite; the last checkpoint is kept.
        """
        prepare_process()
        checkpoint = resolve_checkpoint(context.config.model, context.runs_root)
        records: list[TensorClip] = list(context.records("tensors", TensorClip))
        check_origin(records, checkpoint)
        check_split(records)
        clips = _read_clips(context, records, checkpoint)

        import torch

        from training.adapter import load_adapter_weights
        from training.loop import Trainer
        from training.lora import add_adapters, count_trainable, target_modules
        from training.quantized import check_wrapped

        config = context.config
        section = with_steps(config.train, len(clips["train"]))
        base_sha256 = checkpoint.digest("moshi")
        model = checkpoint.load_lm(dtype=getattr(torch, section.dtype))
        targets = target_modules(
            model,
            section.lora.targets,
            embeddings=section.lora.embeddings,
            codebooks=CODEBOOKS * (2 if section.loss.user_streams else 1),
        )
        if section.quantize != "none":
            quantize_base(model, targets, section, context.report)
        add_adapters(model, section.lora, targets, record_seed(config.seed, "train", "adapters"))
        if section.quantize != "none":
            check_wrapped(model)
        if section.continue_from is not None:
            start = find_path(section.continue_from)
            load_adapter_weights(model, start, section.lora, base_sha256)
            context.report(f"going on from the adapter {start}")
        counts = count_trainable(model, targets)
        _describe(context, model, counts, clips)
        trainer = Trainer(
            model,
            targets,
            section,
            seed=config.seed,
            train_clips=clips["train"],
            valid_clips=clips["valid"],
            work=writer.work,
            identity=_identity(context, records, base_sha256, self.version),
            name=config.name,
        )
        with _progress(section.steps) as on_step:
            result = trainer.run(on_step, context.report)
        if result.frames_per_s:
            context.report(f"trained at {result.frames_per_s:.0f} frames/s")
        facts = {
            "rank": section.lora.rank,
            "alpha": section.lora.alpha,
            "trainable_parameters": sum(count.parameters for count in counts.values()),
            "adapted_modules": {group: count.modules for group, count in counts.items()},
            "alive_modules": result.live,
            "base_sha256": base_sha256,
            "steps": section.steps,
            **validation_facts(result.log),
        }
        return _hand_in(context, writer, model, targets, facts, result)


def start_files(section: TrainSection) -> dict[str, str]:
    """The files of `continue_from`, path -> sha256; none where it is not set.

    Raises:
        MissingInputError: a file is not there.
    """
    if section.continue_from is None:
        return {}
    folder = find_path(section.continue_from)
    paths = [folder / name for name in ADAPTER_FILES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        inner = folder / "adapter"
        hint = f" Give {inner}." if (inner / ADAPTER_FILES[0]).is_file() else ""
        raise MissingInputError(
            f"train.continue_from: must be an adapter folder with {' and '.join(ADAPTER_FILES)}; "
            f"{folder} has no {' and no '.join(missing)}.{hint}"
        )
    return {str(path): known_sha256(path) for path in paths}


def quantize_base(
    model: Any, targets: dict[str, list[str]], section: TrainSection, report: Callable[[str], None]
) -> None:
    """Put the frozen Linear layers into 4 bits, and say what that saves.

    Raises:
        MissingInputError: bitsandbytes is not there.
        RequestError: together with several processes.
    """
    import torch

    from training.quantized import quantize_linears

    if section.processes > 1:
        raise RequestError(
            "train.quantize: nf4 must run in one process, found train.processes "
            f"{section.processes}: FSDP cannot shard packed weights. Set processes: 1, or "
            "quantize: none."
        )
    on_gpu = section.runtime.device != "cpu" and torch.cuda.is_available()
    size = quantize_linears(model, targets, device="cuda" if on_gpu else "cpu")
    report(
        f"  4-bit base: {size.layers} Linear layers, {size.before / 1e6:,.1f} -> "
        f"{size.after / 1e6:,.1f} MB; rms error {size.error:.3f} of the weights'"
        + (f"; {len(size.left)} not packed (first {size.left[0]})" if size.left else "")
    )


def with_steps(section: TrainSection, num_clips: int) -> TrainSection:
    """The section with `epochs` turned into steps."""
    if section.epochs is None:
        return section
    steps = max(1, math.ceil(section.epochs * num_clips / section.batch_size))
    return section.model_copy(update={"steps": steps})


def check_origin(records: list[TensorClip], checkpoint: Checkpoint) -> None:
    """
    Raises:
        RequestError: a clip was made with another codec or tokenizer than this model's.
    """
    for role in ("codec", "tokenizer"):
        expected = checkpoint.digest(role)
        found = [(record.id, getattr(record, f"{role}_digest")) for record in records]
        foreign = [(name, digest) for name, digest in found if digest != expected]
        if foreign:
            raise RequestError(
                f"clips must be made with the {role} of the model that is trained, "
                f"{expected[:12]}…; found {len(foreign)} of {len(records)} made with another "
                f"(first {foreign[0][0]}: {foreign[0][1][:12]}…). "
                "Make the tensors again with this model.base, or train the model they belong to."
            )


def check_split(records: list[TensorClip]) -> None:
    """
    Raises:
        RequestError: a conversation, a text or a tensor on both sides, so that validation would
            measure what was trained on; for a split by persona a persona or a voice too.
    """
    for by in ("conversation", "persona"):
        chosen = [r for r in records if by == "conversation" or r.split_by == "persona"]
        split: dict[str, Split] = {record.id: record.split for record in chosen}
        faults = overlaps(map(member_of, chosen), split, by)
        if faults:
            raise RequestError(
                f"training and validation must share nothing: {'; '.join(faults)}. Make the "
                "tensors again, or import them again: imports split by what is in them."
            )


def validation_facts(log: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last validation: the loss, and each stream's likelihood in nats."""
    lines = [line for line in log if line["kind"] == "valid"]
    if not lines:
        return {}
    return {
        f"valid_{when}": {
            "loss": line["loss"],
            **{name: value for name, value in line["streams"].items() if value is not None},
        }
        for when, line in (("initial", lines[0]), ("final", lines[-1]))
    }


def _read_clips(
    context: StageContext, records: list[TensorClip], checkpoint: Checkpoint
) -> dict[str, list[Clip]]:
    from training.batches import read_clips

    return {
        split: read_clips(
            context.inputs["tensors"],
            [record for record in records if record.split == split],
            crop_frames=context.config.train.crop_frames,
            card=checkpoint.config["card"],
            text_card=checkpoint.config["text_card"],
            loss_on_prompt=context.config.train.loss.prompt,
        )
        for split in ("train", "valid")
    }


def _identity(
    context: StageContext, records: list[TensorClip], base_sha256: str, version: int
) -> str:
    """Digest of all that decides a run: a checkpoint of another run is not gone on from."""
    identity = {
        "base": base_sha256,
        "clips": [record.digest for record in records],
        "seed": context.config.seed,
        "section": context.config.keyed("train"),
        "version": version,
        "start": sorted(start_files(context.config.train).values()),
    }
    return sha256_bytes(canonical_json(identity).encode())


def _describe(
    context: StageContext,
    model: Any,
    counts: dict[str, GroupCount],
    clips: dict[str, list[Clip]],
) -> None:
    """Say what trains, and on what."""
    for group, count in counts.items():
        context.report(
            f"  {group:<9} {count.modules:4d} modules {count.parameters:12,d} parameters"
        )
    trained = sum(count.parameters for count in counts.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    modules = sum(count.modules for count in counts.values())
    context.report(
        f"  training  {modules:4d} modules {trained:12,d} parameters "
        f"({trained / (total - trained):.1%} of the base's {total - trained:,d})"
    )
    for split, chosen in clips.items():
        frames = sum(clip.num_frames for clip in chosen)
        context.report(f"  {split}: {len(chosen)} clips, {frames:,d} frames")
    if not clips["valid"]:
        context.report("  no clip is held out: there will be no validation")


def _hand_in(
    context: StageContext,
    writer: FileWriter,
    model: Any,
    targets: dict[str, list[str]],
    facts: dict[str, Any],
    result: TrainResult,
) -> list[Record]:
    """Write adapter and page into `work`, and move all files to their places."""
    from training.adapter import CONFIG, WEIGHTS, write_adapter
    from training.curves import curves_page
    from training.loop import METRICS, TIMING
    from training.lora import adapter_state, lora_config

    adapter = writer.work / "adapter"
    config = lora_config(context.config.train.lora, targets).to_dict()
    write_adapter(adapter, adapter_state(model), config, facts["base_sha256"])
    summary = {
        "model": context.config.model.base,
        "adapters": ", ".join(f"{n} {group}" for group, n in facts["adapted_modules"].items()),
        "trainable parameters": f"{facts['trainable_parameters']:,d}",
        "steps": str(facts["steps"]),
        "training speed": f"{result.frames_per_s:.0f} frames/s",
    }
    page = curves_page(f"{context.config.name}: training", summary, result.log)
    write_atomic(writer.work / PAGE, page.encode())
    records: list[Record] = [
        writer.add("adapter", adapter / WEIGHTS, f"adapter/{WEIGHTS}", facts=facts),
        writer.add("adapter-config", adapter / CONFIG, f"adapter/{CONFIG}"),
        writer.add("metrics", writer.work / METRICS, METRICS),
    ]
    # Their bytes differ from run to run, so they get no record: records make the digest.
    writer.add("timing", writer.work / TIMING, TIMING, deterministic=False)
    writer.add("page", writer.work / PAGE, PAGE, deterministic=False)
    return records


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A bar on stderr with loss and frames/s."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} frames/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"), speed=0.0)

        def on_step(report: StepReport) -> None:
            progress.update(
                task, completed=report.step, loss=report.loss, speed=report.frames_per_s
            )

        yield on_step


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("train")
