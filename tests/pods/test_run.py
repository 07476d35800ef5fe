"""`duplex pod run` to the end, through preemption, taken hosts, failures and limits."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from duplex.errors import BudgetError, LockedError, PodError, StageFailedError
from duplex.lock import RunLock
from pipeline.evaluation.items import load_all_items
from pipeline.pods.lifecycle import FAILED_LOOKS
from tests.pods.conftest import POLL_S
from tests.pods.fake_runpod import KEY, Fault


def test_run_ends_with_a_page_for_each_item_and_the_model_ready(desk, capsys):
    desk.fake.work_s = 3000
    desk.run()
    said = capsys.readouterr().out
    items = load_all_items(("data/prompts/seeds.yaml",))
    assert len(items) == 4
    for item in items:
        (line,) = [line for line in said.splitlines() if line.startswith(f"{item.id} ")]
        url = urlsplit(line.split()[1])
        assert url.path == "/proxy/pod0001x/8998/"
        assert parse_qs(url.query) == {"text_prompt": [item.text_prompt]}
        assert not set(url.query) & set(" &+#'\"")
    assert "still runs at 0.55 USD/h" in said and "spent 0.48 USD" in said
    assert desk.unseen_usd() == 0
    assert KEY not in said and desk.session().book.token() not in said


@pytest.mark.parametrize("vanish", [False, True], ids=["exited", "gone"])
def test_preemption_is_started_again_and_goes_on_where_it_was(desk, capsys, vanish):
    desk.fake.work_s = 3000
    desk.fake.at(1207, lambda: desk.fake.preempt(vanish=vanish))  # between two looks
    began = desk.clock.now()
    desk.run(network_volume="vol1")
    # Two cold starts and the work once: nothing was done twice.
    assert desk.clock.now() - began < 3000 + 2 * 120 + 4 * POLL_S
    assert "the pod was taken away" in capsys.readouterr().out
    assert len(desk.fake.pods) == (2 if vanish else 1)
    mounts = {"network": [{"volumeId": "vol1", "path": "/workspace"}]}
    assert all(body["mounts"] == mounts for body in desk.bodies())


def test_a_taken_host_is_left_for_another_on_the_same_volume(desk, capsys):
    def preempt_and_take():
        desk.fake.preempt()
        desk.fake.pods["pod0001x"].host_taken = True

    desk.fake.at(400, preempt_and_take)
    desk.run(network_volume="vol1")
    assert desk.fake.pods["pod0001x"].status == "GONE"
    assert [pod.id for pod in desk.fake.running()] == ["pod0002x"]
    said = capsys.readouterr().out
    assert "not enough free GPUs" in said and "deleting pod0001x" in said


def test_a_taken_host_with_the_pods_own_volume_is_not_deleted_unasked(desk):
    desk.up()
    desk.down()
    desk.fake.pods["pod0001x"].host_taken = True
    with pytest.raises(PodError, match="--abandon-volume"):
        desk.run()
    assert desk.fake.pods["pod0001x"].status == "EXITED"  # its data is still there
    desk.run(abandon_volume=True)
    assert desk.fake.pods["pod0001x"].status == "GONE"
    assert [pod.id for pod in desk.fake.running()] == ["pod0002x"]


def test_a_failed_pipeline_takes_the_pod_down_and_says_why(desk, capsys):
    desk.fake.pipeline_fails = True
    with pytest.raises(StageFailedError, match="train: no memory"):
        desk.run()
    assert desk.fake.running() == [] and desk.fake.pods["pod0001x"].status == "EXITED"
    assert "stopped pod0001x" in capsys.readouterr().out
    assert desk.clock.slept.count(POLL_S) >= FAILED_LOOKS - 1


def test_a_start_that_gave_up_takes_the_pod_down_and_says_why(desk):
    """No stage has failed: it was the doctor, or the server."""
    desk.fake.failure = "duplex doctor found what must be mended first: no CUDA device"
    with pytest.raises(StageFailedError, match="no CUDA device"):
        desk.run()
    assert desk.fake.running() == []


def test_a_container_that_starts_over_and_over_is_no_progress(desk):
    desk.fake.loop_s = 90.0
    began = desk.clock.now()
    with pytest.raises(PodError, match="must make progress within 30 minutes"):
        desk.run()
    assert desk.fake.running() == [] and desk.clock.now() - began < 2200


def test_hours_in_one_stage_are_not_held_against_a_pod_that_misses_an_answer(desk):
    desk.fake.work_s = 10000

    def out_of_reach(seconds):
        for pod in desk.fake.running():
            pod.ready_s += seconds

    # Once, for less than two looks: the proxy answers 502.
    desk.fake.at(8000, lambda: out_of_reach(1e6))
    desk.fake.at(8030, lambda: out_of_reach(-1e6))
    desk.run(budget_usd=50)
    assert len(desk.bodies()) == 1 and len(desk.fake.pods["pod0001x"].spans) == 1


def test_a_spent_budget_takes_the_pod_down(desk, capsys):
    desk.fake.work_s = 1e6
    with pytest.raises(BudgetError, match=r"at most 0\.20 USD"):
        desk.run(budget_usd=0.2)
    assert desk.fake.running() == []
    assert desk.fake.bill_usd() == pytest.approx(0.2, abs=0.55 / 3600 * POLL_S)
    assert "spent 0.20 USD" in capsys.readouterr().out


def test_a_pod_that_ended_itself_at_its_budget_is_not_started_again(desk):
    desk.fake.work_s = 1e6
    desk.fake.at(1300, desk.fake.preempt)  # .1986 of .2 USD, by its own watchdog
    with pytest.raises(BudgetError, match="pays for no cold start"):
        desk.run(budget_usd=0.2)
    assert len(desk.fake.pods["pod0001x"].spans) == 1


def test_a_pod_that_goes_away_again_and_again_is_given_up(desk):
    desk.fake.work_s = 1e6
    for hour in range(1, 40):
        desk.fake.at(hour * 300, desk.fake.preempt)
    with pytest.raises(PodError, match="it went away 10 times"):
        desk.run()
    assert len(desk.fake.pods["pod0001x"].spans) == 10


def test_who_takes_it_down_elsewhere_is_obeyed(desk):
    desk.fake.work_s = 1e6

    def down_from_another_terminal():
        if desk.clock.now() > began + 1000 and desk.fake.running():
            desk.clock.on_sleep = lambda: None
            desk.down()

    began = desk.clock.now()
    desk.clock.on_sleep = down_from_another_terminal
    with pytest.raises(PodError, match="was taken down by `duplex pod down`"):
        desk.run()
    assert desk.fake.running() == []


def test_an_api_in_trouble_does_not_end_a_run_whose_pod_answers(desk, capsys):
    # Five attempts a look, three looks.
    desk.fake.faults = [Fault("GET", "pods", 503, times=0)]
    desk.fake.at(300, lambda: setattr(desk.fake.faults[0], "times", 15))
    desk.run()
    assert "going on with what is known" in capsys.readouterr().out
    assert len(desk.bodies()) == 1 and desk.fake.faults[0].times == 0


def test_a_second_run_of_the_same_config_is_refused(desk):
    with (
        RunLock(desk.session().book.folder),
        pytest.raises(LockedError, match="one run at a time"),
    ):
        desk.run()
    assert desk.bodies() == []


def test_logs_come_without_control_characters(desk, capsys):
    from pipeline import pod_command

    desk.up()
    capsys.readouterr()
    session = desk.session()
    pod_command.logs(session, 10)
    session.close()
    assert capsys.readouterr().out.startswith("[31mred[0m line\nlast line")


def test_without_a_pod_there_are_no_logs(desk):
    from pipeline import pod_command

    session = desk.session()
    with pytest.raises(PodError, match="found none"):
        pod_command.logs(session, 10)
    session.close()
