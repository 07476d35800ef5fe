"""Every `duplex …` that README and pages show is a command that there is, with options that it has,
and the files of this checkout that it names are there.

That commands do what they say is shown elsewhere: README by tests/e2e/test_documentation.py,
runpod/README.md by tests/e2e/test_pod_readme.py, the others by the tests of their command.
"""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from typer.main import get_command

from duplex.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "runpod" / "README.md",
    ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
UsageError = typer.BadParameter.__base__  # of the click that Typer brings with it
PATHS = re.compile(r"^(configs|data|docs|runpod)/[\w./-]+$")
STANDS_FOR = {"configs/yours.yaml", "data/yours"}


def fenced(text):
    """Lines of fenced shell blocks, continued ones joined, without their comments."""
    blocks = re.findall(r"^ *```(?:sh|bash|console)\b.*?\n(.*?)^ *```", text, re.S | re.M)
    lines = re.sub(r"\\\n\s*", "", "\n".join(blocks)).splitlines()
    return [line for line in (re.split(r"\s#\s", line)[0].strip() for line in lines) if line]


def inline(text):
    """Code spans that begin with `duplex` and a word."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    return [" ".join(code.split()) for code in re.findall(r"`(duplex [a-z][^`]*)`", prose)]


def innermost(words):
    """The command that the words lead to, and those that are left for it."""
    command = get_command(app)
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        if not words or words[0].startswith("-") or words[0].isupper():
            break
        found = command.commands.get(words[0])
        if found is None:
            raise UsageError(f"no command {words[0]}")
        command, words = found, words[1:]
    return command, words


def faults(line):
    """What a line says that there is not."""
    line = line.split(" | ")[0].split(" && ")[0].split(" > ")[0]
    try:
        words = shlex.split(line.replace("…", "X"))[1:]
        command, rest = innermost(words)
    except (UsageError, ValueError) as error:
        return [str(error)]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    known |= {"--help"}
    options = [word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    found = [f"{command.name} has no {option}" for option in options if option not in known]
    for word in rest:
        path = word.split("=")[-1]
        if PATHS.match(path) and path not in STANDS_FOR and not (ROOT / path).exists():
            found.append(f"no file {path}")
    return found


SHOWN = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}: {line}"[:90])
    for path in PAGES
    for line in dict.fromkeys([*fenced(path.read_text()), *inline(path.read_text())])
    if line.startswith("duplex ")
]


def test_the_pages_commands_are_found():
    assert len(SHOWN) > 100
    commands = {param.values[0].split()[1] for param in SHOWN}
    assert commands >= set(get_command(app).commands) - {"version"}


@pytest.mark.parametrize("line", SHOWN)
def test_a_shown_command_is_there(line):
    assert faults(line) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("duplex runn configs/pocket.yaml", "no command runn"),
        ("duplex run configs/pocket.yaml --onli train", "run has no --onli"),
        ("duplex run configs/nobody.yaml", "no file configs/nobody.yaml"),
        ("duplex pod upp configs/pocket.yaml", "no command upp"),
    ],
)
def test_a_wrong_one_would_be_found(line, fault):
    assert faults(line) == [fault]
