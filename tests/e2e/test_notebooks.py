"""The notebooks run top to bottom on the small run, and hold what a notebook here may hold."""

import ast
import importlib
import json
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from duplex.errors import MissingInputError, RequestError
from pipeline.notebook_views import open_run
from pipeline.run import STAGE_NAMES
from tests.e2e.conftest import ROOT, environment

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = ("duplex", "pipeline", "training")
# What each shows when it has run: pictures, players, and words that its cells print.
SHOWS = {
    "01_dialogue": (1, 1, "agent  "),
    "02_listen": (0, 7, "frames, "),
    "03_tensor": (1, 0, "Verdict: "),
    "04_training": (6, 0, "semantic  loss"),
    "05_compare": (2, 2, "merged: "),
    "06_talk": (1, 1, "agent: "),
}


def read(path):
    return nbformat.read(path, as_version=4)


def code_of(book):
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def parsed(source):
    """A notebook may await at the top of a cell."""
    return compile(source, "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def faults_of(book):
    """What a committed notebook must not hold."""
    nbformat.validate(book)
    found = [] if (book.nbformat, book.nbformat_minor) == (4, 5) else ["another format than 4.5"]
    if book.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("another kernel")
    for cell in book.cells:
        if re.search(r"(?<![\w./:])(/[\w.-]+){2,}|[A-Za-z]:\\\\|~/", cell.source):
            found.append("an absolute path")
        if cell.cell_type != "code":
            continue
        if cell.outputs:
            found.append("outputs")
        if cell.execution_count is not None:
            found.append("an execution count")
        for node in ast.walk(parsed(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                found.append(f"a definition: {type(node).__name__}")
            found += unresolved(node)
    return found


def unresolved(node):
    """Names of our own packages that a line imports and that are not there."""
    if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] not in OURS:
        return []
    module = importlib.import_module(node.module)
    return [f"{node.module}.{a.name}" for a in node.names if not hasattr(module, a.name)]


def run_of(place):
    return {
        "DUPLEX_NOTEBOOK_CONFIG": str(place.config),
        "DUPLEX_NOTEBOOK_RUNS": str(place.runs),
    }


@pytest.fixture
def executed(finished, tmp_path, monkeypatch):
    """Run a notebook in a kernel of its own. Nothing is read from or written to the home folder."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))

    def execute(book):
        client = NotebookClient(
            book, timeout=240, kernel_name="python3",
            resources={"metadata": {"path": str(finished.folder)}},
        )  # fmt: skip
        client.execute(env=environment() | run_of(finished))
        return [output for cell in book.cells for output in cell.get("outputs", [])]

    return execute


def test_there_are_six_and_the_readme_names_each():
    assert [path.stem for path in PATHS] == sorted(SHOWS)
    readme = (ROOT / "README.md").read_text()
    assert [p.name for p in PATHS if f"notebooks/{p.name}" not in readme] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_holds_no_output_no_definition_and_imports_what_there_is(path):
    assert faults_of(read(path)) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f(): pass", "a definition: FunctionDef"),
        ("class A: pass", "a definition: ClassDef"),
        ("f = lambda: 1", "a definition: Lambda"),
        ("async def f(): pass", "a definition: AsyncFunctionDef"),
        ('open("/home/me/runs")', "an absolute path"),
        ("from pipeline.notebook_views import gone", "pipeline.notebook_views.gone"),
    ],
)
def test_what_it_must_not_hold_would_be_found(source, fault):
    book = read(PATHS[0])
    book.cells[-1].source = source
    assert faults_of(book) == [fault]


def test_outputs_and_counts_would_be_found():
    book = read(PATHS[0])
    book.cells[-1].execution_count = 3
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    assert faults_of(book) == ["outputs", "an execution count"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_runs_top_to_bottom(path, executed):
    outputs = executed(read(path))
    shown = [output.get("data", {}) for output in outputs]
    pages = [data.get("text/html", "") for data in shown]
    pictures = sum("<img src=" in page for page in pages) + sum("image/png" in d for d in shown)
    players = sum("<audio" in page for page in pages)
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    least_pictures, least_players, words = SHOWS[path.stem]
    assert pictures >= least_pictures and players >= least_players, (pictures, players)
    assert words in printed


def test_a_cell_that_fails_is_an_error(executed):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import duplex.gone")])
    with pytest.raises(CellExecutionError, match=r"duplex\.gone"):
        executed(book)


def test_the_run_is_that_of_the_config_as_it_stands(workplace, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    config, runs = str(workplace.config), str(workplace.runs)
    run = open_run(config, runs)
    assert tuple(run.stages) == STAGE_NAMES
    plan = {row["name"]: row["folder"] for row in workplace.status()}
    assert {name: str(folder.path) for name, folder in run.stages.items()} == plan
    (run.stages["merge"].path / "manifest.json").unlink()
    assert "tensors" in open_run(config, runs, to="train").stages
    with pytest.raises(MissingInputError, match="none of merge and what follows"):
        open_run(config, runs)
    with pytest.raises(RequestError, match="must be one of personas, dialogues"):
        open_run(config, runs, to="serving")


def test_nothing_heavy_is_imported_to_open_a_run(finished):
    code = (
        "import os, sys; from pipeline.notebook_views import open_run;"
        "open_run(os.environ['DUPLEX_NOTEBOOK_CONFIG'], os.environ['DUPLEX_NOTEBOOK_RUNS']);"
        "import json; print(json.dumps([m for m in ('torch', 'moshi') if m in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=finished.folder, env=environment() | run_of(finished),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(result.stdout) == []
