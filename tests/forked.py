"""`duplex …` in a fork of the test's process: what a shell would start, without a second's import.

The child has a working directory, an environment, an output and an exit code of its own, and runs
the console script's `main`; stages that it starts are processes as ever. How a command starts from
nothing is what tests/e2e/conftest.py's finished run, test_start_script.py and test_layers.py show.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn


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
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001 - the child ends here
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
