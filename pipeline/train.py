"""Stage 6: LoRA training on the tensors, with proof that every adapter takes part.

Reads all clips, checks that they were made with this model's codec and tokenizer, puts the
adapters in, proves on the first batch that each of them is alive (`training/lora.py`), and
trains (`pipeline/training_run.py`, `training/loop.py`). Checkpoints in `work/` outlive a kill;
what the stage hands in is the adapter as PEFT reads it, the metrics and a page of curves.

    adapter/adapter_model.safetensors, adapter/adapter_config.json     the best one
    adapter-last/…     the last one, where that is another
    metrics.jsonl      one line a step and a validation; the same bytes on every run
    timing.jsonl       seconds, frames/s, padding and memory, of killed attempts too
    index.html         curves
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from duplex.base import Record
from duplex.config import Config
from duplex.config_train import TrainSection
from duplex.files import read_lines, write_atomic
from duplex.sinks import FileWriter
from duplex.stage import StageContext, WholeStage
from pipeline.engines.checkpoint import model_identity
from pipeline.training_data import (
    base_folders,
    check_origin,
    check_split,
    keyed_section,
    start_files,
)
from pipeline.training_nodes import first_node
from pipeline.training_run import ADAPTER, LAST, Job, run_job, validation_facts, with_steps
from training.process import prepare_process

__all__ = ["TrainStage", "check_origin", "check_split", "validation_facts", "with_steps"]

PAGE = "index.html"
WORKER = "pipeline.training_run"  # what each of several processes runs


class TrainStage(WholeStage):
    name = "train"
    number = 6
    reads = ("tensors",)

    def engine(self, config: Config) -> str:
        return model_identity(config.model)

    def files(self, config: Config) -> dict[str, str]:
        """Base data by the digests of its stages, and the adapter that is gone on from by its
        files', wherever they are.

        Raises:
            MissingInputError: a folder that is no complete tensors stage, or no adapter.
        """
        folders = {str(folder.path): folder.digest for folder in base_folders(config)}
        return folders | start_files(config.train)

    def keyed(self, config: Config) -> dict[str, Any]:
        return keyed_section(config)

    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        """
        Raises:
            CorruptFileError: a tensor file that is damaged or not what its record says.
            RequestError: clips of another codec or tokenizer, or none to train on.
            DeadAdapterError: an adapter that would get no gradient; nothing was trained.
            WorkError: a loss that is not finite, too little memory, a full disk, a process of
                several that died, a node that is gone; the last checkpoint is kept.
        """
        prepare_process()
        job = Job(
            context.config,
            context.runs_root,
            context.inputs["tensors"],
            writer.work,
            self.version,
        )
        processes = context.config.train.processes
        if processes == 1:
            return _hand_in(context, writer, run_job(job, context.report))
        from training.launch import run_workers

        if context.config.train.runtime.nodes == 1:
            context.report(f"training in {processes} processes")
            result = run_workers(WORKER, job.as_json(), processes, context.report)
            return _hand_in(context, writer, result)
        # The other nodes wait until the files are in their places: they end as this one does.
        with first_node(context.config, writer.folder, job.tensors, context.report) as team:
            context.report(f"training in {processes} processes on {team.nodes} nodes")
            result = run_workers(WORKER, job.as_json(), processes, context.report, team=team)
            return _hand_in(context, writer, result)


def _handed_in(facts: dict[str, Any]) -> str:
    if facts["best_step"] is None:
        return f"the last adapter, of step {facts['final_step']}: no check chose one"
    return f"the adapter of step {facts['best_step']}"


def _base_kind(section: TrainSection) -> str:
    if section.quantize == "none":
        return section.dtype
    return f"{section.quantize}; merged into the full base, which is another: evaluate the merge"


def _hand_in(context: StageContext, writer: FileWriter, result: dict[str, Any]) -> list[Record]:
    """Write the page into `work`, and move all files to their places."""
    from training.adapter import CONFIG, WEIGHTS
    from training.curves import curves_page
    from training.log import METRICS, TIMING, training_speed

    facts, timing = result["facts"], list(read_lines(writer.work / TIMING))
    section = context.config.train
    speed = training_speed(timing)  # of attempts before a kill too
    summary = {
        "model": context.config.model.base,
        "adapters": ", ".join(f"{n} {group}" for group, n in facts["adapted_modules"].items()),
        "trainable parameters": f"{facts['trainable_parameters']:,d}",
        "LoRA": f"rank {facts['rank']}, alpha {facts['alpha']:g}",
        "base": _base_kind(section),
        "learning rate, batch": f"{section.learning_rate:g}, {section.batch_size} clips",
        "steps": f"{facts['final_step']} of {facts['steps']}",
        "handed in": _handed_in(facts),
        "training speed": f"{speed:.0f} frames/s" if speed else "not measured",
    }
    if section.continue_from:
        # Its last folders: the whole path would be this machine's.
        summary["going on from"] = "/".join(Path(section.continue_from).parts[-2:])
    if "stopped" in facts:
        summary["stopped"] = facts["stopped"]
    page = curves_page(f"{context.config.name}: training", summary, result["log"], timing)
    write_atomic(writer.work / PAGE, page.encode())
    records: list[Record] = []
    for name in (ADAPTER, LAST):
        folder = writer.work / name
        if not folder.is_dir():
            shutil.rmtree(writer.folder.path / name, ignore_errors=True)
            continue
        of_best = {"facts": facts} if name == ADAPTER else {}
        records.append(writer.add(name, folder / WEIGHTS, f"{name}/{WEIGHTS}", **of_best))
        records.append(writer.add(f"{name}-config", folder / CONFIG, f"{name}/{CONFIG}"))
    records.append(writer.add("metrics", writer.work / METRICS, METRICS))
    # Their bytes differ from run to run, so they get no record: records make the digest.
    writer.add("timing", writer.work / TIMING, TIMING, deterministic=False)
    writer.add("page", writer.work / PAGE, PAGE, deterministic=False)
    return records


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("train")
