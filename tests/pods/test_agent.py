"""The agent as its own process in a finished run's folder, and what of it reaches home."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from aiohttp.test_utils import TestClient, TestServer

from duplex.configfile import load_config
from duplex.lock import RunLock
from pipeline import pod_command
from pipeline.pods import client as client_module
from pipeline.pods.agent import Agent, is_offered, list_offers, pipeline_state
from pipeline.pods.client import PodClient
from pipeline.pods.inside import Inside
from pipeline.pods.usage import Usage, usage_path, write_usage
from pipeline.run import plan
from tests.factories import write_yaml
from tests.pods.conftest import ROOT
from tests.pods.finished import FILES, finish

TOKEN = "a-token-of-many-letters-0123456789"
LLM_KEY = "hidden-away-from-all-eyes"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def agent_process(
    config: Path, runs: Path, token: str = TOKEN, port: int | None = None, **variables: str
):
    """`python -m pipeline.pods.agent`; gives its URL."""
    at = free_port()
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "DUPLEX_CONFIG": str(config),
        "DUPLEX_RUNS": str(runs), "DUPLEX_AGENT_PORT": str(at), "DUPLEX_TOKEN": token,
        "DUPLEX_PORT": str(port or free_port()), "OPENAI_API_KEY": LLM_KEY,
        "DUPLEX_JOB": "0123abcd", **variables,
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "pipeline.pods.agent"], env=environment)
    url = f"http://127.0.0.1:{at}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(f"{url}/ping", timeout=5)
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        assert process.wait(10) == 0


@contextmanager
def answering(status: int, **by_path: int):
    """A model server that answers everything with one status, but for some paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(by_path.get(self.path.strip("/"), status))
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config and the run root of a pod that has finished it. Read only."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_yaml(folder / "small.yaml", {"name": "small"})
    finish(load_config(config), folder / "volume")
    return config, folder / "volume"


@pytest.fixture(scope="module")
def agent(finished):
    """The agent of that run."""
    config, runs = finished
    log = [f"line {n}" for n in range(1000)] + [f"token {TOKEN} and {LLM_KEY}", "the end"]
    (runs / "pod.log").write_text("\n".join(log) + "\n")
    with answering(503) as port, agent_process(config, runs, port=port) as url:
        yield url


@pytest.fixture
def volume(desk, finished):
    """A copy of that run root which a test may change."""
    shutil.copytree(finished[1], desk.folder / "volume")
    return desk.folder / "volume"


def test_a_run_is_followed_to_its_end_and_its_results_come_home(desk, volume, capsys):
    """`duplex pod run` against the fake API, with the real agent behind its proxy."""
    token = desk.session().book.make_token()
    desk.fake.work_s = 0
    with agent_process(desk.config, volume, token) as url:
        desk.fake.forward = {8999: url}
        desk.run()
        said = capsys.readouterr().out
        home = desk.runs / "small"
        config = load_config(desk.config)
        for step in plan(config, volume):
            stage = step.stage.name
            folder = home / step.folder.path.name
            for name, content in FILES.get(stage, {}).items():
                stays = name.endswith(("model.safetensors", ".wav")) and stage != "train"
                assert (folder / name).exists() != stays
                assert stays or (folder / name).read_bytes() == content
        # With the manifests here, `duplex status` knows the run.
        assert [step.done for step in plan(config, desk.runs)] == [True] * 9
        assert "the model server is ready" in said and "files fetched" in said
        session = desk.session()
        pod_command.sync(session)
        session.close()
        again = capsys.readouterr().out
        assert "0 files fetched (0.0 MB)" in again
        desk.status()
        shown = capsys.readouterr().out
        assert shown.count(" done") >= 9 and "model server: ready" in shown
        assert "the pod's config is not" not in shown
    assert token not in said


def test_nothing_but_ping_is_told_without_the_token(agent, finished):
    url = agent
    assert httpx.get(f"{url}/ping").status_code == 204
    for path in ("/status", "/logs", "/files", "/files/x"):
        for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN},
                        {"Authorization": "Bearer \u00e9".encode()}):  # fmt: skip
            assert httpx.get(url + path, headers=headers).status_code == 401
    headers = {"Authorization": f"Bearer {TOKEN}"}
    for name in ("../../small.yaml", "%2e%2e/%2e%2e/small.yaml", "07-merge-00000000/../x",
                 "/etc/passwd", "small.yaml"):  # fmt: skip
        assert httpx.get(f"{url}/files/{name}", headers=headers).status_code == 404
    merge = next(p.name for p in (finished[1] / "small").iterdir() if "merge" in p.name)
    name = f"{url}/files/{merge}/checkpoint/model.safetensors"
    assert httpx.get(name, headers=headers).status_code == 404  # not on the list


def test_logs_are_the_end_without_secrets(agent):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    text = httpx.get(f"{agent}/logs?tail=3", headers=headers).text
    assert text == "line 999\ntoken *** and ***\nthe end"
    assert httpx.get(f"{agent}/logs?tail=x", headers=headers).status_code == 400
    assert httpx.get(f"{agent}/logs?tail=0", headers=headers).text == ""


def client_of(url: str) -> PodClient:
    return PodClient("pod0001x", TOKEN, template=url + "?{pod}{port}", agent=url)


def test_status_follows_the_lock(desk, volume):
    write_usage(usage_path(volume, "0123abcd"), Usage(spent_usd=1.25))
    with agent_process(desk.config, volume) as url:
        client = client_of(url)
        status = client.status()
        assert status.pipeline == "done" and status.spent_usd == 1.25
        assert [state for _, state, _ in status.stages] == ["done"] * 9
        with RunLock(volume / "small"):
            assert client.status().pipeline == "running"
        client.close()


def test_settings_and_stages_of_the_pod_are_those_of_its_run(desk):
    """`DUPLEX_SET` moves the run's folder, and a pod that is to train only is done then."""
    runs = desk.folder / "half"
    finish(load_config(desk.config, ["name=other"]), runs, until=6)
    settings = "name=other\n\nserve.runtime.token=never-on-a-command-line\n"
    with agent_process(desk.config, runs, DUPLEX_SET=settings, DUPLEX_TO="train") as url:
        client = client_of(url)
        status = client.status()
        assert [state for _, state, _ in status.stages] == ["done"] * 6 + ["missing"] * 3
        assert status.pipeline == "done" and status.message == ""
        assert any("train" in offer.name for offer in client.files()[0])
        with RunLock(runs / "other"):
            assert client.status().pipeline == "running"
        client.close()
    with agent_process(desk.config, runs, DUPLEX_SET="name=other") as url:
        client = client_of(url)
        assert client.status().pipeline == "waiting"  # all nine are wanted
        client.close()


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, "abcd"), ({"FROM": "b"}, "bcd"), ({"TO": "b"}, "ab"), ({"ONLY": "c"}, "c"),
        ({"SKIP": "a, c"}, "bd"), ({"FROM": "b", "TO": "c", "SKIP": "c"}, "b"),
        ({"TO": "nothing-known"}, "abcd"),
    ],
)  # fmt: skip
def test_the_stages_that_a_pod_is_to_do(asked, expected):
    inside = Inside.of({f"DUPLEX_{name}": value for name, value in asked.items()})
    assert "".join(inside.selection.of(list("abcd"))) == expected


def test_why_it_gave_up_is_said_until_the_next_start(desk, volume):
    failed = desk.folder / "failed"
    with agent_process(desk.config, volume, DUPLEX_FAILED_FILE=str(failed)) as url:
        client = client_of(url)
        assert client.status().pipeline == "done"
        failed.write_text(f"the server cannot start with {TOKEN}\n")
        status = client.status()
        assert status.pipeline == "failed"
        assert status.message == "the server cannot start with ***"
        failed.unlink()
        assert client.status().pipeline == "done"
        client.close()


def test_whatever_is_named_like_a_secret_is_taken_out():
    inside = Inside.of({"MY_VENDOR_PASSWORD": "open-sesame", "A_KEY": "short", "PLACE": "harbour"})
    assert inside.clean("open-sesame, short harbour") == "***, short harbour"


def test_a_broken_config_breaks_an_answer_and_not_the_agent(tmp_path):
    config = write_yaml(tmp_path / "broken.yaml", {"name": "small", "no-such-section": 1})
    with agent_process(config, tmp_path / "runs") as url:
        client = client_of(url)
        status = client.status()
        assert status.pipeline == "waiting" and "unknown key" in status.message
        assert client.files() == ([], 0)
        client.close()


@pytest.mark.parametrize(("answer", "ping"), [(200, 200), (503, 204)])
def test_ping_is_what_the_model_server_says(finished, answer, ping):
    """204 while it starts, 200 when it is ready: as RunPod's balancer asks."""

    async def asked(port):
        inside = Inside.of({"DUPLEX_PORT": str(port), "DUPLEX_TOKEN": TOKEN})
        async with TestClient(TestServer(Agent(inside).app())) as client:
            return (await client.get("/ping")).status

    with answering(answer) as port:
        assert asyncio.run(asked(port)) == ping


@pytest.mark.parametrize(
    ("ping", "ready", "expected"), [(200, 200, True), (200, 503, False), (204, 200, False)]
)
def test_ready_takes_both_of_the_servers_answers(ping, ready, expected):
    with answering(404, ping=ping, ready=ready) as port:
        client = PodClient("x", TOKEN, template=f"http://127.0.0.1:{port}/?{{pod}}{{port}}")
        client.server = f"http://127.0.0.1:{port}"
        assert client.server_is_ready() == expected
        client.close()


def test_a_large_file_comes_in_pieces_with_ranges(agent, monkeypatch):
    monkeypatch.setattr(client_module, "PIECE_BYTES", 50_000)
    client = client_of(agent)
    offers, refused = client.files()
    (offer,) = [o for o in offers if o.name.endswith("adapter_model.safetensors")]
    pieces = [client.piece(offer, at) for at in range(0, offer.num_bytes, 50_000)]
    client.close()
    assert len(pieces) == 4 and refused == 0
    assert b"".join(pieces) == FILES["train"]["adapter/adapter_model.safetensors"]


def test_links_are_not_followed_out_of_the_run(desk, volume):
    run_folder = volume / "small"
    train = next(p for p in run_folder.iterdir() if "train" in p.name)
    (train / "timing.jsonl").symlink_to("/etc/hostname")
    (run_folder / "06-train-0badcafe").symlink_to(train)
    (run_folder / "07-merge-0badcafe").mkdir()
    (run_folder / "07-merge-0badcafe" / "manifest.json").write_text("{}")
    (run_folder / "07-merge-0badcafe" / "checkpoint").symlink_to("/etc")
    (train / "blobs").mkdir()
    (train / "blobs" / "manifest.json").write_text("{}")
    names = list_offers(run_folder)
    assert all(is_offered(run_folder, name) for name in names)
    assert not is_offered(run_folder, f"{train.name}/timing.jsonl")
    assert not is_offered(run_folder, f"{train.name}/blobs/manifest.json")
    assert not is_offered(run_folder, "06-train-0badcafe/metrics.jsonl")
    assert not is_offered(run_folder, "07-merge-0badcafe/checkpoint/certificate.json")
    assert f"{train.name}/metrics.jsonl" in names and f"{train.name}/timing.jsonl" not in names
    assert not any("train-0badcafe" in name for name in names)


def test_an_unfinished_stage_is_not_offered(desk):
    runs = desk.folder / "half"
    run_folder = finish(load_config(desk.config), runs, until=3)
    (run_folder / "06-train-1a2b3c4d").mkdir()
    (run_folder / "06-train-1a2b3c4d" / "metrics.jsonl").write_text("{}")
    assert {name[:2] for name in list_offers(run_folder)} == {"01", "02", "03"}


@pytest.mark.parametrize(
    ("states", "running", "expected"),
    [
        (["done", "done"], False, "done"),
        (["done", "missing"], False, "waiting"),
        (["done", "missing"], True, "running"),
        (["done", "failed", "missing"], False, "failed"),
        (["done", "failed", "missing"], True, "running"),
        ([], False, "waiting"),
    ],
)
def test_pipeline_state(states, running, expected):
    assert pipeline_state([{"state": state} for state in states], running) == expected


def test_an_agent_without_a_proper_token_does_not_start(tmp_path):
    for token in ("", "short"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DUPLEX_TOKEN": token}
        result = subprocess.run(
            [sys.executable, "-m", "pipeline.pods.agent"], env=environment, text=True,
            capture_output=True, timeout=60,
        )  # fmt: skip
        assert result.returncode == 2 and "at least 16 characters" in result.stderr
