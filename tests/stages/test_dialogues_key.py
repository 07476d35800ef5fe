"""What decides which dialogues are kept is part of the key under which they are kept."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.dialogues as dialogues
from duplex.config import Config

ROOT = Path(__file__).resolve().parents[2]


def engine(writer: str, domain: str = "coffee-shop") -> str:
    section: dict[str, Any] = {"writer": writer}
    if writer == "openai":
        section |= {"llm": "some-model"}
    settings = {"name": "toy", "personas": {"domain": f"data/domains/{domain}.yaml"}}
    return dialogues.DialoguesStage().engine(
        Config.model_validate(settings | {"dialogues": section})
    )


@pytest.fixture
def grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the grammar; a new process would read each file anew."""
    folder = shutil.copytree(ROOT / "data" / "grammar", tmp_path / "grammar")
    monkeypatch.setattr(dialogues, "GRAMMAR_DIR", folder)
    dialogues._menu_digest.cache_clear()
    yield folder
    dialogues._menu_digest.cache_clear()


def test_another_menu_is_another_key_for_the_coffee_shop_alone(grammar: Path) -> None:
    before, elsewhere = engine("openai"), engine("openai", "vet-reception")
    menu = grammar / "menu.yaml"
    menu.write_bytes(menu.read_bytes() + b"# one more line\n")
    dialogues._menu_digest.cache_clear()
    assert engine("openai") != before
    assert engine("openai", "vet-reception") == elsewhere


def test_other_templates_of_the_grammar_cost_no_model_anything(grammar: Path) -> None:
    before = engine("openai")
    for path in grammar.glob("*.yaml"):
        if path.name != "menu.yaml":
            path.write_bytes(path.read_bytes() + b"# one more line\n")
    dialogues._menu_digest.cache_clear()
    assert engine("openai") == before


@pytest.mark.parametrize("writer", ["scripted", "openai"])
def test_other_checks_are_another_key(writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine(writer)
    monkeypatch.setattr(dialogues, "CHECKS_VERSION", dialogues.CHECKS_VERSION + 1)
    assert engine(writer) != before


def test_imported_personas_without_a_domain_file_keep_the_menu_in_the_key() -> None:
    assert engine("openai", "not-there") == engine("openai")


def test_the_key_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tests.stages.test_dialogues_key import engine; engine('openai');"
        "print([name for name in ('torch', 'openai', 'jinja2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
