"""From nothing to a pod that answers, or to a finished pipeline, whatever happens on the way.

Looks, asks `lifecycle` what to do, does it, and looks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

from duplex.errors import BudgetError, PodError, StageFailedError
from pipeline.pods.api import ApiTrouble
from pipeline.pods.book import PodEntry
from pipeline.pods.client import PodClient, PodStatus
from pipeline.pods.clock import Clock
from pipeline.pods.control import Control
from pipeline.pods.gpus import GpuType
from pipeline.pods.lifecycle import Act, PodState, Rules, View, Why, next_step
from pipeline.pods.request import Wish

POLL_S = 20.0
COLD_START_H = 10 / 60


class Follower:
    """One `up` or `run`.

    Args:
        connect: the services of a pod, by its id.
        report: gets a line for each thing that happens.
    """

    def __init__(
        self,
        control: Control,
        clock: Clock,
        connect: Callable[[str], PodClient],
        report: Callable[[str], None],
        poll_s: float = POLL_S,
    ):
        self._control, self._book, self._clock = control, control.book, clock
        self._connect, self._report, self._poll_s = connect, report, poll_s
        self._status = PodStatus("unknown")
        self._forward_s = self._looked_s = 0.0
        self._said = ""

    def follow(self, wish: Wish, gpus: Sequence[GpuType], rules: Rules) -> PodEntry:
        """The pod, once it is at `rules.goal`.

        Raises:
            BudgetError, PodError, StageFailedError: it was given up, and the pod was taken down,
                unless somebody else did that.
            RequestError: the key is not accepted.
        """
        self._forward_s = self._looked_s = self._clock.now()
        self._book.change(
            lambda state: state.model_copy(
                update={"wanted": "up", "network_volume": wish.network_volume}
            )
        )
        view = View("none")
        while True:
            view, entry = self._look(view, gpus[0].usd_h * wish.gpu_count)
            step = next_step(view, rules)
            if step.act is Act.GIVE_UP:
                assert step.why is not None
                self._give_up(step.why, rules)
            if step.act is Act.WAIT:
                self._clock.sleep(self._poll_s)
                continue
            if step.act is Act.FINISH:
                assert entry is not None
                return entry
            if view.starts:
                self._report("the pod was taken away: bringing it up again, to go on where it was")
            is_up = True
            if step.act is Act.START:
                assert entry is not None
                is_up = self._control.start(entry, wish)
            else:
                if step.act is Act.REPLACE:
                    assert entry is not None
                    self._report(f"deleting {entry.id}: another pod takes its place")
                    self._control.delete(entry)
                self._control.create(wish, gpus)
            view = View("none", start_refused=not is_up, starts=view.starts + is_up)
            self._forward_s = self._looked_s = self._clock.now()
            self._said = ""

    def _look(self, view: View, cheapest_usd_h: float) -> tuple[View, PodEntry | None]:
        standing: PodState | None = None
        try:
            self._control.reconcile()
        except ApiTrouble as trouble:
            standing = "unknown"
            self._say(f"{trouble}; going on with what is known")
        now, state = self._clock.now(), self._book.read()
        entry = state.current
        if entry is not None and entry.runs:
            standing = "running"
        elif standing is None:
            standing = "none" if entry is None else "stopped"
        price = cheapest_usd_h if entry is None else entry.usd_h
        view = replace(
            view, pod=standing, spent_usd=state.spent_usd(now), wanted_down=state.wanted == "down",
            cold_start_usd=price * COLD_START_H,
        )  # fmt: skip
        if standing == "running":
            assert entry is not None and entry.id is not None
            before, view = view, self._ask_pod(entry.id, view)
            if is_forward(before, view):
                self._forward_s = now
            elif view.pipeline == "running":  # a stage may take hours: they do not count
                self._forward_s += now - self._looked_s
            self._say(_progress(view, self._status))
        self._looked_s = now
        return replace(view, stuck_s=now - self._forward_s), entry

    def _ask_pod(self, pod_id: str, view: View) -> View:
        client = self._connect(pod_id)
        try:
            if not client.agent_answers():
                return replace(view, agent_answers=False, pipeline="unknown", server_ready=False)
            try:
                self._status = client.status()
            except PodError as error:
                self._status = PodStatus("unknown", message=str(error))
            state = self._status.pipeline
            return replace(
                view,
                agent_answers=True,
                has_answered=True,
                num_done=max(view.num_done, self._status.num_done),
                pipeline=state,
                server_ready=state == "done" and client.server_is_ready(),
                failed_looks=view.failed_looks + 1 if state == "failed" else 0,
            )
        finally:
            client.close()

    def _say(self, line: str) -> None:
        if line != self._said:
            self._report(line)
            self._said = line

    def _give_up(self, why: Why, rules: Rules) -> NoReturn:
        if why is Why.TAKEN_DOWN:
            raise PodError("the pod was taken down by `duplex pod down`; nothing was started again")
        for line in self._control.down(delete=False):
            self._report(line)
        spent = self._book.read().spent_usd(self._clock.now())
        if why is Why.BUDGET:
            raise BudgetError(
                f"at most {rules.budget_usd:.2f} USD may be spent, {spent:.2f} are, and the rest "
                "pays for no cold start: the pod is down. What it finished is on its volume; a "
                "larger --budget-usd goes on."
            )
        if why is Why.PIPELINE_FAILED:
            failed = [f"{name}: {text}" for name, state, text in self._status.stages
                      if state == "failed"]  # fmt: skip
            raise StageFailedError(
                f"the pipeline in the pod failed: {'; '.join(failed) or self._status.message}. The "
                "pod is down; what it finished is on its volume. Mend the cause and run again."
            )
        if why is Why.HOST_TAKEN:
            raise PodError(
                "the stopped pod's host has no GPU free, and its own volume is on that host. Wait "
                "and try again, or give the volume up with --abandon-volume: a new pod begins "
                "from nothing. A --network-volume avoids this."
            )
        if why is Why.TOO_MANY_STARTS:
            raise PodError(
                f"a pod must stay up, it went away {rules.max_starts} times. What it finished is "
                "on its volume; --cloud secure is steadier than community."
            )
        raise PodError(
            f"the pod must make progress within {rules.deadline_s / 60:.0f} minutes, found "
            f"{self._said or 'none'}. It is down. `duplex pod logs` shows why while a pod is up; "
            "--ready-minutes waits longer."
        )


def is_forward(before: View, after: View) -> bool:
    """A stage more is done than ever before, or the pod answers for the first time since we started
    it. That it answers again is no progress: its container may be starting over and over."""
    return after.num_done > before.num_done or (after.has_answered and not before.has_answered)


def _progress(view: View, status: PodStatus) -> str:
    if not view.agent_answers:
        return "waiting for the pod to answer (a cold start takes 5 to 10 minutes)"
    if view.pipeline == "done":
        return "the model server is ready" if view.server_ready else "waiting for the model server"
    return f"pipeline: {progress_words(status)}"


def progress_words(status: PodStatus) -> str:
    if not status.stages:
        return status.message or status.pipeline
    running = [f", {name} at work" for name, state, _ in status.stages if state == "running"]
    why = f": {status.message}" if status.pipeline == "failed" and status.message else ""
    of = f"{status.num_done} of {len(status.stages)} stages done"
    return f"{status.pipeline}{why}, {of}{''.join(running)}"
