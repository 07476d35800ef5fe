"""The pod ends itself: over the same fake API, by a clock that only moves when somebody sleeps."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.pods import watchdog
from pipeline.pods.api import RunPod
from pipeline.pods.control import IN_VAIN_S
from pipeline.pods.inside import Inside, is_work, pipeline_runs
from pipeline.pods.usage import (
    Usage,
    begun,
    counted,
    read_usage,
    uncounted_s,
    usage_path,
    write_usage,
)
from pipeline.pods.watchdog import (
    STOP_TRIES,
    STOP_WAIT_S,
    TICK_S,
    Watchdog,
    conversations,
    read_metric,
)
from tests.pods.conftest import CHEAPEST
from tests.pods.fake_runpod import KEY, Fault


class Kennel:
    """A watchdog in a pod of the fake's, with the pod's own environment."""

    def __init__(self, desk, *, active=lambda: True, **options):
        if not desk.fake.pods:
            desk.up(**options)
        (self.pod,) = (p for p in desk.fake.pods.values() if p.status == "RUNNING")
        self.desk, self.lines, self.shut = desk, [], []
        environment = self.pod.body["env"] | {
            "RUNPOD_POD_ID": self.pod.id, "DUPLEX_RUNS": str(desk.folder / "volume"),
            "DUPLEX_RUNPOD_URL": desk.fake.api_url,
        }  # fmt: skip
        self.inside = Inside.of(environment)
        self.api = RunPod(
            self.inside.api_key, desk.clock, base_url=self.inside.api_url, timeout_s=0.5, attempts=3
        )
        self.dog = Watchdog(
            self.inside, self.api, desk.clock, active, lambda: self.shut.append(1),
            self.lines.append,
        )  # fmt: skip

    def watch(self):
        try:
            return self.dog.watch()
        finally:
            self.api.close()

    @property
    def usage(self):
        return read_usage(usage_path(self.inside.runs, self.inside.job))


def test_the_budget_ends_the_pod_with_nobody_there(desk):
    kennel = Kennel(desk, budget_usd=0.3)
    assert kennel.watch() == "budget"
    assert kennel.pod.status == "EXITED"  # its volume is kept
    # By the API's price of .55, not the table's .44; never beyond the budget.
    # The cold start, before there was a watchdog, is in it.
    assert 0.3 - 0.55 / 3600 * (2 * TICK_S) <= desk.fake.bill_usd() <= 0.3
    assert kennel.shut == [] and kennel.usage.ended == "budget"


def test_idle_minutes_end_the_pod_and_work_resets_them(desk):
    began = desk.clock.now()
    kennel = Kennel(desk, active=lambda: desk.clock.now() < began + 3000, idle_minutes=10)
    assert kennel.watch() == "idle"
    assert kennel.pod.status == "EXITED"
    ended = kennel.pod.spans[-1][1]
    assert ended == pytest.approx(began + 3000 + 600, abs=2 * TICK_S)


def test_on_a_network_volume_the_pod_is_deleted_since_it_cannot_be_stopped(desk):
    kennel = Kennel(desk, budget_usd=0.1, network_volume="vol1")
    assert kennel.watch() == "budget"
    assert kennel.pod.status == "GONE"
    # Days later nobody can say when it went: at its own budget, and a few orders in vain later.
    desk.clock.sleep(3 * 86400)
    desk.status()
    assert desk.unseen_usd() > 0 and desk.ours_usd() <= 0.1 + 0.55 * IN_VAIN_S / 3600 + 1e-9


def test_the_bill_allows_for_every_order_in_vain():
    """Each order is followed by a look, and each of both may be asked for three times."""
    assert STOP_TRIES * 2 * STOP_WAIT_S <= IN_VAIN_S


def test_an_api_in_trouble_is_asked_again(desk):
    desk.up(budget_usd=0.1)
    desk.fake.faults = [Fault("POST", "stop", 500, times=7)]
    kennel = Kennel(desk)
    kennel.watch()
    assert kennel.pod.status == "EXITED" and kennel.shut == []
    assert sum("could not be ended" in line for line in kennel.lines) == 2
    assert not any(KEY in line for line in kennel.lines)


def test_an_order_that_is_not_carried_out_is_given_again(desk):
    desk.up(budget_usd=0.1)
    desk.fake.faults = [Fault("POST", "stop", 200, "{}", times=2)]
    kennel = Kennel(desk)
    kennel.watch()
    assert kennel.pod.status == "EXITED" and kennel.shut == []


def test_the_last_resort_is_to_shut_the_container_down(desk):
    desk.up(budget_usd=0.1)
    desk.fake.faults = [Fault("POST", "stop", 500, times=1000)]
    kennel = Kennel(desk)
    kennel.watch()
    assert kennel.shut == [1] and "last resort" in kennel.lines[-1]


def test_what_was_spent_outlives_restarts_and_lost_volumes(desk):
    kennel = Kennel(desk, budget_usd=1)
    path = usage_path(kennel.inside.runs, kennel.inside.job)
    now = desk.clock.now()
    write_usage(path, Usage(spent_usd=0.9, seconds=5000, seen_s=now - 9999))
    before = desk.clock.now()
    assert kennel.watch() == "budget"
    boot_s = before - kennel.pod.spans[0][0]
    assert desk.clock.now() - before == pytest.approx(
        0.1 / 0.55 * 3600 - boot_s, abs=30 + 2 * TICK_S
    )
    # The volume is lost, the next pod's environment says it.
    assert begun(Usage(), now, 0.7).spent_usd == 0.7
    path.write_text("{torn")
    assert read_usage(path) == Usage()


def test_a_container_that_dies_again_and_again_stays_idle(desk):
    """Each restart begins a watchdog; idle time goes on, or it would never end."""
    usage, now = Usage(seen_s=1000.0), 1000.0
    for _ in range(10):
        usage = begun(usage, now + 30, 0.0)
        usage = counted(usage, now + 90, 0.5, active=False)
        now += 90
    assert usage.idle_s == 900 and usage.seconds == 900
    # But one that a person started again begins anew.
    assert begun(usage.model_copy(update={"ended": "idle"}), now + 30, 0.0).idle_s == 0
    assert begun(usage, now + 4000, 0.0).idle_s == 0


def test_an_api_that_answers_late_still_gets_the_cold_start_counted(desk):
    desk.up(budget_usd=0.3)
    desk.fake.faults = [Fault("GET", "pods/", 500, times=9)]
    kennel = Kennel(desk)
    assert kennel.watch() == "budget"
    assert desk.fake.faults[0].times == 0 and desk.fake.bill_usd() <= 0.3


def test_a_container_that_comes_back_counts_what_it_missed():
    before = Usage(spent_usd=1, seen_s=5000)
    assert uncounted_s(before, 5900, started_s=1000) == 900  # of one start: since the last count
    assert uncounted_s(before, 9000, started_s=8600) == 400  # another start: since that
    assert uncounted_s(before, 9000, started_s=9500) == 0  # somebody's clock is wrong


def test_a_clock_that_is_set_back_counts_nothing():
    assert counted(Usage(spent_usd=1, seen_s=1000), 10, 0.5, active=True).spent_usd == 1


def test_what_cannot_be_seen_counts_as_work_and_the_budget_still_ends_it(desk):
    def breaks():
        raise RuntimeError("no /proc")

    kennel = Kennel(desk, active=breaks, budget_usd=0.3, idle_minutes=1)
    assert kennel.watch() == "budget"


def test_a_container_is_shut_down_where_runpod_says_that_it_is_one(monkeypatch):
    signals, killed = [], []

    class Process:
        def __init__(self, pid):
            self.pid = pid

        def kill(self):
            killed.append(self.pid)

    monkeypatch.setattr(watchdog.os, "kill", lambda *given: signals.append(given))
    monkeypatch.setattr(watchdog.time, "sleep", lambda _: None)
    processes = [Process(1), Process(7), Process(watchdog.os.getpid())]
    monkeypatch.setattr(watchdog.psutil, "process_iter", lambda: processes)
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    watchdog.shut_container_down()
    assert signals == killed == []
    monkeypatch.setenv("RUNPOD_POD_ID", "pod0001x")
    watchdog.shut_container_down()
    assert signals == [(1, watchdog.signal.SIGTERM)] and killed == [7]


@pytest.mark.parametrize(
    ("command", "works"),
    [
        ("python -m pipeline.train configs/coffee.yaml", True),
        ("/app/.venv/bin/python /app/.venv/bin/duplex run configs/coffee.yaml", True),
        ("/app/.venv/bin/python /app/.venv/bin/duplex doctor configs/coffee.yaml", True),
        ("python -m duplex.cli evaluate configs/coffee.yaml", True),
        ("python -m duplex.cli status configs/coffee.yaml --json", False),
        ("/app/.venv/bin/python /app/.venv/bin/duplex serve configs/coffee.yaml", False),
        ("python -m pipeline.serving.app runs/coffee/07-merge-1a2b3c4d/checkpoint", False),
        ("python -m pipeline.pods.agent", False),
        ("python -m pipeline.pods.watchdog", False),
        ("bash /app/runpod/start.sh", False),
        ("python -m http.server", False),
        ("", False),
    ],
)
def test_what_counts_as_work(command, works):
    assert is_work(command.split()) == works


def test_a_held_lock_is_work(tmp_path, monkeypatch):
    from duplex.lock import RunLock

    monkeypatch.setattr("pipeline.pods.inside._command_lines", lambda: [])
    (tmp_path / "coffee").mkdir()
    assert not pipeline_runs(tmp_path) and not pipeline_runs(tmp_path / "none")
    with RunLock(tmp_path / "coffee"):
        assert pipeline_runs(tmp_path)


def test_a_process_of_the_pipeline_is_seen(tmp_path):
    code = "import time; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, "-m", "pipeline.train"])
    try:
        assert pipeline_runs(tmp_path)
    finally:
        process.kill()
        process.wait()


def test_conversations_are_read_from_the_servers_own_metrics():
    from pipeline.serving.counts import Counts

    counts = Counts()
    assert read_metric(counts.text().decode()) == 0
    counts.slots_taken.set(3)
    assert read_metric(counts.text().decode()) == 3
    assert read_metric("duplex_slots_taken NaN") == 0
    assert conversations(Inside.of({"DUPLEX_PORT": "9"})) == 0  # nobody listens there


def test_a_watchdog_without_limits_says_so_and_ends_with_2(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.pods.watchdog"], capture_output=True, text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "DUPLEX_RUNS": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 2 and "DUPLEX_BUDGET_USD" in result.stderr
    assert CHEAPEST not in result.stderr
