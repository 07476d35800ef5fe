"""The commands that the documents show are run as they stand there; shipped configs too."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
import yaml

from tests import forked
from tests.e2e.conftest import ROOT, environment

README = (ROOT / "README.md").read_text()
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def shell_lines(text):
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
        for line in block.splitlines():
            command = line.split(" #")[0].strip()
            if command:
                yield command


DUPLEX = [line for line in shell_lines(README) if line.startswith("duplex ")]
# `serve` stays up: it has a test of its own below, with the probe that belongs to it.
ENDING = [line for line in DUPLEX if line.split()[1] not in ("serve", "probe")]


@pytest.fixture(scope="module")
def checkout(finished, tmp_path_factory):
    """A folder in which the README's paths mean the small finished run."""
    folder = tmp_path_factory.mktemp("checkout")
    place = finished.copy_to(folder)
    (folder / "configs").mkdir()
    config = yaml.safe_load(place.config.read_text()) | {"name": "pocket"}
    (folder / "configs" / "pocket.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(ROOT / "configs" / "coffee.yaml", folder / "configs")
    shutil.copytree(ROOT / "data" / "personas", folder / "data" / "personas")
    place.run_folder.rename(place.runs / "pocket")
    dialogue = {
        "conversation_id": "Mine 1", "persona_id": "angry-marcus", "persona_name": "Marcus",
        "scenario": "rush hour", "system_prompt": "You are Marcus.", "mood": "angry",
        "turns": [{"role": "user", "text": "Hi."}, {"role": "agent", "text": "Coffee."}],
    }  # fmt: skip
    (folder / "mine.json").write_text(json.dumps([dialogue]))
    return folder


def run(command, folder):
    arguments = [part for word in shlex.split(command)[1:] for part in expand(word, folder)]
    return forked.duplex(arguments, folder, environment())


def expand(word, folder):
    word = word.replace("-KEY", "-*")  # there is one folder of each stage
    return sorted(str(p.relative_to(folder)) for p in folder.glob(word)) if "*" in word else [word]


@pytest.mark.parametrize("command", ENDING)
def test_readme_command(checkout, command, monkeypatch):
    if " import " in command:
        before = (checkout / "runs").parent / "kept"
        shutil.copytree(checkout, before, symlinks=True)
        checkout = before  # an import changes what later commands would see
    if "--set" in command and "--to" not in command:
        command += " --to tensors"  # the change itself is trained in test_pipeline
    result = run(command, checkout)
    if "doctor configs/coffee.yaml" in command:
        assert result.returncode == 1 and "depth steps" in result.stdout
    else:
        assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_conversion_commands(checkout, tmp_path):
    """docs/conversions.md from its first command to its last, on the small run."""
    place = tmp_path / "place"
    shutil.copytree(checkout, place, symlinks=True)
    speeches = next((place / "runs" / "pocket").glob("02-dialogues-*/parts/part-00000.jsonl"))
    records = [json.loads(line) for line in speeches.read_text().splitlines()]
    (place / "training.json").write_text(json.dumps(records))
    text = (ROOT / "docs" / "conversions.md").read_text()
    before = "duplex convert tensors configs/pocket.yaml pt_files --to coffee"
    commands = [before, *shell_lines(text)]
    for command in commands:
        result = run(command, place)
        assert result.returncode == 0, command + result.stdout + result.stderr
    assert [line.split()[1] for line in commands].count("convert") == 5
    for name in sorted(path.name for path in (place / "pt_files").glob("*.pt")):
        pair = [
            torch.load(place / folder / name, weights_only=True)
            for folder in ("pt_files", "pt_again")
        ]
        assert torch.equal(*pair)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code += (
        "\nassert len(clips['train'][0]['codes']) == 17 and spoken['train'][0]['audio']['bytes']"
    )
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment() | cache,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_readme_serve_and_probe(checkout):
    serve = next(line for line in DUPLEX if line.split()[1] == "serve")
    probe = next(line for line in DUPLEX if line.split()[1] == "probe")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "duplex.cli", *shlex.split(serve)[1:], "--port", str(port)],
        cwd=checkout, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/ready")
        result = run(probe.replace(":8998", f":{port}"), checkout)
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.search(r"proven: True", result.stdout)
    finally:
        process.terminate()
        printed = process.communicate(timeout=30)[0]
    assert f"http://127.0.0.1:{port}/?text_prompt=You%20are" in printed
    assert process.returncode == 0


def wait_for(url):
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {url}"
            time.sleep(0.2)


def test_readme_names_only_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`((?:\w+/)+[\w.]+\.\w+)`", README)
    named = {link for link in links if not link.startswith(("runs/", "configs/yours"))}
    assert [link for link in sorted(named) if not (ROOT / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_can_be_planned_and_examined(name, tmp_path):
    path = str(ROOT / "configs" / name)
    for command in (["run", path, "--dry-run", "--json"], ["doctor", path, "--json"]):
        allowed = (0,) if command[0] == "run" else (0, 1)
        result = subprocess.run(
            [sys.executable, "-m", "duplex.cli", *command, "--runs", str(tmp_path / "runs")],
            cwd=tmp_path, env=environment() | {"OPENAI_API_KEY": "none"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode in allowed, result.stderr
        json.loads(result.stdout)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow  # the finished run of these tests goes through the same stages
@pytest.mark.parametrize("name", ["pocket.yaml", "pocket-full.yaml"])
def test_every_config_that_runs_here_writes_its_tensors(name, finished, tmp_path):
    """The data stages of the shipped file itself, with fewer dialogues."""
    finished.lend_models(tmp_path / "runs")
    only = "personas.only=[friendly-june, nervous-mei]"
    result = subprocess.run(
        [sys.executable, "-m", "duplex.cli", "run", str(ROOT / "configs" / name),
         "--to", "tensors", "--set", only, "--set", "dialogues.per_persona=1"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 tensors: done (2 records, 0 rejected, 2 tasks)" in result.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["pocket.yaml", "pocket-full.yaml"])
def test_every_config_that_runs_here_runs_to_its_report(name, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "duplex.cli", "run", str(ROOT / "configs" / name)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    report = re.search(r"Report: +(\S+)", result.stdout)
    assert report and (tmp_path / report[1]).is_file()
