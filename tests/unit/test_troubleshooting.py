"""docs/troubleshooting.md quotes what the program says, and names what there is to change."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from duplex.cli import app
from duplex.config import Config
from duplex.findings import FINDINGS
from pipeline.serving import wire

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FEWEST_LETTERS = 8  # of a quoted message: fewer would be found anywhere
HIDDEN = "…"


@cache
def sayings():
    """Every string of the source, what is put into it shown as …; and the page's scripts."""
    found = []
    for top in ("duplex", "pipeline", "training"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        p.value if isinstance(p, ast.Constant) else HIDDEN for p in node.values
                    )
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                    text = node.value
                    found.append(text if isinstance(text, str) else text.decode(errors="replace"))
    scripts = (ROOT / "pipeline" / "serving" / "static").glob("*.js")
    return [*found, *(path.read_text() for path in scripts)]


def is_said(message):
    """Whether a string of the source holds the quoted parts, in order."""
    parts = [re.escape(part) for part in message.split(HIDDEN)]
    pattern = re.compile(".{0,200}?".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in sayings())


def rows(page):
    """Cells of each row of a table, heads and rules left out."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] not in ("you see", "code") and set(row[0]) != {"-"}]


def seen(row):
    return row[1] if len(row) == 4 else row[0]


QUOTED = sorted({quote for row in rows(PAGE) for quote in re.findall(r"`([^`]+)`", seen(row))})
# What is no message: commands, kinds of WebSocket messages, columns, keys.
NAMES = {
    "duplex inspect",
    "duplex bench",
    "ms behind",
    "05",
    "04",
    "voice_prompt",
    "Response delay",
    "personaplex",
}
MESSAGES = [quote for quote in QUOTED if quote not in NAMES and quote not in FINDINGS]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_says_it(message):
    assert len(re.sub(r"[\W_]", "", message)) >= FEWEST_LETTERS
    assert is_said(message)


def test_there_is_something_to_test():
    assert len(MESSAGES) >= 40
    assert not is_said("the base and its adapters must fit into a pocket")
    assert not is_said("each of the … adapters must get a biscuit")


def test_names_of_measures_and_of_what_the_page_shows_are_real():
    assert all(is_said(name) for name in ("ms behind", "Response delay"))


def test_every_code_that_the_server_closes_with_is_explained():
    codes = {value for name, value in vars(wire).items() if name.startswith("CLOSE_")}
    told = {int(row[0]) for row in rows(PAGE) if len(row) == 4 and row[0].isdigit()}
    assert codes <= told


def test_every_key_that_it_names_is_in_the_schema():
    sections = "|".join(Config.model_fields)
    named = set(re.findall(rf"\b((?:{sections})(?:\.[a-z_]+)+)", PAGE))
    named = {name for name in named if not name.endswith(".md")}
    assert len(named) > 15
    for key in named:
        value = Config(name="x")
        for part in key.split("."):
            assert part in type(value).model_fields, key
            value = getattr(value, part)


def test_every_command_and_option_that_it_names_is_there():
    commands = get_command(app).commands
    for command, options in re.findall(r"`duplex ([a-z]+)([^`]*)`", PAGE):
        known = {
            opt
            for param in commands[command].params
            for opt in (*param.opts, *param.secondary_opts)
        }
        assert set(re.findall(r"(?<!\S)--[a-z-]+", options)) <= known, command
