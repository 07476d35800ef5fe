"""What a stranger may take, and that nobody's fault is another's: limits, stalls, ends, rubbish."""

import asyncio
import json
import socket
import time

import aiohttp
import numpy as np
import pytest
from yarl import URL

from duplex.config import SamplingSection
from pipeline.serving import limits as limits_module
from pipeline.serving import wire
from pipeline.serving.limits import Limits
from pipeline.serving.model import ServedModel
from pipeline.serving.wire import Kind
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.serving_helpers import (
    FRAME_BYTES,
    in_loop,
    lock_step,
    ready,
    receive,
    session_at,
    user_pcm,
)

GREEDY = {"text_temperature": 0, "audio_temperature": 0, "format": "pcm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("limits"), context=60)
    return ServedModel.load(folder, "cpu", num_slots=2)


def reference(model, num_frames, seed=3):
    """The bytes that a conversation alone would be answered with."""
    model.begin("", SamplingSection(), seed)
    heard = wire.pcm_samples(wire.pcm_bytes(user_pcm(num_frames))).reshape(-1, 1920)
    return [wire.pcm_bytes(model.step({0: frame})[0][0]) for frame in heard]


def spoken(answers):
    return [answer[-1][1] for answer in answers]


def test_two_talk_at_once_and_a_third_is_refused(model):
    expected = reference(model, 12)

    async def talk(url):
        async with (
            session_at(url, seed=3, format="pcm") as first,
            session_at(url, seed=3, format="pcm") as second,
        ):
            await asyncio.gather(ready(first), ready(second))
            async with session_at(url, format="pcm") as third:
                kind, reason = await receive(third)
                assert kind == Kind.ERROR and b"2 conversations" in reason
                assert (await receive(third))[0] is None and third.close_code == 1013
            return await asyncio.gather(lock_step(first, 12), lock_step(second, 12))

    for answers in in_loop(model, talk):
        assert spoken(answers) == expected


def test_who_does_not_read_stands_still_alone_and_loses_the_slot(model):
    expected = reference(model, 30)

    async def talk(url):
        reader, writer = await raw_chat(url)
        await read_until(reader, b"\x04")
        sent = asyncio.create_task(flood(writer))
        async with session_at(url, seed=3, format="pcm") as ws:
            await ready(ws)
            answers = await lock_step(ws, 30)
            started = time.monotonic()
            # `reader` is no longer read: its slot must be free again soon after the limit.
            while (await taken(url)) > 1 and time.monotonic() - started < 20:
                await asyncio.sleep(0.05)
            found = await taken(url)
        sent.cancel()
        writer.close()
        return answers, found

    answers, found = in_loop(model, talk, limits=Limits(stall_s=0.5, roll=True))
    assert spoken(answers) == expected
    assert found == 1


async def raw_chat(url, query="format=pcm"):
    """A WebSocket by hand, whose incoming bytes are read only when asked for."""
    target = URL(url)
    own = socket.create_connection(("127.0.0.1", target.port))
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader, writer = await asyncio.open_connection(sock=own, limit=2**12)
    writer.write(
        f"GET /api/chat?{query} HTTP/1.1\r\nHost: 127.0.0.1:{target.port}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    assert b"101" in await reader.readline()
    return reader, writer


async def read_until(reader, marker):
    content = b""
    while marker not in content:
        content += await reader.read(256)


async def flood(writer):
    """Masked frames of audio, for as long as the server takes them."""
    payload = bytes([Kind.AUDIO]) + bytes(FRAME_BYTES * 4)
    head = b"\x82\xfe" + len(payload).to_bytes(2, "big") + bytes(4)
    while True:
        writer.write(head + payload)
        await writer.drain()


async def taken(url):
    async with aiohttp.ClientSession() as session, session.get(f"{url}/ready") as response:
        return (await response.json())["taken"]


def test_a_full_context_ends_the_conversation_and_says_so(model):
    async def talk(url):
        async with session_at(url, seed=3, format="pcm") as ws:
            fed = await ready(ws)
            left = round(fed["seconds_left"] / 0.08)
            assert left == 60 - fed["frames"]
            assert len(await lock_step(ws, left)) == left
            kind, payload = await receive(ws)
            assert kind == Kind.METADATA and json.loads(payload)["reason"] == "context"
            assert (await receive(ws))[0] is None and ws.close_code == 1000

    in_loop(model, talk)


@pytest.mark.slow  # by itself: test_conversation.py
def test_with_roll_it_goes_on_behind_the_context(model):
    async def talk(url):
        async with session_at(url, seed=3, format="pcm") as ws:
            assert (await ready(ws))["seconds_left"] is None
            return await lock_step(ws, 80)

    assert len(in_loop(model, talk, limits=Limits(roll=True))) == 80


@pytest.mark.parametrize(
    ("limit", "reason", "code"),
    [({"session_s": 0.3}, "time", 1000), ({"idle_s": 0.3}, "idle", 1008)],
)
def test_time_and_idleness_have_an_end(model, limit, reason, code):
    async def talk(url):
        async with session_at(url, format="pcm") as ws:
            await ready(ws)
            if reason == "time":
                await asyncio.sleep(0.4)
                await ws.send_bytes(wire.message(Kind.AUDIO, bytes(FRAME_BYTES)))
            while True:
                kind, payload = await receive(ws)
                if kind == Kind.METADATA:
                    break
            assert json.loads(payload)["reason"] == reason
            assert (await receive(ws))[0] is None and ws.close_code == code

    in_loop(model, talk, limits=Limits(roll=True, **limit))


@pytest.mark.slow  # nine seconds of a core
def test_who_sends_ten_times_too_fast_is_answered_frame_by_frame(model):
    num_frames = 200

    async def talk(url):
        async with session_at(url, seed=3, format="pcm") as ws:
            await ready(ws)
            content = wire.pcm_bytes(user_pcm(num_frames))

            async def send():
                for start in range(0, len(content), FRAME_BYTES):
                    part = content[start : start + FRAME_BYTES]
                    await ws.send_bytes(wire.message(Kind.AUDIO, part))

            sending = asyncio.create_task(send())
            heard = []
            while len(heard) < num_frames:
                kind, payload = await receive(ws)
                if kind == Kind.AUDIO:
                    heard.append(payload)
            await sending
            return heard

    assert in_loop(model, talk, limits=Limits(roll=True)) == reference(model, num_frames)


def test_silent_strangers_are_dropped_and_the_oldest_of_too_many(model, monkeypatch, caplog):
    monkeypatch.setattr(limits_module, "HEADER_S", 1.0)

    async def talk(url):
        port = URL(url).port
        async with session_at(url, seed=3, format="pcm") as ws:  # known: it is not counted
            await ready(ws)
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(9)]
            for _, writer in slow:
                writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-A: ")  # and never more
            await asyncio.sleep(0.2)
            at_once = [await gone(reader, 0.05) for reader, _ in slow]
            assert await taken(url) == 1  # who says what they want gets in meanwhile
            slowly = [await gone(reader, 2) for reader, _ in slow]
            answered = len(await lock_step(ws, 3))
        for _, writer in slow:
            writer.close()
        return at_once, slowly, answered

    at_once, slowly, answered = in_loop(model, talk, limits=Limits(max_strangers=6))
    assert at_once == [True] * 3 + [False] * 6  # the oldest make room
    assert all(slowly) and answered == 3
    assert not caplog.records, [record.getMessage() for record in caplog.records]


def test_who_has_no_token_keeps_no_connection(model):
    """Else keep-alives of health checks alone would take every place."""

    async def talk(url):
        found = {}
        for path in ("/health", "/ping", "/api/info", "/"):
            reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            answer = await asyncio.wait_for(reader.read(), 2)  # to the end of the connection
            found[path] = answer.split()[1]
            writer.close()
        return found

    found = in_loop(model, talk, token="a-token-for-it")
    assert found == {"/health": b"200", "/ping": b"200", "/api/info": b"401", "/": b"401"}


async def gone(reader, within_s):
    """Whether the server has closed the connection, or does."""
    try:
        return await asyncio.wait_for(reader.read(), within_s) == b""
    except (ConnectionError, TimeoutError) as error:
        return isinstance(error, ConnectionError)


def test_thousands_of_rubbish_messages_harm_nobody(model):
    rng = np.random.default_rng(7)
    expected = reference(model, 20)

    async def rubbish(url, number):
        query = {} if number % 2 else {"format": "pcm"}
        async with session_at(url, **query) as ws:
            for _ in range(120):
                content = rng.bytes(int(rng.integers(0, 300)))
                if rng.random() < 0.5:
                    content = bytes([rng.integers(0, 8)]) + content
                try:
                    await ws.send_bytes(content)
                except ConnectionError:
                    return

    async def talk(url):
        async with session_at(url, seed=3, format="pcm") as ws:
            await ready(ws)
            answers = []
            for start in range(20):
                rude = asyncio.create_task(rubbish(url, start))
                answers += await one_frame(ws, start)
                await rude
            return answers

    assert in_loop(model, talk) == expected


async def one_frame(ws, number):
    content = wire.pcm_bytes(user_pcm(20))[number * FRAME_BYTES :][:FRAME_BYTES]
    await ws.send_bytes(wire.message(Kind.AUDIO, content))
    while True:
        kind, payload = await receive(ws)
        if kind == Kind.AUDIO:
            return [payload]


def test_thousands_of_rubbish_queries_are_400_or_a_conversation(model):
    rng = np.random.default_rng(8)
    keys = [*wire.KNOWN_KEYS, "x", "text_promt", "__proto__", ""]
    pieces = ["", "a", "-1", "NaN", "1e999", "../../etc/passwd", "%00", "☕", "' or 1=1", "0", "[]"]

    async def talk(url):
        statuses = set()
        async with aiohttp.ClientSession() as session:
            for _ in range(1500):
                query = "&".join(
                    f"{wire.quote(str(rng.choice(keys)))}={wire.quote(str(rng.choice(pieces)))}"
                    for _ in range(int(rng.integers(0, 5)))
                )
                target = URL(f"{url}/api/chat?{query}", encoded=True)
                async with session.get(target) as response:
                    statuses.add(response.status)
                    assert "Traceback" not in await response.text()
            for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd"):
                async with session.get(URL(url + path, encoded=True)) as response:
                    assert response.status == 404, path
        return statuses

    assert in_loop(model, talk) == {400}


def test_a_message_over_the_limit_and_a_body_over_the_limit_are_refused(model):
    async def talk(url):
        async with session_at(url, format="pcm") as ws:
            await ready(ws)
            await ws.send_bytes(wire.message(Kind.AUDIO, bytes(wire.MAX_MESSAGE_BYTES + 10)))
            while (await receive(ws))[0] is not None:
                pass
            assert ws.close_code == 1009
        async with aiohttp.ClientSession() as session:
            body = {"text_prompt": "x" * 300_000}
            async with session.post(f"{url}/api/prompts", json=body) as response:
                assert response.status == 413
        assert await taken(url) == 0

    in_loop(model, talk)


def test_it_stays_alive_for_health_checks_while_it_is_full(model):
    async def talk(url):
        async with session_at(url, format="pcm") as one, session_at(url, format="pcm") as two:
            await asyncio.gather(ready(one), ready(two))
            async with aiohttp.ClientSession() as session:
                found = {}
                for path in ("/health", "/ready", "/ping"):
                    async with session.get(url + path) as response:
                        found[path] = response.status
            return found

    assert set(in_loop(model, talk).values()) == {200}
