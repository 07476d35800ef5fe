"""`/v1/audio/speech` over real HTTP: what comes is speech, or an error that says what came."""

import json
import struct
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from duplex.config_data import SpeechSection
from duplex.errors import RecordError, RequestError, TransientError
from duplex.frames import SAMPLE_RATE
from duplex.records import Voice
from pipeline.engines import openai_speech
from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.openai_speech import OpenAISpeech
from pipeline.engines.speaker import Speaker
from pipeline.engines.speaking import SpeechRequest
from tests.stages.speech_server import VOICES, Reply, encoded, serving, wav

pytest.importorskip("espeakng_loader")

KEY = "tiger-lily-must-not-be-seen-0123456789"
TEXT = "I would like a large latte, please."


def voice(**params):
    return Voice(
        id="alloy",
        engine="openai-speech",
        role="agent",
        params={"voice": "alloy"} | params,
        licence="test",
    )


def section(url, **changes):
    runtime = {"base_url": url, "api_key": KEY, "timeout_s": 5} | changes.pop("runtime", {})
    return SpeechSection.model_validate(
        {"engine": "openai-speech", "model": "tts-1", "runtime": runtime} | changes
    )


def request(text=TEXT, **changes):
    return SpeechRequest(text, changes.pop("voice", voice()), seed=1, **changes)


def spoken(*answers, waits=None, text=TEXT, **changes):
    """What the engine makes of a server that gives these answers."""
    with serving(*answers) as server:
        engine = OpenAISpeech(
            section(server.url, **changes), wait=([] if waits is None else waits).append
        )
        try:
            return engine.synthesize(request(text))
        finally:
            engine.close()


@pytest.fixture(scope="module")
def reference():
    with EspeakEngine() as engine:
        return engine.synthesize(TEXT, VOICES["alloy"]).samples


def likeness(a, b):
    """Correlation of two waveforms at their best lag within 20 ms."""
    length = min(len(a), len(b)) - 960
    a = a[480 : 480 + length]
    windows = [b[start : start + length] for start in range(0, 960, 16)]
    return max(abs(float(np.corrcoef(a, window)[0, 1])) for window in windows)


def test_speech_comes_as_it_was_spoken(reference):
    utterance = spoken()
    assert utterance.samples.dtype == np.float32
    assert utterance.samples == pytest.approx(reference, abs=1 / 30000)
    assert utterance.words is None


def open_ended(samples, body):
    """A WAV as servers stream it: sizes of all ones, and a chunk before the samples."""
    content = encoded(samples)
    extra = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    header = content[:4] + b"\xff\xff\xff\xff" + content[8:36] + extra
    return Reply(header + b"data\xff\xff\xff\xff" + content[44:])


FORMS = {
    "open-ended wav": open_ended,
    "flac": lambda s, _: Reply(encoded(s, format="FLAC"), "audio/flac"),
    "wav that says octet-stream": lambda s, _: Reply(encoded(s), "application/octet-stream"),
    "float wav": lambda s, _: Reply(encoded(s, subtype="FLOAT")),
    "raw": lambda s, _: Reply((s * 32767).astype("<i2").tobytes(), "audio/pcm"),
    "raw at 48 kHz": lambda s, _: Reply(
        (np.repeat(s, 2) * 32767).astype("<i2").tobytes(), "audio/pcm;rate=48000"
    ),
    "wav at 48 kHz": lambda s, _: Reply(encoded(s, 48000)),
    "wav at 22.05 kHz": lambda s, _: Reply(encoded(s, 22050)),
    "stereo of which one side is silent": lambda s, _: Reply(encoded(np.stack([0 * s, s], axis=1))),
    "stereo whose mean cancels": lambda s, _: Reply(encoded(np.stack([s, -s], axis=1))),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_sound_gives_the_same_speech(reference, form):
    samples = spoken(FORMS[form]).samples
    assert len(samples) == pytest.approx(len(reference), abs=60)
    assert likeness(reference, samples) > 0.95


def cut(samples, body):
    return Reply(encoded(samples)[:-20_000])


BAD = {
    "json with 200": (
        lambda s, _: Reply(b'{"error": {"message": "no such voice"}}', "application/json"),
        "no such voice",
    ),
    "a page with 200": (lambda s, _: Reply(b"<html>sign in</html>", "text/html"), "sign in"),
    "json that says wav": (lambda s, _: Reply(b'{"error": "x"}'), "begin with"),
    "nothing": (lambda s, _: Reply(b""), "an empty body"),
    "a cut wav": (cut, "WAV that was cut: .* of samples of"),
    "a header only": (lambda s, _: Reply(encoded(s)[:30]), "cut"),
    "no samples": (lambda s, _: Reply(encoded(s[:0])), "no samples"),
    "an absurd rate": (lambda s, _: Reply(encoded(s)[:24] + b"\1\0\0\0" + encoded(s)[28:]), "rate"),
    "NaN": (lambda s, _: Reply(encoded(s * np.nan, subtype="FLOAT")), "NaN"),
    "damaged flac": (lambda s, _: Reply(b"fLaC" + b"\0" * 99, "audio/flac"), "decoded"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reply_that_is_no_sound_rejects_the_record_and_is_described(kind):
    answer, said = BAD[kind]
    with pytest.raises(RecordError, match=said):
        spoken(answer)


def test_a_reply_that_ends_early_is_transient_and_asked_for_again():
    waits = []

    def ends_early(samples, body):
        content = encoded(samples)
        return Reply(content[:9000], declared=len(content), headers={"Connection": "close"})

    assert len(spoken(ends_early, wav, waits=waits).samples) > SAMPLE_RATE
    assert waits == [1.0]


def test_an_endless_reply_is_cut_off(monkeypatch):
    monkeypatch.setattr(openai_speech, "LARGEST_REPLY", 1 << 20)
    with pytest.raises(RecordError, match="at most 1 MB"):
        spoken(lambda s, _: Reply(encoded(np.tile(s, 40))))


def test_a_trickling_reply_meets_its_deadline():
    slow = {"deadline_s": 0.3, "retries": 0}
    with pytest.raises(TransientError, match=r"finish a reply within 0\.3 s"):
        spoken(lambda s, _: Reply(encoded(s), trickle_s=0.1), runtime=slow)


def test_a_busy_server_is_asked_again_when_it_says():
    waits = []
    busy = lambda s, _: Reply(b"slow down", "text/plain", 429, {"Retry-After": "3"})  # noqa: E731
    down = lambda s, _: Reply(b"oops", "text/plain", 503)  # noqa: E731
    far = lambda s, _: Reply(b"", "text/plain", 503, {"Retry-After": "86400"})  # noqa: E731
    date = {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}
    past = lambda s, _: Reply(b"", "text/plain", 500, date)  # noqa: E731
    assert len(spoken(busy, down, far, past, wav, waits=waits).samples) > SAMPLE_RATE
    assert waits == [3.0, 2.0, 60.0, 8.0]


def test_a_server_that_stays_busy_leaves_the_record_undone():
    waits = []
    with pytest.raises(TransientError, match="answered 503: out of memory; run again"):
        spoken(
            lambda s, _: Reply(b"out of memory", "text/plain", 503),
            waits=waits,
            runtime={"retries": 2},
        )
    assert len(waits) == 2


def test_nobody_there_is_transient():
    engine = OpenAISpeech(section("http://127.0.0.1:9/v1", runtime={"retries": 0}))
    with pytest.raises(TransientError, match="must be reachable"):
        engine.synthesize(request())


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_ends_the_work_and_never_shows_the_key(status):
    leaky = Reply(f"bad key {KEY}".encode(), "text/plain", status)
    with pytest.raises(RequestError) as caught:
        spoken(lambda s, _: leaky)
    told = "".join(traceback.format_exception(caught.value))
    assert KEY not in told and "bad key ***" in told
    assert caught.value.__cause__ is None


def test_what_the_server_finds_wrong_with_a_text_rejects_it():
    with pytest.raises(RecordError, match="rejected the request with 400: too long"):
        spoken(lambda s, _: Reply(b"too long", "text/plain", 400))


def test_the_request_carries_voice_speed_model_and_words_for_the_emotion_where_asked():
    with serving() as server:
        for wanted in (False, True):
            speaker = Speaker(
                section(server.url, instructions=wanted, checks={"recogniser": "none"}),
                report=print,
            )
            speaker.speak(request(emotion="sad", intensity=1.5))
            speaker.close()
    plain, told = server.seen
    assert plain == {
        "model": "tts-1", "input": TEXT, "voice": "alloy", "response_format": "wav", "speed": 0.88,
    }  # fmt: skip
    assert told == plain | {"instructions": "Speak in a very sad, tired tone of voice."}
    assert server.keys == [f"Bearer {KEY}"] * 2


def test_openais_key_goes_to_openai_alone(monkeypatch):
    monkeypatch.setenv(openai_speech.KEY_VARIABLE, KEY)
    with serving() as server:
        engine = OpenAISpeech(section(server.url, runtime={"api_key": None}))
        engine.synthesize(request())
        engine.close()
    assert server.keys == [None]


@pytest.mark.parametrize("params", [{"voice": 3}, {"model": "other"}, {"input": "something else"}])
def test_a_voice_cannot_change_what_is_asked(params):
    engine = OpenAISpeech(section("http://127.0.0.1:9/v1"))
    with pytest.raises(RequestError, match="must have voice, its name at the server"):
        engine.synthesize(request(voice=voice(**params)))


@pytest.mark.parametrize("changes", [{"model": None}, {"runtime": {"base_url": None}}])
def test_a_config_without_model_or_server_says_what_is_missing(monkeypatch, changes):
    monkeypatch.delenv(openai_speech.KEY_VARIABLE, raising=False)
    runtime = {"api_key": None} | changes.pop("runtime", {})
    with pytest.raises(RequestError, match=r"openai-speech needs speech\."):
        OpenAISpeech(section("http://127.0.0.1:9/v1", runtime=runtime, **changes))


def test_threads_share_the_engine_and_hold_to_the_limit():
    with serving() as server:
        engine = OpenAISpeech(section(server.url, runtime={"concurrency": 2}))
        with ThreadPoolExecutor(6) as pool:
            lengths = set(pool.map(lambda _: len(engine.synthesize(request()).samples), range(6)))
        engine.close()
    assert len(lengths) == 1 and len(server.seen) == 6
    assert server.most_at_once == 2


def test_the_key_is_in_no_dump_of_the_section():
    assert KEY not in json.dumps(section("http://x/v1").model_dump(exclude={"runtime"}))
    assert KEY not in repr(section("http://x/v1"))
