"""The probe: proves what was fed, and calls nothing proven that is not."""

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
import sphn
from aiohttp import web

from duplex.errors import ServerError
from pipeline.serving import wire
from pipeline.serving.model import ServedModel
from pipeline.serving.probe import probe
from tests.stages.serving_helpers import PROMPT, WIDE, in_loop


@pytest.fixture(scope="module")
def deaf(tiny_checkpoint):
    """The planted fault: it reads the prompt, checks it, and feeds none of it."""

    class Deaf(ServedModel):
        def plan(self, prompt_text, *audio):
            return super().plan("", *audio)

    return Deaf.load(tiny_checkpoint, "cpu")


@pytest.mark.parametrize("prompt", [PROMPT, "", "'\"<b>&amp;%00", "☕" * 100, WIDE], ids=range(5))
def test_the_probe_proves_what_was_fed(tiny_speaker, prompt):
    result = in_loop(tiny_speaker, lambda url: probe(wire.page_url(url, prompt)))
    tokens = wire.prompt_tokens(tiny_speaker.tokenizer, prompt)
    assert result.proven, result.reason
    assert (result.prompt, result.count) == (prompt.strip(), len(tokens))
    assert result.served_digest == result.expected_digest == wire.prompt_digest(tokens)
    assert (result.prefill_s or 0) > 0 and (result.first_packet_s or 0) > 0
    assert result.server.startswith("duplex-workbench")


def test_the_probe_takes_the_tokenizer_that_it_is_given(tiny_speaker):
    own = tiny_speaker.tokenizer_file
    assert in_loop(tiny_speaker, lambda url: probe(url, prompt=PROMPT, tokenizer=own)).proven


def test_a_server_that_does_not_feed_the_prompt_fails_the_probe(deaf):
    result = in_loop(deaf, lambda url: probe(url, prompt=PROMPT))
    assert not result.proven
    assert result.count == 0 and result.served_digest != result.expected_digest
    assert "something else" in result.reason


def test_a_probe_with_another_checkpoints_tokenizer_proves_nothing(tiny_speaker):
    result = in_loop(tiny_speaker, lambda url: probe(url, prompt=PROMPT, tokenizer=b"another"))
    assert not result.proven and "tokenizer" in result.reason


@dataclass
class StockServer:
    """Speaks Moshi's protocol as `moshi.server` does: no 04, no /api/info, Opus only."""

    heard: int = 0  # samples

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
