"""What users say, shown; and replies that only repeat it, warned of."""

import asyncio
import json

import numpy as np
import pytest

from duplex.records import Word
from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.recogniser import make_recogniser
from pipeline.serving import wire
from pipeline.serving.hearing import PAUSE_FRAMES, WAITING_TURNS, Hearing, Recognition, Turns
from pipeline.serving.wire import Kind
from tests.stages.serving_helpers import in_loop, ready, receive, session_at, user_pcm

SPEECH = 0.2 * user_pcm(1).reshape(1920) / 0.3
QUIET = np.zeros(1920, np.float32)


class Said:
    """A recogniser that hears what a test says was said."""

    def __init__(self, *texts):
        self.texts, self.lengths = list(texts), []

    def transcribe(self, samples, language):
        self.lengths.append(len(samples))
        words = self.texts.pop(0).split()
        return tuple(Word(text=word, start_s=0, end_s=0) for word in words)


def told(script, *texts):
    """What is told of `script`: (user's frame, model's text) a frame."""

    async def run():
        found = []
        hearing = Hearing(Recognition(Said(*texts)), found.append)
        for frame, text in script:
            hearing.user(frame)
            hearing.model(text)
            await asyncio.sleep(0.002)
        await asyncio.sleep(0.05)
        hearing.close()
        return found

    return asyncio.run(run())


def turn(reply, *, spoken=6, wait=1, after=12):
    """The user speaks; the model says `reply`, a word a frame, after `wait` frames."""
    words = [""] * wait + [f" {word}" for word in reply.split()]
    words += [""] * max(0, after - len(words))
    return [(SPEECH, "")] * spoken + [(QUIET, text) for text in words]


@pytest.mark.parametrize("wait", [0, 3, 9], ids=["at once", "in the pause", "later"])
def test_a_reply_that_repeats_the_user_is_told_and_another_is_not(wait):
    same = told(turn("what would you like", wait=wait) + turn("x"), "what would you like", "next")
    assert [one["type"] for one in same] == ["heard", "echo", "heard"]
    assert same[1]["reply"] == "what would you like"
    other = told(turn("a large latte please", wait=wait) + turn("x"), "what would you like", "next")
    assert [one["type"] for one in other] == ["heard", "heard"]
    assert other[0] == {"type": "heard", "text": "what would you like", "start_s": 0, "end_s": 0.48}


def test_a_reply_is_judged_when_it_is_over_though_nobody_speaks_again():
    long = [(QUIET, "")] * 80
    found = told(turn("what would you like") + long, "what would you like")
    assert [one["type"] for one in found] == ["heard", "echo"]


def test_turns_are_cut_by_pauses_and_noise_is_none():
    turns = Turns()
    rng = np.random.default_rng(1)
    hiss = [(0.004 * rng.standard_normal(1920)).astype(np.float32) for _ in range(200)]
    assert not any(turns.add(frame) for frame in hiss)
    found = []
    for frame in [SPEECH] * 10 + [QUIET] * 3 + [SPEECH] * 5 + [QUIET] * 9 + [SPEECH] + hiss[:20]:
        if (one := turns.add(frame)) is not None:
            found.append(one)
    (only,) = found  # a click of one frame is no turn
    assert (only.start, only.end) == (198, 218)  # with two frames from before it
    assert len(only.samples) == (20 + PAUSE_FRAMES) * 1920


def test_who_talks_on_is_not_taken_for_the_rooms_noise():
    turns, found = Turns(), []
    for frame in [QUIET] * 30 + [SPEECH] * 150 + [QUIET] * 9:
        if (one := turns.add(frame)) is not None:
            found.append((one.start, one.end))
    assert found == [(28, 180)]


def test_a_recogniser_that_is_late_or_fails_holds_nobody_up():
    class Slow(Said):
        def transcribe(self, samples, language):
            raise RuntimeError("no memory")

    async def run():
        recognition = Recognition(Slow())
        waiting = [recognition.text(SPEECH) for _ in range(WAITING_TURNS + 2)]
        return await asyncio.gather(*waiting, return_exceptions=True)

    found = asyncio.run(run())
    assert found.count(None) == 2
    assert sum(isinstance(one, RuntimeError) for one in found) == WAITING_TURNS


def test_over_the_wire_with_a_real_recogniser(tiny_speaker):
    """espeak speaks, pocketsphinx listens: the words come as metadata, the answers stay whole."""
    with EspeakEngine() as engine:
        speech = engine.synthesize("Hello, good morning.", {"voice": "en-us"}).samples
    frames = np.pad(speech, (0, 24_000 + -len(speech) % 1920)).astype(np.float32)

    async def talk(url):
        heard, audio = [], 0
        async with session_at(url, seed=3, format="pcm") as ws:
            await ready(ws)
            content = wire.pcm_bytes(frames)
            await ws.send_bytes(wire.message(Kind.AUDIO, content))
            while audio < len(frames) // 1920 or not heard:
                kind, payload = await receive(ws)
                audio += kind == Kind.AUDIO
                if kind == Kind.METADATA:
                    heard.append(json.loads(payload))
                if audio == len(frames) // 1920 and not heard:
                    await ws.send_bytes(wire.message(Kind.AUDIO, bytes(3840)))
        return heard

    recognition = Recognition(make_recogniser("pocketsphinx", None, "en"))
    (first, *_) = in_loop(tiny_speaker, talk, recognition=recognition)
    assert first["type"] == "heard" and "morning" in first["text"].lower()
    assert first["start_s"] < 0.5 < first["end_s"] < 3
