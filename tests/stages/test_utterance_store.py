"""Utterances that are kept: nothing is bought twice, and no damaged file is heard."""

import hashlib
import os
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from duplex.config import Config
from duplex.errors import StageFailedError
from duplex.records import Turn, Voice, Word
from duplex.store import StageFolder
from pipeline.clean import plan_removals
from pipeline.engines.speaking import SpeechRequest, Utterance
from pipeline.engines.utterance_store import FOLDER, UtteranceStore, key_of
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage
from tests.stages.speech_server import Reply, encoded, serving
from tests.stages.spoken_helpers import complete, context_of, conversation, made_speech

pytest.importorskip("espeakng_loader")

VOICES = [
    Voice(id=name, engine="openai-speech", role=role, persona_id=persona, licence="l",
          params={"voice": sound})
    for name, role, persona, sound in (
        ("agent-ann", "agent", "ann", "alloy"), ("user-00", "user", None, "onyx"),
    )
]  # fmt: skip
TEXTS = ("Good morning. What can I get you?", "A large latte, please.", "That is four dollars.")
TALK = conversation(
    "ann",
    0,
    (
        Turn(role="user", text=TEXTS[0]),
        Turn(role="agent", text=TEXTS[1]),
        Turn(role="user", text=TEXTS[2]),
    ),
)


def spoken(root, server, *, retry_rejected=False, **speech):
    inputs = {
        "dialogues": complete(root, 2, "dialogues", [TALK]),
        "voices": complete(root, 3, "voices", VOICES),
    }
    runtime = {"base_url": server.url, "retries": 0, "timeout_s": 5}
    checks = {"retries": 1, "recogniser": "pocketsphinx", "share": 0}
    section = {"engine": "openai-speech", "model": "m", "runtime": runtime, "checks": checks}
    voices = {"engine": "openai-speech", "names": {"female": ["alloy"]}}
    context = context_of(inputs, root, voices=voices, speech=section | speech)
    folder = StageFolder.of(root, 4, "speech", "2" * 64)
    execute(SpeechStage(), context, folder, retry_rejected=retry_rejected)
    return folder


def asked(server):
    return Counter(body["input"] for body in server.seen)


class Down:
    """Busy for one text while `down`; silence, `faults` times, for another."""

    def __init__(self, faults=0):
        self.down, self.faults = True, faults

    def __call__(self, samples, body):
        if body["input"] == TEXTS[2] and self.down:
            return Reply(b"busy", "text/plain", 503)
        if body["input"] == TEXTS[1] and self.faults:
            self.faults -= 1
            return Reply(encoded(0 * samples))
        return Reply(encoded(samples))


@pytest.mark.slow  # four seconds of a core
def test_a_turn_that_fails_for_now_does_not_buy_the_others_again(tmp_path):
    answer = Down(faults=1)
    with serving(answer) as server:
        for _ in range(2):
            with pytest.raises(StageFailedError, match="503"):
                spoken(tmp_path / "a", server)
        answer.down = False
        found = spoken(tmp_path / "a", server)
        # The second text's first try was silence: its second has another seed, and a name.
        assert asked(server) == {TEXTS[0]: 1, TEXTS[1]: 2, TEXTS[2]: 3}
        answer.faults = 1
        undisturbed = spoken(tmp_path / "b", server)
    one: Any = next(iter(found.records()))
    other: Any = next(iter(undisturbed.records()))
    assert one.quality.timed_by == {"recogniser": 3}, "a server says no times"
    assert one.audio == other.audio and one.digest == other.digest and one.quality.retries == 1


def test_a_refused_utterance_is_asked_for_anew_and_no_other(tmp_path):
    answer = Down(faults=2)
    answer.down = False
    with serving(answer) as server:
        with pytest.raises(StageFailedError, match="silent throughout"):
            spoken(tmp_path, server)
        folder = spoken(tmp_path, server, retry_rejected=True)
        assert len(list(folder.records())) == 1
        assert asked(server) == {TEXTS[0]: 1, TEXTS[1]: 3, TEXTS[2]: 1}


def test_espeak_is_not_kept(tmp_path):
    made_speech(tmp_path, dialogues=[conversation("angry-ann", 0)])
    assert not (tmp_path / FOLDER).exists()


def test_clean_removes_what_nobody_asked_for_in_a_month(tmp_path):
    store = UtteranceStore(tmp_path / FOLDER)
    for key in ("a" * 64, "b" * 64):
        store.write(key, Utterance(np.zeros(240, dtype=np.float32), None))
    old = next((tmp_path / FOLDER).rglob("a*.utterance"))
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (month_ago, month_ago))
    config = Config.model_validate({"name": "toy"})
    assert [removal.path for removal in plan_removals(config, tmp_path)] == [old]
    assert store.read("a" * 64) is not None
    assert plan_removals(config, tmp_path) == [], "it was asked for"


# -- the files

KEY = hashlib.sha256(b"key").hexdigest()
WORDS = (Word(text="good", start_s=0.1, end_s=0.3), Word(text="día", start_s=0.4, end_s=0.9))


@pytest.mark.parametrize("words", [None, (), WORDS])
@pytest.mark.parametrize("grid", [True, False])
def test_what_is_read_is_what_was_written(tmp_path, words, grid):
    samples = np.random.default_rng(0).uniform(-1.2, 1.2, 24_000).astype(np.float32)
    if grid:
        samples = (np.random.default_rng(0).integers(-32768, 32768, 24_000) / 32768).astype("f4")
    store = UtteranceStore(tmp_path)
    store.write(KEY, Utterance(samples, words))
    found = store.read(KEY)
    assert found and np.array_equal(found.samples, samples) and found.samples.dtype == np.float32
    assert found.words == words
    (path,) = tmp_path.rglob("*.utterance")
    assert path.stat().st_size < 24_000 * (2 if grid else 4) + 1000


def signed(body):
    return hashlib.sha256(body).digest() + body


def with_header(old, new):
    return lambda content: signed(content[32:].replace(old, new, 1))


DAMAGE = {
    "cut": lambda content: content[:-1],
    "flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "empty": lambda content: b"",
    "another's": with_header(KEY.encode(), b"0" * 64),
    "no json": with_header(b"{", b"["),
    "a list": lambda content: signed(b"[]\n" + bytes(480)),
    "deep": lambda content: signed(b"[" * 100_000 + b"\n" + bytes(480)),
    "objects": with_header(b"<i2", b"|O8"),
    "odd": lambda content: signed(content[32:] + b"\0"),
    "words": with_header(b'"words": null', b'"words": [{"text": "a", "start_s": -1, "end_s": 2}]'),
    "late": with_header(b'"words": null', b'"words": [{"text": "a", "start_s": 1, "end_s": 1e9}]'),
    "no sound": lambda content: signed(content[32:].split(b"\n")[0] + b"\n"),
    "NaN": lambda content: signed(
        content[32:].split(b"\n")[0].replace(b"<i2", b"<f4") + b"\n" + b"\xff" * 480
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_as_good_as_none_and_made_anew(tmp_path, damage):
    store, utterance = UtteranceStore(tmp_path), Utterance(np.zeros(240, dtype=np.float32), None)
    store.write(KEY, utterance)
    (path,) = tmp_path.rglob("*.utterance")
    whole = path.read_bytes()
    assert store.read(KEY) is not None
    path.write_bytes(DAMAGE[damage](whole))
    assert path.read_bytes() != whole and store.read(KEY) is None
    store.write(KEY, utterance)
    assert path.read_bytes() == whole and store.read(KEY) is not None


REQUEST = SpeechRequest("hello", VOICES[0], seed=1)
CHANGES = [
    {"text": "hello there"}, {"seed": 2}, {"language": "de"}, {"emotion": "sad"},
    {"intensity": 1.5}, {"adjusted": {"voice": "onyx"}}, {"voice": VOICES[1]},
    {"voice": VOICES[0].model_copy(update={"sample": "a" * 64})},
]  # fmt: skip


def key(request=REQUEST, revision="m 1", number=0, hears_context=False):
    return key_of(revision, request, number, hears_context=hears_context)


@pytest.mark.parametrize("change", CHANGES)
def test_another_request_is_another_utterance(change):
    assert key(replace(REQUEST, **change)) != key()


def test_another_model_or_try_is_another_utterance_and_another_proof_is_not():
    assert len({key(), key(revision="m 2"), key(number=1)}) == 3
    proven = VOICES[0].model_copy(update={"proof": "a" * 64})
    assert key(replace(REQUEST, voice=proven)) == key()


def test_what_was_said_before_counts_for_who_hears_it():
    said = [(("hi", Utterance(np.full(9, level, dtype=np.float32), None)),) for level in (0, 1)]
    one, other = (replace(REQUEST, context=context) for context in said)
    assert key(one) == key(other) == key()
    assert len({key(r, hears_context=True) for r in (REQUEST, one, other)}) == 3


def test_instructions_to_a_server_are_another_request(tmp_path):
    answer = Down()
    with serving(answer) as server:
        for instructions in (False, True, True):
            with pytest.raises(StageFailedError):
                spoken(tmp_path, server, instructions=instructions)
        assert asked(server) == {TEXTS[0]: 2, TEXTS[1]: 2, TEXTS[2]: 3}
