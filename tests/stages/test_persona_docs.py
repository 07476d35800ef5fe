"""docs/personas.md from its first command to its last, in a place of its own."""

from __future__ import annotations

import os
import re
import shlex

import yaml

from duplex.characters import Domain, Persona, Scenario
from duplex.datafiles import CHECKOUT
from tests import forked

TEXT = (CHECKOUT / "docs" / "personas.md").read_text()


def test_each_command_of_the_page_does_what_it_says(tmp_path):
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    commands = [
        line.split(" #")[0]
        for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) == 5 and all(command.startswith("duplex ") for command in commands)
    for command in commands:
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OPENAI_API_KEY": "none"}
        result = forked.duplex(shlex.split(command)[1:], tmp_path, environment)
        assert result.returncode == 0, command + result.stdout + result.stderr
    assert yaml.safe_load((tmp_path / "mine" / "angry-ruth.yaml").read_text())["type"] == "angry"


def test_the_page_names_every_field():
    for model in (Domain, Persona, Scenario):
        hidden = {"title", "place", "agent_role", "user_role"} if model is Domain else set()
        named = {name for name in model.model_fields if f"`{name}`" in TEXT}
        assert set(model.model_fields) - named - hidden == set()
