"""The image: its Dockerfile by a linter and by the rules that cost a pod, its steps as far as they
run without a container engine, and the template.

Executed here, without root: COPY with .dockerignore (emulated), the compile step, and the shell of
the two steps with secrets, with uv and hf replaced by programs that note how they are called.
`test_image_executed.py` (slow, as root) executes every step in a bare root, with nothing replaced
but the base image, and runs the entry point there. Executed nowhere: the CUDA base itself, the
download of models, the health check's schedule.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

from duplex.configfile import load_config
from pipeline.pods.request import MIN_CUDA
from tests.e2e.conftest import ROOT, SMALL
from tests.e2e.image import DOCKERFILE, Step, context_files, ignored, lay_out, steps
from tests.e2e.test_image_executed import settings

SCRIPTS = Path(sysconfig.get_paths()["scripts"])
STEPS = steps(DOCKERFILE.read_text())
SECRET = "hf_planted-secret-value"


def only(word: str) -> list[str]:
    return [step.text for step in STEPS if step.word == word]


def test_the_linters_find_nothing():
    scripts = sorted(str(path) for path in (ROOT / "runpod").glob("*.sh"))
    for command in (["hadolint", str(DOCKERFILE)], ["shellcheck", *scripts]):
        result = subprocess.run(
            [SCRIPTS / command[0], *command[1:]], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_linter_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM nvidia/cuda:latest\nRUN cd /app\nCMD run\n")
    found = subprocess.run([SCRIPTS / "hadolint", tmp_path / "Dockerfile"], capture_output=True)
    assert found.returncode == 1 and b"DL3007" in found.stdout and b"DL3025" in found.stdout


def test_base_and_python():
    base = only("FROM")[-1]
    assert re.fullmatch(r"nvidia/cuda:12\.8\.\d+-cudnn-runtime-ubuntu2[24]\.04", base)
    assert base.startswith(f"nvidia/cuda:{MIN_CUDA}.")  # a host with less cannot start it
    install = next(text for text in only("RUN") if "uv pip install" in text)
    assert "--python 3.11" in install and "--constraint constraints.txt" in install
    extras = re.search(r"\.\[([\w,]+)\]", install)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert "espeak" in extras[1].split(",")


def test_nothing_of_the_image_lies_on_the_volume():
    assert only("WORKDIR") == ["/app"]
    for text in [*only("COPY"), *only("RUN"), *only("ENTRYPOINT")]:
        assert "/workspace" not in text
    (entry,) = map(json.loads, only("ENTRYPOINT"))
    assert entry == ["/app/runpod/start.sh"] and os.access(ROOT / "runpod/start.sh", os.X_OK)
    check = only("HEALTHCHECK")[0].partition("CMD ")[2]
    program = json.loads(check)[-2]
    assert program == "/app/runpod/ping.py" and (ROOT / program.removeprefix("/app/")).is_file()


def test_secrets_come_by_mounts_and_the_environment():
    named = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
    assert [text for text in only("ARG") if named.search(text)] == []
    values = " ".join(only("ENV"))
    assert not named.search(values)
    for text in only("RUN"):
        if "/run/secrets/" in text:
            assert text.startswith("--mount=type=secret,id=")


def test_an_interpreter_that_others_may_enter():
    (place,) = re.findall(r"UV_PYTHON_INSTALL_DIR=(\S+)", " ".join(only("ENV")))
    assert not place.startswith("/root")


def test_no_secret_and_no_run_is_sent_to_a_build(tmp_path):
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    planted = [
        ".env",
        ".env.local",
        "runs/coffee/x",
        "wandb/y",
        "a/__pycache__/z.pyc",
        ".git/config",
    ]
    kept = ["configs/coffee.yaml", "data/pocket/base.json", "runpod/start.sh", "duplex/envelope.py"]
    for name in (*planted, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(context_files(tmp_path)) == {*kept, ".dockerignore"}
    assert not ignored("data/runs/x", ["runs"]) and ignored("runs/a/b", ["runs"])


def shell_of(step_with: str) -> str:
    """The shell of a RUN step, without its mounts."""
    (text,) = [text for text in only("RUN") if step_with in text]
    return re.sub(r"--mount=\S+\s+", "", text)


def executed(shell: str, root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A RUN step with / standing for `root`, uv and hf for programs that note their calls."""
    bin_folder = root / "app" / ".venv" / "bin"
    for name in ("uv", "hf"):
        program = bin_folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{root}/calls\nenv >>{root}/{name}.env\n'
            f'case "$*" in *fails*) exit 1;; esac\n'
        )
        program.chmod(0o755)
    for place in ("/app", "/opt", "/usr/local/bin", "/run/secrets"):
        (root / place[1:]).mkdir(parents=True, exist_ok=True)
        shell = re.sub(rf"(?<![\w.-]){place}(?=[/\s\"')]|$)", str(root) + place, shell)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell], cwd=root / "app", capture_output=True, text=True,
        env={"PATH": f"{bin_folder}:/usr/bin:/bin"} | variables,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "secret", "line", "variable"),
    [
        ("hf download", "hf_token", SECRET, "HF_TOKEN"),
        ("uv pip install", "uv_index", f"UV_INDEX_URL={SECRET}", "UV_INDEX_URL"),
    ],
)
def test_a_build_secret_reaches_its_program_by_the_environment_alone(
    tmp_path, step, secret, line, variable
):
    (tmp_path / "run/secrets").mkdir(parents=True)
    (tmp_path / "run/secrets" / secret).write_text(line)
    result = executed(shell_of(step), tmp_path, DUPLEX_MODELS="kyutai/one kyutai/two")
    assert result.returncode == 0, result.stderr
    calls = (tmp_path / "calls").read_text()
    assert SECRET not in calls and SECRET not in result.stdout + result.stderr
    assert f"{variable}={SECRET}" in (tmp_path / f"{step[:2]}.env").read_text()
    if step == "hf download":
        assert calls.count("hf download kyutai/") == 2 and "app/models/kyutai/two" in calls


def test_the_download_step_does_nothing_unasked_and_fails_with_a_model(tmp_path):
    shell = shell_of("hf download")
    assert executed(shell, tmp_path, DUPLEX_MODELS="").returncode == 0
    assert not (tmp_path / "calls").exists()
    assert executed(shell, tmp_path, DUPLEX_MODELS="it/fails it/works").returncode == 1


def test_the_copied_files_compile_and_are_for_everybody(tmp_path):
    app = lay_out(tmp_path)
    assert not (app / "tests").exists() and not (app / ".git").exists()
    (app / "configs" / "coffee.yaml").chmod(0o600)
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    shell = shell_of("compileall").replace("/app/.venv/bin/python", str(app / ".venv/bin/python"))
    shell = shell.replace("/usr/local/bin/", f"{tmp_path}/usr/local/bin/")
    result = subprocess.run(["bash", "-c", shell], cwd=app, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert list((app / "duplex" / "__pycache__").glob("cli.*.pyc"))
    assert (app / "configs" / "coffee.yaml").stat().st_mode & 0o004
    assert (tmp_path / "usr/local/bin/duplex").is_symlink()


def test_the_settings_by_which_the_executed_image_runs_small():
    config = load_config(ROOT / "configs" / "pocket.yaml", settings().splitlines())
    assert config.train.steps == SMALL["train"]["steps"] and len(config.personas.only) == 3


def test_the_template_fits_image_and_start_script():
    template = json.loads((ROOT / "runpod" / "template.json").read_text())
    # Of `POST /v2/templates`, as RunPod's reference has it: others are refused.
    known = {
        "name", "image", "category", "public", "serverless", "disk", "mounts", "ports", "env",
        "startJupyter", "startSsh", "allowedCudaVersions", "args", "registry",
    }  # fmt: skip
    assert set(template) <= known
    volume = template["mounts"]["persistent"]
    assert set(template["mounts"]) == {"persistent"} and set(volume) == {"size", "path"}
    # On unless it is said: the image has neither.
    assert template["startJupyter"] is False and template["startSsh"] is False
    assert isinstance(template["ports"], list) and isinstance(template["env"], dict)
    exposed = Step("EXPOSE", only("EXPOSE")[0]).text.split()
    assert [port.partition("/")[0] for port in template["ports"]] == exposed
    assert template["env"]["DUPLEX_RUNS"].startswith(volume["path"] + "/")
    config = Path(template["env"]["DUPLEX_CONFIG"])
    assert (ROOT / config.relative_to("/app")).is_file()
    script = (ROOT / "runpod" / "start.sh").read_text()
    for name, value in template["env"].items():
        assert name in script, f"{name} means nothing to start.sh"
        if re.search("TOKEN|KEY", name):
            assert re.fullmatch(r"\{\{ RUNPOD_SECRET_\w+ \}\}", value)
