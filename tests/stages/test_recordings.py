"""Recordings through `duplex import --stage speech`: real voice activity, a real recogniser."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duplex.config import Config
from duplex.datafiles import CHECKOUT
from duplex.errors import CorruptFileError, MissingInputError, RequestError, StageFailedError
from duplex.frames import SAMPLE_RATE
from duplex.metrics import word_error_rate, words_of
from pipeline import recordings
from pipeline.imports import import_stage
from pipeline.recordings import RecordingOptions, voice_id
from tests import forked
from tests.stages.recordings_helpers import SCRIPT, speak, write

SPHINX = RecordingOptions(persona="Ann B", prompt="You are Ann.", recogniser="pocketsphinx")


@pytest.fixture(scope="module")
def conversation():
    return speak()


@pytest.fixture(scope="module")
def short():
    """A user's and an agent's word or two, for tests that need no more."""
    return speak((("user", 0.5, "Hello there."), ("agent", 2.0, "A large coffee.")))


def bring_in(path, tmp_path, options=None, rate=0.0):
    config = Config.model_validate({"name": "c", "speech": {"runtime": {"max_reject_rate": rate}}})
    return import_stage(config, tmp_path / "runs", "speech", path, recording=options)


@pytest.mark.slow  # six seconds of a core
def test_a_recording_without_a_transcript_gets_its_turns_and_words(tmp_path, conversation):
    """Bounds: turns within 0.2 s; word error rate under .5 (measured: .24, pocketsphinx)."""
    samples, truth = conversation
    path = write(tmp_path / "call.wav", samples, rate=48_000)
    folder, imported = bring_in(path, tmp_path, SPHINX)
    (speech,) = imported.records
    assert (speech.persona_id, speech.system_prompt) == ("ann-b", "You are Ann.")
    assert speech.first_speaker == "user"
    assert [turn.role for turn in speech.turns] == [turn[0] for turn in truth]
    assert {turn.voice_id for turn in speech.turns} == {"recorded.ann-b", "recorded.user"}
    errors = total = 0
    for turn, (_, start_s, end_s, _), (_, _, text) in zip(speech.turns, truth, SCRIPT, strict=True):
        assert turn.start_s == pytest.approx(start_s, abs=0.2)
        assert turn.end_s == pytest.approx(end_s, abs=0.2)
        times = [time for word in turn.words for time in (word.start_s, word.end_s)]
        assert times == sorted(times)
        assert turn.start_s <= times[0] and times[-1] <= turn.end_s
        reference = words_of(text)
        errors += word_error_rate(reference, words_of(turn.text)) * len(reference)
        total += len(reference)
    assert errors / total < 0.5
    audio, rate = soundfile.read(folder / "blobs" / f"{speech.audio}.wav")
    assert rate == SAMPLE_RATE and audio.shape == (speech.num_samples, 2)
    provenance = json.loads((folder / "manifest.json").read_text())["provenance"]
    assert provenance["recogniser"]["revision"].startswith("pocketsphinx 5")
    assert provenance["voice_activity"].startswith("silero-vad 6")


def test_a_transcript_is_taken_as_it_is_and_checked_by_ear(tmp_path, conversation):
    samples, truth = conversation
    write(tmp_path / "set" / "good.wav", samples, turns=truth)
    swapped = [({"agent": "user", "user": "agent"}[t[0]], *t[1:]) for t in truth]
    write(tmp_path / "set" / "swapped.flac", samples, turns=swapped)
    folder, imported = bring_in(tmp_path / "set", tmp_path)
    good, other = imported.records
    assert [(t.role, t.start_s, t.end_s) for t in good.turns] == [t[:3] for t in truth]
    assert [w.text for t in good.turns for w in t.words] == [w[0] for t in truth for w in t[3]]
    assert (good.persona_id, other.persona_id) == ("good", "swapped")
    assert all("are the sides swapped?" in note for note in imported.notes)
    assert len(imported.notes) == 2 and all("swapped.flac" in note for note in imported.notes)
    assert "recogniser" not in json.loads((folder / "manifest.json").read_text())["provenance"]
    assert good.audio == hashlib.sha256((tmp_path / "set" / "good.wav").read_bytes()).hexdigest()


def test_a_file_says_who_it_is_before_the_options_do(tmp_path, short):
    samples, truth = short
    for name in ("a", "b"):
        write(tmp_path / "set" / f"{name}.wav", samples, turns=truth)
    facts = [
        {"path": "a.wav", "persona_id": "Bob", "system_prompt": "Be Bob.", "first_speaker": "agent"}
    ]
    lines = "".join(json.dumps(fact) + "\n" for fact in facts)
    (tmp_path / "set" / "metadata.jsonl").write_text(lines)
    _, imported = bring_in(tmp_path / "set", tmp_path, SPHINX)
    first, second = imported.records
    assert (first.persona_id, first.system_prompt, first.first_speaker) == (
        "bob",
        "Be Bob.",
        "agent",
    )
    assert (second.persona_id, second.first_speaker) == ("ann-b", "user")
    assert imported.notes == ["a.wav: first_speaker is given as agent, but the user is heard first"]
    index = tmp_path / "set" / "index.jsonl"
    index.write_text(json.dumps({"path": "b.wav", "duration": 4, "persona_id": "Carl"}))
    (speech,) = bring_in(index, tmp_path)[1].records
    assert speech.persona_id == "carl"


def test_a_transcript_of_the_models_side_alone_keeps_who_speaks_first(tmp_path, short):
    samples, truth = short
    agent = [turn for turn in truth if turn[0] == "agent"]
    path = write(tmp_path / "a.wav", samples, turns=agent)
    (speech,) = bring_in(path, tmp_path)[1].records
    assert speech.first_speaker == "user"
    assert [turn.role for turn in speech.turns] == ["agent"]


def refused(tmp_path, path, options=None):
    with pytest.raises(RequestError) as caught:
        bring_in(path, tmp_path, options)
    assert not (tmp_path / "runs").exists(), "nothing is written"
    return str(caught.value)


@pytest.mark.parametrize(
    ("transcript", "said"),
    [
        ("{", "must be JSON in UTF-8"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "must be JSON in UTF-8"),
        ("[]", 'must be an object {"alignments"'),
        ('{"alignments": [["a", [0, NaN], "SPEAKER_MAIN"]]}', "alignment 0 must be"),
        ('{"alignments": [["a", [0, 99], "SPEAKER_MAIN"]]}', "must lie within the audio"),
        ('{"alignments": []}', "must be words of the model's side"),
    ],
)
def test_a_hostile_transcript_is_refused(tmp_path, short, transcript, said):
    path = write(tmp_path / "a.wav", short[0])
    content = transcript if isinstance(transcript, bytes) else transcript.encode()
    path.with_suffix(".json").write_bytes(content)
    assert said in refused(tmp_path, path)


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ({"persona_id": 5}, "persona_id must be text"),
        ({"system_prompt": " "}, "system_prompt must be text"),
        ({"first_speaker": "barista"}, "must be agent or user"),
        ({"path": "../a.wav"}, "must lie in the set's own folder"),
        ({"path": "/etc/passwd"}, "must lie in the set's own folder"),
        ({"path": "link.wav"}, "must lie in the set's own folder"),
        ({"path": ["a.wav"]}, "must be a file"),
        ({"path": "a\0.wav"}, "null"),
        ({"path": ""}, "must lie in"),
        ({"path": "absent.wav"}, "must be a file, found none"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, short, fact, said):
    write(tmp_path / "set" / "a.wav", *short[:1], turns=short[1])
    write(tmp_path / "a.wav", *short[:1], turns=short[1])
    (tmp_path / "set" / "link.wav").symlink_to(tmp_path / "a.wav")
    index = tmp_path / "set" / "index.jsonl"
    index.write_text(json.dumps({"path": "a.wav"} | fact))
    assert said in refused(tmp_path, index)


def test_mono_and_silence_and_folders_without_recordings_are_refused(tmp_path, short):
    samples = short[0]
    mono = write(tmp_path / "mono.wav", samples.sum(axis=1))
    assert "found one channel. Two speakers" in refused(tmp_path, mono, SPHINX)
    both = write(tmp_path / "both.wav", np.repeat(samples.sum(axis=1)[:, None], 2, axis=1))
    assert "a mono mix cannot be taken apart" in refused(tmp_path, both, SPHINX)
    silent = write(tmp_path / "silent.wav", samples * [1, 0])
    assert "found the right silent" in refused(tmp_path, silent, SPHINX)
    no_agent = write(tmp_path / "user.wav", np.stack([short[0][::-1, 0] * 0, samples[:, 1]], 1)
                     + np.random.default_rng(1).normal(scale=3e-3, size=samples.shape))  # fmt: skip
    assert "found 0 spans of speech" in refused(tmp_path, no_agent, SPHINX)
    (tmp_path / "empty").mkdir()
    assert "must hold recordings (.wav, .flac)" in refused(tmp_path, tmp_path / "empty")


def test_one_bad_recording_of_two_is_left_out_with_its_reason(tmp_path, short):
    samples, truth = short
    write(tmp_path / "set" / "good.wav", samples, turns=truth)
    cut = write(tmp_path / "set" / "cut.wav", samples, turns=truth)
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises(StageFailedError, match=r"cut\.wav: the WAV header must fit"):
        bring_in(tmp_path / "set", tmp_path)
    assert not (tmp_path / "runs").exists()
    folder, imported = bring_in(tmp_path / "set", tmp_path, rate=0.5)
    assert [record.id for record in imported.records] == ["good"]
    assert "cut.wav" in (folder / "rejected.jsonl").read_text()


def test_a_recording_that_changes_meanwhile_ends_the_import(tmp_path, short, monkeypatch):
    path = write(tmp_path / "a.wav", short[0], turns=short[1])
    read = recordings._digest

    def changed(sound):
        result = read(sound)
        write(path, short[0] * 0.5)
        return result

    monkeypatch.setattr(recordings, "_digest", changed)
    with pytest.raises(CorruptFileError, match="must stay as it is"):
        bring_in(path, tmp_path)
    stages = [p for p in (tmp_path / "runs" / "c").iterdir() if p.is_dir()]
    assert not any((stage / "manifest.json").exists() for stage in stages)
    assert not (tmp_path / "runs" / "c" / "imports" / "speech.json").exists()


def test_a_missing_recogniser_is_asked_for_only_where_it_is_needed(tmp_path, short, monkeypatch):
    def missing(*_):
        raise MissingInputError("pip install 'duplex-workbench[asr]'")

    monkeypatch.setattr(recordings, "make_recogniser", missing)
    write(tmp_path / "set" / "with.wav", short[0], turns=short[1])
    assert len(bring_in(tmp_path / "set", tmp_path)[1].records) == 1
    write(tmp_path / "set" / "without.wav", short[0])
    with pytest.raises(MissingInputError, match="asr"):
        bring_in(tmp_path / "set", tmp_path, rate=0.9)


def test_the_command_brings_in_speech_that_the_next_stage_takes(tmp_path, short, tiny_checkpoint):
    config = tmp_path / "c.yaml"
    config.write_text(f"name: c\nmodel: {{base: {tiny_checkpoint}}}\n")
    path = write(tmp_path / "a.wav", short[0])
    common = ["import", str(config), str(path), "--runs", str(tmp_path / "runs"), "--stage"]
    ended = duplex(*common, "dialogues", "--persona", "ann")
    assert ended.returncode == 2 and "are for --stage speech" in ended.stderr
    ended = duplex(*common, "speech", "--recogniser", "pocketsphinx", "--persona", "ann", "--json")
    assert ended.returncode == 0, ended.stderr
    assert "a.wav (1 of 1)" in ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["records"] == 1
    content = soundfile.read(io.BytesIO(next_blob(answer["folder"])))[0]
    assert np.abs(content - short[0]).max() < 1e-4
    ended = duplex("run", str(config), "--runs", str(tmp_path / "runs"), "--only", "tensors")
    assert ended.returncode == 0, ended.stderr
    assert "0 rejected" in ended.stdout


def duplex(*arguments):
    return forked.duplex(arguments, CHECKOUT, os.environ | {"PYTHONPATH": str(CHECKOUT)})


def next_blob(folder):
    return next((Path(folder) / "blobs").glob("*.wav")).read_bytes()


def test_voice_ids_differ_and_fit():
    long = ["x" * 96, "x" * 95 + "y"]
    assert len({voice_id(name) for name in long}) == 2
    assert all(len(voice_id(name)) <= 96 for name in long)
    assert voice_id("ann") == "recorded.ann"
