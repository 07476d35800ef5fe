"""Servers that are none of ours: which one it is, by how it behaves, and what to know about it.

Neither moshi's server nor PersonaPlex's says what it fed its model, so whether a prompt was taken
cannot be proven there. Two things can be observed:

- without query keys PersonaPlex's fails (it looks `text_prompt` and `voice_prompt` up, and the
  request ends in 500), while moshi's takes the connection: it reads no keys at all;
- PersonaPlex's sends `00` after it has stepped through the prompt, a frame a token; so `00` comes
  later by that with a prompt than with a short one. Moshi's sends it at once.

Sources: `moshi/server.py` of moshi 0.2.13 and of NVIDIA/personaplex.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from pipeline.serving import wire
from pipeline.serving.wire import Kind

# Assumed: a step of a 7B takes longer, and the rest of what `00` waits for varies less.
LEAST_STEP_S = 0.008
CHARS_A_TOKEN = 5  # of English, assumed
SHORT_PROMPT = "Hi."
HANDSHAKE_S = 30.0


@dataclass(frozen=True)
class Stranger:
    """name: whose server it is; took: what its behaviour says of the prompt; traps: one a line;
    keys: what its URLs need besides."""

    name: str
    took: str
    traps: tuple[str, ...]
    keys: dict[str, str] = field(default_factory=dict)


MOSHI_TRAPS = (
    "it ignores text_prompt, voice_prompt, seed and sampling in its URL",
    "it holds one conversation at a time, and lets the next client wait without a word",
    "it drops the first frame of a user's audio, and cannot run without CUDA",
)
PERSONAPLEX_TRAPS = (
    "text_prompt and voice_prompt are required keys; an empty text_prompt ends the conversation",
    "it ignores sampling parameters, and `seed` ends the request in an error",
    "it asks for no token, and joins the voice's file name to a folder unchecked: never let it be "
    "reached from the internet",
    "it holds one conversation at a time",
)
LOAD_BALANCER = (
    "this host is the load balancer of RunPod's serverless workers, which passes no WebSocket "
    "upgrades: use the pod's proxy, https://POD-PORT.proxy.runpod.net/"
)


def host_traps(url: str) -> tuple[str, ...]:
    """What is known of a host by its name."""
    host = urlsplit(wire.base_url(url)).hostname or ""
    return (LOAD_BALANCER,) if host.endswith(("api.runpod.ai", "api.runpod.io")) else ()


async def tell(session: aiohttp.ClientSession, base: str, prompt: str) -> Stranger:
    """Which server answers at `base`, and whether `prompt` makes a difference to it.

    Opens a few short conversations, one after the other.
    """
    bare = await _ready_after(session, wire.chat_url(base))
    if bare is None:
        return await _personaplex(session, base, prompt)
    with_prompt = await _ready_after(session, wire.chat_url(base, text_prompt=prompt))
    if with_prompt is None:
        took = "it takes connections without a prompt and refuses this one"
        return Stranger("a server that speaks Moshi's protocol", took, ())
    if with_prompt - bare < _least_prefill_s(prompt):
        took = (
            f"00 came after {with_prompt:.2f} s with the prompt and {bare:.2f} s without any key: "
            "by its behaviour it was not read"
        )
        return Stranger("moshi's server, by its behaviour", took, MOSHI_TRAPS)
    took = (
        f"00 came after {with_prompt:.2f} s with the prompt and {bare:.2f} s without: by its "
        "behaviour something was read, what is not known"
    )
    return Stranger("a server that speaks Moshi's protocol", took, ())


async def _personaplex(session: aiohttp.ClientSession, base: str, prompt: str) -> Stranger:
    name = "PersonaPlex's server, by its behaviour"
    times = []
    keys = {"voice_prompt": "NATF2.pt"}  # one of its packaged voices
    for text in (SHORT_PROMPT, prompt):
        after = await _ready_after(session, wire.chat_url(base, text_prompt=text, **keys))
        if after is None:
            took = "it fails without query keys, and with text_prompt and voice_prompt too"
            return Stranger("a server that refuses", took, PERSONAPLEX_TRAPS)
        times.append(after)
    short, long = times
    read = long - short >= _least_prefill_s(prompt)
    took = (
        f"00 came after {long:.2f} s with the prompt and {short:.2f} s with a short one: by its "
        f"behaviour it was {'read' if read else 'not read'}"
    )
    return Stranger(name, took, PERSONAPLEX_TRAPS, keys)


def _least_prefill_s(prompt: str) -> float:
    return max(0.05, len(prompt) / CHARS_A_TOKEN * LEAST_STEP_S)


async def _ready_after(session: aiohttp.ClientSession, chat: str) -> float | None:
    """Seconds from asking to `00`; None when it is refused or closed before."""
    started_s = time.perf_counter()
    try:
        async with session.ws_connect(URL(chat, encoded=True), max_msg_size=0) as ws:
            message = await ws.receive(HANDSHAKE_S)
            if message.type != aiohttp.WSMsgType.BINARY or message.data[:1] != bytes([Kind.READY]):
                return None
            return time.perf_counter() - started_s
    except (aiohttp.WSServerHandshakeError, TimeoutError):
        return None
