"""The doctor's look at memory and disk: sums of what the config asks for, and what would help."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from duplex.config import Config
from duplex.datafiles import CHECKOUT
from pipeline import doctor
from pipeline.pod_session import GPUS, PodOptions, Session
from pipeline.pods.clock import WallClock
from pipeline.pods.gpus import load_gpus, with_margin
from training.estimate import MOSHI_7B, estimate_memory, parameter_count

MOSHIKO, PERSONAPLEX = "kyutai/moshiko-pytorch-bf16", "nvidia/personaplex-7b-v1"


def config(base=MOSHIKO, merge=None, **train):
    section = {"dtype": "bfloat16", "batch_size": 4, "crop_frames": 1250} | train
    return Config.model_validate(
        {"name": "x", "model": {"base": base}, "train": section, "merge": merge or {}}
    )


def memory_of(config):
    return estimate_memory(doctor._lm_config(config), config.train)


def test_what_fits_and_what_would_help():
    whole = config()
    memory = memory_of(whole)
    need, least = (with_margin(size / 1e9) * 1e9 for size in (memory.total, memory.fixed))
    assert need > memory.total + 1e9  # CUDA's own memory alone is that much
    assert doctor._memory(whole, "GPU", need + 1)["state"] == "ok"
    tight = doctor._memory(whole, "GPU", need - 1)
    assert tight["state"] == "warn" and "checkpointing: full" in tight["found"]
    small = doctor._memory(whole, "GPU", least - 1)
    assert small["state"] == "fail" and "quantize: nf4" in small["found"]
    assert "computed, never measured" in small["found"]
    single = config(dtype="float32")
    assert "dtype: bfloat16" in doctor._memory(single, "GPU", 1.0)["found"]


@pytest.mark.parametrize(
    ("batch", "frames", "smallest_gb"),
    [(1, 400, 24), (1, 1250, 48), (4, 1250, 48), (8, 1250, 80), (12, 1250, 94)],
)
def test_the_doctor_and_the_choice_of_a_pods_gpu_agree(batch, frames, smallest_gb, tmp_path):
    """On every GPU of the table. The second needs 22 GB, and 25.7 with what that leaves out."""
    asked = config(batch_size=batch, crop_frames=frames)
    session = Session(asked, Path("x.yaml"), tmp_path, {"RUNPOD_API_KEY": "rpa_x"}, WallClock(),
                      as_json=False)  # fmt: skip
    table = load_gpus(CHECKOUT / GPUS)
    passed = [gpu for gpu in table if doctor._memory(asked, gpu.id, gpu.memory_gb * 1e9)["state"]
              == "ok"]  # fmt: skip
    assert set(session.gpus(PodOptions())) == set(passed)
    assert min(gpu.memory_gb for gpu in passed) == smallest_gb


@pytest.mark.parametrize(("asked", "state"), [(1, "warn"), (2, None), (4, "fail")])
def test_each_process_needs_a_gpu(monkeypatch, asked, state):
    import torch

    gpu = SimpleNamespace(name="GPU", total_memory=10**12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    checks = {check["check"]: check for check in doctor._device(config(processes=asked))}
    assert checks["device"]["state"] == "ok"
    assert checks.get("gpus", {}).get("state") == state


def test_sizes_come_from_the_model_that_is_named(tiny_checkpoint, tmp_path):
    assert doctor._lm_config(config())["dep_q"] == 8
    assert doctor._lm_config(config(PERSONAPLEX))["dep_q"] == 16
    tiny = doctor._lm_config(config(str(tiny_checkpoint)))
    assert tiny["dim"] == 64 and parameter_count(tiny) < 1e6
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "personaplex"}))
    assert doctor._lm_config(config(str(tmp_path)))["dep_q"] == 16
    (tmp_path / "config.json").write_text("{")
    assert doctor._lm_config(config(str(tmp_path)))["dim"] == 4096
    assert memory_of(config("pocket")).total < 2e9


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 6), ("bfloat16", 4)])
def test_the_disk_holds_base_and_merge(tmp_path, dtype, bytes_each):
    (check,) = doctor._space(config(merge={"dtype": dtype}), tmp_path / "runs")
    need = parameter_count(MOSHI_7B) * bytes_each + 5e9
    assert f"about {need / 1e9:.1f} GB needed" in check["found"]


def test_the_package_for_4_bits_is_asked_for(monkeypatch):
    version = doctor.metadata.version

    def missing(name):
        if name == "bitsandbytes":
            raise doctor.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert doctor._packages(config())[0]["state"] == "ok"
    (check,) = doctor._packages(config(quantize="nf4"))
    assert check["state"] == "fail" and "pip install -e '.[quantize]'" in check["found"]


def test_an_adapter_to_go_on_from_must_be_there(tmp_path):
    (check,) = doctor._data(config(continue_from=str(tmp_path)))
    assert check["state"] == "fail" and "train.continue_from" in check["found"]


def test_the_estimate_imports_nothing_heavy():
    code = (
        "import sys; from duplex.config import Config; from pipeline import doctor;"
        "c = Config.model_validate({'name': 'x'});"
        "assert doctor._memory(c, 'GPU', 1e12)['state'] == 'ok';"
        "print({'torch', 'moshi', 'peft', 'bitsandbytes'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr
