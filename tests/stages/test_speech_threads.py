"""Dialogues spoken at once by a server: the same bytes, and never too many requests."""

import threading
import time

import pytest

from duplex.config import Config
from duplex.records import Turn, Voice
from duplex.store import StageFolder
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage
from tests.stages.speech_server import Reply, encoded, serving
from tests.stages.spoken_helpers import complete, context_of, conversation

pytest.importorskip("espeakng_loader")

FRUITS = ("apples", "bananas", "cherries", "oranges", "lemons")
VOICES = [
    Voice(id=name, engine="openai-speech", role=role, persona_id=persona, licence="l",
          params={"voice": sound})
    for name, role, persona, sound in (
        ("agent-ann", "agent", "ann", "alloy"), ("user-00", "user", None, "onyx"),
    )
]  # fmt: skip


def talk(index, fruit):
    turns = (
        Turn(role="user", text=f"How many {fruit} do you want?"),
        Turn(role="agent", text=f"I would like seven {fruit}, please."),
    )
    return conversation("ann", index, turns)


class Moody:
    """Answers by what is asked, whoever comes first: busy, cut, a page, silence, then right."""

    def __init__(self):
        self._seen = {}
        self._lock = threading.Lock()

    def __call__(self, samples, body):
        text = body["input"]
        with self._lock:
            number = self._seen[text] = self._seen.get(text, -1) + 1
        time.sleep(0.05)
        faults = [
            Reply(b"wait", "text/plain", 429, {"Retry-After": "0.02"}),
            Reply(encoded(samples)[:-20_000]),
            Reply(b"<html>", "text/html"),
            Reply(encoded(0 * samples)),
        ][: sum(map(ord, text)) % 5]
        return faults[number] if number < len(faults) else Reply(encoded(samples))


def spoken(root, concurrency):
    """The finished stage, and how many requests the server had in hand at most."""
    talks = [talk(index, fruit) for index, fruit in enumerate(FRUITS)]
    inputs = {
        "dialogues": complete(root, 2, "dialogues", talks),
        "voices": complete(root, 3, "voices", VOICES),
    }
    with serving(Moody()) as server:
        runtime = {"base_url": server.url, "concurrency": concurrency, "timeout_s": 5}
        speech = {
            "engine": "openai-speech", "model": "m", "runtime": runtime,
            "checks": {"recogniser": "pocketsphinx"},
        }  # fmt: skip
        voices = {"engine": "openai-speech", "names": {"female": ["alloy"]}}
        context = context_of(inputs, root, voices=voices, speech=speech)
        assert SpeechStage().threads(context.config) == concurrency
        folder = StageFolder.of(root, 4, "speech", "2" * 64)
        execute(SpeechStage(), context, folder)
    return folder, server.most_at_once


@pytest.mark.slow
def test_threads_give_the_same_bytes_and_keep_to_the_limit(tmp_path):
    alone, one = spoken(tmp_path / "alone", 1)
    together, three = spoken(tmp_path / "together", 3)
    assert (one, three) == (1, 3)
    assert together.digest == alone.digest
    assert [r.audio for r in together.records()] == [r.audio for r in alone.records()]
    assert sum(r.quality.retries for r in alone.records()) > 3
    assert all(r.quality.transcribed == 2 for r in together.records())


def threads(voices, **speech):
    config = {"name": "x", "voices": voices, "speech": speech | {"runtime": {"concurrency": 6}}}
    return SpeechStage().threads(Config.model_validate(config))


def test_only_a_servers_dialogues_are_spoken_several_at_once():
    names = {"names": {"female": ["a"]}}
    server = {"engine": "openai-speech", **names}
    assert threads(server) == 6  # `speech.engine` is for voices that do not speak a language
    assert threads(server, engines={"ta": "espeak"}) == 6
    assert threads(server, engines={"en": "csm"}) == 1
    assert threads({}) == 1
    assert threads({"engine": "moshi-tts", **names}, engine="openai-speech") == 1
