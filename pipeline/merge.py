"""Stage 7: base + adapter -> a checkpoint of its own, which the stock moshi loads too.

The work and its proofs are in `training/merge.py`; here are where the parts come from and
where they go. The stage's folder `checkpoint/` is complete: config.json, weights, codec and
tokenizer (hard links where the file system allows), and certificate.json. A base with sixteen
depth steps (PersonaPlex) comes out with the agent's eight, which is what is served.
"""

from __future__ import annotations

import shutil

from duplex.base import Record
from duplex.config import Config
from duplex.sinks import FileWriter
from duplex.stage import StageContext, WholeStage
from pipeline.engines.checkpoint import model_identity, resolve_checkpoint
from training.process import prepare_process

FOLDER = "checkpoint"
# Artifact id -> file of the merged folder.
FILES = {
    "weights": "model.safetensors",
    "config": "config.json",
    "codec": "mimi.safetensors",
    "codec-config": "mimi_config.json",
    "tokenizer": "tokenizer.model",
    "certificate": "certificate.json",
}


class MergeStage(WholeStage):
    name = "merge"
    version = 2
    number = 7
    reads = ("train",)

    def engine(self, config: Config) -> str:
        return model_identity(config.model)

    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        """
        Raises:
            CorruptFileError: the adapter is not the one that training recorded.
            MergeError: adapter and base do not fit, or the result is not base + adapter.
        """
        prepare_process()
        checkpoint = resolve_checkpoint(context.config.model, context.runs_root)
        adapter = context.inputs["train"].artifact("adapter")

        from training.depthcut import is_wide
        from training.merge import merge_checkpoint, summary

        merged = writer.work / FOLDER
        shutil.rmtree(merged, ignore_errors=True)  # of an attempt that was killed
        certificate = merge_checkpoint(
            checkpoint.folder,
            adapter.parent,
            merged,
            context.config.merge.dtype,
            cut=is_wide(checkpoint.config),
        )
        for line in summary(certificate):
            context.report(line)
        del certificate["modules"]  # they are in certificate.json
        return [
            writer.add(
                artifact_id,
                merged / name,
                f"{FOLDER}/{name}",
                facts=certificate if artifact_id == "weights" else None,
            )
            for artifact_id, name in FILES.items()
            if (merged / name).exists()
        ]


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("merge")
