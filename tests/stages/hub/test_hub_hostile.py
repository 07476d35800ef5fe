"""`duplex pull` from repositories that are not what they say; what a push must not send."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch

from duplex.errors import CorruptFileError, RequestError
from duplex.records import Speech, SpokenTurn, Voice, Word
from duplex.store import stage_digest
from pipeline.hub import pull
from pipeline.hubs.index import blobs_of
from pipeline.hubs.scan import check_consent, scan_texts
from tests.stages.hub.fake_hub import TOKEN
from tests.stages.hub.helpers import (
    digests,
    elsewhere,
)

# -- hostile repositories


def reindexed(hub, **changes):
    """Put a changed index up, which fits the files that lie there."""
    tree = hub.repos["me/data"].tree
    index = json.loads(tree["duplex.json"][0]) | changes
    for file in index["files"]:
        if file["path"] in tree:
            content = tree[file["path"]][0]
            file["bytes"], file["sha256"] = len(content), hashlib.sha256(content).hexdigest()
    hub.put("me/data", "duplex.json", json.dumps(index).encode())


def first(hub, suffix):
    return next(path for path in hub.repos["me/data"].tree if path.endswith(suffix))


def tamper(hub):
    wav = first(hub, ".wav")
    content = bytearray(hub.repos["me/data"].tree[wav][0])
    content[-1] ^= 1
    hub.put("me/data", wav, bytes(content))


def shorten(hub):
    wav = first(hub, ".wav")
    hub.put("me/data", wav, hub.repos["me/data"].tree[wav][0][:-100])


def climb(hub):
    hub.put("me/data", "../../x", b"out")


def climb_by_index(hub):
    index = json.loads(hub.repos["me/data"].tree["duplex.json"][0])
    more = [{"path": "../../x", "sha256": "0" * 64, "bytes": 3}]
    reindexed(hub, files=index["files"] + more)


def change_a_record(hub):
    content = hub.repos["me/data"].tree["records/dialogues.jsonl"][0]
    hub.put("me/data", "records/dialogues.jsonl", content.replace(b"You", b"You all", 1))
    reindexed(hub)


def break_a_record(hub):
    hub.put("me/data", "records/dialogues.jsonl", b'{"record": "Dialogue", "id": "x"}\n')
    reindexed(hub)


def lose_a_proof(hub):
    """A file that a voice names is in no list and not there; all else fits."""
    tree = dict(hub.repos["me/data"].tree)
    record = json.loads(tree["records/voices.jsonl"][0].splitlines()[0])
    lost = f"blobs/{record['proof'][:2]}/{record['proof']}.wav"
    del tree[lost]
    hub.repos["me/data"].commit(tree)
    files = json.loads(tree["duplex.json"][0])["files"]
    reindexed(hub, files=[file for file in files if file["path"] != lost])


class Trap:
    def __reduce__(self):
        return (open, ("sprung", "w"))


def plant_a_trap(hub):
    """A pickle that would run code, named by its own sha256 and in every list."""
    buffer = io.BytesIO()
    torch.save(Trap(), buffer)
    trap = buffer.getvalue()
    old, new = Path(first(hub, ".pt")).stem, hashlib.sha256(trap).hexdigest()
    tree = dict(hub.repos["me/data"].tree)
    del tree[f"blobs/{old[:2]}/{old}.pt"]
    tree = {k: (v[0].replace(old.encode(), new.encode()), v[1]) for k, v in tree.items()}
    tree[f"blobs/{new[:2]}/{new}.pt"] = (trap, True)
    index = json.loads(tree["duplex.json"][0])
    lines = tree["records/tensors.jsonl"][0].decode().splitlines()
    for file in index["files"]:
        if file["sha256"] == new:
            file["path"] = f"blobs/{new[:2]}/{new}.pt"
    for stage in index["stages"]:
        if stage["stage"] == "tensors":
            stage["digest"] = stage_digest(lines, [], stage["counts"])
    tree["duplex.json"] = (json.dumps(index).encode(), False)
    hub.repos["me/data"].commit(tree)
    reindexed(hub)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (tamper, "it was changed after the push"),
        (shorten, r"must have \d+ bytes, found \d+"),
        (climb, "a file's name must stay in its folder, found '../../x'"),
        (climb_by_index, "one of the names of a push, found '../../x'"),
        (change_a_record, "dialogues: the records must have the digest"),
        (break_a_record, "dialogues: not a record of ours"),
        (lose_a_proof, "voices: agent-friendly-june names a file that is not there"),
        (plant_a_trap, "may run code"),
        (lambda hub: reindexed(hub, format=9), "format"),
        (lambda hub: hub.put("me/data", "duplex.json", b"[" * 9999), "must be JSON|nested"),
        (lambda hub: hub.put("me/data", "duplex.json", b"[]"), "must be the index of a push"),
    ],
)
def test_what_is_not_as_it_was_pushed_is_refused_and_nothing_is_used(
    trained, reached, tmp_path, attack, said, monkeypatch
):
    place = elsewhere(trained, tmp_path)
    monkeypatch.chdir(place)
    attack(reached)
    with pytest.raises(CorruptFileError, match=said):
        pull("me/data", Path("small.yaml"), None, revision=None, runs=Path("runs"), overrides=[],
             as_json=False)  # fmt: skip
    assert digests(place) == {} and not list(place.rglob("sprung"))
    assert not list(tmp_path.rglob("x"))


# -- what must not go up


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"see {TOKEN}", "a Hugging Face token"),
        ("key sk-proj-abcdefghijklmnop1234", "an API key"),
        ("it lies in /home/ann/voices/me.wav", "a path of this machine"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("my-own-secret-words", "the value of MY_API_KEY"),
    ],
)
def test_a_secret_or_a_path_stops_the_push_and_is_not_shown(monkeypatch, text, what):
    monkeypatch.setenv("MY_API_KEY", "my-own-secret-words")
    scan_texts({"records/x.jsonl": b"You are Mei. A path / to nowhere, sk and hf_ alone."})
    with pytest.raises(RequestError, match=what) as caught:
        scan_texts({"records/x.jsonl": text.encode()})
    assert "path" in what or text.split()[-1] not in str(caught.value)


def test_all_that_a_voice_names_goes_along():
    both = voice("a", sample="0" * 64, proof="1" * 64)
    assert blobs_of(both) == ("0" * 64, "1" * 64)
    assert blobs_of(voice("a", proof="1" * 64)) == ("1" * 64,) and blobs_of(voice("a")) == ()


def voice(voice_id, **changes):
    fields = {"id": voice_id, "engine": "chatterbox", "role": "agent", "params": {}}
    return Voice.model_validate(fields | {"licence": "private"} | changes)


def spoken_by(voice_id):
    word = Word(text="Hi", start_s=0, end_s=1)
    turn = SpokenTurn(
        role="agent", text="Hi", voice_id=voice_id, start_s=0, end_s=1, words=(word,)
    )  # fmt: skip
    return Speech(
        id="s", dialogue_id="d", persona_id="p", scenario_id="c", system_prompt="x", audio="0" * 64,
        first_speaker="agent", num_samples=1, turns=(turn,),
    )  # fmt: skip


def test_recorded_voices_need_consent_that_is_recorded_or_stated():
    check_consent([voice("a"), spoken_by("a")], None)
    for records in ([voice("a", source="a friend")], [voice("a", sample="0" * 64)],
                    [spoken_by("nobody-knows")]):  # fmt: skip
        with pytest.raises(RequestError, match="need the consent of who speaks"):
            check_consent(records, None)
        with pytest.raises(RequestError):
            check_consent(records, "  ")
        check_consent(records, "signed by the speaker")
    check_consent([voice("a", source="a friend", consent="written, of May")], None)
