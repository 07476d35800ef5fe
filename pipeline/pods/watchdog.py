"""Stops the pod from inside, when its budget is spent or nothing has run for long.

    python -m pipeline.pods.watchdog     settings: the environment (pipeline/pods/inside.py)

The limits hold with the user's laptop off. Time is counted into a file on the volume, so that a
restart forgets nothing. The volume is kept: the pod is stopped, or deleted where everything is on
a network volume, since such a pod cannot be stopped. If the API does not do it, again and again,
the container is shut down as a last resort. That frees the GPU of work, but RunPod may start the
container again and go on billing; a new watchdog then tries again from its first second.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

import httpx
import psutil

from duplex.errors import EXIT_BAD_REQUEST, EXIT_DONE, DuplexError
from pipeline.pods.api import NotThere, Pod, RunPod
from pipeline.pods.clock import Clock, WallClock
from pipeline.pods.inside import Inside, pipeline_runs
from pipeline.pods.usage import (
    Limit,
    Limits,
    Usage,
    added,
    begun,
    counted,
    reached,
    read_usage,
    repriced,
    uncounted_s,
    usage_path,
    write_usage,
)

TICK_S = 15.0
ASK_EVERY_S, FIRST_ASK_S = 600.0, 60.0
STOP_TRIES, STOP_WAIT_S = 10, 30.0
METRIC = "duplex_slots_taken"


class Watchdog:
    """
    Args:
        is_active: whether anything runs that the pod is paid for.
        shut_down: the last resort.
    """

    def __init__(
        self,
        inside: Inside,
        api: RunPod,
        clock: Clock,
        is_active: Callable[[], bool],
        shut_down: Callable[[], None],
        report: Callable[[str], None],
    ):
        self._inside, self._api, self._clock = inside, api, clock
        self._is_active, self._shut_down = is_active, shut_down
        self._report = report
        self._path = usage_path(inside.runs, inside.job)
        self._asked_s, self._is_known = -ASK_EVERY_S, False
        self.limits = Limits(
            budget_usd=inside.budget_usd, usd_h=inside.usd_h, idle_minutes=inside.idle_minutes
        )

    def watch(self) -> Limit:
        """Counts until a limit is reached, then ends the pod; returns which limit it was."""
        before = read_usage(self._path)
        usage = begun(before, self._clock.now(), self._inside.spent_usd)
        begun_s = usage.seen_s
        while True:
            pod, table_usd_h = self._ask_api(), self.limits.usd_h
            if pod is not None and pod.usd_h is not None:  # it takes the place of the table's
                self.limits = self.limits.model_copy(update={"usd_h": pod.usd_h})
            if pod is not None and not self._is_known:
                self._is_known = True
                # What was counted until now was counted at the table's price.
                usage = repriced(usage, usage.seen_s - begun_s, table_usd_h, self.limits.usd_h)
                missed_s = uncounted_s(before, begun_s, pod.started_s or begun_s)
                usage = added(usage, missed_s, self.limits.usd_h)
            usage = counted(usage, self._clock.now(), self.limits.usd_h, active=self._active())
            limit = reached(usage, self.limits, TICK_S)
            self._keep(usage)
            if limit is not None:
                why = f"nothing has run for {usage.idle_s / 60:.0f} minutes"
                if limit == "budget":
                    why = f"{usage.spent_usd:.2f} of {self.limits.budget_usd:.2f} USD are spent"
                self._report(f"the pod ends: {why}")
                self._keep(usage.model_copy(update={"ended": limit}))
                self._end()
                return limit
            self._clock.sleep(TICK_S)

    def _active(self) -> bool:
        """What cannot be found out counts as work: the budget still ends it."""
        try:
            return self._is_active()
        except Exception as error:  # noqa: BLE001 - a watchdog that dies limits nothing
            self._report(f"whether anything runs cannot be seen: {type(error).__name__}")
            return True

    def _keep(self, usage: Usage) -> None:
        try:
            write_usage(self._path, usage)
        except OSError as error:  # a full disk must not keep the pod alive
            self._report(f"{self._path} cannot be written: {error.strerror}")

    def _ask_api(self) -> Pod | None:
        """What the API says of this pod, now and then; sooner while it has never answered."""
        every_s = ASK_EVERY_S if self._is_known else FIRST_ASK_S
        if self._clock.now() - self._asked_s < every_s:
            return None
        self._asked_s = self._clock.now()
        try:
            return self._api.get(self._inside.pod_id)
        except DuplexError as error:
            self._report(f"the price stays at {self.limits.usd_h:.2f} USD/h: {error}")
            return None

    def _end(self) -> None:
        for attempt in range(STOP_TRIES):
            if attempt:
                self._clock.sleep(STOP_WAIT_S)
            try:
                self._stop()
                self._report("the API takes the order to end this pod")
            except DuplexError as error:
                self._report(f"the pod could not be ended: {error}")
                continue
            # An order that is carried out ends this process too.
            self._clock.sleep(STOP_WAIT_S)
            if not self._still_runs():
                return
        self._report("last resort: shutting the container down")
        self._shut_down()

    def _stop(self) -> None:
        pod_id = self._inside.pod_id
        if self._inside.data_outlives_pod:
            self._api.delete(pod_id)
            return
        try:
            self._api.stop(pod_id)
        except NotThere:
            return

    def _still_runs(self) -> bool:
        try:
            return self._api.get(self._inside.pod_id).is_running
        except NotThere:
            return False
        except DuplexError:
            return True


def conversations(inside: Inside) -> int:
    """How many the model server holds now, from its `/metrics`; 0 where there is none."""
    try:
        answer = httpx.get(
            f"http://127.0.0.1:{inside.port}/metrics",
            headers={"Authorization": f"Bearer {inside.token}"},
            timeout=5,
        )
    except httpx.HTTPError:
        return 0
    return read_metric(answer.text) if answer.status_code == 200 else 0


def read_metric(text: str) -> int:
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == METRIC:
            try:
                return int(float(value))
            except (ValueError, OverflowError):
                return 0
    return 0


def shut_container_down() -> None:
    """Ends the container's first process, and whatever is left of the others.

    Only where RunPod's own variable says that this is one of its pods.
    """
    if not os.environ.get("RUNPOD_POD_ID"):
        return
    os.kill(1, signal.SIGTERM)
    time.sleep(20)
    for process in psutil.process_iter():
        if process.pid not in (1, os.getpid()):
            try:
                process.kill()
            except psutil.Error:
                continue


def main() -> int:
    inside = Inside.of(os.environ)
    needed = {
        "DUPLEX_BUDGET_USD": inside.budget_usd,
        "DUPLEX_PRICE_USD_H": inside.usd_h,
        "DUPLEX_IDLE_MINUTES": inside.idle_minutes,
        "DUPLEX_POD_ID or RUNPOD_POD_ID": inside.pod_id,
        "RUNPOD_API_KEY": inside.api_key,
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        print(f"the watchdog needs {', '.join(missing)}; nothing limits this pod", file=sys.stderr)
        return EXIT_BAD_REQUEST

    def report(line: str) -> None:
        print(f"watchdog: {inside.clean(line)}", flush=True)

    clock = WallClock()
    api = RunPod(
        inside.api_key, clock, base_url=inside.api_url, secrets=inside.secrets, timeout_s=20,
        attempts=3,
    )  # fmt: skip
    watchdog = Watchdog(
        inside, api, clock,
        is_active=lambda: pipeline_runs(inside.runs) or conversations(inside) > 0,
        shut_down=shut_container_down, report=report,
    )  # fmt: skip
    limits = watchdog.limits
    report(f"at most {limits.budget_usd:g} USD and {limits.idle_minutes:g} idle minutes")
    watchdog.watch()
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
