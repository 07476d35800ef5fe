"""What to do next with a pod, from what is known of it. Pure: a state machine without a clock.

    none ──create──▶ running ──agent answers──▶ pipeline runs ──▶ done ──▶ server ready: finish
      ▲                │  ▲
      │    preempted ──┤  └──start── stopped
      └────────────────┘             │
         replace ◀── start refused ──┘   the host's GPU is taken

Readiness is what the service in the pod says; the API's `status` only says whether it is paid
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

PodState = Literal["none", "running", "stopped", "unknown"]
PipelineState = Literal["unknown", "waiting", "running", "failed", "done"]
Goal = Literal["answering", "finished"]

# A failed stage may be tried again by start.sh in a moment: so many looks must agree.
FAILED_LOOKS = 3


class Act(Enum):
    CREATE = "create"
    START = "start"
    REPLACE = "replace"  # delete and create anew, on the same volume
    WAIT = "wait"
    FINISH = "finish"
    GIVE_UP = "give up"


class Why(Enum):
    """Why it is given up; what the user is told is in `control`."""

    TAKEN_DOWN = "taken down"
    BUDGET = "budget"
    NEVER_READY = "never ready"
    PIPELINE_FAILED = "pipeline failed"
    HOST_TAKEN = "host taken"
    TOO_MANY_STARTS = "too many starts"


@dataclass(frozen=True)
class Rules:
    """goal: `answering` for `pod up`, `finished` for `pod run`.
    deadline_s: longest time without a step forward. Cold starts take 5 to 10 minutes.
    max_starts: pods created or started by one command."""

    goal: Goal
    budget_usd: float
    deadline_s: float = 1800.0
    max_starts: int = 10
    keeps_data: bool = False
    abandon_volume: bool = False


@dataclass(frozen=True)
class View:
    """What is known at one moment.

    pod: `unknown` while the API gives no answer.
    cold_start_usd: less than that is left of a budget that is spent.
    wanted_down: another command, or a person, took it down meanwhile.
    start_refused: the API would not start the stopped pod.
    agent_answers, pipeline, server_ready: what the pod's own services say.
    has_answered: it did so once since we started it.
    num_done: the most stages that were ever done.
    failed_looks: how many looks in a row saw a failed pipeline.
    stuck_s: seconds since the last step forward, less those in which the pipeline was at work.
    """

    pod: PodState
    spent_usd: float = 0.0
    wanted_down: bool = False
    start_refused: bool = False
    agent_answers: bool = False
    has_answered: bool = False
    pipeline: PipelineState = "unknown"
    server_ready: bool = False
    num_done: int = 0
    failed_looks: int = 0
    stuck_s: float = 0.0
    starts: int = 0
    cold_start_usd: float = 0.0


@dataclass(frozen=True)
class Step:
    act: Act
    why: Why | None = None


def next_step(view: View, rules: Rules) -> Step:
    if view.wanted_down:
        return Step(Act.GIVE_UP, Why.TAKEN_DOWN)
    if view.spent_usd >= rules.budget_usd:
        return Step(Act.GIVE_UP, Why.BUDGET)
    if view.pod in ("none", "stopped"):
        return _bring_up(view, rules)
    if rules.goal == "answering" and view.agent_answers:
        return Step(Act.FINISH)
    if view.agent_answers:
        if view.pipeline == "done" and view.server_ready:
            return Step(Act.FINISH)
        if view.failed_looks >= FAILED_LOOKS:
            return Step(Act.GIVE_UP, Why.PIPELINE_FAILED)
        if view.pipeline == "running":
            return Step(Act.WAIT)
    if view.stuck_s >= rules.deadline_s:
        return Step(Act.GIVE_UP, Why.NEVER_READY)
    return Step(Act.WAIT)


def _bring_up(view: View, rules: Rules) -> Step:
    if view.spent_usd + view.cold_start_usd > rules.budget_usd:
        return Step(Act.GIVE_UP, Why.BUDGET)
    if view.starts >= rules.max_starts:
        return Step(Act.GIVE_UP, Why.TOO_MANY_STARTS)
    if view.pod != "stopped":
        return Step(Act.CREATE)
    if not view.start_refused:
        return Step(Act.START)
    if rules.keeps_data or rules.abandon_volume:
        return Step(Act.REPLACE)
    return Step(Act.GIVE_UP, Why.HOST_TAKEN)
