"""The server over loopback: its wire, its proofs, its refusals. The model is tiny and real."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import pytest
import sphn
from aiohttp import web
from yarl import URL

from duplex.errors import RequestError, ServerError
from duplex.files import sha256_bytes
from pipeline.serving import wire
from pipeline.serving.app import make_runner
from pipeline.serving.chat import ChatDesk
from pipeline.serving.conversation import Speaker
from pipeline.serving.probe import probe
from pipeline.serving.wire import Kind

PROMPT = 'You work for "Sunrise" & Co. Your name is Maria + 100% ☕ #1'
FRAME_BYTES = 3840


@pytest.fixture(scope="module")
def speaker(tiny_checkpoint):
    return Speaker.load(tiny_checkpoint, "cpu")


@pytest.fixture(scope="module")
def deaf(tiny_checkpoint):
    """The planted fault: it reads the prompt, checks it, and feeds none of it."""

    class Deaf(Speaker):
        def begin(self, prompt_text, *rest):
            return super().begin("", *rest)

    return Deaf.load(tiny_checkpoint, "cpu")


@asynccontextmanager
async def serving(speaker, token=None):
    with ThreadPoolExecutor(1) as worker:
        desk = ChatDesk(worker)
        desk.speaker = speaker
        runner = make_runner(desk, token)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@asynccontextmanager
async def session_at(url, **query):
    """A WebSocket at `url`, before anything was received."""
    target = URL(wire.chat_url(url, **query), encoded=True)
    async with aiohttp.ClientSession() as session, session.ws_connect(target) as ws:
        yield ws


async def receive(ws, timeout_s=20):
    message = await ws.receive(timeout_s)
    if message.type != aiohttp.WSMsgType.BINARY:
        return None, b""
    return Kind(message.data[0]), message.data[1:]


async def ready(ws):
    """Through the handshake; the first metadata."""
    assert await receive(ws) == (Kind.READY, b"")
    kind, payload = await receive(ws)
    assert kind == Kind.METADATA
    return json.loads(payload)


def user_pcm(num_frames):
    time_s = np.arange(num_frames * 1920) / 24_000
    return (0.3 * np.sin(2 * np.pi * 300 * time_s)).astype(np.float32)


async def lock_step(ws, num_frames):
    """Messages that answer each frame: [(kind, payload), …] a frame, the audio last."""
    content = wire.pcm_bytes(user_pcm(num_frames))
    answers = []
    for start in range(0, len(content), FRAME_BYTES):
        await ws.send_bytes(wire.message(Kind.AUDIO, content[start : start + FRAME_BYTES]))
        answers.append([await receive(ws)])
        while answers[-1][-1][0] == Kind.TEXT:
            answers[-1].append(await receive(ws))
    return answers


def in_loop(speaker, talk, **options):
    """Run `talk(url)` against a server in this loop."""

    async def run():
        async with serving(speaker, **options) as url:
            return await talk(url)

    return asyncio.run(run())


def test_ready_comes_after_the_prompt_and_says_what_was_fed(speaker, tiny_checkpoint):
    async def talk(url):
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/info") as response:
            info = await response.json()
        async with session_at(url, text_prompt=PROMPT, seed=3, format="pcm") as ws:
            return info, await ready(ws)

    info, fed = in_loop(speaker, talk)
    tokens = wire.prompt_tokens(speaker.tokenizer, PROMPT)
    prompt = speaker.plan(PROMPT)
    assert fed["type"] == "prompt" and fed["protocol"] == info["protocol"] == 1
    assert (fed["count"], fed["digest"]) == (len(tokens), wire.prompt_digest(tokens))
    assert fed["frames"] == prompt.num_frames and fed["seed"] == 3 and fed["prefill_s"] > 0
    weights = sha256_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    tokenizer = sha256_bytes((tiny_checkpoint / "tokenizer.model").read_bytes())
    assert fed["model_digest"] == info["model_digest"] == weights
    assert info["tokenizer_digest"] == tokenizer
    assert (info["sample_rate"], info["card"], info["device"]) == (24_000, 64, "cpu")


def test_each_full_frame_has_one_answer_with_its_text_before_it(speaker):
    async def talk(url):
        async with session_at(url, text_prompt=PROMPT, seed=3, format="pcm") as ws:
            await ready(ws)
            answers = await lock_step(ws, 12)
            # Any chunking, odd bytes too: 2.5 frames in pieces of 777 bytes are two answers.
            content = wire.pcm_bytes(user_pcm(3))[: FRAME_BYTES * 5 // 2]
            for start in range(0, len(content), 777):
                await ws.send_bytes(wire.message(Kind.AUDIO, content[start : start + 777]))
            await ws.send_bytes(wire.message(Kind.PING))
            await ws.send_bytes(b"\x63 a kind to come")
            await ws.send_str("not even binary")
            found = []
            while found.count(Kind.AUDIO) < 2:
                found.append((await receive(ws))[0])
            with pytest.raises(TimeoutError):
                await receive(ws, 0.3)
            return answers, found

    answers, found = in_loop(speaker, talk)
    assert set(found) <= {Kind.AUDIO, Kind.TEXT}
    assert len(answers) == 12
    for answer in answers:
        assert [kind for kind, _ in answer] in ([Kind.AUDIO], [Kind.TEXT, Kind.AUDIO])
        assert len(answer[-1][1]) == FRAME_BYTES
    assert any(len(answer) == 2 for answer in answers)


def test_seed_prompt_and_audio_decide_every_byte(speaker):
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

    first, again, other = in_loop(speaker, talk)
    assert first == again
    assert [answer[-1] for answer in first] != [answer[-1] for answer in other]
    assert [answer[0] for answer in first] != [answer[0] for answer in other]


LONG = ("The customer wants a “large latte” & a muffin; " * 50)[:2000]


@pytest.mark.parametrize("prompt", [PROMPT, "", "'\"<b>&amp;%00", "☕" * 300, LONG])
def test_the_probe_proves_what_was_fed(speaker, prompt):
    result = in_loop(speaker, lambda url: probe(wire.page_url(url, prompt)))
    tokens = wire.prompt_tokens(speaker.tokenizer, prompt)
    assert result.proven, result.reason
    assert (result.prompt, result.count) == (prompt.strip(), len(tokens))
    assert result.served_digest == result.expected_digest == wire.prompt_digest(tokens)
    assert (result.prefill_s or 0) > 0 and (result.first_packet_s or 0) > 0
    assert result.server.startswith("duplex-workbench")


def test_the_probe_takes_the_tokenizer_that_it_is_given(speaker):
    own = speaker.tokenizer_file
    assert in_loop(speaker, lambda url: probe(url, prompt=PROMPT, tokenizer=own)).proven


def test_a_server_that_does_not_feed_the_prompt_fails_the_probe(deaf):
    result = in_loop(deaf, lambda url: probe(url, prompt=PROMPT))
    assert not result.proven
    assert result.count == 0 and result.served_digest != result.expected_digest
    assert "something else" in result.reason

    result = in_loop(speaker, lambda url: probe(url, prompt=PROMPT, tokenizer=b"another"))
    assert not result.proven and "tokenizer" in result.reason


@dataclass
class StockServer:
    """Speaks Moshi's protocol as `moshi.server` does: no 04, no /api/info, Opus only."""

    heard: int = 0
    tasks: list = field(default_factory=list)

    async def chat(self, request):
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        await ws.send_bytes(b"\x00")
        reader, writer = sphn.OpusStreamReader(24_000), sphn.OpusStreamWriter(24_000)
        async for message in ws:
            self.heard += reader.append_bytes(message.data[1:]).shape[-1]
            packet = writer.append_pcm(np.zeros(1920, dtype=np.float32))
            await ws.send_bytes(b"\x02 hello")
            await ws.send_bytes(b"\x01" + packet)
        return ws


def test_a_server_without_metadata_is_named_and_not_proven():
    async def run():
        stock, app = StockServer(), web.Application()
        app.router.add_get("/api/chat", stock.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return stock, await probe(wire.page_url(url, PROMPT))
        finally:
            await runner.cleanup()

    stock, result = asyncio.run(run())
    assert not result.proven and "04" in result.reason
    assert "without metadata" in result.server
    assert result.first_packet_s is not None and stock.heard > 0


def test_nobody_there_is_an_error():
    with pytest.raises(ServerError, match="must answer"):
        asyncio.run(probe("http://127.0.0.1:9/?text_prompt=x"))


def test_a_second_client_is_refused_and_the_first_goes_on(speaker):
    async def talk(url):
        async with session_at(url, seed=1, format="pcm") as first:
            await ready(first)
            async with session_at(url, format="pcm") as second:
                kind, reason = await receive(second)
                assert kind == Kind.ERROR and b"one conversation" in reason
                assert (await receive(second))[0] is None
                assert second.close_code == 1013
            busy = await probe(url, prompt=PROMPT)
            assert not busy.proven and "one conversation" in busy.reason
            assert len(await lock_step(first, 3)) == 3
        assert (await _probe_when_free(url)).proven

    in_loop(speaker, talk)


async def _probe_when_free(url, within_s=2.0):
    deadline = time.monotonic() + within_s
    while True:
        result = await probe(url, prompt="Hello.")
        if result.proven or time.monotonic() > deadline:
            return result
        await asyncio.sleep(0.02)


def vanish(ws):
    ws._response.connection.transport.abort()  # no close frame: as a killed client leaves


def test_a_client_that_vanishes_frees_the_model(speaker):
    async def talk(url):
        async with session_at(url, format="pcm") as ws:
            await ready(ws)
            await ws.send_bytes(wire.message(Kind.AUDIO, bytes(FRAME_BYTES * 50)))
            vanish(ws)
        assert (await _probe_when_free(url)).proven

    in_loop(speaker, talk)


def test_a_client_that_vanishes_during_the_prompt_frees_the_model(speaker):
    assert speaker.plan(LONG).num_frames > 800  # seconds of prefill

    async def talk(url):
        async with session_at(url, text_prompt=LONG, format="pcm") as ws:
            await asyncio.sleep(0.3)
            async with aiohttp.ClientSession() as session:  # the loop is alive meanwhile
                started = time.perf_counter()
                async with session.get(f"{url}/ready") as response:
                    assert await response.json() == {"ready": True, "busy": True}
                assert time.perf_counter() - started < 0.5
            vanish(ws)
        started = time.perf_counter()
        assert (await _probe_when_free(url)).proven
        return time.perf_counter() - started

    assert in_loop(speaker, talk) < 1.5


def test_opus_in_and_out(speaker):
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

    assert in_loop(speaker, talk) > 0.01


@pytest.mark.parametrize("rubbish", [b"rubbish" * 50, b"OggS" + bytes(300)])
def test_rubbish_in_place_of_ogg_is_told_and_harms_nobody(speaker, rubbish):
    async def talk(url):
        async with session_at(url) as ws:
            await ready(ws)
            for _ in range(2):
                await ws.send_bytes(wire.message(Kind.AUDIO, rubbish))
            kind, reason = await receive(ws)
            assert kind == Kind.ERROR and b"Ogg" in reason
            assert (await receive(ws))[0] is None and ws.close_code == 1003
        assert (await _probe_when_free(url)).proven

    in_loop(speaker, talk)


def test_an_error_of_the_model_ends_one_conversation_only(speaker, monkeypatch):
    def fail(_):
        raise RuntimeError("out of memory")

    async def talk(url):
        with monkeypatch.context() as patch:
            patch.setattr(speaker, "step", fail)
            async with session_at(url, format="pcm") as ws:
                await ready(ws)
                await ws.send_bytes(wire.message(Kind.AUDIO, bytes(FRAME_BYTES)))
                assert (await receive(ws))[0] == Kind.ERROR
                assert (await receive(ws))[0] is None and ws.close_code == 1011
        assert (await _probe_when_free(url)).proven

    in_loop(speaker, talk)


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
def test_a_bad_request_is_a_400_that_says_why(speaker, query, named):
    async def talk(url):
        target = URL(wire.chat_url(url, **query).replace("ws", "http", 1), encoded=True)
        async with aiohttp.ClientSession() as session, session.get(target) as response:
            return response.status, await response.text()

    status, text = in_loop(speaker, talk)
    assert status == 400 and named in text


def test_the_probe_says_why_it_was_refused(speaker):
    with pytest.raises(RequestError, match=r"400 .*text_topk"):
        in_loop(speaker, lambda url: probe(wire.chat_url(url, text_topk=0)))
