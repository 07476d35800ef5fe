"""`duplex import`: outside data becomes a stage's output, or is refused with its reason."""

import io
import json

import numpy as np
import pytest
import soundfile
import torch

from duplex.config import Config
from duplex.errors import MissingInputError, RequestError, StageFailedError
from duplex.records import Dialogue, Speech, TensorClip
from duplex.streams import TEXT_PAD
from pipeline.foreign_tensors import leading_constant_frames
from pipeline.imports import forget_import, import_stage
from pipeline.run import has_rejects_to_retry, plan


def predecessor_record(number=1, **changes):
    record = {
        "conversation_id": f"Conv {number}",
        "persona_id": "P01",
        "persona_name": "Dana",
        "scenario": "rush hour",
        "system_prompt": "You are Dana.",
        "mood": "angry",
        "turns": [{"role": "agent", "text": "Hurry up."}, {"role": "user", "text": "Yes."}],
    }
    return record | changes


def lenient(stage, rate=0.5, **sections):
    return Config.model_validate(
        {"name": "c", stage: {"runtime": {"max_reject_rate": rate}}} | sections
    )


def test_the_predecessors_dialogues_become_dialogues(tmp_path):
    path = tmp_path / "training.json"
    path.write_text(json.dumps([predecessor_record(1), predecessor_record(2)]))
    config = Config(name="c")
    folder, imported = import_stage(config, tmp_path / "runs", "dialogues", path)
    assert [type(record) for record in imported.records] == [Dialogue, Dialogue]
    first = imported.records[0]
    assert (first.id, first.persona_id, first.scenario_id) == ("conv-1", "p01", "rush-hour")
    assert first.first_speaker == "agent" and first.writer == "import"
    step = plan(config, tmp_path / "runs")[1]
    assert step.done and step.imported and step.folder.path == folder
    assert [record.id for record in step.folder.records()] == ["conv-1", "conv-2"]
    assert forget_import(config, tmp_path / "runs", "dialogues")
    assert not plan(config, tmp_path / "runs")[1].imported


def test_an_import_is_never_replaced_by_the_stages_own_work_unasked(tmp_path):
    path = tmp_path / "training.json"
    path.write_text(json.dumps([predecessor_record(1)]))
    config = Config(name="c")
    folder, _ = import_stage(config, tmp_path / "runs", "dialogues", path)
    step = plan(config, tmp_path / "runs")[1]
    assert not has_rejects_to_retry(step, retry_rejected=True)
    (folder / "manifest.json").unlink()
    with pytest.raises(MissingInputError, match="--forget"):
        plan(config, tmp_path / "runs")
    (tmp_path / "runs" / "c" / "imports" / "dialogues.json").write_text('{"folder": ')
    with pytest.raises(MissingInputError, match="Import it again"):
        plan(config, tmp_path / "runs")
    assert forget_import(config, tmp_path / "runs", "dialogues")
    assert not plan(config, tmp_path / "runs")[1].done
    with pytest.raises(RequestError, match="--stage must be one of"):
        forget_import(config, tmp_path / "runs", "../../x")


def test_json_lines_and_our_own_records_are_read_too(tmp_path):
    own = Dialogue.model_validate_json(
        import_stage_of([predecessor_record(1)], tmp_path).to_json()
    ).model_dump(mode="json")
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(predecessor_record(7)) + "\n" + json.dumps(own) + "\n")
    _, imported = import_stage(Config(name="c"), tmp_path / "b", "dialogues", path)
    assert {record.id for record in imported.records} == {"conv-7", "conv-1"}


def import_stage_of(records, tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(records))
    return import_stage(Config(name="c"), tmp_path / "a", "dialogues", path)[1].records[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"turns": []}, "turns must not be empty"),
        ({"turns": [{"role": "barista", "text": "x"}, {"role": "user", "text": "y"}]}, "role"),
        ({"turns": [{"role": "user", "text": " "}, {"role": "agent", "text": "y"}]}, "text"),
        ({"system_prompt": ""}, "system_prompt"),
    ],
)
def test_a_bad_dialogue_is_refused_with_its_reason(tmp_path, change, said):
    path = tmp_path / "t.json"
    path.write_text(json.dumps([predecessor_record(1), predecessor_record(2, **change)]))
    with pytest.raises(StageFailedError, match="Conv 2") as caught:
        import_stage(Config(name="c"), tmp_path / "runs", "dialogues", path)
    assert said in str(caught.value) and not (tmp_path / "runs").exists()
    folder, imported = import_stage(lenient("dialogues"), tmp_path / "runs", "dialogues", path)
    assert len(imported.records) == 1
    assert "Conv 2" in (folder / "rejected.jsonl").read_text()


@pytest.mark.parametrize("content", ["", "[", "[1, 2]", '"text"', "[]", "5"])
def test_a_file_without_dialogues_writes_nothing(tmp_path, content):
    path = tmp_path / "t.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=r"t\.json"):
        import_stage(Config(name="c"), tmp_path / "runs", "dialogues", path)
    assert not (tmp_path / "runs").exists()


def write_recording(folder, name, channels=2, words=None, seconds=2.0):
    generator = np.random.default_rng(3)
    samples = 0.1 * generator.normal(size=(int(seconds * 24_000), channels)).astype(np.float32)
    soundfile.write(folder / f"{name}.wav", samples, 24_000, subtype="PCM_16")
    default = [["hello", [0.1, 0.4], "SPEAKER_MAIN"], ["there", [0.4, 0.5], "SPEAKER_MAIN"],
               ["hi", [1.0, 1.4], "SPEAKER_OTHER"]]  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps({"alignments": words or default}))
    return {"path": f"{name}.wav", "duration": seconds}


def test_a_moshi_finetune_set_becomes_speech(tmp_path):
    index = tmp_path / "set.jsonl"
    index.write_text(json.dumps(write_recording(tmp_path, "a")) + "\n")
    folder, imported = import_stage(Config(name="c"), tmp_path / "runs", "speech", index)
    (speech,) = imported.records
    assert isinstance(speech, Speech)
    assert [(turn.role, turn.text) for turn in speech.turns] == [
        ("agent", "hello there"),
        ("user", "hi"),
    ]
    assert (folder / "blobs" / f"{speech.audio}.wav").read_bytes() == (
        tmp_path / "a.wav"
    ).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": 1}, "must be stereo"),
        ({"words": [["late", [9.0, 9.5], "SPEAKER_MAIN"]]}, "must lie within the audio"),
        ({"words": [["x", [0.0, 0.5], "SPEAKER_OTHER"]]}, "SPEAKER_MAIN"),
        ({"words": [["x", [], "SPEAKER_MAIN"]]}, r"bad\.wav: alignment 0 must be"),
    ],
)
def test_a_bad_recording_is_refused(tmp_path, options, said):
    index = tmp_path / "set.jsonl"
    index.write_text(json.dumps(write_recording(tmp_path, "bad", **options)) + "\n")
    with pytest.raises(RequestError, match=said):
        import_stage(Config(name="c"), tmp_path / "runs", "speech", index)


def test_a_recording_outside_of_its_set_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    write_recording(tmp_path, "outside")
    index = tmp_path / "set" / "set.jsonl"
    index.write_text(json.dumps({"path": "../outside.wav", "duration": 2}) + "\n")
    with pytest.raises(RequestError, match="must lie in the set's own folder"):
        import_stage(Config(name="c"), tmp_path / "runs", "speech", index)


def codes(prompt=12, frames=40, fill=TEXT_PAD):
    generator = np.random.default_rng(1)
    result = generator.integers(0, 60, (17, frames))
    result[0] = fill
    result[9:, :prompt] = 7
    return torch.from_numpy(result)


def tensor_config(tiny_checkpoint):
    return lenient("tensors", 0.9, model={"base": str(tiny_checkpoint)})


def test_bare_tensors_become_clips_with_their_prompt_found(tmp_path, tiny_checkpoint):
    files = tmp_path / "pt"
    files.mkdir()
    torch.save(codes(), files / "one.pt")
    other = codes(fill=-1)
    other[3, 30] += 1
    torch.save(other, files / "two.pt")
    config = tensor_config(tiny_checkpoint)
    folder, imported = import_stage(config, tmp_path / "runs", "tensors", files)
    first, second = imported.records
    assert isinstance(first, TensorClip)
    assert (first.prompt[0].start, first.prompt[0].end) == (0, 12)
    assert {first.split, second.split} == {"train", "valid"}
    assert "2 files without a record do not say which codec" in imported.notes[0]
    assert imported.notes[1:] == [
        "two.pt: 40 text frames of -1 became PAD; where the predecessor made it, "
        "`duplex convert tensors` mends its prompt too"
    ]
    blob = folder / "blobs" / f"{second.tensor}.pt"
    assert (torch.load(io.BytesIO(blob.read_bytes()), weights_only=True)[0] == TEXT_PAD).all()


class Trap:
    """Runs code when it is unpickled, if anybody lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_equal_dialogues_are_never_split(tmp_path, tiny_checkpoint):
    files = tmp_path / "pt"
    files.mkdir()
    for number in range(12):
        tensor = codes(prompt=10 + number % 3)  # another prompt is no other conversation
        tensor[1:9, 25] = number // 3
        torch.save(tensor[:, number % 3 :] if number % 2 else tensor, files / f"f{number}.pt")
    (files / "folder.pt").mkdir()
    _, imported = import_stage(tensor_config(tiny_checkpoint), tmp_path / "runs", "tensors", files)
    assert [name for name, _ in imported.refused] == ["folder.pt"]
    sides = {}
    for clip in imported.records:
        assert clip.split_by == "conversation"
        sides.setdefault(clip.text_digest, set()).add(clip.split)
    assert all(len(splits) == 1 for splits in sides.values())
    assert {"train"} in sides.values() and {"valid"} in sides.values()


def test_hostile_and_damaged_tensors_are_refused_and_run_nothing(tmp_path, tiny_checkpoint):
    files = tmp_path / "pt"
    files.mkdir()
    torch.save(codes(), files / "good.pt")
    torch.save(Trap(tmp_path / "sprung"), files / "trap.pt")
    (files / "rubbish.pt").write_bytes(b"\x80\x04 not a tensor")
    torch.save(codes().float(), files / "floats.pt")
    torch.save(codes()[:9], files / "nine.pt")
    big = codes()
    big[3, 5] = 64
    torch.save(big, files / "range.pt")
    _, imported = import_stage(tensor_config(tiny_checkpoint), tmp_path / "runs", "tensors", files)
    assert [record.id for record in imported.records] == ["good"]
    reasons = dict(imported.refused)
    assert "may run code" in reasons["trap.pt"] and "torch.save" in reasons["rubbish.pt"]
    assert "dense integer tensor" in reasons["floats.pt"] and "shape" in reasons["nine.pt"]
    assert "found 64 in row 3, frame 5" in reasons["range.pt"]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(("constant", "found"), [(12, 12), (7, 0), (40, 0), (1, 0)])
def test_leading_constant_frames(constant, found):
    rows = np.arange(8 * 40).reshape(8, 40)
    rows[:, :constant] = 5
    assert leading_constant_frames(rows) == found
