"""A finished run of a config, with files of the right names and digests, without doing its work."""

from __future__ import annotations

import json
from pathlib import Path

from duplex.config import Config
from duplex.files import sha256_bytes, write_atomic
from pipeline.run import STAGES, plan

FILES = {
    "train": {
        "adapter/adapter_model.safetensors": bytes(range(256)) * 700,
        "adapter/adapter_config.json": b'{"r": 4}',
        "metrics.jsonl": b'{"step": 1}\n',
        "index.html": b"<p>curves",
    },
    "merge": {
        "checkpoint/certificate.json": b'{"changed": 337}',
        "checkpoint/model.safetensors": b"15 GB that stay in the pod",
    },
    "evaluate": {
        "report.html": b"<p>verdict",
        "report.json": b'{"verdicts": []}',
        "conversations/seed-angry.base.wav": b"stays in the pod",
    },
}


def finish(config: Config, runs: Path, *, until: int = len(STAGES)) -> Path:
    """The run folder, with its first `until` stages complete."""
    for index in range(until):
        step = plan(config, runs)[index]
        assert step.folder is not None
        entries = []
        for name, content in FILES.get(step.stage.name, {}).items():
            write_atomic(step.folder.path / name, content)
            entries.append({"path": name, "sha256": sha256_bytes(content), "bytes": len(content)})
        step.folder.complete(
            [json.dumps({"id": f"{step.stage.name}-1"})], files=entries, counts={"records": 1},
            provenance={"seconds": 1.0},
        )  # fmt: skip
    return runs / config.name
