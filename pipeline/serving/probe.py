"""Proves from outside that a server fed the prompt of its URL to its model.

The probe tokenizes the prompt itself, with the tokenizer of the checkpoint that it means,
and compares with the digest that the server reports in its `04` message, which is taken from
the model's input cache. A server that sends no `04` may have done the right thing, but
nothing shows it: that is "not proven", never "fine".
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
from yarl import URL

from duplex.errors import RequestError, ServerError
from duplex.files import sha256_bytes
from duplex.frames import FRAME_S, FRAME_SAMPLES, SAMPLE_RATE
from pipeline.serving import wire
from pipeline.serving.strangers import host_traps, tell
from pipeline.serving.wire import Kind

PROBE_FRAMES = 5
OPUS_FRAMES = 25  # an Opus server may hold audio back for a few frames
METADATA_WAIT_S = 2.0  # our servers send it right after 00
REPLY_WAIT_S = 20.0


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found. Times are the client's: `prefill_s` from the open socket to `00`,
    `first_packet_s` from the first audio sent to the first received; `real_time_factor` is the time
    of a frame's answer over the 80 ms that it lasts. `took`: of a server that proves nothing, what
    its behaviour says of the prompt; `traps`: what is known of such a server. None: not seen.
    """

    url: str
    server: str
    prompt: str
    proven: bool
    reason: str
    expected_digest: str | None = None
    served_digest: str | None = None
    count: int | None = None
    frames_digest: str | None = None
    voice_prompt: str | None = None
    greeting: str | None = None
    model_digest: str | None = None
    prefill_s: float | None = None
    first_packet_s: float | None = None
    real_time_factor: float | None = None
    took: str | None = None
    traps: tuple[str, ...] = ()


def probe_sync(url: str, **options: Any) -> ProbeResult:
    """`probe` for callers without an event loop."""
    return asyncio.run(probe(url, **options))


async def probe(
    url: str,
    *,
    prompt: str | None = None,
    tokenizer: bytes | None = None,
    token: str | None = None,
    timeout_s: float = 120,
) -> ProbeResult:
    """Ask a server for a conversation with the prompt of `url`, and check what it fed.

    Args:
        url: any URL that `wire.chat_url` takes; its query holds `text_prompt`.
        prompt: replaces the query's.
        tokenizer: a SentencePiece file, of the checkpoint that is meant to be served; without
            it the server's own is used, checked against the digest that it reports.
        token: what the server asks for; replaces the query's.
        timeout_s: how long the prompt may take.

    Raises:
        RequestError: the URL is wrong, or asks for what the server refuses.
        ServerError: nothing answers there.
    """
    changes = {} if prompt is None else {"text_prompt": prompt}
    chat = wire.chat_url(url, **changes)
    given = dict(wire.query_pairs(chat))
    token = token or given.get("token")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    chat = wire.chat_url(chat.split("?")[0], **{k: v for k, v in given.items() if k != "token"})
    try:
        async with aiohttp.ClientSession(headers=headers) as session:
            return await _Probe(session, chat, given.get("text_prompt", "").strip()).run(
                tokenizer, timeout_s
            )
    except (aiohttp.ClientConnectionError, TimeoutError) as error:
        text = f"{wire.base_url(url)} must answer, it does not: {error or type(error).__name__}"
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            text += ". If the certificate is your own: SSL_CERT_FILE=DIR/cert.pem duplex probe …"
        raise ServerError(text) from None


class _Probe:
    def __init__(self, session: aiohttp.ClientSession, chat: str, prompt: str):
        self._session = session
        self._chat = chat
        self._base = wire.base_url(chat)
        self._prompt = prompt
        self._found: dict[str, Any] = {"server": "unknown"}

    async def run(self, tokenizer: bytes | None, timeout_s: float) -> ProbeResult:
        self._found["traps"] = host_traps(self._chat)
        info = await self._info()
        if info is None:
            return await self._of_stranger(timeout_s)
        self._found["server"] = f"{info.get('name')} {info.get('version')}"
        self._found["model_digest"] = info.get("model_digest")
        if tokenizer is None:
            tokenizer = await self._tokenizer()
        if sha256_bytes(tokenizer) != info.get("tokenizer_digest"):
            return self._result(False, "the server's tokenizer is not the checkpoint's")
        return await self._talk(_tokens(tokenizer, self._prompt), timeout_s)

    async def _of_stranger(self, timeout_s: float) -> ProbeResult:
        stranger = await tell(self._session, self._base, self._prompt)
        self._found |= {
            "server": stranger.name,
            "took": stranger.took,
            "traps": (*self._found["traps"], *stranger.traps),
        }
        given = dict(wire.query_pairs(self._chat))
        self._chat = wire.chat_url(self._chat, **(stranger.keys | given))
        return await self._talk(None, timeout_s)

    async def _info(self) -> dict[str, Any] | None:
        """What the server says it is; None when it is none of ours."""
        async with self._session.get(f"{self._base}/api/info") as response:
            if response.status in (401, 403, 503):
                raise ServerError(f"{self._base}: {response.status} {await response.text()}")
            try:
                info = await response.json() if response.status == 200 else None
            except (ValueError, aiohttp.ContentTypeError):
                return None
            return info if isinstance(info, dict) and "protocol" in info else None

    async def _tokenizer(self) -> bytes:
        async with self._session.get(f"{self._base}/api/tokenizer") as response:
            return await response.read()

    async def _talk(self, tokens: list[int] | None, timeout_s: float) -> ProbeResult:
        is_ours = tokens is not None
        # Others know no `format` and would take PCM for broken Ogg.
        chat = wire.chat_url(self._chat, format="pcm") if is_ours else self._chat
        started_s = time.perf_counter()
        try:
            ws = await self._session.ws_connect(URL(chat, encoded=True), max_msg_size=0)
        except aiohttp.WSServerHandshakeError as error:
            raise await self._refusal(chat, error) from None
        async with ws:
            try:
                await _expect(ws, Kind.READY, timeout_s)
            except _Surprise as surprise:
                return self._result(False, str(surprise))
            self._found["prefill_s"] = time.perf_counter() - started_s
            served, wrong = None, ""
            try:
                served = await _expect(ws, Kind.METADATA, METADATA_WAIT_S)
            except _Surprise as surprise:
                wrong = str(surprise)
            try:
                await (self._step_pcm(ws) if is_ours else self._step_opus(ws))
            except _Surprise as surprise:
                wrong = wrong or str(surprise)
        if served is None:
            return self._result(
                False, f"no 04 message says what it fed, so nothing proves it: {wrong}"
            )
        return self._judge(tokens, served, wrong)

    def _judge(self, tokens: list[int] | None, served: bytes, wrong: str) -> ProbeResult:
        try:
            fed = json.loads(served)
            digest, count = str(fed["digest"]), int(fed["count"])
        except (ValueError, KeyError, TypeError):
            return self._result(False, "its 04 message is not one of ours")
        frames = fed.get("frames_digest")
        self._found |= {"served_digest": digest, "count": count}
        self._found["frames_digest"] = frames if isinstance(frames, str) else None
        for key in ("voice_prompt", "greeting"):
            self._found[key] = str(fed.get(key) or "none")
        if tokens is None:
            return self._result(False, "it names no tokenizer to check its 04 message against")
        expected = wire.prompt_digest(tokens)
        self._found["expected_digest"] = expected
        if (digest, count) != (expected, len(tokens)):
            return self._result(
                False,
                f"the model was fed something else: {count} tokens, digest {digest[:12]}…; must be "
                f"the {len(tokens)} tokens of the prompt, digest {expected[:12]}…",
            )
        if wrong:
            return self._result(False, f"it took the prompt and does not converse: {wrong}")
        return self._result(True, f"the model was fed all {count} tokens of the prompt")

    async def _refusal(self, chat: str, error: aiohttp.WSServerHandshakeError) -> Exception:
        """Why a handshake failed: a plain GET of the same URL tells in words."""
        url = URL(f"http{chat.removeprefix('ws')}", encoded=True)
        async with self._session.get(url) as response:
            text = (await response.text())[:500]
            if response.content_type == "text/html":  # a page for people, which says nothing here
                text = "with a web page: no Moshi server is there, or not under this path"
            message = f"{self._base} refused: {error.status} {text}"
        return RequestError(message) if error.status == 400 else ServerError(message)

    async def _step_pcm(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        """Silence in, one reply a frame out."""
        silence = wire.message(Kind.AUDIO, bytes(2 * FRAME_SAMPLES))
        started_s = time.perf_counter()
        for _ in range(PROBE_FRAMES):
            sent_s = time.perf_counter()
            await ws.send_bytes(silence)
            reply = await _expect(ws, Kind.AUDIO, REPLY_WAIT_S)
            self._found.setdefault("first_packet_s", time.perf_counter() - sent_s)
            if len(reply) != len(silence) - 1:
                raise _Surprise(f"a reply of {len(reply)} bytes instead of {len(silence) - 1}")
        a_frame_s = (time.perf_counter() - started_s) / PROBE_FRAMES
        self._found["real_time_factor"] = round(a_frame_s / FRAME_S, 3)

    async def _step_opus(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        import sphn

        writer = sphn.OpusStreamWriter(SAMPLE_RATE)
        sent_s = time.perf_counter()
        for _ in range(OPUS_FRAMES):
            packet = writer.append_pcm(np.zeros(FRAME_SAMPLES, dtype=np.float32))
            await ws.send_bytes(wire.message(Kind.AUDIO, packet))
        await _expect(ws, Kind.AUDIO, REPLY_WAIT_S)
        self._found["first_packet_s"] = time.perf_counter() - sent_s

    def _result(self, proven: bool, reason: str) -> ProbeResult:
        return ProbeResult(
            url=self._chat, prompt=self._prompt, proven=proven, reason=reason, **self._found
        )


class _Surprise(Exception):
    """What came, in words, instead of the message that was due."""


async def _expect(ws: aiohttp.ClientWebSocketResponse, kind: Kind, wait_s: float) -> bytes:
    """The payload of the next message; before audio, text is passed over.

    Raises:
        _Surprise: nothing, something else, or the end.
    """
    while True:
        try:
            received = await ws.receive(wait_s)
        except TimeoutError:
            raise _Surprise(f"no {kind:02d} message within {wait_s:g} s") from None
        if received.type != aiohttp.WSMsgType.BINARY:
            busy = " (busy)" if ws.close_code == wire.CLOSE_BUSY else ""
            raise _Surprise(f"closed with {ws.close_code}{busy} before a {kind:02d} message")
        found, payload = received.data[0], received.data[1:]
        if found == kind:
            return payload
        if found == Kind.ERROR:
            raise _Surprise(f"it says: {payload.decode(errors='replace')}")
        if not (found == Kind.TEXT and kind == Kind.AUDIO):
            raise _Surprise(f"a {found:02d} message where {kind:02d} was due")


def _tokens(tokenizer: bytes, prompt: str) -> list[int]:
    import sentencepiece

    return wire.prompt_tokens(sentencepiece.SentencePieceProcessor(model_proto=tokenizer), prompt)
