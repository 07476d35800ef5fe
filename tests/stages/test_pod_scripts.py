"""What runs in a pod beside the pipeline: who answers /ping first, and the log without secrets."""

import http.client
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from duplex.errors import ServerError
from duplex.tokens import SECRET_NAME, SHORTEST_SECRET
from pipeline.serve_command import require_free_port
from pipeline.serving import placeholder
from tests.e2e.conftest import ROOT

PING, LOG = ROOT / "runpod" / "ping.py", ROOT / "runpod" / "pod_log.py"
SECRET = "planted/secret+value=="


@contextmanager
def ping():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-I", str(PING), "--host", "127.0.0.1", "--port", str(port)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while placeholder.is_free("127.0.0.1", port):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process, port
    finally:
        process.kill()
        process.communicate()


def ask(port, path, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)
    finally:
        connection.close()


def check(port):
    return subprocess.run(
        [sys.executable, "-I", str(PING), "--check", "--port", str(port)], capture_output=True
    ).returncode


def test_ping_answers_204_and_all_else_503():
    with ping() as (_, port):
        assert ask(port, "/ping")[:2] == (204, b"")
        assert ask(port, "/ping?from=probe")[0] == ask(port, "/ping", "HEAD")[0] == 204
        for path in ("/", "/ready", "/api/chat?text_prompt=x", "/ping/../x"):
            status, body, headers = ask(port, path)
            assert status == 503 and b'"starting"' in body and headers["Retry-After"]
        assert ask(port, "/", "HEAD")[:2] == (503, b"")
        assert check(port) == 0
    assert check(port) == 1


def test_ping_outlives_clients_that_say_nothing_and_rubbish():
    with ping() as (process, port):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        silent[0].sendall(b"\x16\x03\x01 rubbish\r\n\r\n")
        silent[1].sendall(b"GET /" + b"x" * 100_000)
        time.sleep(0.1)
        for one in silent:
            one.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                assert ask(port, "/ping")[0] == 204
                break
            except (OSError, http.client.HTTPException):
                assert time.monotonic() < deadline, "it does not come back"
                time.sleep(0.1)
        assert process.poll() is None


def test_a_silent_client_is_left_after_some_seconds():
    """Else 32 of them would be all that /ping has places for."""
    with ping() as (_, port), socket.create_connection(("127.0.0.1", port)) as silent:
        silent.settimeout(12)
        assert silent.recv(1) == b""


def test_the_server_takes_the_port_from_it_without_waiting(monkeypatch):
    with ping() as (process, port):
        with pytest.raises(ServerError):
            require_free_port("127.0.0.1", port)
        monkeypatch.setenv(placeholder.VARIABLE, str(process.pid))
        assert placeholder.is_held()
        started = time.monotonic()
        placeholder.dismiss("127.0.0.1", port)
        assert time.monotonic() - started < 1.5
        require_free_port("127.0.0.1", port)
        assert process.wait(5) == 0 and not placeholder.is_held()


@pytest.mark.parametrize("pid", ["", "0", "1", "-1", "x", "999999999"])
def test_nobody_else_is_sent_away(monkeypatch, pid):
    sent = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda *to: sent.append(to) or kill(*to))
    monkeypatch.setenv(placeholder.VARIABLE, pid)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    placeholder.dismiss("127.0.0.1", port)
    assert sent == ([(999999999, signal.SIGTERM)] if pid == "999999999" else [])


# -- the log


def logged(path, text, *options, **variables):
    result = subprocess.run(
        [sys.executable, "-I", str(LOG), str(path), *options], input=text, capture_output=True,
        env={"PATH": os.environ["PATH"], **variables},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_secrets_are_taken_out_of_both(tmp_path):
    path = tmp_path / "logs" / "pod.log"
    text = f"a {SECRET} b\nurl ?token=planted%2Fsecret%2Bvalue%3D%3D\nplain DUPLEX\nab\n".encode()
    printed = logged(path, text, DUPLEX_TOKEN=SECRET, MY_KEY="ab", HOME="plain")
    expected = "a … b\nurl ?token=…\nplain DUPLEX\nab\n".encode()
    assert printed == expected and path.read_bytes() == expected


def test_a_secret_that_comes_in_two_pieces_is_taken_out(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-I", str(LOG), str(tmp_path / "log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"HF_TOKEN": SECRET},
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(f"x {SECRET[:9]}".encode())
    process.stdin.flush()
    time.sleep(0.3)
    printed, _ = process.communicate(f"{SECRET[9:]} y\n".encode())
    assert printed == "x … y\n".encode()


def test_the_file_is_rotated_and_no_line_is_lost(tmp_path):
    lines = [b"line %04d %s\n" % (number, b"x" * 80) for number in range(100)]
    printed = logged(tmp_path / "log", b"".join(lines), "--max-mb", "0.002", "--keep", "3")
    assert printed == b"".join(lines)
    files = [tmp_path / name for name in ("log.3", "log.2", "log.1", "log")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert all(path.stat().st_size <= 2000 for path in files)
    kept = b"".join(path.read_bytes() for path in files)
    assert kept and b"".join(lines).endswith(kept)


def test_progress_bars_are_printed_and_not_kept(tmp_path):
    printed = logged(tmp_path / "log", b"10%\r20%\r30%\rdone\n")
    assert printed == b"10%\r20%\r30%\rdone\n" and (tmp_path / "log").read_bytes() == b"done\n"


def test_a_volume_that_cannot_be_written_costs_the_file_alone(tmp_path):
    printed = logged("/proc/nowhere/pod.log", b"one\ntwo\n")
    lines = printed.splitlines()
    assert [line for line in lines if b"cannot be written" not in line] == [b"one", b"two"]
    assert len(lines) == 3  # said once


def test_it_outlives_the_signals_that_stop_the_others(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-I", str(LOG), str(tmp_path / "log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"up\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"up\n"
    for name in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(name)
    waiter = threading.Timer(0.2, process.stdin.close)
    waiter.start()
    process.stdin.write(b"last words\n")
    process.stdin.flush()
    assert process.stdout.read() == b"last words\n"
    assert process.wait(5) == 0


# -- what is kept running

KEEP = ROOT / "runpod" / "keep.sh"


def kept(tmp_path, *command):
    return subprocess.Popen(
        [str(KEEP), *command], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"DUPLEX_KEEP_PAUSE_S": "0"},
    )  # fmt: skip


def test_a_program_that_ends_is_started_again_until_it_says_2(tmp_path):
    script = "echo x >>runs; case $(wc -l <runs) in 1) exit 1;; 2) exit 0;; *) exit 2;; esac"
    process = kept(tmp_path, "sh", "-c", script)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 2 and (tmp_path / "runs").read_text() == "x\n" * 3
    assert printed.count("again in 0 s") == 2 and "not started again" in printed


def test_a_watchdog_that_has_done_its_work_stays_ended():
    """0 is its end; what dies otherwise is started again."""
    result = subprocess.run(
        [str(KEEP), "--until-done", "sh", "-c", "echo once; exit 0"], text=True,
        capture_output=True, timeout=20, env=os.environ | {"DUPLEX_KEEP_PAUSE_S": "0"},
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.count("once\n") == 1


def test_sigterm_ends_the_program_and_its_keeper(tmp_path):
    process = kept(tmp_path, "sh", "-c", 'trap "echo ended; exit 1" TERM; echo up; sleep 60 & wait')
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.terminate()
    assert process.wait(10) == 0
    assert process.stdout.readline() == "ended\n"


def test_a_secret_is_the_same_to_the_log_as_to_the_programs_beside_it():
    """The log's script runs without this project (`python -I`): it has the pattern again."""
    script = runpy.run_path(str(LOG))
    assert script["SECRET_NAME"].pattern == SECRET_NAME.pattern
    assert script["SECRET_NAME"].flags == SECRET_NAME.flags
    assert script["SHORTEST"] == SHORTEST_SECRET
