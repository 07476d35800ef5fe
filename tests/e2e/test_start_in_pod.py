"""runpod/start.sh in a pod where something fails: the agent says so, the pod stays up for its
watchdog, and SIGTERM ends all of it.
"""
# ruff: noqa: F811 - fixtures of the script's other tests

import contextlib
import json
import time
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, make_workplace
from tests.e2e.image import libraries
from tests.e2e.test_start_script import (  # noqa: F401
    Pod,
    bare_root,
    command_lines,
    ended,
    free_port,
    fresh,
    start_here,
)

API_KEY = "rpa_plantedkeyofrunpod88"


def with_key(runs):
    """Command lines of this run root's processes that know the key of RunPod's API."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes()
            if str(runs).encode() in variables and API_KEY.encode() in variables:
                yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended


def started_by(pod):
    """Ids and command lines of this pod's processes, as others are at work on this machine too."""
    runs = f"DUPLEX_RUNS={pod.environment['DUPLEX_RUNS']}\0".encode()
    for pid, line in command_lines():
        with contextlib.suppress(OSError):
            if runs in Path(f"/proc/{pid}/environ").read_bytes():
                yield pid, line


def in_a_pod(fresh, tmp_path, app=ROOT, **variables):
    """With limits, and an API that nobody answers for."""
    return Pod(
        fresh, tmp_path / "out", app, RUNPOD_POD_ID="pod1", RUNPOD_API_KEY=API_KEY,
        DUPLEX_RUNPOD_URL=f"http://127.0.0.1:{free_port()}", DUPLEX_BUDGET_USD="5",
        DUPLEX_PRICE_USD_H="1", DUPLEX_IDLE_MINUTES="30", **variables,
    )  # fmt: skip


def told_by_the_agent(pod, within_s, look=lambda: None):
    """What the agent says of the pipeline, once that is `failed`."""
    url = f"http://127.0.0.1:{pod.environment['DUPLEX_AGENT_PORT']}/status"
    deadline, status = time.monotonic() + within_s, {}
    while status.get("pipeline") != "failed":
        assert pod.process.poll() is None, f"start.sh ended:\n{pod.output()}"
        assert time.monotonic() < deadline, f"found {status}:\n{pod.output()}"
        look()
        token = pod.environment["DUPLEX_TOKEN"]
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
            status = json.load(answer)
        time.sleep(0.1)
    return status


@pytest.mark.slow
def test_in_a_pod_a_failed_pipeline_is_said_and_waited_out(fresh, tmp_path):
    """`duplex run --only train` without tensors; the doctor finds nothing."""
    pod = in_a_pod(fresh, tmp_path, DUPLEX_ONLY="train")
    seen = set()
    with ended(pod.start()):
        status = told_by_the_agent(pod, 90, look=lambda: seen.update(with_key(fresh.runs)))
        assert "duplex run ended with exit code" in status["message"], status
        assert pod.get("/ping") == 204
        lines = [line for _, line in started_by(pod)]
        for program in ("agent", "watchdog"):
            assert any(f"pipeline.pods.{program}" in line for line in lines)
        assert told_by_the_agent(pod, 30)["message"] == status["message"]
        code, seconds = pod.stop()
        assert code == 0 and seconds < 10, pod.output()
    assert any("pipeline.pods.watchdog" in line for line in seen)
    # `env -u` itself has the key for the moment before it becomes the program.
    ran = [line for line in seen if not line.startswith("env -u RUNPOD_API_KEY ")]
    assert not [line for line in ran if "duplex.cli" in line]
    assert API_KEY not in pod.output()
    assert list(with_key(fresh.runs)) == []  # all has ended


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DUPLEX_RUNS": "/proc/nowhere/runs"}, "/proc/nowhere/runs must be writable"),
        ({"DUPLEX_SET": "serve.runtime.token=abcdef-ghijkl"}, "no secrets"),
    ],
)
def test_in_a_pod_what_fails_first_has_agent_and_watchdog(fresh, tmp_path, variables, said):
    pod = in_a_pod(fresh, tmp_path, **variables)
    with ended(pod.start()):
        status = told_by_the_agent(pod, 60)
        assert said in status["message"] and "abcdef-ghijkl" not in json.dumps(status)
        deadline = time.monotonic() + 20
        while "watchdog: at most 5 USD" not in pod.output():
            assert time.monotonic() < deadline, pod.output()
            time.sleep(0.1)
        code, seconds = pod.stop()
        assert code == 0 and seconds < 10, pod.output()


def test_in_a_pod_a_missing_token_has_a_watchdog(fresh, tmp_path):
    """Without a token no agent: nobody could be told. Its idle minutes end it all the same."""
    pod = in_a_pod(fresh, tmp_path, DUPLEX_TOKEN="", DUPLEX_HOST="0.0.0.0")
    with ended(pod.start()):
        deadline = time.monotonic() + 30
        while not all(words in pod.output() for words in ("DUPLEX_TOKEN must be set to serve",
                                                          "watchdog: at most 5 USD")):  # fmt: skip
            assert time.monotonic() < deadline, pod.output()
            time.sleep(0.1)
        assert pod.process.poll() is None
        assert pod.stop()[0] == 0


@pytest.mark.slow
def test_root_starts_agent_and_watchdog_as_the_user_it_becomes(bare_root, tmp_path):
    root, app, user = bare_root
    workplace = start_here(make_workplace(root / "workspace"))
    pod = in_a_pod(
        workplace, tmp_path, app, DUPLEX_USER=user.name, DUPLEX_RUNS=str(workplace.runs),
        DUPLEX_PYTHON=str(app / ".venv/bin/python"), HF_HOME=str(root / "workspace/huggingface"),
        DUPLEX_SET="serve.runtime.token=abcdef-ghijkl", **libraries(root),
    )  # fmt: skip
    pod.environment = {k: v for k, v in pod.environment.items() if not k.startswith("PYTEST_")}
    with ended(pod.start()):
        assert "no secrets" in told_by_the_agent(pod, 60)["message"]
        ours = [pid for pid, _ in started_by(pod)]
        owners = {Path(f"/proc/{pid}").stat().st_uid for pid in ours}
        assert len(ours) >= 5 and owners == {user.uid}
        code, seconds = pod.stop()
        assert code == 0 and seconds < 10, pod.output()
        assert [pid for pid in ours if Path(f"/proc/{pid}").exists()] == []
