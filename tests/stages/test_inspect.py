"""`duplex inspect` on files and folders: exit codes, JSON, picture, and hostile files."""

from __future__ import annotations

import io
import json
import os
import pickle
import wave
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from duplex.cli import app
from duplex.errors import DuplexError
from duplex.files import sha256_bytes
from duplex.records import Speech, SpokenTurn, TensorClip, record_line
from duplex.sinks import FolderBlobs
from duplex.store import StageFolder
from duplex.streams import USER_ROWS, build_prompt, system_text
from tests import tensorfiles as make


def inspect(*arguments):
    """Exit code and output, as the `duplex` script gives them."""
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if isinstance(result.exception, DuplexError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def as_json(*arguments):
    code, output = inspect(*arguments, "--json")
    return code, json.loads(output)


def codes_in(report):
    return {found["code"] for found in report["findings"]}


def save(codes, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(torch.from_numpy(codes), path)
    return path


def wav_bytes(agent_level, user_level, seconds=3):
    time = np.arange(24_000 * seconds) / 24_000
    tone = np.sin(2 * np.pi * 440 * time)
    pcm = np.stack([agent_level * tone, user_level * tone], axis=1) * 32767
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(24_000)
        file.writeframes(pcm.astype("<i2").tobytes())
    return content.getvalue()


# -- one file


def test_a_clean_file(tmp_path):
    code, output = inspect(save(make.workbench(), tmp_path / "a.pt"))
    assert code == 0
    assert "looks like workbench" in output and "fit for training" in output


def test_a_file_of_the_predecessor(tmp_path):
    path = save(make.coffee(), tmp_path / "conv_0000.pt")
    code, output = inspect(path)
    assert code == 1
    assert "looks like coffee-compat" in output and "zero-text" in output
    code, report = as_json(path)
    assert code == 1 and report["harm"] and report["profile"]["name"] == "coffee-compat"
    assert {"closing-tag", "zero-text"} <= codes_in(report)
    assert report["measures"]["frame_0"] == "kept"


def test_int16_is_allowed_and_int32_is_not(tmp_path):
    codes = torch.from_numpy(make.workbench())
    torch.save(codes.to(torch.int16), tmp_path / "small.pt")
    torch.save(codes.to(torch.int32), tmp_path / "wide.pt")
    assert as_json(tmp_path / "small.pt")[0] == 0
    code, report = as_json(tmp_path / "wide.pt")
    assert code == 1 and codes_in(report) >= {"dtype"}


@pytest.mark.parametrize("frames", [27, 300, 2900])
def test_the_picture_is_a_png(tmp_path, frames):
    turns = (("agent", 2, 22, 6),) if frames < 100 else make.TURNS
    path = save(make.workbench(turns=turns, frames=frames), tmp_path / "a.pt")
    picture = tmp_path / "out" / "a.png"
    assert inspect(path, "--picture", picture)[0] == 0
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width == 1760 and 300 <= image.height <= 2400
        # Strips keep a frame wider than a pixel: tokens, silence and speech all show.
        assert len(set(np.asarray(image.convert("RGB"))[:, 200:].reshape(-1, 3).tobytes())) > 20
    assert [file.name for file in picture.parent.iterdir()] == ["a.png"]


def test_loudness_is_of_the_recording_beside_the_file(tmp_path):
    path = save(make.workbench(), tmp_path / "a.pt")
    (tmp_path / "a.wav").write_bytes(wav_bytes(0.09, 0.0))
    code, report = as_json(path)
    # A sine of amplitude a has about 20 log10(a) - 3 LUFS at 440 Hz.
    assert report["loudness_lufs"]["agent"] == pytest.approx(-23.9, abs=1.0)
    assert report["loudness_lufs"]["user"] is None
    assert code == 0 and "loudness" in codes_in(report)
    (tmp_path / "a.wav").write_bytes(wav_bytes(0.0, 0.09))
    assert as_json(path)[0] == 1
    assert "loudness_lufs" in as_json(path, "--no-audio")[1]
    assert as_json(path, "--no-audio")[1]["loudness_lufs"] is None
    (tmp_path / "a.wav").write_bytes(b"RIFF rubbish")
    assert "loudness" in codes_in(as_json(path)[1])


# -- wrong requests


def test_wrong_requests_exit_2(tmp_path):
    path = save(make.workbench(), tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    rubbish = tmp_path / "no.model"
    rubbish.write_bytes(b"rubbish")
    for arguments, said in (
        ([tmp_path / "gone.pt"], "found nothing there"),
        ([tmp_path / "pipe"], "found nothing there"),
        ([tmp_path / "empty"], "found none"),
        ([tmp_path, "--picture", tmp_path / "x.png"], "draws one file"),
        ([path, "--picture", tmp_path / "x.jpg"], ".png"),
        ([path, "--picture", tmp_path], ".png"),
        ([path, "--model", tmp_path / "gone"], "checkpoint folder"),
        ([path, "--model", tmp_path / "empty"], "config.json"),
        ([path, "--tokenizer", rubbish], "SentencePiece"),
        ([path, "--tokenizer", rubbish, "--model", tmp_path], "give --model or --tokenizer"),
    ):
        code, output = inspect(*arguments)
        assert code == 2 and said in output, (arguments, output)
    assert not (tmp_path / "x.png").exists()


# -- hostile and foreign files


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch PWNED",))


def write_packed_bomb(path):
    """An archive of a few kilobytes that unpacks to more than any conversation."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * (200 << 20))


HOSTILE = {
    "rubbish": (lambda p: p.write_bytes(b"rubbish" * 100), "no file of torch.save"),
    "nothing": (lambda p: p.write_bytes(b""), "no file of torch.save"),
    "a pickle that runs": (lambda p: p.write_bytes(pickle.dumps(Bomb())), "pickled objects"),
    "a saved object": (lambda p: torch.save(Bomb(), p), "pickled objects"),
    "a list": (lambda p: torch.save([1, 2], p), "a list"),
    "a dict": (lambda p: torch.save({"codes": torch.zeros(17, 3)}, p), "a dict of 1 (codes"),
    "floats": (lambda p: torch.save(torch.zeros(17, 5), p), "real numbers"),
    "complex": (lambda p: torch.save(torch.zeros(17, 5, dtype=torch.complex64), p), "complex"),
    "bools": (lambda p: torch.save(torch.zeros(17, 5, dtype=torch.bool), p), "bool"),
    "sparse": (lambda p: torch.save(torch.eye(17).long().to_sparse(), p), "layout sparse_coo"),
    "quantized": (
        lambda p: torch.save(torch.quantize_per_tensor(torch.zeros(17, 5), 1, 0, torch.qint8), p),
        "quantized",
    ),
    "meta": (lambda p: torch.save(torch.zeros(17, 5, device="meta").long(), p), "without data"),
    "a view of far more than is there": (
        lambda p: torch.save(torch.zeros(17, 1, dtype=torch.int64).expand(17, 10**11), p),
        "more than any conversation",
    ),
    "a packed bomb": (write_packed_bomb, "unpacks to"),
    "a voice": (
        lambda p: torch.save({"embeddings": torch.zeros(9, 1, 1, 8), "cache": torch.zeros(1)}, p),
        "packaged voice NATF2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_tensor_of_codes_is_named(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write, said = HOSTILE[kind]
    path = tmp_path / "NATF2.pt"
    write(path)
    code, report = as_json(path)
    assert code == 1 and report["measures"] is None
    assert said in report["findings"][0]["message"]
    code, output = inspect(path)
    assert code == 1 and "Traceback" not in output
    assert not (tmp_path / "PWNED").exists()
    assert inspect(path, "--picture", tmp_path / "x.png")[0] == 2


def test_a_file_larger_than_any_conversation(tmp_path):
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    code, report = as_json(path)
    assert code == 1 and "65 MiB" in report["findings"][0]["message"]


def test_names_are_shown_as_text(tmp_path):
    path = save(make.workbench(), tmp_path / "[red]\x1b[2Ja.pt")
    code, output = inspect(path)
    assert code == 0 and "[red]" in output and "\x1b[2J" not in output


# -- folders


def test_a_folder_of_bare_files(tmp_path):
    save(make.workbench(), tmp_path / "a.pt")
    save(make.coffee(), tmp_path / "old" / "b.pt")
    save(make.coffee(), tmp_path / "old" / "c.pt")
    (tmp_path / "old" / "d.pt").write_bytes(b"rubbish")
    save(make.moshi(), tmp_path / "too" / "deep" / "e.pt")
    code, report = as_json(tmp_path)
    summary = report["summary"]
    assert code == 1 and summary["files"] == 4 and summary["files_with_harm"] == 3
    assert summary["profiles"] == {"coffee-compat": 2, "workbench": 1, "unknown": 1}
    assert {"code": "zero-text", "severity": "harm", "files": 2} in summary["findings"]
    assert codes_in(report) == {"duplicate"}
    code, output = inspect(tmp_path)
    assert code == 1 and "old/b.pt: " in output and "4 files" in output


def spoken(clip_id, user_voice):
    turns = tuple(
        SpokenTurn(role=role, text=f"{clip_id} {role}", voice_id=voice, start_s=a, end_s=b,
                   words=())
        for role, voice, a, b in (("user", user_voice, 0, 1), ("agent", clip_id[:3], 1, 2))
    )  # fmt: skip
    audio = wav_bytes(0.09, 0.09)
    return audio, Speech(
        id=clip_id, dialogue_id=clip_id, persona_id=clip_id[:3], scenario_id="rush",
        system_prompt="You are Ann.", first_speaker="user", audio=sha256_bytes(audio),
        num_samples=72_000, turns=turns,
    )  # fmt: skip


def write_stage(folder, records, blobs, stage="tensors"):
    stage_folder = StageFolder(folder, stage, "k" * 8)
    stage_folder.path.mkdir(parents=True)
    sink = FolderBlobs(stage_folder)
    for content, suffix in blobs:
        sink.put(content, suffix)
    lines = [record_line(record) for record in records]
    stage_folder.complete(lines, files=[], counts={"records": len(lines)}, provenance={})
    return folder


def write_run(run, changes=()):
    """A run with speech and tensors: clips ann.0 and ann.1 for training, bob.0 for validation.

    changes: (id, change) of the records.
    """
    speeches, clips, blobs, audios = [], [], [], []
    for number, name in enumerate(("ann.0", "ann.1", "bob.0")):
        codes = make.workbench(seed=number)
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(codes), buffer)
        fields = {
            "id": name, "speech_id": name, "dialogue_id": name, "persona_id": name[:3],
            "voices": (name[:3],), "text_digest": f"{number}" * 64,
            "tensor": sha256_bytes(buffer.getvalue()),
            "split": "valid" if name == "bob.0" else "train",
        }  # fmt: skip
        clips.append(make.record(codes, **(fields | dict(changes).get(name, {}))))
        blobs.append((buffer.getvalue(), ".pt"))
        audio, speech = spoken(name, f"user-{number}")
        speeches.append(speech)
        audios.append((audio, ".wav"))
    write_stage(run / "04-speech-aaaaaaaa", speeches, audios, "speech")
    return write_stage(run / "05-tensors-bbbbbbbb", clips, blobs)


def test_a_clean_stage_folder(tmp_path):
    stage = write_run(tmp_path / "run")
    for folder in (stage, tmp_path / "run"):
        code, report = as_json(folder)
        assert code == 0, report["findings"]
        assert report["kind"] == "tensors stage" and report["summary"]["files"] == 3
        assert report["summary"]["splits"] == {"train": 2, "valid": 1}
        assert codes_in(report) == set()
        assert [file["record_id"] for file in report["files"]] == ["ann.0", "ann.1", "bob.0"]
        assert all(file["loudness_lufs"] for file in report["files"])


@pytest.mark.parametrize(
    ("changes", "code", "harm"),
    [
        ({"text_digest": "0" * 64}, "split-overlap", True),
        ({"voices": ("ann",)}, "split-overlap", True),
        ({"dialogue_id": "ann.0"}, "split-overlap", True),
        ({"persona_id": "ann"}, "personas-on-both-sides", False),
        ({"split": "train"}, "one-sided", False),
    ],
)
def test_what_is_on_both_sides_of_a_split(tmp_path, changes, code, harm):
    stage = write_run(tmp_path / "run", [("bob.0", changes)])
    exit_code, report = as_json(stage, "--no-audio")
    assert code in codes_in(report) and exit_code == harm


def test_a_blob_is_read_with_its_record(tmp_path):
    stage = write_run(tmp_path / "run", [("ann.0", {"dropped_tokens": 2, "text_tokens": 36})])
    clip = next(r for r in StageFolder(stage, "tensors", "").records() if r.id == "ann.0")
    assert isinstance(clip, TensorClip)
    code, report = as_json(stage / "blobs" / f"{clip.tensor}.pt")
    assert code == 1 and report["record_id"] == "ann.0"
    assert "dropped-tokens" in codes_in(report)


def test_damage_in_a_stage_folder(tmp_path):
    stage = write_run(tmp_path / "run")
    blob = sorted((stage / "blobs").glob("*.pt"))[0]
    blob.write_bytes(blob.read_bytes()[:-9])
    code, report = as_json(stage)
    assert code == 1
    assert {"code": "record-mismatch", "severity": "harm", "files": 1} in (
        report["summary"]["findings"]
    )
    assert inspect(tmp_path / "run" / "04-speech-aaaaaaaa")[0] == 2
    (stage / "manifest.json").write_text("{")
    assert inspect(stage)[0] == 1


# -- a real checkpoint


def test_a_file_held_to_a_checkpoint(tmp_path, tiny_checkpoint):
    """The codec's own tokens and the tokenizer's own text pass; another prompt does not."""
    from pipeline.engines.checkpoint import Checkpoint
    from pipeline.inspecting.known import find_checkpoint, known_of_checkpoint

    checkpoint = Checkpoint.open(tiny_checkpoint)
    known = known_of_checkpoint(checkpoint, "tiny")
    assert known.tokens is not None
    tokenizer = checkpoint.load_tokenizer()
    text = system_text("You work for Sunrise Coffee as a customer named Maria")
    prompt = build_prompt(tokenizer.encode(text), known.tokens)
    body = make.dialogue(codec=known.tokens)
    body[1:] %= 64
    body[0] = np.where(body[0] >= 2000, body[0] % 300 + 10, body[0])
    path = save(np.concatenate([prompt.training_codes(), body], axis=1), tmp_path / "a.pt")
    code, report = as_json(path, "--model", tiny_checkpoint)
    assert report["measures"]["prompt"]["decoded"] == text
    assert report["measures"]["prompt"]["foreign_frames"] == 0
    assert codes_in(report) & {"prompt-rows", "out-of-range", "no-tags"} == set() and code == 0

    foreign = make.workbench()
    foreign[USER_ROWS, :20] = 63
    code, report = as_json(save(foreign, tmp_path / "b.pt"), "--model", tiny_checkpoint)
    assert code == 1 and {"out-of-range", "foreign-tokenizer"} <= codes_in(report)

    tokenizer_file = checkpoint.files()["tokenizer"]
    code, report = as_json(path, "--tokenizer", tokenizer_file)
    assert code == 0 and report["measures"]["prompt"]["decoded"] == text

    # A checkpoint that nobody named counts only under the record's digests.
    models = tmp_path / "runs" / ".models"
    models.mkdir(parents=True)
    (models / "tiny").symlink_to(tiny_checkpoint)
    clip = make.record(
        make.workbench(), codec_digest=known.codec_digest, tokenizer_digest=known.tokenizer_digest
    )
    found = find_checkpoint(tmp_path / "runs" / "r", clip)
    assert found is not None and found.tokens == known.tokens
    other = replace(known, codec_digest="f" * 64).codec_digest
    assert find_checkpoint(
        tmp_path / "runs" / "r", clip.model_copy(update={"codec_digest": other})
    ) is None  # fmt: skip
