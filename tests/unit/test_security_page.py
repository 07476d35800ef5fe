"""What docs/security.md says of the code as a whole, looked for in the code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from duplex import configfile, files
from duplex.config import Config
from duplex.configfile import load_config
from pipeline.serving.app import main as serve
from pipeline.serving.limits import HEADER_S, Limits

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


@cache
def trees():
    tops = ("duplex", "pipeline", "training", "benchmarks")
    paths = [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "…"


def calls_in(found):
    """(file, what is called, call), as `torch.load`."""
    return [
        (file, dotted(node.func), node)
        for file, tree in found.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


@cache
def all_calls():
    return calls_in(trees())


def calls_of(named, calls=None):
    return [(file, call) for file, name, call in calls or all_calls() if name == named]


def unsafe(named, keyword, value, calls=None):
    """Calls that do not give `keyword` this value."""
    return [
        f"{file}:{call.lineno}"
        for file, call in calls_of(named, calls)
        if {k.arg: ast.unparse(k.value) for k in call.keywords}.get(keyword) != value
    ]


def importers(package):
    return {
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and package in [a.name.split(".")[0] for a in node.names])
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package)
    }


CALLS = [
    ("torch.load", "weights_only", "True"),
    ("np.load", "allow_pickle", "False"),
    ("Environment", "autoescape", "True"),
]


@pytest.mark.parametrize(("named", "keyword", "value"), CALLS)
def test_every_such_call_is_a_safe_one(named, keyword, value):
    assert calls_of(named)
    assert unsafe(named, keyword, value) == []


@pytest.mark.parametrize(("named", "keyword", "value"), CALLS)
def test_an_unsafe_one_would_be_found(named, keyword, value):
    for arguments in ("", f"{keyword}=maybe"):
        assert unsafe(named, keyword, value, calls_in({"a.py": ast.parse(f"{named}({arguments})")}))


@pytest.mark.parametrize(
    "named",
    ["pickle.load", "pickle.loads", "yaml.unsafe_load", "eval", "exec", "os.system",
     "joblib.load", "shutil.unpack_archive"],
)  # fmt: skip
def test_no_such_call_is_made(named):
    assert [f"{file}:{call.lineno}" for file, call in calls_of(named)] == []


def test_no_archive_is_unpacked_and_no_code_of_a_hub_is_run():
    for file, name, call in all_calls():
        assert not name.endswith(".extractall"), file
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert {given.get(key, "False") for key in ("trust_remote_code", "shell")} == {"False"}, (
            file
        )


def test_yaml_is_read_by_safe_loaders(tmp_path):
    named = {ast.unparse(call.args[1]) for _, call in calls_of("yaml.load")}
    assert named == {"_Loader", "_SafeLoader"}  # of duplex/configfile.py and duplex/files.py
    assert issubclass(configfile._Loader, yaml.SafeLoader)
    assert files._SafeLoader in (yaml.SafeLoader, yaml.CSafeLoader)
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        files.parse_yaml("name: !!python/object/apply:os.getcwd []")
    (tmp_path / "c.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match="must be YAML"):
        load_config(tmp_path / "c.yaml")


def test_the_gpl_library_is_imported_by_its_worker_alone():
    assert importers("espeakng_loader") == {"pipeline/engines/espeak_worker.py"}
    worker = trees()["pipeline/engines/espeak_worker.py"]
    ours = {"duplex", "pipeline", "training"}
    imported = [a.name for n in ast.walk(worker) if isinstance(n, ast.Import) for a in n.names]
    imported += [n.module or "" for n in ast.walk(worker) if isinstance(n, ast.ImportFrom)]
    assert not ours & {name.split(".")[0] for name in imported}


def test_scripts_of_the_pages_write_no_html():
    scripts = [*(ROOT / "pipeline").rglob("*.js"), *(ROOT / "pipeline").rglob("*.j2")]
    assert len(scripts) > 5
    for path in scripts:
        text = path.read_text()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        ), path
        # Left as they are: the page's own style sheet and script, which are files of ours.
        assert set(re.findall(r"(\S+)\s*\|\s*safe\b", text)) <= {"style", "script"}, path


def test_secrets_of_a_config_enter_no_key_and_are_not_shown():
    secret = "sk-not-to-be-seen"
    config = Config.model_validate(
        {
            "name": "x",
            "dialogues": {"runtime": {"api_key": secret}},
            "speech": {"runtime": {"api_key": secret}},
            "serve": {"runtime": {"token": secret}},
        }
    )
    assert secret not in repr(config)
    assert all(secret not in str(config.keyed(s)) for s in ("dialogues", "speech", "serve"))


def test_limits_and_defaults_are_those_that_it_names(capsys):
    assert Config(name="x").serve.runtime.host == "127.0.0.1"
    assert f"has {HEADER_S:g} s, {Limits().max_strangers} such connections" in PAGE
    assert serve(["nowhere", "--host", "0.0.0.0"]) == 2
    assert "must have a token, found none" in capsys.readouterr().err
    assert serve(["nowhere", "--host", "0.0.0.0", "--token", "short"]) == 2
    assert "a token must have at least 16 characters" in capsys.readouterr().err


def test_every_module_that_it_names_is_there():
    named = re.findall(r"`((?:duplex|pipeline|training)/[\w/]+\.py)`", PAGE)
    assert len(named) > 25 and [name for name in named if not (ROOT / name).exists()] == []
