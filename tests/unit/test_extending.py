"""The examples of docs/extending.md run as they stand there, and print what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from duplex.errors import EXIT_DONE
from pipeline.evaluation import measures, verdicts

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def sections(page):
    """Heading -> (its Python, what it prints)."""
    found = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE))
        (printed,) = re.findall(r"^```text\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
        found[part.partition("\n")[0]] = (code, printed)
    return found


def run(code, folder):
    (folder / "example.py").write_text(code)
    return subprocess.run(
        [sys.executable, "example.py"], cwd=folder, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["A stage", "A speech engine", "A measure"])
def test_it_prints_what_the_page_says(name, tmp_path):
    code, printed = sections(PAGE)[name]
    result = run(code, tmp_path)
    assert result.returncode == EXIT_DONE, result.stderr
    assert result.stdout == printed


def test_the_three_are_there_and_an_error_in_one_would_be_seen(tmp_path):
    assert len(sections(PAGE)) == 3
    code, printed = sections(PAGE)["A measure"]
    assert run(code.replace("def questions", "def answers"), tmp_path).returncode == 1
    assert run(code.replace('endswith("?")', 'endswith(".")'), tmp_path).stdout == printed
    assert run(code.replace('endswith("?")', 'endswith("!")'), tmp_path).stdout != printed


def test_a_row_is_in_the_table_and_the_verdicts():
    names = {measure.key for measure in measures.MEASURES}
    judged = {measure.key for measure in verdicts.JUDGED}
    assert judged == names - set(verdicts.NOT_JUDGED)
