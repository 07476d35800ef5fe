"""What each of several processes runs that train a pocket base together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training.launch import work


def join_group() -> Any:
    """This process's `Ranks`, in the group that its environment describes."""
    import torch
    from torch import distributed

    from training.distributed import Ranks

    distributed.init_process_group("gloo")
    return Ranks(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"))


def make(job: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """One rank of it. job: `argv` of the command."""
    from training.pocket.base_command import make_base

    make_base(job["argv"], join_group(), report)
    return {}


if __name__ == "__main__":
    work(make)
