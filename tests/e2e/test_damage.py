"""Damaged files and a full disk: a message with the file's name, nothing lost, no traceback."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import make_workplace


def folder_of(workplace, stage):
    return next(Path(row["folder"]) for row in workplace.status() if row["name"] == stage)


def damage(path):
    """Change one byte in the middle; the size stays. A linked file is copied first."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.unlink()
    path.write_bytes(content)


@pytest.mark.slow  # a damaged tensor: below
def test_a_damaged_recording_is_rejected_by_name(workplace):
    blob = sorted((folder_of(workplace, "speech") / "blobs").iterdir())[0]
    damage(blob)
    changed = ("--to", "tensors", "--set", "tensors.onset_fraction=0.4")
    result = workplace.run(*changed)
    assert result.returncode == 1
    assert "found 1 of 6" in result.stderr and blob.name in result.stderr
    assert "Traceback" not in result.stderr
    lenient = workplace.run(*changed, "--set", "tensors.runtime.max_reject_rate=0.2")
    assert lenient.returncode == 0, lenient.stderr
    assert "5 records, 1 rejected" in lenient.stdout


def test_a_damaged_tensor_stops_training_by_name(workplace):
    blob = sorted((folder_of(workplace, "tensors") / "blobs").iterdir())[0]
    damage(blob)
    result = workplace.run("--to", "train", "--set", "train.steps=2")
    assert result.returncode == 1
    assert blob.name in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow  # a tensor stops training: above
def test_a_damaged_adapter_stops_the_merge_by_name(workplace):
    damage(folder_of(workplace, "train") / "adapter" / "adapter_model.safetensors")
    result = workplace.run("--to", "merge", "--set", "merge.dtype=bfloat16")
    assert result.returncode == 1
    assert "adapter_model.safetensors" in result.stderr and "Traceback" not in result.stderr


def test_a_damaged_manifest_names_itself(workplace):
    manifest = folder_of(workplace, "dialogues") / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    result = workplace.run()
    assert result.returncode == 1
    assert "manifest.json" in result.stderr and "finished records are kept" in result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB for run folders; it can be grown."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    workplace = make_workplace(tmp_path / "small")
    workplace.runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(workplace.runs)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount a small disk")
    yield workplace
    subprocess.run(["umount", "-l", str(workplace.runs)], check=True)


def test_a_full_disk_keeps_what_was_finished(small_disk, finished):
    result = small_disk.run("--to", "speech")
    assert result.returncode == 1
    assert "the disk is full" in result.stderr and "Traceback" not in result.stderr
    rows = {row["name"]: row for row in small_disk.status()}
    assert rows["voices"]["state"] == "done"
    assert rows["speech"]["state"] in ("failed", "missing")
    grow = ["mount", "-o", "remount,size=100m", str(small_disk.runs)]
    subprocess.run(grow, check=True)
    resumed = small_disk.run("--to", "speech")
    assert resumed.returncode == 0, resumed.stderr
    assert small_disk.digests()["speech"] == finished.digests()["speech"]
