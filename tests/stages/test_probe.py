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
from pipeline.serving.strangers import host_traps
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


@dataclass
class PersonaPlexServer(StockServer):
    """Like NVIDIA's: its query keys are required, and `00` comes when the prompt was stepped."""

    step_s: float = 0.01

    async def chat(self, request):
        text, voice = request.query["text_prompt"], request.query["voice_prompt"]
        assert text and voice.endswith(".pt")
        await asyncio.sleep(self.step_s * len(text) / 5)
        return await super().chat(request)


def probed(server, prompt=PROMPT * 2):
    async def run():
        app = web.Application()
        app.router.add_get("/api/chat", server.chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return await probe(wire.page_url(url, prompt))
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_moshis_server_is_told_by_its_behaviour_and_not_proven():
    server = StockServer()
    result = probed(server)
    assert not result.proven and "04" in result.reason
    assert result.server.startswith("moshi's server") and "was not read" in (result.took or "")
    assert any("ignores text_prompt" in trap for trap in result.traps)
    assert result.first_packet_s is not None and server.heard > 0


def test_personaplexs_server_is_told_by_its_behaviour_and_not_proven():
    """It takes the prompt, as its `00` shows; that is still no proof of what was fed."""
    result = probed(PersonaPlexServer())
    assert not result.proven and "04" in result.reason
    assert result.server.startswith("PersonaPlex's") and "it was read" in (result.took or "")
    assert any("required keys" in trap for trap in result.traps)
    assert result.first_packet_s is not None
    deaf = probed(PersonaPlexServer(step_s=0))
    assert deaf.server.startswith("PersonaPlex's") and "not read" in (deaf.took or "")


def test_hosts_that_pass_no_websockets_are_named():
    assert "proxy.runpod.net" in host_traps("https://abc.api.runpod.ai/?text_prompt=x")[0]
    assert host_traps("https://abc-8998.proxy.runpod.net/?text_prompt=x") == ()


def test_our_server_is_real_time_or_not_and_says_so(tiny_speaker):
    result = in_loop(tiny_speaker, lambda url: probe(wire.page_url(url, PROMPT)))
    assert result.real_time_factor is not None and 0 < result.real_time_factor < 5
    assert result.took is None and result.traps == ()


def test_nobody_there_is_an_error():
    with pytest.raises(ServerError, match="must answer"):
        asyncio.run(probe("http://127.0.0.1:9/?text_prompt=x"))
