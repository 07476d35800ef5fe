"""One way to open a Weights & Biases run, for training and evaluation, also offline.

It is told what is given here and nothing else: no host, no command line (which may hold a token),
no git remote, no console output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROJECT = "duplex-workbench"


def open_run(
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    *,
    run_id: str | None = None,
    resumed: bool = False,
    job_type: str | None = None,
) -> Any:
    """The run of `wandb.init`; raises whatever that does."""
    import wandb

    return wandb.init(
        project=PROJECT,
        name=name,
        id=run_id,
        resume="allow" if resumed else None,
        job_type=job_type,
        dir=str(folder),
        config=dict(config),
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True
        ),
    )
