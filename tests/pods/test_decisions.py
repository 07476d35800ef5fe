"""The pure parts: which GPU, what it costs, what next, what is asked for; worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duplex.configfile import load_config
from duplex.errors import DataFileError, RequestError
from pipeline.doctor import training_memory
from pipeline.pods.api import read_pod
from pipeline.pods.bill import closed, hours_left, opened, parse_time, plausible, spent_usd
from pipeline.pods.follow import is_forward
from pipeline.pods.gpus import GpuType, fitting, load_gpus, with_margin
from pipeline.pods.lifecycle import FAILED_LOOKS, Act, Rules, View, Why, next_step
from pipeline.pods.request import Wish, create_body, pod_env, pod_name, read_name
from tests.factories import write_yaml
from tests.pods.conftest import ROOT
from tests.pods.schema_v2 import ACTIONS, faults_of_create

TABLE = load_gpus(ROOT / "data" / "gpus.yaml")


def gpu(name, memory_gb, usd_h):
    return GpuType(id=name, memory_gb=memory_gb, usd_h=usd_h, source="test")


# -- which GPU


def test_the_table_has_the_predecessors_prices_and_says_whose_they_are():
    prices = {row.id: (row.memory_gb, row.usd_h) for row in TABLE}
    assert prices["NVIDIA RTX A6000"] == (48, 0.79)
    assert prices["NVIDIA GeForce RTX 4090"] == (24, 0.69)
    assert prices["NVIDIA GeForce RTX 3090"] == (24, 0.44)
    assert all("predecessor" in row.source or row.date is not None for row in TABLE)
    assert len(prices) == len(TABLE)


def test_cheapest_first_and_of_equal_price_the_larger():
    rows = [gpu("d", 80, 2), gpu("a", 24, 0.5), gpu("c", 48, 0.8), gpu("b", 80, 0.8)]
    assert [row.id for row in fitting(rows, 30)] == ["b", "c", "d"]
    assert [row.id for row in fitting(rows, 30, max_usd_h=1)] == ["b", "c"]
    assert [row.id for row in fitting(rows, 30, only=["c", "a"])] == ["c"]


def test_what_does_not_fit_is_said_with_what_to_do():
    with pytest.raises(RequestError, match=r"must have 200\.0 GB.*the largest has 94 GB"):
        fitting(TABLE, 200)
    with pytest.raises(RequestError, match=r"no more than 0\.10 USD"):
        fitting(TABLE, 10, max_usd_h=0.1)
    with pytest.raises(RequestError, match="found RTX 9999"):
        fitting(TABLE, 10, only=["RTX 9999"])


def test_the_shipped_gpu_config_gets_the_gpu_that_the_page_names(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    config = load_config(ROOT / "configs" / "coffee.yaml")
    estimate = training_memory(config).total / 1e9
    need = with_margin(estimate)
    chosen = fitting(TABLE, need)[0]
    # Not by `fitting` again: the cheapest row of the table that is large enough.
    assert chosen.usd_h == min(row.usd_h for row in TABLE if row.memory_gb >= need)
    assert chosen.id == "NVIDIA RTX A6000"
    page = " ".join((ROOT / "docs" / "pods.md").read_text().split())
    assert (
        f"is computed to take {estimate:.1f} GB, so {need:.1f} GB are asked for: by today's table "
        f"an {chosen.id.removeprefix('NVIDIA ')}, {chosen.memory_gb:g} GB." in page
    )


def test_a_table_with_faults_is_refused(tmp_path):
    path = write_yaml(tmp_path / "gpus.yaml", {"gpus": [{"id": "x", "memory_gb": 0, "usd_h": -1}]})
    with pytest.raises(DataFileError, match=r"gpus\.0\.memory_gb"):
        load_gpus(path)


# -- what it costs


def test_a_bill_by_hand():
    spans = opened((), 1000, 0.5)
    assert spent_usd(spans, 1000 + 7200) == 1.0
    spans = opened(spans, 5000, 0.8)  # the API's price, from the start on
    assert spans[0].start_s == 1000 and spent_usd(spans, 1000 + 3600) == pytest.approx(0.8)
    spans = closed(closed(spans, 1000 + 1800), 9999)  # the second end changes nothing
    assert spent_usd(spans, 1e9) == pytest.approx(0.4)
    spans = closed(opened(spans, 10000, 1.0), 9000)  # never before its start
    assert spent_usd(spans, 1e9) == pytest.approx(0.4)
    assert closed((), 5) == ()
    assert hours_left(5, 1, 2) == 2 and hours_left(1, 5, 2) == 0


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)), max_size=8), st.floats(0.01, 10))
def test_a_bill_never_shrinks_and_is_that_of_its_seconds(gaps, usd_h):
    spans, now, seconds, before = (), 0.0, 0.0, 0.0
    for off, on in gaps:
        now += off
        spans = opened(spans, now, usd_h)
        now += on
        spans = closed(spans, now)
        seconds += on
        spent = spent_usd(spans, now)
        assert spent >= before
        before = spent
    assert before == pytest.approx(seconds / 3600 * usd_h)


def test_the_apis_times():
    stamp = "2024-07-12T15:14:40-04:00"
    assert parse_time(stamp) == parse_time("2024-07-12T19:14:40.000Z") == 1720811680
    for strange in (None, 7, "", "yesterday", "x" * 1000, "9999999-01-01", "Exited: Fri 99"):
        assert parse_time(strange) is None
    assert plausible(5, 1, 9) == 5 and plausible(0, 1, 9) is None and plausible(None, 1, 9) is None


def test_a_pod_of_the_apis():
    pod = read_pod({"id": "abc123", "name": "n", "status": "RUNNING", "cost": 0.74,
                    "startedAt": "2024-07-12T19:14:40Z"})  # fmt: skip
    assert pod is not None and pod.is_running and pod.usd_h == 0.74 and pod.started_s == 1720811680
    # What v2 knows, and what it may come to know: of two it says that they cost nothing.
    for status in [*ACTIONS, "", "MIGRATING"]:
        pod = read_pod({"id": "abc123", "status": status, "startedAt": None})
        assert pod is not None and pod.started_s is None
        assert pod.is_running == (status not in ("EXITED", "TERMINATED"))
    for cost in (None, "NaN", "inf", -1, 0, "dear", True, [], 1e9):
        odd = read_pod({"id": "abc123", "cost": cost})
        assert odd is not None and odd.usd_h is None
    # An id goes into a host name.
    for pod_id in ("evil.example/", "a.b", "", None, 7, "a" * 65, "abc\n", "../x"):
        assert read_pod({"id": pod_id}) is None
    assert read_pod([]) is None


# -- what is asked for


WISH = Wish(config="coffee", config_in_pod="configs/coffee.yaml", image="someone/duplex",
            env={"OPENAI_API_KEY": "hidden"})  # fmt: skip


def test_a_body_has_the_apis_shapes():
    env = pod_env(WISH, job="0123abcd", usd_h=0.79, spent_usd=1.5)
    body = create_body(WISH, "duplex-coffee-0123abcd-0", "NVIDIA RTX A6000", env)
    assert faults_of_create(body) == []
    assert body["env"]["DUPLEX_SPENT_USD"] == "1.500000"
    assert body["env"]["DUPLEX_DATA_OUTLIVES_POD"] == "0"
    kept = replace(WISH, network_volume="vol1", template="tpl", image=None)
    body = create_body(kept, "n", "g", pod_env(kept, job="0123abcd", usd_h=1, spent_usd=0))
    assert faults_of_create(body) == []
    assert body["mounts"] == {"network": [{"volumeId": "vol1", "path": "/workspace"}]}
    assert body["templateId"] == "tpl" and "image" not in body
    assert body["env"]["DUPLEX_DATA_OUTLIVES_POD"] == "1"


def test_what_holds_secrets_does_not_show_them():
    assert "hidden" not in repr(WISH)


def test_names_tell_configs_apart():
    assert read_name(pod_name("coffee", "0123abcd", 3)) == ("coffee", "0123abcd")
    assert read_name(pod_name("coffee-multi", "0123abcd", 0)) == ("coffee-multi", "0123abcd")
    for name in ("duplex-coffee", "duplex-coffee-0123abcd-", "coffee-0123abcd-0", "",
                 "duplex-coffee-0123abcd-0x", "my duplex-coffee-0123abcd-0"):  # fmt: skip
        assert read_name(name) is None


# -- what next

UP = Rules("answering", budget_usd=5)
RUN = Rules("finished", budget_usd=5)


@pytest.mark.parametrize(
    ("view", "rules", "act", "why"),
    [
        (View("none"), RUN, Act.CREATE, None),
        (View("stopped"), RUN, Act.START, None),
        (View("stopped", start_refused=True), RUN, Act.GIVE_UP, Why.HOST_TAKEN),
        (View("stopped", start_refused=True), replace(RUN, keeps_data=True), Act.REPLACE, None),
        (View("stopped", start_refused=True), replace(RUN, abandon_volume=True), Act.REPLACE, None),
        (View("running"), RUN, Act.WAIT, None),
        (View("running", stuck_s=1800), RUN, Act.GIVE_UP, Why.NEVER_READY),
        (View("running", agent_answers=True), UP, Act.FINISH, None),
        (View("running", agent_answers=True, pipeline="running", stuck_s=9e9), RUN, Act.WAIT, None),
        (View("running", agent_answers=True, pipeline="waiting", stuck_s=1800), RUN, Act.GIVE_UP,
         Why.NEVER_READY),
        (View("running", agent_answers=True, pipeline="done"), RUN, Act.WAIT, None),
        (View("running", agent_answers=True, pipeline="done", stuck_s=1800), RUN, Act.GIVE_UP,
         Why.NEVER_READY),
        (View("running", agent_answers=True, pipeline="done", server_ready=True), RUN, Act.FINISH,
         None),
        (View("running", agent_answers=True, pipeline="failed", failed_looks=FAILED_LOOKS - 1), RUN,
         Act.WAIT, None),
        (View("running", agent_answers=True, pipeline="failed", failed_looks=FAILED_LOOKS), RUN,
         Act.GIVE_UP, Why.PIPELINE_FAILED),
        (View("running", spent_usd=5.0, agent_answers=True, pipeline="running"), RUN, Act.GIVE_UP,
         Why.BUDGET),
        (View("none", spent_usd=4.9, cold_start_usd=0.2), RUN, Act.GIVE_UP, Why.BUDGET),
        (View("none", starts=10), RUN, Act.GIVE_UP, Why.TOO_MANY_STARTS),
        (View("none", wanted_down=True), RUN, Act.GIVE_UP, Why.TAKEN_DOWN),
        (View("unknown"), RUN, Act.WAIT, None),  # nobody knows: creating might make a second one
        (View("unknown", stuck_s=1800), RUN, Act.GIVE_UP, Why.NEVER_READY),
    ],
)  # fmt: skip
def test_next_step(view, rules, act, why):
    step = next_step(view, rules)
    assert (step.act, step.why) == (act, why)


VIEWS = st.builds(
    View,
    pod=st.sampled_from(["none", "running", "stopped", "unknown"]),
    spent_usd=st.floats(0, 10), wanted_down=st.booleans(), start_refused=st.booleans(),
    agent_answers=st.booleans(), server_ready=st.booleans(), failed_looks=st.integers(0, 5),
    pipeline=st.sampled_from(["unknown", "waiting", "running", "failed", "done"]),
    stuck_s=st.floats(0, 4000), starts=st.integers(0, 12), cold_start_usd=st.floats(0, 1),
)  # fmt: skip


@given(VIEWS, st.sampled_from([UP, RUN, replace(RUN, keeps_data=True)]))
def test_whatever_is_seen_money_is_spent_within_the_budget_alone(view, rules):
    step = next_step(view, rules)
    spends = step.act in (Act.CREATE, Act.START, Act.REPLACE)
    if spends:
        assert view.spent_usd + view.cold_start_usd <= rules.budget_usd
        assert view.pod in ("none", "stopped") and not view.wanted_down
    if step.act is Act.REPLACE:  # a volume is given up only when all is kept elsewhere
        assert rules.keeps_data
    if step.act in (Act.WAIT, Act.FINISH):
        assert view.spent_usd < rules.budget_usd
    assert (step.act is Act.GIVE_UP) == (step.why is not None)


def test_every_line_of_the_commands_help_has_an_example():
    from typer.testing import CliRunner

    from duplex.cli import app

    for name in ("up", "run", "status", "logs", "sync", "down"):
        result = CliRunner().invoke(app, ["pod", name, "--help"])
        assert result.exit_code == 0 and f"Example: duplex pod {name} configs/" in result.output


def test_without_a_key_the_command_ends_with_2_and_says_where_one_comes_from(tmp_path, monkeypatch):
    import subprocess
    import sys

    path = write_yaml(tmp_path / "small.yaml", {"name": "small"})
    for key, said in (("", "RUNPOD_API_KEY must hold a key"), ("two words", "plain characters")):
        result = subprocess.run(
            [sys.executable, "-m", "duplex.cli", "pod", "up", str(path), "--image", "x", "--yes"],
            env={"PYTHONPATH": str(ROOT), "RUNPOD_API_KEY": key, "PATH": ""}, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 2 and said in result.stderr and "words" not in result.stderr
    assert [p.name for p in Path(tmp_path).iterdir()] == ["small.yaml"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"has_answered": True}, True),
        ({"has_answered": True}, {"has_answered": True, "agent_answers": True}, False),
        ({"has_answered": True}, {"has_answered": True, "pipeline": "running"}, False),
        ({"has_answered": True}, {"has_answered": True, "pipeline": "done"}, False),
        ({"has_answered": True, "num_done": 2}, {"has_answered": True, "num_done": 3}, True),
        ({"has_answered": True, "num_done": 3}, {"has_answered": True, "num_done": 3}, False),
    ],
)
def test_what_counts_as_a_step_forward(before, after, expected):
    assert is_forward(View("running", **before), View("running", **after)) == expected
