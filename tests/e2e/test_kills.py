"""SIGKILL at random moments: the next run goes on and ends with an undisturbed run's digests."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from pipeline.run import STAGE_NAMES
from tests.e2e.conftest import environment, make_workplace

DETERMINISTIC = STAGE_NAMES[: STAGE_NAMES.index("merge") + 1]


def start(workplace):
    return subprocess.Popen(
        [sys.executable, "-m", "duplex.cli", "run", "small.yaml", "--workers", "2"],
        cwd=workplace.folder, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, bufsize=1, start_new_session=True,
    )  # fmt: skip


def kill_during(workplace, stage, after_s):
    """Start a run, wait for `stage` to begin, kill it `after_s` later with all it started.

    Returns whether the kill fell into that stage: the run's last word is still its beginning.
    """
    process = start(workplace)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if re.match(rf"\d {stage}: running", line):
            break
    else:
        pytest.fail(f"{stage} never began:\n{seen}")
    time.sleep(after_s)
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read()  # ends when the stage, which holds the pipe too, is gone
    process.wait()
    process.stdout.close()
    return f"{stage}: done" not in rest


def wait_until_unlocked(workplace):
    from duplex.lock import is_locked

    deadline = time.monotonic() + 20
    while is_locked(workplace.run_folder):
        assert time.monotonic() < deadline, "a stage outlived its run"
        time.sleep(0.05)


def kill_and_finish(finished, workplace, plan):
    """`plan` holds (stage, fraction of that stage's undisturbed time) for each kill: at most half,
    since that run may have met a busier machine."""
    seconds = {row["name"]: row["seconds"] for row in finished.status()}
    for stage, fraction in plan:
        # Start-up of a stage's process counts as well: about a second before its own clock.
        inside = kill_during(workplace, stage, fraction * (seconds[stage] + 0.5))
        wait_until_unlocked(workplace)
        assert inside, f"{stage} was over before it could be killed"
    result = subprocess.run(
        [sys.executable, "-m", "duplex.cli", "run", "small.yaml", "--to", "merge"],
        cwd=workplace.folder, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(workplace.run_folder.rglob("*.tmp"))
    return deterministic(workplace)


def deterministic(workplace):
    """Digests of the stages that come out the same, killed or not."""
    return {name: digest for name, digest in workplace.digests().items() if name in DETERMINISTIC}


@pytest.mark.slow
@pytest.mark.timeout(600)  # it is the first to ask for the finished run, whose making counts too
def test_three_kills(finished, tmp_path):
    workplace = make_workplace(tmp_path / "killed")
    draw = random.Random()
    seed = draw.randrange(2**32)
    print(f"moments drawn with seed {seed}")
    draw.seed(seed)
    moments = [(stage, draw.uniform(0.05, 0.5)) for stage in ("speech", "tensors", "train")]
    assert kill_and_finish(finished, workplace, moments) == deterministic(finished)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_each_stage_at_least_once(finished, tmp_path):
    workplace = make_workplace(tmp_path / "killed")
    draw = random.Random()
    seed = draw.randrange(2**32)
    print(f"moments drawn with seed {seed}")
    draw.seed(seed)
    stages = [*DETERMINISTIC, "train", "speech", "tensors"]
    stages.sort(key=STAGE_NAMES.index)
    moments = [(stage, draw.uniform(0.05, 0.5)) for stage in stages]
    assert kill_and_finish(finished, workplace, moments) == deterministic(finished)
    for stage in ("serve", "evaluate"):
        assert kill_during(workplace, stage, 2.0)
        wait_until_unlocked(workplace)
    assert workplace.run().returncode == 0
