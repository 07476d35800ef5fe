"""The server over loopback: its wire and its refusals. The model is tiny and real."""

import asyncio
import time

import aiohttp
import numpy as np
import pytest
import sphn
from yarl import URL

from duplex.config import SamplingSection
from duplex.errors import RequestError
from duplex.files import sha256_bytes
from pipeline.serving import chat, wire
from pipeline.serving.prefill import Prefill, PromptCache
from pipeline.serving.probe import probe
from pipeline.serving.text import TextAssembler
from pipeline.serving.wire import Kind
from tests.stages.serving_helpers import (
    FRAME_BYTES,
    LONG,
    PROMPT,
    in_loop,
    lock_step,
    probe_when_free,
    ready,
    receive,
    session_at,
    user_pcm,
)


def test_ready_comes_after_the_prompt_and_says_what_was_fed(tiny_speaker, tiny_checkpoint):
    async def talk(url):
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/info") as response:
            info = await response.json()
        async with session_at(url, text_prompt=PROMPT, seed=3, format="pcm") as ws:
            return info, await ready(ws)

    info, fed = in_loop(tiny_speaker, talk)
    tokens = wire.prompt_tokens(tiny_speaker.tokenizer, PROMPT)
    prompt = tiny_speaker.plan(PROMPT).prompt
    assert fed["type"] == "prompt" and fed["protocol"] == info["protocol"] == 1
    assert (fed["count"], fed["digest"]) == (len(tokens), wire.prompt_digest(tokens))
    assert fed["frames"] == prompt.num_frames and fed["seed"] == 3 and fed["prefill_s"] > 0
    weights = sha256_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    tokenizer = sha256_bytes((tiny_checkpoint / "tokenizer.model").read_bytes())
    assert fed["model_digest"] == info["model_digest"] == weights
    assert info["tokenizer_digest"] == tokenizer
    assert (info["sample_rate"], info["card"], info["device"]) == (24_000, 64, "cpu")


def test_each_frame_is_answered_by_its_own_text_and_then_its_own_audio(tiny_speaker):
    async def talk(url):
        async with session_at(url, text_prompt=PROMPT, seed=3, format="pcm") as ws:
            await ready(ws)
            return await lock_step(ws, 30)

    answers = in_loop(tiny_speaker, talk)
    tiny_speaker.begin(PROMPT, SamplingSection(), seed=3)
    pieces, texts = TextAssembler(tiny_speaker.tokenizer), 0
    heard = wire.pcm_samples(wire.pcm_bytes(user_pcm(30))).reshape(30, 1920)
    for frame, answer in zip(heard, answers, strict=True):
        pcm, token = tiny_speaker.step({0: frame})[0]
        text = "" if token is None else pieces.append(token)
        texts += bool(text)
        expected = [(Kind.TEXT, text.encode())] if text else []
        assert answer == [*expected, (Kind.AUDIO, wire.pcm_bytes(pcm))]
    assert 0 < texts < 30


def test_audio_comes_in_any_chunks_and_other_messages_count_for_nothing(tiny_speaker):
    async def talk(url):
        async with session_at(url, seed=3, format="pcm") as ws:
            await ready(ws)
            content = wire.pcm_bytes(user_pcm(2))  # in odd pieces: half samples are kept
            for start in range(0, len(content), 777):
                await ws.send_bytes(wire.message(Kind.AUDIO, content[start : start + 777]))
            await ws.send_bytes(wire.message(Kind.AUDIO, content[:4]))  # the next frame's start
            await ws.send_bytes(wire.message(Kind.PING))
            await ws.send_bytes(b"\x63 a kind to come")
            await ws.send_bytes(b"")
            await ws.send_str("not even binary")
            found = []
            while found.count(Kind.AUDIO) < 2:
                found.append((await receive(ws))[0])
            with pytest.raises(TimeoutError):
                await receive(ws, 0.3)
            return found

    assert set(in_loop(tiny_speaker, talk)) <= {Kind.AUDIO, Kind.TEXT}


def test_what_is_said_before_ready_is_not_part_of_the_conversation(tiny_speaker):
    async def talk(url):
        async with session_at(url, text_prompt=PROMPT, format="pcm") as ws:
            await ws.send_bytes(wire.message(Kind.AUDIO, bytes(FRAME_BYTES)))
            await ready(ws)
            with pytest.raises(TimeoutError):
                await receive(ws, 0.3)
            return await lock_step(ws, 2)

    assert len(in_loop(tiny_speaker, talk)) == 2


def test_seed_prompt_and_audio_decide_every_byte(tiny_speaker):
    async def talk(url):
        async def once(**query):
            async with session_at(url, format="pcm", **query) as ws:
                await ready(ws)
                return await lock_step(ws, 10)

        first = await once(text_prompt=PROMPT, seed=3)
        await once(text_prompt="Another.", seed=8)
        return (
            first,
            await once(text_prompt=PROMPT, seed=3),
            await once(text_prompt=PROMPT, seed=4),
        )

    first, again, other = in_loop(tiny_speaker, talk)
    assert first == again
    assert [answer[-1] for answer in first] != [answer[-1] for answer in other]
    assert [answer[0] for answer in first] != [answer[0] for answer in other]


def test_a_second_client_is_refused_and_the_first_goes_on(tiny_speaker):
    async def talk(url):
        async with session_at(url, seed=1, format="pcm") as first:
            await ready(first)
            async with session_at(url, format="pcm") as second:
                kind, reason = await receive(second)
                assert kind == Kind.ERROR and b"1 conversation at" in reason
                assert (await receive(second))[0] is None
                assert second.close_code == 1013
            busy = await probe(url, prompt=PROMPT)
            assert not busy.proven and "1 conversation at" in busy.reason
            assert len(await lock_step(first, 3)) == 3
        assert (await probe_when_free(url)).proven

    in_loop(tiny_speaker, talk)


def vanish(ws):
    ws._response.connection.transport.abort()  # no close frame: as a killed client leaves


def test_a_client_that_vanishes_frees_the_model(tiny_speaker):
    async def talk(url):
        async with session_at(url, format="pcm") as ws:
            await ready(ws)
            await ws.send_bytes(wire.message(Kind.AUDIO, bytes(FRAME_BYTES * 50)))
            vanish(ws)
        assert (await probe_when_free(url)).proven

    in_loop(tiny_speaker, talk)


def test_nothing_comes_before_the_prompt_is_fed_and_who_leaves_then_frees_the_model(
    tiny_speaker, monkeypatch
):
    monkeypatch.setattr(tiny_speaker, "cache", PromptCache(0))  # another test may have fed it
    feed = Prefill.advance
    monkeypatch.setattr(Prefill, "advance", lambda own: (time.sleep(0.3), feed(own))[1])
    assert tiny_speaker.plan(LONG).prompt.num_frames > 800  # so nine seconds of prefill

    async def talk(url):
        async with session_at(url, text_prompt=LONG, format="pcm") as ws:
            with pytest.raises(TimeoutError):
                await receive(ws, 0.3)
            async with aiohttp.ClientSession() as session:  # the loop is alive meanwhile
                started = time.perf_counter()
                async with session.get(f"{url}/ready") as response:
                    assert await response.json() == {"ready": True, "slots": 1, "taken": 1}
                assert time.perf_counter() - started < 0.5
            vanish(ws)
        started = time.perf_counter()
        assert (await probe_when_free(url)).proven
        return time.perf_counter() - started

    assert in_loop(tiny_speaker, talk) < 1.5


def test_a_client_that_no_longer_reads_frees_the_model(tiny_speaker, monkeypatch):
    monkeypatch.setattr(chat, "HEARTBEAT_S", 0.5)

    async def talk(url):
        async with session_at(url, format="pcm") as ws:
            await ready(ws)
            await asyncio.sleep(1.5)  # aiohttp answers pings while somebody receives only
            assert (await probe_when_free(url)).proven

    in_loop(tiny_speaker, talk)


def test_opus_in_and_out(tiny_speaker):
    async def talk(url):
        writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
        async with session_at(url, text_prompt=PROMPT, seed=3) as ws:
            await ready(ws)
            heard, loudest = 0, 0.0
            for frame in user_pcm(25).reshape(25, 1920):
                await ws.send_bytes(wire.message(Kind.AUDIO, writer.append_pcm(frame)))
            while heard < 20 * 1920:
                kind, payload = await receive(ws)
                assert kind in (Kind.AUDIO, Kind.TEXT)
                if kind == Kind.AUDIO:
                    pcm = reader.append_bytes(payload)
                    heard += pcm.shape[-1]
                    loudest = max(loudest, float(np.abs(pcm).max(initial=0)))
            return loudest

    assert in_loop(tiny_speaker, talk) > 0.01


@pytest.mark.parametrize("rubbish", [b"rubbish" * 50, b"OggS" + bytes(300)])
def test_rubbish_in_place_of_ogg_is_told_and_harms_nobody(tiny_speaker, rubbish):
    async def talk(url):
        async with session_at(url) as ws:
            await ready(ws)
            for _ in range(2):
                await ws.send_bytes(wire.message(Kind.AUDIO, rubbish))
            kind, reason = await receive(ws)
            assert kind == Kind.ERROR and b"Ogg" in reason
            assert (await receive(ws))[0] is None and ws.close_code == 1003
        assert (await probe_when_free(url)).proven

    in_loop(tiny_speaker, talk)


def test_an_error_of_the_model_ends_one_conversation_only(tiny_speaker, monkeypatch):
    def fail(_):
        raise RuntimeError("out of memory")

    async def talk(url):
        with monkeypatch.context() as patch:
            patch.setattr(tiny_speaker, "step", fail)
            async with session_at(url, format="pcm") as ws:
                await ready(ws)
                await ws.send_bytes(wire.message(Kind.AUDIO, bytes(FRAME_BYTES)))
                assert (await receive(ws))[0] == Kind.ERROR
                assert (await receive(ws))[0] is None and ws.close_code == 1011
        assert (await probe_when_free(url)).proven

    in_loop(tiny_speaker, talk)


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"seed": "x"}, "seed"),
        ({"text_topk": "0"}, "text_topk"),
        ({"format": "mp3"}, "format"),
        ({"voice_prompt": "NATF0.pt"}, "voice_prompt"),
        ({"text_prompt": "coffee and tea " * 1500}, "context of 3000 frames"),
    ],
)
def test_a_bad_request_is_a_400_that_says_why(tiny_speaker, query, named):
    async def talk(url):
        target = URL(wire.chat_url(url, **query).replace("ws", "http", 1), encoded=True)
        async with aiohttp.ClientSession() as session, session.get(target) as response:
            return response.status, await response.text()

    status, text = in_loop(tiny_speaker, talk)
    assert status == 400 and named in text


def test_the_probe_says_why_it_was_refused(tiny_speaker):
    with pytest.raises(RequestError, match=r"400 .*text_topk"):
        in_loop(tiny_speaker, lambda url: probe(wire.chat_url(url, text_topk=0)))
