"""Bringing a pod up and taking it down over the API's own wire, with everything that goes wrong."""

from __future__ import annotations

import json
import stat

import pytest

from duplex.errors import BudgetError, PodError, RequestError, StageFailedError
from pipeline import pod_command
from pipeline.pods import request
from pipeline.pods.request import read_name
from tests.pods.conftest import CHEAPEST, NEXT, TYPES
from tests.pods.fake_runpod import KEY, Fault


def test_up_rents_the_cheapest_that_fits_and_asks_as_the_api_wants_it(desk, capsys):
    desk.up()
    (body,) = desk.bodies()
    assert body["gpu"] == {"id": CHEAPEST, "count": 1, "minCudaVersion": "12.8"}
    assert body["ports"] == ["8998/http", "8999/http"]
    assert body["mounts"] == {"persistent": {"size": 100, "path": "/workspace"}}
    assert body["env"]["DUPLEX_RUNS"] == "/workspace/runs"
    assert body["image"] == "someone/duplex" and "templateId" not in body
    assert 50 <= body["disk"] <= 100
    assert read_name(body["name"])[0] == "small"
    limits = {name: body["env"][f"DUPLEX_{name}"] for name in ("BUDGET_USD", "PRICE_USD_H",
                                                              "IDLE_MINUTES")}  # fmt: skip
    assert limits == {"BUDGET_USD": "5", "PRICE_USD_H": "0.44", "IDLE_MINUTES": "30"}
    said = capsys.readouterr().out
    assert "0.55 USD/h (the API's price)" in said  # 0.44 in the table
    assert desk.session().book.read().current.usd_h == 0.55
    assert all(
        method != "ASTRAY" and "graphql" not in path for method, path, _ in desk.fake.requests
    )


def test_a_price_that_comes_late_counts_from_the_start(desk, capsys):
    desk.fake.price_lag_s = 60.0
    desk.up()
    said = capsys.readouterr().out
    assert "0.44 USD/h (price predecessor's prices, undated)" in said  # until the API names its own
    assert "at 0.55 USD/h (api)" in said


def test_a_template_is_sent_without_an_image_since_it_would_win(desk):
    desk.up(template="tpl123")
    (body,) = desk.bodies()
    assert body["templateId"] == "tpl123" and "image" not in body


def test_ready_is_what_the_service_says_not_what_the_api_says(desk):
    desk.fake.boot_s = 420.0
    started = desk.clock.now()
    desk.up()
    assert desk.clock.now() - started >= 420  # the API said RUNNING from the first second


def test_up_twice_is_one_pod(desk):
    desk.up()
    desk.up()
    assert len(desk.bodies()) == 1


def test_no_capacity_takes_the_next_type_and_says_so(desk, capsys):
    desk.fake.taken = {CHEAPEST}
    desk.up()
    assert [body["gpu"]["id"] for body in desk.bodies()] == [CHEAPEST, NEXT]
    assert f"no {CHEAPEST} is free; trying the next" in capsys.readouterr().out


def test_no_capacity_at_all_rents_nothing(desk):
    desk.fake.taken = set(TYPES)
    with pytest.raises(PodError, match="Nothing was rented"):
        desk.up()
    assert desk.fake.pods == {} and desk.ours_usd() == 0
    assert desk.session().left_running() == []  # a refusal is an answer: nothing may run


def test_a_refusal_that_made_a_pod_all_the_same_is_noticed_later(desk):
    text = "There are no longer any instances available with the requested specifications."
    desk.fake.faults = [Fault("POST", "pods", 500, text, acts=True)]
    desk.fake.list_lag_s = 60.0
    desk.up()
    assert len(desk.fake.pods) == 2
    desk.clock.sleep(60)
    desk.status()
    assert len(desk.fake.running()) == 1


def test_more_memory_takes_a_larger_gpu(desk):
    desk.up(gpu_memory=60)
    assert desk.bodies()[0]["gpu"]["id"] in ("NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB")


def test_a_refusal_without_a_code_takes_the_next_type(desk, capsys):
    """400 is what v2 answers to a rule that is broken and to a GPU that cannot be had there."""
    text = '{"title": "Bad Request", "status": 400, "detail": "could not be placed"}'
    desk.fake.faults = [Fault("POST", "pods", 400, text)]
    desk.up()
    assert [body["gpu"]["id"] for body in desk.bodies()] == [CHEAPEST, NEXT]
    said = capsys.readouterr().out
    assert (
        f"{CHEAPEST}: RunPod's API (POST /pods) answered 400: could not be placed; trying" in said
    )


def test_what_is_refused_for_every_type_is_not_asked_for_again(desk):
    desk.fake.faults = [Fault("POST", "pods", 400, "no such data center", times=99)]
    with pytest.raises(PodError, match=r"no such data center\. Nothing was rented"):
        desk.up()
    assert len(desk.bodies()) == len(TYPES) and desk.session().left_running() == []


def test_a_body_that_breaks_the_schema_is_refused_once_with_what_is_wrong(desk, monkeypatch):
    monkeypatch.setattr(request, "MIN_CUDA", 12.8)
    with pytest.raises(PodError, match=r"breaks the schema; gpu\.minCudaVersion\. Nothing"):
        desk.up()
    assert len(desk.bodies()) == 1


def test_stopping_what_somebody_else_has_stopped_is_no_error(desk):
    """v2 calls it a conflict, as it calls what cannot be stopped."""
    desk.up()
    desk.fake.running()
    desk.fake.end(desk.fake.pods["pod0001x"])
    session = desk.session()
    session.api.stop("pod0001x")
    session.close()
    assert desk.fake.requests[-2][2] == {"action": "stop"}


def test_a_pod_that_cannot_be_stopped_is_not_called_stopped(desk):
    desk.up()
    desk.fake.pods["pod0001x"].status = "ERROR"
    with pytest.raises(
        PodError, match=r"not valid for a pod that is ERROR.*may cost money.*--delete"
    ):
        desk.down()
    assert desk.session().book.read().current.runs
    desk.fake.pods["pod0001x"].status = "RUNNING"


def test_a_pod_on_a_later_page_of_the_list_is_found(desk):
    stranger = {"gpu": {"id": CHEAPEST, "count": 1}, "env": {}, "mounts": {}}
    for number in range(5):
        desk.fake._create(stranger | {"name": f"other-{number}"})
    desk.fake.faults = [Fault("POST", "pods", 500, acts=True)]
    desk.up()
    assert len(desk.bodies()) == 1 and desk.session().book.read().current.id == "pod0006x"
    for pod in desk.fake.running():
        if pod.body["name"].startswith("other"):
            desk.fake.end(pod, "GONE")


def test_a_create_that_answers_500_and_made_the_pod_is_found_by_its_name(desk, capsys):
    desk.fake.faults = [Fault("POST", "pods", 500, acts=True)]
    desk.fake.list_lag_s = 8.0
    desk.up()
    assert len(desk.fake.pods) == 1
    assert "answered with an error, and made the pod" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "pods", 201, "<html>", acts=True),
        Fault("POST", "pods", 201, "[]", acts=True),
        Fault("POST", "pods", hang=True, acts=True),
        Fault("POST", "pods", 502, "{", acts=True),
    ],
    ids=["html", "no-pod", "timeout", "bad-gateway"],
)
def test_whatever_a_create_answers_its_pod_is_found(desk, fault):
    desk.fake.faults = [fault]
    desk.up()
    assert len(desk.fake.pods) == 1 and len(desk.fake.running()) == 1


def test_a_pod_that_shows_up_too_late_does_not_stay_beside_the_second_one(desk, capsys):
    desk.fake.faults = [Fault("POST", "pods", 500, acts=True)]
    desk.fake.list_lag_s = 100.0  # after the second one is asked for
    desk.up()
    assert len(desk.fake.pods) == 2
    desk.status()
    assert len(desk.fake.running()) == 1
    assert "runs beside another pod of ours: deleting it" in capsys.readouterr().out


def test_a_crash_between_create_and_answer_loses_nothing(desk, monkeypatch):
    session = desk.session()
    create = session.api.create

    def crash(body):
        create(body)
        raise KeyboardInterrupt

    monkeypatch.setattr(session.api, "create", crash)
    with pytest.raises(KeyboardInterrupt):
        pod_command.up(session, desk.options())
    session.close()
    (entry,) = desk.session().book.read().pods
    assert entry.id is None  # written down before it was asked for
    desk.clock.sleep(600)
    desk.up()
    assert len(desk.fake.pods) == 1 and desk.session().book.read().current.id == "pod0001x"


def test_what_still_runs_is_said_when_interrupted(desk, capsys):
    desk.fake.boot_s = 600.0

    def interrupt():
        if len(desk.clock.slept) == 3:
            raise KeyboardInterrupt

    desk.clock.on_sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        desk.up()
    said = capsys.readouterr().err
    assert "pod0001x (NVIDIA GeForce RTX 3090) still runs at 0.55 USD/h" in said
    assert f"to end it: duplex pod down {desk.config}" in said


def test_a_pod_that_never_answers_is_taken_down_with_its_bill(desk, capsys):
    desk.fake.boot_s = None
    with pytest.raises(PodError, match="must make progress within 30 minutes"):
        desk.up()
    assert desk.fake.running() == []
    assert 0.27 < desk.ours_usd() < 0.29  # half an hour at .55
    assert "spent 0.28 USD" in capsys.readouterr().out


def test_a_key_that_is_not_accepted_is_exit_2_and_is_not_shown(desk, capsys):
    desk.environment["RUNPOD_API_KEY"] = "rpa_WRONG0KEY"
    with pytest.raises(RequestError, match=r"the key of RUNPOD_API_KEY, answered 401") as caught:
        desk.up()
    assert caught.value.exit_code == 2
    captured = capsys.readouterr()
    assert "rpa_WRONG0KEY" not in captured.out + captured.err + str(caught.value)


def test_429_is_waited_out_as_the_server_asks(desk):
    desk.fake.faults = [Fault("POST", "pods", 429, "slow down", {"Retry-After": "77"}, times=2)]
    desk.up()
    assert desk.clock.slept.count(77) == 2 and len(desk.fake.pods) == 1


def test_a_list_in_trouble_is_asked_again(desk):
    desk.fake.faults = [
        Fault("GET", "pods", 500), Fault("GET", "pods", 200, "not json"),
        Fault("GET", "pods", 200, '{"pods": 1}'), Fault("GET", "pods", hang=True),
    ]  # fmt: skip
    with pytest.raises(PodError, match="the list of pods must be an array"):
        desk.status()  # an answer of another shape is no passing trouble
    desk.up()
    assert len(desk.fake.pods) == 1


def test_an_error_that_quotes_the_request_shows_no_secret(desk, capsys):
    token = desk.session().book.make_token()
    desk.environment["OPENAI_API_KEY"] = "hidden-away-from-all-eyes"
    desk.environment["VENDOR_PASSWORD"] = "open-sesame"
    text = f"bad env: {KEY} {token} hidden-away-from-all-eyes open-sesame"
    desk.fake.faults = [Fault("POST", "pods", 400, text, times=99)]
    with pytest.raises(PodError, match="bad env") as caught:
        desk.up(env=("VENDOR_PASSWORD",))
    captured = capsys.readouterr()
    for secret in (KEY, token, "hidden-away-from-all-eyes", "open-sesame"):
        assert secret not in captured.out + captured.err + str(caught.value)
    assert desk.bodies()[0]["env"]["OPENAI_API_KEY"] == "hidden-away-from-all-eyes"


def test_the_token_is_its_owners_alone_and_in_no_state(desk):
    desk.up()
    book = desk.session().book
    assert stat.S_IMODE(book.token_path.stat().st_mode) == 0o600
    assert desk.bodies()[0]["env"]["DUPLEX_TOKEN"] == book.token()


def test_a_pod_is_not_rented_for_a_training_on_several_machines(desk):
    text = desk.config.read_text()
    place = "{processes: 2, runtime: {nodes: 2, main_address: 'gpu-1:29400'}}"
    assert "train:" not in text
    desk.config.write_text(f"{text}train: {place}\n")
    with pytest.raises(RequestError, match="nodes must be 1, found 2"):
        desk.up()
    assert desk.bodies() == []


def test_nobody_is_asked_without_a_terminal(desk, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(RequestError, match="say --yes"):
        desk.up(yes=False)
    assert desk.bodies() == []


@pytest.mark.parametrize(("answer", "rents"), [("y", True), ("", False), ("no", False)])
def test_a_person_is_asked_once_the_cost_is_shown(desk, monkeypatch, capsys, answer, rents):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    shown = []
    monkeypatch.setattr("builtins.input", lambda _: shown.append(capsys.readouterr().out) or answer)
    if rents:
        desk.up(yes=False)
    else:
        with pytest.raises(StageFailedError, match="nothing was rented"):
            desk.up(yes=False)
    assert bool(desk.bodies()) == rents
    assert "0.44 USD/h" in shown[0] and "at most 5.00 USD" in shown[0] and "11.4 hours" in shown[0]


def test_down_stops_keeps_the_volume_and_may_be_said_twice(desk, capsys):
    desk.up()
    desk.down()
    assert [pod.status for pod in desk.fake.pods.values()] == ["EXITED"]
    desk.down()
    assert "is stopped already" in capsys.readouterr().out
    desk.down(delete=True)
    desk.down(delete=True)
    assert "no pod of this config is there" in capsys.readouterr().out


def test_a_stopped_pod_is_started_again_with_the_limits_of_today(desk):
    desk.up(budget_usd=1)
    desk.down()
    desk.clock.sleep(3600)
    desk.up(budget_usd=2)
    (pod,) = desk.fake.pods.values()
    assert pod.status == "RUNNING" and pod.body["env"]["DUPLEX_BUDGET_USD"] == "2"
    assert len(desk.bodies()) == 1


def test_what_else_changed_reaches_a_pod_that_is_started_again(desk):
    """A new key under the same limits."""
    desk.environment["OPENAI_API_KEY"] = "an-old-key-of-the-llm"
    desk.up()
    desk.down()
    desk.environment["OPENAI_API_KEY"] = "a-new-key-of-the-llm"
    desk.up()
    (pod,) = desk.fake.pods.values()
    assert pod.body["env"]["OPENAI_API_KEY"] == "a-new-key-of-the-llm"
    assert len(desk.bodies()) == 1


def test_down_is_not_believed_while_the_api_calls_it_running(desk):
    desk.up()
    desk.fake.faults = [Fault("POST", "stop", 200, "{}")]
    with pytest.raises(PodError, match="still calls it RUNNING"):
        desk.down()


def test_a_spent_budget_starts_nothing(desk):
    desk.up(budget_usd=0.5)
    desk.clock.sleep(3000)
    desk.down()
    with pytest.raises(BudgetError, match="larger --budget-usd"):
        desk.up(budget_usd=0.5)
    assert desk.fake.running() == []
    desk.up(budget_usd=2)
    assert len(desk.fake.running()) == 1


def test_another_job_has_a_budget_of_its_own(desk):
    desk.up(budget_usd=0.5)
    desk.clock.sleep(3000)
    desk.down(delete=True)
    first = desk.ours_usd()
    desk.up(budget_usd=0.5)
    jobs = [read_name(body["name"])[1] for body in desk.bodies()]
    assert jobs[0] != jobs[1] and desk.ours_usd() >= first > 0.45


def test_strays_are_listed_and_left_alone_until_asked_for(desk, capsys):
    desk.up()
    stranger = {"gpu": {"id": CHEAPEST, "count": 1}, "env": {}, "mounts": {}}
    desk.fake._create(stranger | {"name": "duplex-small-0123abcd-0"})
    desk.fake._create(stranger | {"name": "other-peoples-pod"})
    desk.fake._create(stranger | {"name": "duplex-small-multi-0123abcd-0"})
    capsys.readouterr()
    session = desk.session(as_json=True)
    pod_command.status(session)
    session.close()
    shown = json.loads(capsys.readouterr().out)
    assert [pod["id"] for pod in shown["strays"]] == ["pod0002x"]
    assert [pod["id"] for pod in shown["others"]] == ["pod0004x"]
    desk.down()
    assert [p.id for p in desk.fake.running()] == ["pod0002x", "pod0003x", "pod0004x"]
    desk.down(strays=True)
    assert [p.id for p in desk.fake.running()] == ["pod0003x", "pod0004x"]
    for pod in desk.fake.running():
        desk.fake.end(pod, "GONE")
        pod.body["name"] = "other"
