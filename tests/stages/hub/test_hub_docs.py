"""docs/hub.md: its commands run as they stand there."""

from __future__ import annotations

import re
import shlex
import shutil

from duplex.datafiles import CHECKOUT
from tests.stages.hub.helpers import duplex

TEXT = (CHECKOUT / "docs" / "hub.md").read_text()


def test_the_commands_that_ask_nobody_work(trained, tmp_path):
    (tmp_path / "configs").mkdir()
    shutil.copy(trained / "small.yaml", tmp_path / "configs" / "pocket.yaml")
    for name in ("runs", "models"):
        (tmp_path / name).symlink_to(trained / name)
    (block,) = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for command in block.splitlines():
        result = duplex(*shlex.split(command)[1:], cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "nothing was sent" in result.stdout


def test_the_other_commands_are_understood(tmp_path):
    """Up to the point where the hub would be asked, which is offline here."""
    shown = re.findall(r"^    (duplex (?:push|pull) .*)$", TEXT, flags=re.MULTILINE)
    hub_lines = [line.split(" #")[0] for line in shown]
    assert len(hub_lines) == 3
    for command in hub_lines:
        result = duplex(*shlex.split(command)[1:], cwd=tmp_path)
        assert result.returncode == 2 and "Usage" not in result.stderr
