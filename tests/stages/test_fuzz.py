"""2 000 damaged files: each is taken or refused with a reason; nothing crashes, runs or half-lands.

Good files of every kind that comes from outside are cut, spliced, flipped and overwritten by a
seeded generator, and go through the entries that users have. What is not our own error escapes
and fails the test, as does a refusal without a reason.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duplex.config import Config
from duplex.errors import DuplexError
from duplex.phases import Known
from duplex.records import TensorClip
from duplex.streams import check_codes
from pipeline.converters.coffee_files import convert_tensors
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.tensor_file import read_codes
from pipeline.engines.voicesample import read_voice
from pipeline.imports import import_stage
from pipeline.inspecting.folders import inspect_file

EACH = 500  # files of each kind, four kinds


def mutations(good: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of the files of `good`."""
    rng = random.Random(seed)
    for _ in range(count):
        content = bytearray(rng.choice(good))
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(content) or 1)
            size = rng.choice([1, 2, 4, 16, 200])
            kind = rng.randrange(7)
            if kind == 0:
                content = content[:at]
            elif kind == 1:
                content[at : at + size] = rng.randbytes(size)
            elif kind == 2:
                content[at:at] = rng.randbytes(size)
            elif kind == 3:
                del content[at : at + size]
            elif kind == 4 and content:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 5:
                other = rng.choice(good)
                content = content[:at] + other[rng.randrange(len(other)) :]
            else:
                content[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        yield bytes(content)


class Trap:
    """A pickle that writes a file when it is loaded without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def write_files(folder: Path, contents: Iterator[bytes], suffix: str) -> None:
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"f{number:04d}{suffix}").write_bytes(content)


def lenient(stage: str, checkpoint: Path) -> Config:
    return Config.model_validate(
        {
            "name": "c",
            "model": {"base": str(checkpoint)},
            stage: {"runtime": {"max_reject_rate": 1}},
        }
    )


def check_nothing_half_written(runs: Path, folder: Path | None) -> None:
    """A stage folder is there with its manifest, or nothing is; no temporary file stays."""
    assert not [p for p in runs.rglob("*") if p.name.endswith(".tmp")]
    stages = [p for p in runs.glob("c/0*") if p.is_dir()]
    assert stages == ([folder] if folder else [])
    if folder:
        assert (folder / "manifest.json").is_file()


def import_all(stage: str, path: Path, checkpoint: Path, runs: Path):
    """What came in and what was refused, each with its reason."""
    folder, imported = None, None
    try:
        folder, imported = import_stage(lenient(stage, checkpoint), runs, stage, path)
    except DuplexError as error:
        assert len(str(error)) > 20
    check_nothing_half_written(runs, folder)
    if imported:
        assert all(len(reason) > 10 for _, reason in imported.refused)
    return imported


@pytest.fixture(scope="module")
def tensor_files(tmp_path_factory):
    """Good tensor files, and pickles that must never be run."""
    folder = tmp_path_factory.mktemp("tensors")
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (17, 90)))
    codes[9:, :20] = 7
    values = [codes, codes.to(torch.int16), codes.float(), {"embeddings": codes, "cache": codes}]
    values += [Trap(folder / "sprung"), [codes, codes], codes.to_sparse()]
    contents = []
    for number, value in enumerate(values):
        path = folder / f"{number}.pt"
        torch.save(value, path)
        contents.append(path.read_bytes())
    contents.append(pickle.dumps(Trap(folder / "sprung")))
    path = folder / "legacy.pt"
    torch.save(codes, path, _use_new_zipfile_serialization=False)
    return [*contents, path.read_bytes()], folder / "sprung"


def test_damaged_tensors(tmp_path, tiny_checkpoint, tensor_files):
    good, sprung = tensor_files
    files = tmp_path / "pt"
    write_files(files, mutations(good, EACH, seed=1), ".pt")
    model = Checkpoint.open(tiny_checkpoint).config
    taken = 0
    for path in sorted(files.iterdir()):
        inspection = inspect_file(path, Known(), name=path.name, speeches={}, audio=False)
        try:
            codes, _ = read_codes(path)
        except DuplexError as error:
            assert inspection.harm and len(str(error)) > 20
        else:
            fit = not check_codes(codes, card=model["card"], text_card=model["text_card"])
            taken += codes.ndim == 2 and fit
    imported = import_all("tensors", files, tiny_checkpoint, tmp_path / "runs")
    assert imported and 0 < len(imported.records) <= EACH
    assert len(imported.records) + len(imported.refused) == EACH
    assert all(isinstance(record, TensorClip) for record in imported.records)
    with pytest.raises(DuplexError):
        convert_tensors(
            files, tmp_path / "out", "workbench", model=str(tiny_checkpoint), dialogues=None,
            prompt_fill="pad", skip_refused=False, runs=tmp_path / "runs",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
    assert not sprung.exists()


def stereo(path: Path, subtype: str = "PCM_16", rate: int = 24_000) -> bytes:
    rng = np.random.default_rng(3)
    audio = 0.1 * rng.standard_normal((rate, 2))
    soundfile.write(path, audio, rate, subtype=subtype)
    return path.read_bytes()


TRANSCRIPT = {
    "alignments": [
        ["hello", [0.1, 0.3], "SPEAKER_MAIN"],
        ["there", [0.35, 0.6], "SPEAKER_MAIN"],
        ["yes", [0.7, 0.9], "SPEAKER_1"],
    ]
}


@pytest.mark.slow  # seven seconds of a core; by name: test_recordings.py
def test_damaged_recordings(tmp_path, tiny_checkpoint):
    good = [
        stereo(tmp_path / "a.wav"),
        stereo(tmp_path / "b.wav", "FLOAT"),
        stereo(tmp_path / "c.wav", "PCM_24", 48_000),
        stereo(tmp_path / "d.flac"),
    ]
    files = tmp_path / "wav"
    write_files(files, mutations(good, EACH, seed=2), ".wav")
    for path in sorted(files.iterdir()):
        try:
            assert np.isfinite(read_voice(path)).all()
        except DuplexError as error:
            assert len(str(error)) > 20
    for path in list(files.iterdir()):
        path.with_suffix(".json").write_text(json.dumps(TRANSCRIPT))
    imported = import_all("speech", files, tiny_checkpoint, tmp_path / "runs")
    assert imported and len(imported.records) + len(imported.refused) == EACH


@pytest.mark.slow  # four seconds of a core; by name: test_recordings.py
def test_damaged_transcripts(tmp_path, tiny_checkpoint):
    audio = stereo(tmp_path / "a.wav")
    files = tmp_path / "wav"
    write_files(files, mutations([json.dumps(TRANSCRIPT).encode()], EACH, seed=3), ".json")
    (files / "f0000.json").write_text(json.dumps(TRANSCRIPT))
    for path in list(files.iterdir()):
        path.with_suffix(".wav").write_bytes(audio)
    imported = import_all("speech", files, tiny_checkpoint, tmp_path / "runs")
    assert imported and len(imported.records) + len(imported.refused) == EACH
    assert "f0000" in {record.id for record in imported.records}


@pytest.mark.slow  # four seconds of a core
def test_damaged_lists(tmp_path, tiny_checkpoint):
    """Dialogue lists and indexes: one file each, since a list that is no JSON is refused whole."""
    turns = [{"role": "agent", "text": "Hurry up."}, {"role": "user", "text": "Yes."}]
    dialogue = {
        "conversation_id": "c1", "persona_id": "p1", "persona_name": "Dana", "scenario": "rush",
        "system_prompt": "You are Dana.", "mood": "angry", "turns": turns,
    }  # fmt: skip
    index = {"path": "a.wav", "duration": 1.0, "persona_id": "p1", "system_prompt": "You are Dana."}
    stereo(tmp_path / "a.wav")
    (tmp_path / "a.json").write_text(json.dumps(TRANSCRIPT))
    kinds = {
        "dialogues": (
            [json.dumps([dialogue, dialogue | {"conversation_id": "c2"}]).encode()],
            ".json",
        ),
        "speech": ([f"{json.dumps(index)}\n".encode()], ".jsonl"),
    }
    for stage, (good, suffix) in kinds.items():
        taken = 0
        for number, content in enumerate(mutations(good, EACH // 2, seed=4)):
            path = tmp_path / f"list{suffix}"
            path.write_bytes(content)
            runs = tmp_path / f"runs-{stage}-{number}"
            taken += import_all(stage, path, tiny_checkpoint, runs) is not None
        assert 0 < taken < EACH // 2
