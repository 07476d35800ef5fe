"""How a stage's tasks are worked off: here, or elsewhere. Stages do not know the difference.

local.py    brings a stage to its manifest, whoever works; the only writer of a run folder
work.py     in this process, in its threads, or in processes of this machine
ray.py      in the workers of a Ray cluster; the only module that imports Ray
"""

from __future__ import annotations

from importlib import util
from typing import TYPE_CHECKING

from duplex.errors import MissingInputError, RequestError

if TYPE_CHECKING:
    from pipeline.runners.work import Runner

RUNNERS = ("local", "ray")


def check_runner(name: str) -> None:
    """
    Raises:
        RequestError: no such runner.
        MissingInputError: its package is not installed.
    """
    if name not in RUNNERS:
        raise RequestError(f"--runner must be one of {', '.join(RUNNERS)}; found {name}")
    if name == "ray" and util.find_spec("ray") is None:
        raise MissingInputError(
            "--runner ray needs the package ray, found none. Install it in this environment: "
            "pip install -e '.[ray]' in the checkout; on every node of a cluster"
        )


def runner_named(name: str) -> Runner:
    """As `check_runner`; imports what the runner needs."""
    check_runner(name)
    if name == "ray":
        from pipeline.runners.ray import RayRunner

        return RayRunner()
    from pipeline.runners.work import LOCAL

    return LOCAL
