"""What both programs inside the pod know of it: its environment, and whether it is busy.

DUPLEX_CONFIG, DUPLEX_RUNS        what runs, and where its folders are
DUPLEX_PORT, DUPLEX_AGENT_PORT    of the model server (8998) and of the agent (8999)
DUPLEX_TOKEN                      what both ask for
DUPLEX_LOG                        the pipeline's output; <run root>/pod.log if not given
DUPLEX_SET                        settings over the config, one a line
DUPLEX_FROM, DUPLEX_TO, DUPLEX_ONLY, DUPLEX_SKIP   which stages the pod is to do
DUPLEX_FAILED_FILE                why start.sh gave up; there only while it has
DUPLEX_BUDGET_USD, DUPLEX_PRICE_USD_H, DUPLEX_IDLE_MINUTES, DUPLEX_SPENT_USD   the limits
DUPLEX_JOB                        whose budget it is
DUPLEX_DATA_OUTLIVES_POD          1: on a network volume, so the pod may be deleted
DUPLEX_POD_ID or RUNPOD_POD_ID, RUNPOD_API_KEY, DUPLEX_RUNPOD_URL              to stop it
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from duplex.lock import is_locked
from duplex.tokens import masked, secret_values
from pipeline.pods.api import BASE_URL, KEY_NAME
from pipeline.pods.request import AGENT_PORT, RUNS_IN_POD, SERVE_PORT

# Processes that stay up for as long as the pod does: they are no work.
_STANDING = ("pipeline.serving.app", "pipeline.pods.")


@dataclass(frozen=True)
class Selected:
    """Which stages this pod is to do, as `duplex run` was told."""

    first: str | None = None
    last: str | None = None
    only: str | None = None
    skip: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> list[str]:
        """Those of `names`, in order. An unknown name limits nothing: `duplex run` refuses it."""
        start, end = self.only or self.first, self.only or self.last
        low = names.index(start) if start in names else 0
        high = names.index(end) + 1 if end in names else len(names)
        return [name for name in names[low:high] if name not in self.skip]


def read_settings(text: str) -> tuple[str, ...]:
    """The lines of DUPLEX_SET. start.sh refuses secrets there; until it has, they go nowhere, since
    others see a process's arguments."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not re.search(r"(token|api_key)=", line))


@dataclass(frozen=True)
class Inside:
    config: Path
    runs: Path
    port: int
    agent_port: int
    log: Path
    job: str
    token: str = field(repr=False)
    pod_id: str
    api_key: str = field(repr=False)
    api_url: str
    budget_usd: float
    usd_h: float
    idle_minutes: float
    spent_usd: float
    data_outlives_pod: bool
    secrets: tuple[str, ...] = field(repr=False)
    settings: tuple[str, ...] = ()
    selection: Selected = field(default_factory=Selected)
    failed_file: Path | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Inside:
        get = environment.get
        runs = Path(get("DUPLEX_RUNS") or RUNS_IN_POD)
        return cls(
            config=Path(get("DUPLEX_CONFIG") or "configs/coffee.yaml"),
            runs=runs,
            port=int(_number(get("DUPLEX_PORT"), SERVE_PORT)),
            agent_port=int(_number(get("DUPLEX_AGENT_PORT"), AGENT_PORT)),
            log=Path(get("DUPLEX_LOG") or runs / "pod.log"),
            job=get("DUPLEX_JOB") or "",
            token=get("DUPLEX_TOKEN") or "",
            pod_id=get("DUPLEX_POD_ID") or get("RUNPOD_POD_ID") or "",
            api_key=get(KEY_NAME) or "",
            api_url=get("DUPLEX_RUNPOD_URL") or BASE_URL,
            budget_usd=_number(get("DUPLEX_BUDGET_USD"), 0.0),
            usd_h=_number(get("DUPLEX_PRICE_USD_H"), 0.0),
            idle_minutes=_number(get("DUPLEX_IDLE_MINUTES"), 0.0),
            spent_usd=_number(get("DUPLEX_SPENT_USD"), 0.0),
            data_outlives_pod=get("DUPLEX_DATA_OUTLIVES_POD") == "1",
            secrets=secret_values(environment),
            settings=read_settings(get("DUPLEX_SET") or ""),
            selection=Selected(
                get("DUPLEX_FROM") or None,
                get("DUPLEX_TO") or None,
                get("DUPLEX_ONLY") or None,
                tuple(name.strip() for name in (get("DUPLEX_SKIP") or "").split(",")),
            ),
            failed_file=Path(failed) if (failed := get("DUPLEX_FAILED_FILE")) else None,
        )

    def clean(self, text: str) -> str:
        """`text` without any secret of this pod's environment."""
        return masked(text, self.secrets)


def _number(text: str | None, default: float) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return default
    return value if 0 < value < 1e9 else default


def pipeline_runs(runs: Path) -> bool:
    """Whether any pipeline is at work: somebody holds a run folder's lock, or a stage's process or
    a `duplex` command is there. `duplex doctor` counts too: it comes before the lock."""
    try:
        folders = [path for path in runs.iterdir() if path.is_dir()]
    except OSError:
        folders = []
    return any(map(is_locked, folders)) or any(map(is_work, _command_lines()))


def is_work(command: list[str]) -> bool:
    """Whether a process's arguments are those of a stage or of a command at work."""
    module = next((b for a, b in itertools.pairwise(command) if a == "-m"), "")
    if module.startswith(_STANDING):
        return False
    if module.startswith("pipeline."):
        return True
    words = [Path(word).name for word in command[:3]]
    if "duplex" in words or module == "duplex.cli":
        return not {"serve", "status", "pod"} & set(command[1:5])
    return False


def _command_lines() -> Iterable[list[str]]:
    own = os.getpid()
    for process in psutil.process_iter(["cmdline"]):
        if process.pid != own:
            yield process.info["cmdline"] or []
