"""The server as a child process that never outlives its parent.

The child reads its standard input, which is a pipe from here, and stops at its end: the
kernel closes that pipe however this process dies, so a `kill -9` leaves no orphan either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from duplex.datafiles import CHECKOUT
from duplex.errors import ServerError

LOG_TAIL_LINES = 30
STOP_TIMEOUT_S = 15
POLL_S = 0.05


@contextmanager
def running_server(
    checkpoint: Path,
    *,
    device: str = "auto",
    timeout_s: float = 600,
    port: int = 0,
    voices: dict[str, Path] | None = None,
    bare: bool = False,
    slots: int = 1,
) -> Iterator[str]:
    """Serve `checkpoint` on loopback; gives the server's base URL once it is ready.

    Args:
        port: 0 takes any free one.
        voices: recordings by the names that a query may give them.
        bare: the model was trained without prompts.
        slots: conversations at a time.

    Raises:
        ServerError: it ended, or was not ready within `timeout_s`; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="duplex-serve-") as name:
        ready_file, log = Path(name) / "ready.json", Path(name) / "server.log"
        command = [
            *(sys.executable, "-m", "pipeline.serving.app", str(checkpoint.resolve())),
            *("--port", str(port), "--device", device, "--slots", str(slots)),
            *("--ready-file", str(ready_file), "--die-with-stdin"),
        ]
        command += ["--bare"] if bare else []
        if voices:
            command += ["--voice-files", json.dumps({n: str(p) for n, p in voices.items()})]
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        try:
            yield _wait_until_ready(process, ready_file, log, timeout_s)
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # A server of our own on loopback needs no token, and its callers know none.
    environment.pop("DUPLEX_TOKEN", None)
    paths = [str(CHECKOUT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _wait_until_ready(
    process: subprocess.Popen[bytes], ready_file: Path, log: Path, timeout_s: float
) -> str:
    deadline_s = time.monotonic() + timeout_s
    while not ready_file.exists():
        code = process.poll()
        if code is not None:
            raise ServerError(f"the server must stay up, it ended with {code}.{_tail(log)}")
        if time.monotonic() > deadline_s:
            raise ServerError(
                f"the server must be ready within {timeout_s:g} s, it is not; "
                f"raise start_timeout_s if the model is large.{_tail(log)}"
            )
        time.sleep(POLL_S)
    return json.loads(ready_file.read_text())["url"]


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return (
        " Its log:\n" + "\n".join(f"  {line}" for line in lines) if lines else " It said nothing."
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask by the pipe, then by signals; a stopped process is always reaped."""
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    for insist in (lambda: None, process.terminate, process.kill):
        insist()
        try:
            process.wait(STOP_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            continue
