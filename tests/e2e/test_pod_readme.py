"""runpod/README.md: each command is one that there is, with options that it has; the two ways in
are walked with the pocket model. Blocks marked `sh pod` need a pod or an engine: of those, our own
commands are parsed as well."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

from duplex.cli import app
from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import ConfigError
from tests import forked
from tests.e2e.conftest import ROOT, environment

README = (ROOT / "runpod" / "README.md").read_text()
UsageError = typer.BadParameter.__base__  # of the click that Typer brings with it
ELSEWHERE = {"docker", "curl", "sed", "printf", "rsync", "sky", "ssh"}


def commands(kind):
    """Lines of the fenced blocks of a kind, continued ones joined."""
    blocks = re.findall(rf"^ *```{kind}\n(.*?)^ *```", README, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return [line.strip() for line in text.splitlines() if line.strip()]


HERE, ON_A_POD = commands("sh"), commands("sh pod")
OURS = [line for line in [*HERE, *ON_A_POD] if line.startswith("duplex ")]


def parsed(line):
    """The innermost context of a `duplex …` line.

    Raises:
        UsageError: no such command, option or number of arguments.
    """
    group = get_command(app)
    context = group.make_context("duplex", shlex.split(line)[1:])
    while hasattr(context.command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return context


def test_all_commands_are_found():
    fences = re.findall(r"^ *```(.*)$", README, flags=re.MULTILINE)
    assert set(fences[::2]) == {"sh", "sh pod"} and set(fences[1::2]) == {""}
    assert len(OURS) >= 18 and {line.split()[1] for line in OURS} >= {
        "run", "doctor", "import", "convert", "serve", "probe", "status", "clean", "personas",
    }  # fmt: skip


def test_what_is_no_command_of_ours_needs_a_pod():
    others = [line for line in HERE if not line.startswith("duplex ")]
    assert [line.split()[-1] for line in others] == ["runpod/start.sh"]
    for line in ON_A_POD:
        programs = [part.split()[0] for part in line.split(" | ")]
        assert {*programs} <= {*ELSEWHERE, "duplex"}, line


@pytest.mark.parametrize("line", OURS)
def test_a_command_parses_and_its_config_takes_its_settings(line):
    context = parsed(line)
    given = [value for value in context.params.values() if str(value).endswith(".yaml")]
    for config in given:
        settings = load_config(ROOT / str(config), list(context.params.get("overrides") or []))
        assert settings.name == "coffee"


@pytest.mark.parametrize(
    "line",
    ["duplex runn configs/coffee.yaml", "duplex run configs/coffee.yaml --skipp voices",
     "duplex import", "duplex clean configs/coffee.yaml extra"],
)  # fmt: skip
def test_a_wrong_command_would_be_found(line):
    with pytest.raises(UsageError):
        parsed(line)


def test_a_wrong_setting_would_be_found():
    with pytest.raises(ConfigError):
        load_config(ROOT / "configs/coffee.yaml", ["personas.foldr=x"])


def test_files_and_variables_that_it_names():
    script = (ROOT / "runpod" / "start.sh").read_text()
    named = set(re.findall(r"DUPLEX_[A-Z_]+", README)) - {
        "DUPLEX_MODELS", "DUPLEX_HOURS",  # of the Dockerfile and of sky.yaml
    }  # fmt: skip
    assert [name for name in sorted(named) if name not in script.replace("${option^^}", "")] == []
    for path in re.findall(r"`((?:configs|data|tests|benchmarks)/[\w./-]+\.\w+)`", README):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"^\| `([\w.]+\.\w+)`", README, flags=re.MULTILINE):
        assert (ROOT / "runpod" / name).is_file(), name
    for name in re.findall(r"^\| .*\| .*`((?:train|serve)\.[\w.]+)=", README, flags=re.MULTILINE):
        section, *_ = name.split(".")
        assert section in Config.model_fields


def test_the_laptop_line_is_the_script(tmp_path):
    (line,) = [line for line in HERE if line.endswith("start.sh")]
    result = subprocess.run(
        ["bash", "-c", f"{line} duplex status configs/pocket.yaml --runs {tmp_path}"],
        cwd=ROOT, env=environment() | {"DUPLEX_PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "missing" in result.stdout, result.stderr


def test_several_gpus_differ_in_nothing_else():
    one, two = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for name in ("coffee", "coffee-multi")
    )
    for config in (one, two):
        config["train"].pop("accumulate"), config["train"].pop("processes", None)
    assert one == two
    train = load_config(ROOT / "configs" / "coffee-multi.yaml").train
    assert train.processes == 2 and train.batch_size == train.processes * train.accumulate


# -- the two ways in


@pytest.fixture
def pod(workplace, tmp_path):
    """A place where the README's paths mean the small finished run, less its last stages."""
    volume = tmp_path / "workspace"
    volume.mkdir()
    workplace.runs.rename(volume / "runs")
    (volume / "runs" / "small").rename(volume / "runs" / "coffee")
    config = yaml.safe_load(workplace.config.read_text()) | {"name": "coffee"}
    (tmp_path / "configs").mkdir()
    (workplace.folder / "personas").rename(tmp_path / "personas")
    (tmp_path / "configs" / "coffee.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def said(pod, line):
    """A line of the README in that place."""
    line = line.replace("/workspace", str(pod / "workspace"))
    line = line.replace("nvidia/personaplex-7b-v1", "pocket")
    return forked.duplex(shlex.split(line)[1:], pod, environment())


def way(heading, up_to):
    text = README[README.index(heading) :]
    lines = re.search(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    assert lines
    return [line for line in lines[1].splitlines() if line.split()[1] in up_to]


def dialogues_of(pod):
    (folder,) = (pod / "workspace" / "runs" / "coffee").glob("02-dialogues-*")
    lines = (folder / "parts" / "part-00000.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def actions(pod, *settings):
    result = said(pod, "duplex run configs/coffee.yaml --runs /workspace/runs --dry-run --json "
                  + " ".join(settings))  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {row["name"]: row["action"] for row in json.loads(result.stdout)["stages"]}


@pytest.mark.slow  # the other recipe runs: below
def test_dialogues_that_exist(pod):
    """Way A, without its training: what comes after the import is planned."""
    records = dialogues_of(pod)
    (pod / "workspace" / "training.json").write_text(json.dumps(records))
    (imported,) = way("**A. Dialogues that exist**", {"import"})
    result = said(pod, imported)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(records)} records imported, 0 refused" in result.stdout
    key = ("--set dialogues.writer=openai", "--set dialogues.llm=x")
    planned = actions(pod, *key)
    assert planned["dialogues"] == "keep" and planned["evaluate"] == "run"
    doctor = said(pod, "duplex doctor configs/coffee.yaml --runs /workspace/runs " + " ".join(key))
    assert "not needed" in " ".join(doctor.stdout.split()), doctor.stdout


@pytest.mark.slow  # six commands; conversion by itself: tests/stages/test_convert.py
def test_tensors_that_exist(pod):
    """Way A with `.pt` files of the predecessor's form: converted, imported, planned from there."""
    made = said(pod, "duplex convert tensors configs/coffee.yaml /workspace/pt_files --to coffee "
                "--model pocket --runs /workspace/runs")  # fmt: skip
    assert made.returncode == 0, made.stderr
    (pod / "workspace" / "training.json").write_text(json.dumps(dialogues_of(pod)))
    for stage in ("02-dialogues", "03-voices", "04-speech", "05-tensors"):
        for folder in (pod / "workspace" / "runs" / "coffee").glob(f"{stage}-*"):
            folder.rename(pod / "workspace" / folder.name)  # this pod has none of it
    for line in way("**or tensors that exist**", {"convert", "import"}):
        result = said(pod, line)
        assert result.returncode == 0, line + result.stdout + result.stderr
    writer = ("--set dialogues.writer=openai", "--set dialogues.llm=x")
    planned = actions(pod, "--skip dialogues,voices,speech", *writer)
    assert planned["tensors"] == "keep" and planned["train"] == planned["serve"] == "run"
    assert planned["dialogues"] == planned["speech"] == "leave out"
    # The run itself asks for no key either: it begins, up to a stage that is there.
    first = said(pod, "duplex run configs/coffee.yaml --runs /workspace/runs --to tensors --skip "
                 "dialogues,voices,speech " + " ".join(writer))  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "5 tensors: imported" in first.stdout


def test_new_personas(pod):
    """Way B: a skeleton is refused until it is filled in, and then runs."""
    new, check, run = way("**B. New personas**", {"personas", "run"})
    assert said(pod, new).returncode == 0
    refused = said(pod, check)
    assert refused.returncode != 0 and "FILL IN" in refused.stdout + refused.stderr
    (path,) = (pod / "workspace" / "personas").glob("*.yaml")
    text = (ROOT / "data" / "personas" / "friendly-theo.yaml").read_text()
    path.write_text(text.replace("friendly-theo", path.stem))
    assert said(pod, check).returncode == 0
    result = said(pod, run + " --to dialogues")
    assert result.returncode == 0, result.stderr
    assert "2 dialogues: done (2 records" in result.stdout


def test_clean_shows_and_removes_the_largest_first(pod):
    """`clean` of the README on folders of three sizes; what is needed stays."""
    run_folder = pod / "workspace" / "runs" / "coffee"
    personas = next(run_folder.glob("01-personas-*"))
    sizes = {"aaaaaaaa": 2_000, "bbbbbbbb": 3_000_000, "cccccccc": 40_000}
    (line,) = [one for one in OURS if " clean " in one and "--dry-run" in one]
    done = said(pod, "duplex run configs/coffee.yaml --runs /workspace/runs --to personas")
    assert done.returncode == 0, done.stderr
    kept = set(run_folder.glob("01-personas-*"))
    for key, size in sizes.items():
        folder = run_folder / f"01-personas-{key}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"x" * size)
    shown = said(pod, line + " --json")
    rows = json.loads(shown.stdout)["folders"]
    found = [Path(row["path"]).name[-8:] for row in rows if Path(row["path"]).name[-8:] in sizes]
    assert found == ["bbbbbbbb", "cccccccc", "aaaaaaaa"]
    assert [row["bytes"] for row in rows] == sorted((row["bytes"] for row in rows), reverse=True)
    assert all((run_folder / f"01-personas-{key}").exists() for key in sizes)
    (line,) = [one for one in OURS if " clean " in one and "--yes" in one]
    assert said(pod, line).returncode == 0
    left = set(run_folder.glob("01-personas-*"))
    assert not any(folder.name[-8:] in sizes for folder in left)
    assert left <= kept and left, personas
