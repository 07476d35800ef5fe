"""The fork that tests take for a stage's process ends as the process would."""

import os
import signal
import subprocess
import sys

import pytest

from tests import forked


def start(*arguments):
    return forked._start([sys.executable, "-m", *arguments], env=dict(os.environ))


def test_a_stage_is_a_fork_and_another_module_a_process():
    stage = start("pipeline.dialogues", "missing.yaml")
    assert isinstance(stage, forked._Stage) and stage.wait() == 2, "a bad request"
    other = start("json.tool", "missing.json")
    assert isinstance(other, subprocess.Popen) and other.wait() != 0


def test_a_stage_is_waited_for_no_longer_than_asked_and_ends_by_a_signal(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")  # which nobody writes: it is read for ever
    for end, number in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        stage = start("pipeline.dialogues", str(tmp_path / "config.yaml"))
        with pytest.raises(subprocess.TimeoutExpired):
            stage.wait(0.1)
        getattr(stage, end)()
        code = stage.wait(20)
        assert code == -number or (end == "terminate" and code != 0), (end, code)
