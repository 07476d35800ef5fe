"""What the voices stage depends on: each change of the recordings, by content, name or consent."""

import os

import numpy as np
import pytest

from duplex import files
from duplex.config import Config
from duplex.errors import DataFileError, RecordError, RequestError
from pipeline.engines import voice_sets
from pipeline.engines.voice_choice import Want
from pipeline.engines.voice_recordings import Sample, clips_of_folder
from pipeline.engines.voice_sets import source_digest, source_files
from pipeline.run import plan
from pipeline.voices import VoicesStage
from tests.factories import write_yaml

DIGESTS = {"personas": "a" * 64, "dialogues": "b" * 64}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "recordings"
    for speaker in ("anna", "bert"):
        (root / speaker).mkdir(parents=True)
        (root / speaker / "one.wav").write_bytes(speaker.encode() * 100)
    write_yaml(root / "voices.yaml", {"licence": "CC0-1.0", "consent": "signed, 2024"})
    return root


def config_of(folder, **voices):
    section = {"engine": "pocket-tts", "recordings": str(folder)} | voices
    return Config.model_validate({"name": "toy", "voices": section})


def replace_recording(folder):
    (folder / "anna" / "one.wav").write_bytes(b"abcd" * 100)


def withdraw_consent(folder):
    write_yaml(folder / "voices.yaml", {"licence": "CC0-1.0", "consent": "withdrawn, 2025"})


def rename_speaker(folder):
    (folder / "anna").rename(folder / "abel")


def swap_speakers(folder):
    (folder / "anna").rename(folder / "nobody")
    (folder / "bert").rename(folder / "anna")
    (folder / "nobody").rename(folder / "bert")


CHANGES = [replace_recording, withdraw_consent, rename_speaker, swap_speakers]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_recordings_undoes_the_stage_and_its_voices(folder, tmp_path, change):
    config, runs = config_of(folder), tmp_path / "runs"

    def voices():
        return next(step for step in plan(config, runs) if step.stage.name == "voices")

    for name in ("personas", "dialogues", "voices"):
        step = next(step for step in plan(config, runs) if step.stage.name == name)
        assert step.folder
        step.folder.complete([], files=[], counts={}, provenance={})
    digest = source_digest(config.voices)
    assert voices().done
    change(folder)
    assert not voices().done
    assert source_digest(config.voices) != digest


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_local_data_set_undoes_the_stage(folder, change):
    config = config_of(folder, recordings=None, dataset={"name": str(folder)})
    key, digest = VoicesStage().folder_key(config, DIGESTS), source_digest(config.voices)
    change(folder)
    assert VoicesStage().folder_key(config, DIGESTS) != key
    assert source_digest(config.voices) != digest


def test_what_is_hidden_in_a_data_set_does_not_count(folder):
    config = config_of(folder, recordings=None, dataset={"name": str(folder)})
    before = source_files(config.voices)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_bytes(b"x")
    assert source_files(config.voices) == before
    assert set(before) == {"anna/one.wav", "bert/one.wav", "voices.yaml"}


def test_voices_without_recordings_have_no_files(tmp_path):
    assert VoicesStage().files(Config.model_validate({"name": "toy"})) == {}
    with pytest.raises(DataFileError, match="must be a folder"):
        VoicesStage().files(config_of(tmp_path / "nowhere"))


def test_a_file_is_hashed_once_and_again_when_it_was_changed(tmp_path, monkeypatch):
    path, read = tmp_path / "weights", []
    path.write_bytes(b"x" * 1000)
    own = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: read.append(path) or own(path))
    first = files.known_sha256(path)
    assert files.known_sha256(path) == first and len(read) == 2, "written a moment ago"
    monkeypatch.setattr(files, "SETTLED_NS", -1)
    assert [files.known_sha256(path) for _ in range(3)] == [first] * 3
    assert len(read) == 3
    stat = path.stat()
    with path.open("r+b") as opened:
        opened.write(b"y")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # size and mtime as they were
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # a tick of the file system's clock
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files.known_sha256(path) != first


def test_of_all_of_a_speakers_files_the_best_is_taken(folder, monkeypatch):
    """The twentieth too, which is as many as there may be; of a set's rows five are tried."""
    for number in range(2, 21):
        (folder / "anna" / f"{number:02d}.wav").write_bytes(b"x" * number)
    clips = clips_of_folder(folder, config_of(folder).voices)

    def as_long_as_its_file(clip, vad, *, guess_gender):
        if clip.content.stat().st_size < 20:
            raise RecordError("too short")
        samples = np.zeros(clip.content.stat().st_size)
        return Sample(clip, samples, 0, 1, 30, 8000, True)

    monkeypatch.setattr(voice_sets, "take_sample", as_long_as_its_file)
    own = [clip for clip in clips if clip.speaker == "anna" and "one" not in clip.source]
    want = Want("user-00", "user", "en")
    sample = voice_sets.cast([want], own, None).samples["user-00"]
    assert sample.clip.source == "anna/20.wav"
    with pytest.raises(RequestError, match="5 recordings were refused"):
        voice_sets.cast([want], own, None, thorough=False)
