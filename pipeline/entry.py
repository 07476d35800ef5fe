"""`python -m pipeline.<stage> CONFIG`: one stage by itself, in this process.

`duplex run` starts stages this way; a person may too. The earlier stages must be complete.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from pathlib import Path

from duplex.configfile import load_config
from duplex.errors import EXIT_DONE, EXIT_WORK_FAILED, DuplexError
from duplex.lock import RunLock, inherited_lock
from duplex.store import StageFolder
from pipeline.join_training import take_part
from pipeline.needless import keep_out_bitsandbytes
from pipeline.run import (
    STAGE_NAMES,
    check_request,
    context_for,
    has_rejects_to_retry,
    plan,
    run_folder_of,
)
from pipeline.runners import RUNNERS, runner_named
from pipeline.runners.local import describe_os_error, execute


def main(name: str, arguments: list[str] | None = None) -> int:
    """Run the stage `name`; returns the exit code: 0 done, 1 work failed, 2 bad request."""
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}")
    parser.add_argument("config", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="run root")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--retry-rejected", action="store_true")
    parser.add_argument("--runner", choices=RUNNERS, default="local")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    folder: StageFolder | None = None
    try:
        config = load_config(options.config, options.set)
        if name == "train" and config.train.runtime.node_rank:
            take_part(config, options.runs, print)
            return EXIT_DONE
        check_request(config)
        run_folder = run_folder_of(config, options.runs)
        with contextlib.nullcontext() if inherited_lock() else RunLock(run_folder):
            steps = plan(config, options.runs)
            step = steps[STAGE_NAMES.index(name)]
            context = context_for(step, steps, config, options.runs)
            folder = step.folder
            assert folder is not None, "a step whose inputs are complete has a key"
            if step.done and not has_rejects_to_retry(step, options.retry_rejected):
                return EXIT_DONE
            if name == "merge" or (name == "train" and config.train.quantize == "none"):
                keep_out_bitsandbytes()
            runner = runner_named(options.runner)
            execute(
                step.stage, context, folder,
                retry_rejected=options.retry_rejected, runner=runner,
            )  # fmt: skip
    except DuplexError as error:
        return _fail(folder, str(error), error.exit_code)
    except OSError as error:
        return _fail(folder, f"{name}: {describe_os_error(error)}", EXIT_WORK_FAILED)
    except KeyboardInterrupt:
        return _fail(folder, f"{name}: interrupted; finished records are kept.", 130)
    return EXIT_DONE


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _fail(folder: StageFolder | None, message: str, code: int) -> int:
    print(message, file=sys.stderr)
    if folder is not None:
        with contextlib.suppress(OSError):  # a full disk has no room for the note either
            folder.note_failure(message)
    return code
