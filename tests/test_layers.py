"""Imports go downward only, and each heavy package has its one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STAGE_MODULES = [
    "personas",
    "dialogues",
    "voices",
    "speech",
    "tensors",
    "train",
    "merge",
    "serve",
    "evaluate",
]

# The lower number is the deeper layer; a module imports its own layer or deeper ones.
LAYERS = [
    (0, ("duplex.frames", "duplex.errors", "duplex.memory", "duplex")),
    (
        1,
        (
            "duplex.base",
            "duplex.tokens",
            "duplex.characters",
            "duplex.words",
            "duplex.records",
            "duplex.config",
            "duplex.configfile",
            "duplex.sections",
            "duplex.config_data",
            "duplex.config_train",
        ),
    ),
    (
        2,
        (
            "duplex.alignment",
            "duplex.streams",
            "duplex.splits",
            "duplex.coffee",
            "duplex.clips",
            "duplex.mixing",
            "duplex.room",
            "duplex.metrics",
            "duplex.verdict",
            "duplex.turn_taking",
            "duplex.degeneration",
            "duplex.emotion_words",
            "duplex.sound_quality",
            "duplex.topic",
            "duplex.duplex_bench",
            "duplex.agreement",
            "duplex.phases",
            "duplex.inspection",
            "duplex.findings",
            "duplex.judgement",
            "duplex.wording",
            "duplex.turn_checks",
            "duplex.talk_checks",
            "duplex.dialogue_checks",
            "training.loss",
            "training.lora",
            "training.embedding",
            "training.estimate",
            "training.collapse",
        ),
    ),
    (
        3,
        (
            "duplex.files",
            "duplex.lock",
            "duplex.datafiles",
            "duplex.stage",
            "duplex.store",
            "duplex.sinks",
        ),
    ),
    (3, ("pipeline.runners", "pipeline.imported")),
    (4, ("pipeline.engines", "training", "pipeline.serving", "pipeline.evaluation")),
    (4, ("pipeline.pages", "pipeline.training_data", "pipeline.training_model")),
    (4, ("pipeline.training_run", "pipeline.training_nodes", "pipeline.pods")),
    (5, tuple(f"pipeline.{stage}" for stage in STAGE_MODULES)),
    (
        6,
        (
            "pipeline",
            "duplex.cli",
            "duplex.cli_bench",
            "duplex.cli_data",
            "duplex.cli_judge",
            "duplex.cli_options",
            "duplex.cli_pod",
            "duplex.cli_evaluate",
            "duplex.cli_serve",
            "duplex.cli_train",
        ),
    ),
]
PURE = LAYERS[2][1]
ONLY_IN = {"ray": "pipeline.runners.ray", "accelerate": "training.loop", "peft": "training"}


def modules():
    for top in ("duplex", "pipeline", "training"):
        for path in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def layer_of(name):
    fitting = [
        (len(prefix), layer)
        for layer, prefixes in LAYERS
        for prefix in prefixes
        if name == prefix or (prefix != "duplex" and name.startswith(prefix + "."))
    ]
    return max(fitting)[1] if fitting else None


def is_main_guard(node):
    return isinstance(node, ast.If) and "__main__" in ast.dump(node.test)


def imports_of(path):
    """Imported module names, in functions too; the `__main__` guard and type checks apart."""
    found = []
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if is_main_guard(node) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        pending += list(ast.iter_child_nodes(node))
    return found


def violations(named_paths):
    known = {name for name, _ in modules()}
    found = []
    for name, path in named_paths:
        for imported in imports_of(path):
            if imported not in known or imported == name:
                continue
            both_stages = layer_of(name) == layer_of(imported) == 5
            if layer_of(imported) > layer_of(name) or both_stages:
                found.append(f"{name} imports {imported}")
    return found


def test_every_module_has_a_layer():
    assert [name for name, _ in modules() if layer_of(name) is None] == []


def test_imports_go_downward_and_stages_stay_apart():
    assert violations(modules()) == []


def test_an_upward_import_would_be_found(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from pipeline.run import plan\n")
    assert violations([("duplex.streams", planted)]) == [
        "duplex.streams imports pipeline.run",
    ]
    planted.write_text("import pipeline.speech\n")
    assert violations([("pipeline.voices", planted)]) == ["pipeline.voices imports pipeline.speech"]


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_each_heavy_package_has_its_place(package):
    users = {
        name
        for name, path in modules()
        if any(i == package or i.startswith(package + ".") for i in imports_of(path))
    }
    place = ONLY_IN[package]
    assert {name for name in users if name != place and not name.startswith(place + ".")} == set()


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_touch_no_file_clock_or_log(name):
    path = dict(modules())[name]
    banned = {
        "os",
        "io",
        "pathlib",
        "time",
        "datetime",
        "logging",
        "random",
        "subprocess",
        "socket",
    }
    assert banned & {imported.split(".")[0] for imported in imports_of(path)} == set()


def test_planning_imports_no_heavy_package():
    code = (
        "import sys, pipeline.run, pipeline.commands, duplex.cli;"
        "heavy = ('torch', 'moshi', 'peft', 'datasets', 'matplotlib', 'aiohttp', 'ray');"
        "print([module for module in heavy if module in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.strip() == "[]"


def test_no_file_is_longer_than_400_lines():
    tops = ("duplex", "pipeline", "training", "benchmarks", "tests")
    paths = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    assert [str(p) for p in paths if len(p.read_text().splitlines()) > 400] == []
