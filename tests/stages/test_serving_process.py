"""The server as a process: who may talk to it, how it starts, and that it always ends."""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext

import aiohttp
import pytest
from yarl import URL

from duplex.config import Config
from duplex.datafiles import CHECKOUT, load_personas
from duplex.errors import ServerError
from duplex.records import Proof, record_line
from duplex.sinks import FileWriter
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.serve import ServeStage
from pipeline.serving import wire
from pipeline.serving.app import _Redacting
from pipeline.serving.launch import running_server
from pipeline.serving.probe import ProbeResult, probe, probe_sync
from pipeline.serving.wire import Kind
from tests.stages.serving_helpers import PROMPT, in_loop

SECRET = "s&cret-☕-42-and-longer"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
SERVER = (sys.executable, "-m", "pipeline.serving.app")


def command(checkpoint, *options):
    return [
        sys.executable,
        "-m",
        "pipeline.serving.app",
        str(checkpoint),
        "--device",
        "cpu",
        *options,
    ]


@contextmanager
def process(checkpoint, tmp_path, *options, **environment):
    """A server process, its URL (once it is up) and its log; killed at the end if it lives."""
    ready_file, log = tmp_path / "ready.json", tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command(checkpoint, "--port", "0", "--ready-file", str(ready_file), *options),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | environment,
        )
    try:
        yield server, _wait_for_url(server, ready_file, log), log
    finally:
        server.kill()
        server.wait()


def _wait_for_url(server, ready_file, log):
    deadline = time.monotonic() + 60
    while not ready_file.exists():
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return json.loads(ready_file.read_text())["url"]


def close_input(server):
    assert server.stdin is not None
    server.stdin.close()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_only_its_own_page_may_talk_to_a_server_without_token(tiny_speaker):
    async def talk(url):
        statuses = []
        async with aiohttp.ClientSession() as session:
            for origin in ("https://evil.example", url):
                async with session.get(f"{url}/api/info", headers={"Origin": origin}) as response:
                    statuses.append(response.status)
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await session.ws_connect(wire.chat_url(url), origin="https://evil.example")
        return statuses

    assert in_loop(tiny_speaker, talk) == [403, 200]


def test_a_token_is_asked_for_everywhere_but_by_health_checks(tiny_speaker):
    async def talk(url):
        found = {}
        jar = aiohttp.DummyCookieJar()  # so that no request profits from another's cookie
        async with aiohttp.ClientSession(cookie_jar=jar) as session:
            for path in (
                "/api/info",
                "/metrics",
                "/api/tokenizer",
                "/api/chat",
                "/health",
                "/ping",
            ):
                for query in ("", "?token=wrong", "?token=s%26cret"):
                    async with session.get(URL(url + path + query, encoded=True)) as response:
                        found[path + query] = response.status
            bearer = {"Authorization": "Bearer s&cret"}
            async with session.get(f"{url}/api/info", headers=bearer) as response:
                found["bearer"] = response.status
        assert (await probe(url, prompt=PROMPT, token="s&cret")).proven
        assert (await probe(f"{url}/?text_prompt=Hi&token=s%26cret")).proven
        with pytest.raises(ServerError, match="token"):
            await probe(url, prompt=PROMPT, token="wrong")
        return found

    found = in_loop(tiny_speaker, talk, token="s&cret")
    assert found.pop("bearer") == 200
    assert found.pop("/api/chat?token=s%26cret") == 400  # let in, but not a WebSocket
    for target, status in found.items():
        is_open = target.startswith(("/health", "/ping")) or target.endswith("s%26cret")
        assert status == (200 if is_open else 401), target


def test_a_token_off_loopback_is_required_checked_and_never_logged(tiny_checkpoint, tmp_path):
    refused = subprocess.run(
        command(tiny_checkpoint, "--host", "0.0.0.0"), capture_output=True, text=True,
        env={k: v for k, v in ENVIRONMENT.items() if k != "DUPLEX_TOKEN"}, timeout=30,
    )  # fmt: skip
    assert refused.returncode == 2 and "DUPLEX_TOKEN" in refused.stderr

    with process(tiny_checkpoint, tmp_path, "--host", "0.0.0.0", DUPLEX_TOKEN=SECRET) as (
        server,
        url,
        log,
    ):
        page = URL(wire.page_url(url, PROMPT) + "&token=" + wire.quote(SECRET), encoded=True)

        async def talk():
            assert (await probe(url, prompt=PROMPT, token=SECRET)).proven
            assert (await probe(str(page))).proven
            with pytest.raises(ServerError, match="401"):
                await probe(url, prompt=PROMPT)
            async with aiohttp.ClientSession() as session:
                async with session.get(page, allow_redirects=False) as response:
                    assert response.status == 303  # to the page, with a cookie for the token
                    assert "token" not in response.headers["Location"]
                async with session.get(page.with_path("/api/chat", keep_query=True)) as response:
                    assert response.status == 400
            # Broken requests that carry it: a line that is too long, and one that is none.
            target = f"/?token={wire.quote(SECRET)}"
            for line in (f"GET {target}&x={'x' * 40_000} HTTP/1.1", f"GET {target} \x01 \x02"):
                reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
                writer.write(f"{line}\r\nHost: h\r\n\r\n".encode())
                assert b" 400 " in await reader.readline()
                writer.close()

        asyncio.run(talk())
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
        text = log.read_text()
        assert "serving" in text
        assert SECRET not in text and wire.quote(SECRET) not in text and "cret-" not in text


def test_what_is_logged_has_the_token_blanked():
    text = f"GET /?token={wire.quote(SECRET)} by {SECRET}"
    record = logging.LogRecord("n", logging.INFO, "", 0, text, None, None)
    assert _Redacting(SECRET).format(record).endswith("GET /?token=… by …")


def test_a_taken_port_is_said_with_its_number_and_exits_1(tiny_checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ended = subprocess.run(
            command(tiny_checkpoint, "--port", str(port)), capture_output=True, text=True,
            env=ENVIRONMENT, timeout=30,
        )  # fmt: skip
    assert ended.returncode == 1
    assert str(port) in ended.stderr and "--port" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow  # while it loads: below
def test_it_ends_with_its_standard_input(tiny_checkpoint, tmp_path):
    with process(tiny_checkpoint, tmp_path, "--die-with-stdin") as (server, url, _):
        assert probe_sync(url, prompt="Hello.").proven
        close_input(server)
        assert server.wait(10) == 0


def test_it_ends_with_its_standard_input_while_it_loads(tiny_checkpoint):
    code = (
        "import sys, time\nfrom pipeline.serving import app\n"
        "app._load = lambda *_: print('loading', flush=True) or time.sleep(60)\n"
        f"sys.exit(app.main([{str(tiny_checkpoint)!r}, '--port', '0', '--die-with-stdin']))"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    try:
        assert server.stdout is not None and b"loading" in server.stdout.readline()
        close_input(server)
        assert server.wait(5) == 0
    finally:
        server.kill()
        server.wait()


def test_a_signal_ends_a_conversation_in_progress_and_exits_0(tiny_checkpoint, tmp_path):
    with process(tiny_checkpoint, tmp_path) as (server, url, log):

        async def talk():
            target = URL(wire.chat_url(url, format="pcm"), encoded=True)
            async with aiohttp.ClientSession() as session, session.ws_connect(target) as ws:
                assert (await ws.receive(10)).data[0] == Kind.READY
                server.send_signal(signal.SIGINT)
                while (await ws.receive(10)).type == aiohttp.WSMsgType.BINARY:
                    pass
                return ws.close_code

        assert asyncio.run(talk()) == 1001
        assert server.wait(10) == 0
        assert "Traceback" not in log.read_text()


def test_the_server_of_a_killed_process_ends_too(tiny_checkpoint):
    code = (
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from pipeline.serving import launch\n"
        "started = []\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *a, **k): super().__init__(*a, **k); started.append(self.pid)\n"
        "launch.subprocess.Popen = Popen\n"
        f"with launch.running_server(Path({str(tiny_checkpoint)!r}), device='cpu') as url:\n"
        "    print(started[0], flush=True); time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_a_server_that_cannot_start_tells_why(tmp_path):
    with (
        pytest.raises(ServerError, match=r"ended with 2[\s\S]*config\.json"),
        running_server(tmp_path, device="cpu", timeout_s=60),
    ):
        pass


def test_a_server_that_is_not_ready_in_time_is_stopped(tiny_checkpoint):
    started = time.monotonic()
    with (
        pytest.raises(ServerError, match=r"within 0\.2 s"),
        running_server(tiny_checkpoint, device="cpu", timeout_s=0.2),
    ):
        pass
    assert time.monotonic() - started < 10


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom pipeline.serving import app\n"
        "try: app.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True)
    assert ended.returncode == 0 and b"--die-with-stdin" in ended.stdout


# -- the stage


def stage_context(tmp_path, checkpoint):
    personas = load_personas(CHECKOUT / "data" / "personas")[:2]
    folder = StageFolder(tmp_path / "01-personas-00000000", "personas", "")
    folder.complete([record_line(p) for p in personas], files=[], counts={}, provenance={})
    merge = StageFolder(tmp_path / "07-merge-00000000", "merge", "")
    writer = FileWriter(merge)
    shutil.copytree(checkpoint, merge.path / "checkpoint")
    shutil.copy(checkpoint / "model.safetensors", writer.work / "w")
    weights = writer.add("weights", writer.work / "w", "checkpoint/model.safetensors")
    merge.complete([record_line(weights)], files=writer.files, counts={}, provenance={})
    tensors = StageFolder(tmp_path / "05-tensors-00000000", "tensors", "")
    tensors.complete([], files=[], counts={}, provenance={})
    inputs = {"personas": folder, "tensors": tensors, "merge": merge}
    config = Config.model_validate({"name": "t", "serve": {"runtime": {"device": "cpu"}}})
    return StageContext(config, tmp_path, inputs, report=lambda _: None), personas


def test_the_stage_proves_one_prompt_of_each_persona_and_leaves_no_server(
    tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("DUPLEX_TOKEN", "of a server of the user's own")
    context, personas = stage_context(tmp_path, tiny_checkpoint)
    urls = []
    monkeypatch.setattr(
        "pipeline.serving.probe.probe_sync",
        lambda url, **options: urls.append(url) or probe_sync(url, **options),
    )
    writer = FileWriter(StageFolder(tmp_path / "08-serve-00000000", "serve", ""))
    proofs = [p for p in ServeStage().run(context, writer) if isinstance(p, Proof)]
    assert [proof.id for proof in proofs] == [persona.id for persona in personas]
    for proof, persona in zip(proofs, personas, strict=True):
        assert proof.proven and proof.prompt == persona.prompts[0].strip()
        assert proof.served_digest == proof.expected_digest and proof.num_tokens > 0
    with pytest.raises(ServerError, match="must answer"):
        probe_sync(urls[0])


def test_a_prompt_that_is_not_proven_fails_the_stage(tiny_checkpoint, tmp_path, monkeypatch):
    context, personas = stage_context(tmp_path, tiny_checkpoint)
    unproven = ProbeResult("u", "s", "p", False, "no 04 message", "0" * 64, "0" * 64)
    monkeypatch.setattr("pipeline.serving.probe.probe_sync", lambda *_, **__: unproven)
    monkeypatch.setattr(
        "pipeline.serving.launch.running_server", lambda *_, **__: nullcontext("http://h:1")
    )
    writer = FileWriter(StageFolder(tmp_path / "08-serve-00000000", "serve", ""))
    with pytest.raises(ServerError, match=f"{personas[0].id}.*no 04 message"):
        ServeStage().run(context, writer)
