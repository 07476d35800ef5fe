"""How an evaluation hears: planted engines behind it, and silero-vad on real speech."""

import time
from types import SimpleNamespace

import numpy as np

from duplex.records import Word
from pipeline.engines import dnsmos
from pipeline.engines.espeak import EspeakEngine
from pipeline.evaluation.listening import Listener, covered
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from tests.stages.planted_server import Plan, planted, spoken


def test_sound_is_rated_and_recognised_where_that_is_asked_for(monkeypatch):
    """Planted engines: a rating, and a recogniser that hears one of two words."""
    plan = Plan(echo=14, says={17: "good", 18: " morning"})
    monkeypatch.setattr(dnsmos, "revision", lambda: "planted 1")

    class Rates:
        def score(self, samples):
            return SimpleNamespace(overall=float(len(samples)) / 24_000)

    class Hears:
        def transcribe(self, samples, language):
            return (Word(text="morning", start_s=0, end_s=1),)

        def revision(self):
            return "planted 2"

    listener = Listener(recogniser="pocketsphinx", dnsmos=True)
    listener.__dict__ |= {"_dnsmos": Rates(), "_recogniser": Hears()}
    items = [spoken(user_turns=["What would you like"])]
    settings = PlaySettings(tokenizer=plan.tokenizer, listener=listener)
    with planted(plan) as url:
        (played,) = evaluate_urls({"one": url}, items, settings, lambda line: None)
    (one,) = played.conversations
    assert one.metrics()["dnsmos"] == items[0].num_frames * 0.08
    assert one.metrics()["word_error_rate"] == 0.5
    assert listener.protocol() == {
        "speech_found_by": "level", "recogniser": "planted 2", "dnsmos": "planted 1",
    }  # fmt: skip


def test_silero_finds_speech_where_the_level_does_and_not_in_a_tone():
    with EspeakEngine() as engine:
        speech = engine.synthesize("Good morning, what would you like?", {"voice": "en-us"}).samples
    quiet = np.zeros(24_000, dtype=np.float32)
    samples = np.concatenate([quiet, speech.astype(np.float32), quiet])
    level, silero = Listener().activity(samples), Listener("silero").activity(samples)
    assert level.shape == silero.shape and np.mean(level != silero) < 0.2
    assert not silero[:10].any() and not silero[-10:].any() and silero.sum() > 10
    assert covered([(0.0, 0.12), (0.2, 0.24)], 4).tolist() == [True, True, True, False]


def test_conversations_that_end_together_are_heard_one_after_the_other():
    """A recogniser keeps state while it works: two threads in it would mix two conversations."""
    inside: list[int] = []

    class Hears:
        def transcribe(self, samples, language):
            inside.append(1)
            time.sleep(0.02)
            assert len(inside) == 1
            inside.clear()
            return (Word(text="morning", start_s=0, end_s=1),)

        def revision(self):
            return "planted"

    plan = Plan(echo=14, says={17: "morning"}, slots=3)
    listener = Listener(recogniser="pocketsphinx")
    listener.__dict__["_recogniser"] = Hears()
    items = [spoken(item_id=f"item-{n}", user_turns=["What would you like"]) for n in range(6)]
    settings = PlaySettings(tokenizer=plan.tokenizer, listener=listener, at_a_time=3)
    with planted(plan) as url:
        (played,) = evaluate_urls({"one": url}, items, settings, lambda line: None)
    assert [one.metrics()["word_error_rate"] for one in played.conversations] == [0.0] * 6
