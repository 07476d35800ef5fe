"""`duplex convert moshi-finetune` and `datasets`: sets that others' loaders read, and ours."""

import io
import json

import numpy as np
import pytest
import soundfile
import yaml

from duplex.config import Config
from duplex.files import sha256_bytes
from duplex.records import Speech, TensorClip, Voice, record_line
from duplex.store import StageFolder
from pipeline.imports import import_stage
from tests.stages.test_convert import duplex

RATE = 24_000
WORDS = {
    "june.one": [("user", "Hello", 0.1, 0.4), ("user", "there,", 0.4, 0.7),
                 ("agent", "A", 0.9, 1.0), ("agent", "“latte”.", 1.0, 1.4),
                 ("agent", "please", 1.5, 1.9), ("user", "Mm", 1.2, 1.3)],  # into the turn
    "june.two": [("agent", "Hé", 0.123456789, 0.3), ("agent", "you", 0.3, 0.3)],
    "marcus.one": [("agent", "Now", 0.2, 0.5)],
}  # fmt: skip
SPLIT = {"june.one": "train", "june.two": "train", "marcus.one": "valid"}


def wav(seed):
    samples = np.random.default_rng(seed).integers(-3000, 3000, (2 * RATE, 2)).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def turns_of(words):
    """A turn for each run of one speaker's words."""
    turns = []
    for role, text, start, end in words:
        word = {"text": text, "start_s": start, "end_s": end}
        if turns and turns[-1]["role"] == role:
            turns[-1]["words"].append(word)
        else:
            turns.append({"role": role, "voice_id": f"{role}-voice", "words": [word]})
    for turn in turns:
        own = turn["words"]
        turn |= {"text": " ".join(w["text"] for w in own), "start_s": own[0]["start_s"]}
        turn |= {"end_s": max(own[-1]["end_s"], own[0]["start_s"] + 0.01)}
    return turns


def speech(name, content, **changes):
    fields = {
        "id": name, "dialogue_id": name, "persona_id": name.split(".")[0], "scenario_id": "rush",
        "system_prompt": f"You are “{name}”.", "first_speaker": WORDS[name][0][0],
        "audio": sha256_bytes(content), "num_samples": 2 * RATE, "turns": turns_of(WORDS[name]),
    }  # fmt: skip
    return Speech.model_validate(fields | changes)


def clip(name, codes, content):
    return TensorClip.model_validate({
        "id": name, "speech_id": name, "persona_id": name.split(".")[0],
        "tensor": sha256_bytes(content), "num_frames": codes.shape[1],
        "prompt": [{"label": "silence", "start": 0, "end": 5}],
        "turns": [{"label": "agent", "start": 6, "end": 9}], "text_tokens": 3,
        "dropped_tokens": 1, "alignment": "word", "split": SPLIT[name],
        "codec_digest": "a" * 64, "tokenizer_digest": "b" * 64,
    })  # fmt: skip


def complete(run, number, stage, records, blobs=()):
    folder = StageFolder.of(run, number, stage, "0" * 64)
    (folder.path / "blobs").mkdir(parents=True)
    for content, suffix in blobs:
        (folder.path / "blobs" / f"{sha256_bytes(content)}{suffix}").write_bytes(content)
    lines = [record_line(record) for record in records]
    folder.complete(lines, files=[], counts={"records": len(lines)}, provenance={})
    return folder.path


@pytest.fixture
def audio():
    return {name: wav(seed) for seed, name in enumerate(WORDS)}


@pytest.fixture
def speech_stage(tmp_path, audio):
    records = [speech(name, content) for name, content in audio.items()]
    blobs = [(content, ".wav") for content in audio.values()]
    return complete(tmp_path / "run", 4, "speech", records, blobs)


def tensor_stage(run):
    import torch

    codes, contents = {}, {}
    for index, name in enumerate(WORDS):
        generator = np.random.default_rng(index)
        codes[name] = generator.integers(0, 32_000, (17, 20 + index))
        codes[name][0, :3] = -1
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(codes[name]), buffer)
        contents[name] = buffer.getvalue()
    clips = [clip(name, codes[name], content) for name, content in contents.items()]
    blobs = [(content, ".pt") for content in contents.values()]
    return complete(run, 5, "tensors", clips, blobs), codes, clips


# -- moshi-finetune


def heard(record):
    """(role, word, start, end) of a recording, by start."""
    words = [(t.role, w.text, w.start_s, w.end_s) for t in record.turns for w in t.words]
    return sorted(words, key=lambda word: word[2])


def test_speech_goes_out_and_comes_back_with_the_same_audio_words_times_and_roles(
    tmp_path, monkeypatch, speech_stage, audio, capsys
):
    out = tmp_path / "set"
    assert duplex(monkeypatch, "convert", "moshi-finetune", speech_stage, out) == 0
    assert "1 words that ended where they start got 1 ms" in capsys.readouterr().out
    folder, imported = import_stage(
        Config(name="c"), tmp_path / "runs", "speech", out / "data.jsonl"
    )  # fmt: skip
    back = {record.id: record for record in imported.records}
    assert set(back) == set(WORDS) and imported.refused == []
    for name, content in audio.items():
        original = speech(name, content)
        assert back[name].audio == sha256_bytes(content) == original.audio
        assert (folder / "blobs" / f"{original.audio}.wav").read_bytes() == content
        wanted = [(r, t, a, b if b > a else a + 0.001) for r, t, a, b in heard(original)]
        assert heard(back[name]) == wanted
        assert back[name].system_prompt == original.system_prompt
        assert back[name].persona_id == original.persona_id


def test_the_set_loads_where_moshi_finetune_loads_it(tmp_path, monkeypatch, speech_stage, audio):
    """By sphn from the index's folder, words sorted by start, each with a length."""
    import sphn

    out = tmp_path / "set"
    assert duplex(monkeypatch, "convert", "moshi-finetune", speech_stage, out) == 0
    assert [path.name for path in out.rglob("*jsonl")] == ["data.jsonl"]
    monkeypatch.chdir("/")
    samples = list(sphn.dataset_jsonl(
        str(out / "data.jsonl"), duration_sec=3.0, num_threads=1, sample_rate=RATE,
        pad_last_segment=True,
    ).seq(skip=0, step_by=1))  # fmt: skip
    assert len(samples) == len(WORDS)
    for sample, (name, content) in zip(samples, audio.items(), strict=True):
        assert sample["path"] == str(out / "data_stereo" / f"{name}.wav")
        heard_samples = soundfile.read(io.BytesIO(content), dtype="float32")[0].T
        assert sample["unpadded_len"] == heard_samples.shape[1]
        assert np.allclose(sample["data"][:, : 2 * RATE], heard_samples, atol=1e-4)
        words = json.loads((out / "data_stereo" / f"{name}.json").read_text())["alignments"]
        assert all(start < end for _, (start, end), _ in words)
        assert [w[1][0] for w in words] == sorted(w[1][0] for w in words)
        speakers = {"agent": "SPEAKER_MAIN", "user": "SPEAKER_USER"}
        by_start = sorted(WORDS[name], key=lambda word: word[2])
        assert [(speakers[r], t) for r, t, *_ in by_start] == [(w[2], w[0]) for w in words]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"role": "agent", "text": "No times.", "voice_id": "v", "start_s": 0, "end_s": 1,
           "words": []}], "each turn must have word times"),
        ([{"role": "agent", "text": "Late.", "voice_id": "v", "start_s": 0, "end_s": 9,
           "words": [{"text": "Late.", "start_s": 8, "end_s": 9}]}], "within the audio of 2 s"),
        ([{"role": "agent", "text": "Back.", "voice_id": "v", "start_s": 0, "end_s": 1,
           "words": [{"text": "Back.", "start_s": 1, "end_s": 0.5}]}], "must end after it starts"),
    ],
)  # fmt: skip
def test_speech_that_moshi_finetune_could_not_use_is_refused(
    tmp_path, monkeypatch, capsys, audio, turns, said
):
    records = [
        speech("june.one", audio["june.one"]),
        speech("june.two", audio["june.two"], turns=turns),
    ]
    blobs = [(audio[record.id], ".wav") for record in records]
    stage = complete(tmp_path / "run", 4, "speech", records, blobs)
    out = tmp_path / "set"
    assert duplex(monkeypatch, "convert", "moshi-finetune", stage, out) == 1
    assert said in capsys.readouterr().err and not out.exists()
    assert duplex(monkeypatch, "convert", "moshi-finetune", stage, out, "--skip-refused") == 0
    assert [p.stem for p in (out / "data_stereo").glob("*.wav")] == ["june.one"]


def test_a_damaged_stage_folder_writes_nothing(tmp_path, monkeypatch, capsys, speech_stage):
    blob = next((speech_stage / "blobs").iterdir())
    blob.write_bytes(blob.read_bytes()[:-2])
    for kind in ("moshi-finetune", "datasets"):
        assert duplex(monkeypatch, "convert", kind, speech_stage, tmp_path / "out") == 1
        assert "must have sha256" in capsys.readouterr().err
    (speech_stage / "manifest.json").write_text('{"stage": "speech", "files": 5}')
    for kind in ("moshi-finetune", "datasets"):
        assert duplex(monkeypatch, "convert", kind, speech_stage, tmp_path / "out") == 1
        assert "manifest" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("kind", ["moshi-finetune", "datasets"])
def test_a_wrong_request_ends_with_2_and_writes_nothing(
    tmp_path, monkeypatch, capsys, speech_stage, kind
):
    config = tmp_path / "c.yaml"
    config.write_text("name: unheard-of\n")
    personas = complete(tmp_path / "run", 1, "personas", [])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("kept")
    for arguments, said in (
        ([tmp_path / "none", "out"], "must exist, found nothing"),
        ([taken, "out"], "must be a config (.yaml) or a finished stage folder"),
        ([personas, "out"], "found personas"),
        ([config, "out", "--runs", tmp_path / "runs"], "must be finished in"),
        ([speech_stage, "out", "--set", "seed=1"], "--set changes a config"),
        ([speech_stage, taken], "must not exist or be empty"),
    ):
        where = [tmp_path / "out" if part == "out" else part for part in arguments]
        assert duplex(monkeypatch, "convert", kind, *where) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (taken / "mine").read_text() == "kept"
    assert list(tmp_path.glob(".*")) == []


# -- datasets


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """load_dataset on a folder, offline, with its cache beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def load(out, *name):
        from datasets import load_dataset

        return load_dataset(str(out), *name, cache_dir=str(tmp_path / "cache"))

    return load


def test_tensors_load_code_for_code(tmp_path, monkeypatch, loaded):
    stage, codes, clips = tensor_stage(tmp_path / "run")
    out = tmp_path / "out"
    assert duplex(monkeypatch, "convert", "datasets", stage, out) == 0
    found = loaded(out)
    assert {split: found[split]["id"][:] for split in found} == {
        "train": ["june.one", "june.two"], "validation": ["marcus.one"],
    }  # fmt: skip
    rows = {row["id"]: row for split in found.values() for row in split}
    for record in clips:
        row = rows[record.id]
        assert np.array_equal(np.array(row["codes"]), codes[record.id])
        assert row["prompt"] == [{"label": "silence", "start": 0, "end": 5}]
        assert row["turns"] == [{"label": "agent", "start": 6, "end": 9}]
        assert (row["persona_id"], row["dropped_tokens"]) == (record.persona_id, 1)
        assert row["codec_digest"] == "a" * 64
    assert str(found["train"].features["codes"]) == "List(List(Value('int32')), length=17)"


def test_speech_loads_byte_for_byte_without_a_decoder(
    tmp_path, monkeypatch, loaded, speech_stage, audio
):
    out = tmp_path / "out"
    assert duplex(monkeypatch, "convert", "datasets", speech_stage, out) == 0
    found = loaded(out)
    assert set(found) == {"train"}, "without tensors there is no split"
    for row in found["train"]:
        original = speech(row["id"], audio[row["id"]]).model_dump(mode="json")
        assert row["audio"] == {"bytes": audio[row["id"]], "path": f"{row['id']}.wav"}
        assert row["turns"] == original["turns"]
        for name in ("system_prompt", "persona_id", "num_samples", "first_speaker"):
            assert row[name] == original[name]


def imported(run, stage, folder):
    """A pointer as `duplex import` writes it, so that a config finds the folder."""
    (run / "imports").mkdir(parents=True, exist_ok=True)
    pointer = {"folder": folder.name, "key": "0" * 64}
    (run / "imports" / f"{stage}.json").write_text(json.dumps(pointer))


def test_a_config_gives_tensors_and_speech_in_one_folder(
    tmp_path, monkeypatch, loaded, speech_stage, audio
):
    run = tmp_path / "run"
    tensors, _, _ = tensor_stage(run)
    voice = {"engine": "espeak", "role": "agent", "params": {}, "licence": "GPL-3.0 (the engine)"}
    voices = [Voice.model_validate({"id": name, **voice}) for name in ("agent-voice", "unused")]
    complete(run, 3, "voices", voices)
    for stage, folder in (("speech", speech_stage), ("tensors", tensors)):
        imported(run, stage, folder)
    config = tmp_path / "c.yaml"
    config.write_text("name: run\n")
    out = tmp_path / "out"
    assert duplex(monkeypatch, "convert", "datasets", config, out, "--runs", tmp_path) == 0
    assert loaded(out)["train"].num_rows == 2, "tensors are the default"
    spoken = loaded(out, "speech")
    assert {split: spoken[split]["id"][:] for split in spoken} == {
        "train": ["june.one", "june.two"], "validation": ["marcus.one"],
    }  # fmt: skip
    assert spoken["validation"][0]["audio"]["bytes"] == audio["marcus.one"]
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert [entry["config_name"] for entry in head["configs"]] == ["tensors", "speech"]
    assert "- espeak, 1 voices: GPL-3.0 (the engine)" in card
    assert "unknown, since no record of the run names them: user-voice" in card


def test_large_sets_are_cut_into_shards(tmp_path, monkeypatch, loaded, speech_stage):
    from pipeline.converters import datasets_view

    monkeypatch.setattr(datasets_view, "GROUP_BYTES", 1)
    monkeypatch.setattr(datasets_view, "SHARD_BYTES", 1)
    out = tmp_path / "out"
    assert duplex(monkeypatch, "convert", "datasets", speech_stage, out) == 0
    assert len(list((out / "speech").iterdir())) == 3
    assert loaded(out)["train"]["id"][:] == sorted(WORDS)
