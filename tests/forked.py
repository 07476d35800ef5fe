"""`duplex …` in a fork of the test's process: what a shell would start, without a second's import.

The child has a working directory, an environment, an output and an exit code of its own, and runs
the console script's `main`. Stages that it starts are forks of it in their turn, with `python -m`'s
arguments and environment: each would import torch for seconds. How a command and its stages start
from nothing is what tests/e2e/conftest.py's finished run, test_start_script.py and test_kills.py
show.
"""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.run import STAGE_NAMES

STAGES = {f"pipeline.{name}" for name in STAGE_NAMES}


def duplex(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. environment: the whole of it."""
    import duplex.cli  # before the fork: each child would import it anew

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _become(duplex.cli.main, arguments, cwd, environment, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    code = os.waitstatus_to_exitcode(status)
    return subprocess.CompletedProcess(["duplex", *arguments], code, *texts)


def _become(main, arguments, cwd, environment, out, err) -> NoReturn:
    code = 70
    try:
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, mode, closefd=False), "utf-8", line_buffering=True)
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["duplex", *arguments]
        subprocess.Popen = _start  # pyright: ignore[reportAttributeAccessIssue]
        code = _exit_code(main)
    finally:
        os._exit(code)


def _exit_code(main: Callable[[], object]) -> int:
    """Of a process that did nothing but this."""
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - the child ends here
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


_Popen = subprocess.Popen


def _start(command: Any, *arguments: Any, **options: Any) -> Any:
    """A stage's process as a fork, any other as it is."""
    is_stage = list(command[:2]) == [sys.executable, "-m"] and command[2] in STAGES
    if not is_stage or arguments or options.keys() - {"env", "pass_fds", "preexec_fn"}:
        return _Popen(command, *arguments, **options)
    return _Stage(command, **options)


class _Stage:
    """What `pipeline.run` asks of a `Popen`."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),  # a fork has them all
        preexec_fn: Callable[[], None] = lambda: None,
    ):
        _, _, module, *arguments = command
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            preexec_fn()
            os.environ.clear()
            os.environ.update(env)
            sys.argv = [module, *arguments]
            code = _exit_code(lambda: runpy.run_module(module, run_name="__main__"))
        finally:
            os._exit(code)

    def wait(self, timeout: float | None = None) -> int:
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, 0 if deadline_s is None else os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired("a stage", timeout or 0.0)
            time.sleep(0.02)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
