"""runpod/sky.yaml against what this project knows, without SkyPilot: the GPUs hold the training,
the disk holds the run, secrets have no value, setup installs what the image does, and run works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import pod_costs
from duplex.configfile import load_config
from pipeline import doctor
from pipeline.pods.gpus import holds, load_gpus
from tests.e2e.conftest import ROOT, environment
from tests.e2e.image import DOCKERFILE, steps
from tests.e2e.test_start_script import free_port, fresh, start_here  # noqa: F401

TEXT = (ROOT / "runpod" / "sky.yaml").read_text()
TASK = yaml.safe_load(TEXT)
# SkyPilot's name of an accelerator -> types of data/gpus.yaml that it may be.
TYPES = {
    "A100-80GB": {"NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"},
    "H100": {"NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"},
}


@pytest.fixture
def config(monkeypatch):
    for name in TASK["secrets"]:
        monkeypatch.setenv(name, "a-value-for-the-test")
    return load_config(ROOT / TASK["envs"]["DUPLEX_CONFIG"], TASK["envs"]["DUPLEX_SET"].split("\n"))


def test_only_fields_that_skypilot_has():
    assert set(TASK) == {"name", "workdir", "resources", "envs", "secrets", "setup", "run"}
    fields = {"accelerators", "cpus", "memory", "disk_size", "autostop"}
    assert set(TASK["resources"]) == fields
    assert TASK["workdir"] == "." and TASK["resources"]["autostop"]["idle_minutes"] > 0
    # The page is reached by ssh: an open tunnel must not keep the machine.
    assert TASK["resources"]["autostop"]["wait_for"] == "jobs"


def test_secrets_are_the_configs_and_have_no_value_here():
    assert TASK["secrets"] == dict.fromkeys(("DUPLEX_TOKEN", "OPENAI_API_KEY", "HF_TOKEN"))
    named = set(re.findall(r"\$\{(\w+)\}", (ROOT / TASK["envs"]["DUPLEX_CONFIG"]).read_text()))
    assert named <= set(TASK["secrets"])
    assert not [name for name in TASK["envs"] if re.search("TOKEN|KEY|SECRET", name)]
    shown = re.findall(r"--secret ([A-Z_]+)", TEXT)
    assert shown == list(TASK["secrets"])


def test_each_accelerator_holds_the_training_by_the_table_of_costs(config):
    accelerators = TASK["resources"]["accelerators"]
    assert set(accelerators) == set(TYPES)
    assert set(accelerators.values()) == {config.train.processes} == {1}
    need_gb = doctor.training_memory(config).total / 1e9
    rows = {row.gpu.id: row for row in pod_costs.rows()}
    table = {gpu.id: gpu for gpu in load_gpus(ROOT / "data" / "gpus.yaml")}
    for gpu_id in set.union(*TYPES.values()):
        assert holds(table[gpu_id].memory_gb, need_gb)
        settings = rows[gpu_id].settings
        assert settings is not None
        assert TASK["envs"]["DUPLEX_SET"] == "\n".join(f"{k}={v}" for k, v in settings.items())
    hours = max(rows[gpu_id].whole_h.value for gpu_id in set.union(*TYPES.values()))
    assert hours < int(TASK["envs"]["DUPLEX_HOURS"])


def test_the_disk_holds_the_packages_and_what_the_doctor_asks_for(config, tmp_path):
    (check,) = doctor._space(config, tmp_path)
    need_gb = float(re.search(r"about ([\d.]+) GB needed", check["found"])[1])
    assert need_gb > 40 and need_gb + 30 < TASK["resources"]["disk_size"]


def test_setup_installs_what_the_image_installs():
    (image,) = [step.text for step in steps(DOCKERFILE.read_text())
                if step.word == "RUN" and "pip install" in step.text]  # fmt: skip
    for words in ("--managed-python --python 3.11", "--constraint constraints.txt"):
        assert words in image and words in TASK["setup"]
    extras = [re.search(r"'\.\[[\w,]+\]'", text)[0] for text in (image, TASK["setup"])]
    assert extras[0] == extras[1]


@pytest.mark.slow  # seven seconds of a core
def test_what_is_run_ends_well_when_its_hours_are_over(fresh):  # noqa: F811
    """The task's own line, with start.sh as it is; SIGTERM ends it as it ends a pod."""
    variables = environment() | TASK["envs"] | {
        "DUPLEX_CONFIG": str(fresh.config), "DUPLEX_RUNS": str(fresh.runs), "DUPLEX_SET": "",
        "DUPLEX_PORT": str(free_port()), "DUPLEX_AGENT_PORT": str(free_port()),
        "DUPLEX_HOURS": "0.002", "DUPLEX_PYTHON": sys.executable, "DUPLEX_USER": "",
        "DUPLEX_TOKEN": "planted-token-of-sky",
    }  # fmt: skip
    variables = {name: str(value) for name, value in variables.items()}
    result = subprocess.run(
        ["bash", "-c", TASK["run"]], cwd=ROOT, env=variables, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stopping on SIGTERM" in result.stdout and "planted-token" not in result.stdout
    assert Path(fresh.runs, "pod.log").is_file() and os.access(ROOT / "runpod/start.sh", os.X_OK)


def test_a_failure_of_what_is_run_is_the_jobs(fresh):  # noqa: F811
    variables = environment() | {name: str(value) for name, value in TASK["envs"].items()} | {
        "DUPLEX_PYTHON": "/nowhere/python", "DUPLEX_RUNS": str(fresh.runs), "DUPLEX_USER": "",
    }  # fmt: skip
    result = subprocess.run(
        ["bash", "-c", TASK["run"]], cwd=ROOT, env=variables, capture_output=True, timeout=60
    )
    assert result.returncode == 1
