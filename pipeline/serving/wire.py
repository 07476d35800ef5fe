"""The wire format: message kinds, the query of `/api/chat`, URLs, digests. No torch.

The first byte of a WebSocket message is its kind, as in `moshi.server` and Moshi's
`rust/protocol.md`; unknown kinds are to be discarded by whoever gets them:

    00 ready        server, after the prompt was fed
    01 audio        both ways: Ogg-Opus, or with `format=pcm` 24 kHz int16 little endian
    02 text         server: UTF-8, whole characters
    03 control      client; ignored
    04 metadata     server: UTF-8 JSON; the first one says what prompt the model was fed
    05 error        server: UTF-8, before it closes
    06 ping         ignored

With `format=pcm` a conversation is in lock-step: each full frame of 1 920 samples that came
in is answered by exactly one audio message of 1 920 samples, and the text of that frame goes
out before it.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import numpy as np
from pydantic import ValidationError

from duplex.config import SamplingSection
from duplex.errors import RequestError
from duplex.streams import prompt_tokens as prompt_tokens  # what the protocol digests

PROTOCOL = 1
CHAT_PATH = "/api/chat"
MAX_LINE_BYTES = 32 * 1024  # request line; aiohttp's own limit of 8 190 cuts long prompts off
MAX_MESSAGE_BYTES = 1 << 20  # 22 s of PCM
MAX_SEED = 2**63 - 1

CLOSE_DONE = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_UNSUPPORTED = 1003
CLOSE_POLICY = 1008
CLOSE_INTERNAL = 1011
CLOSE_BUSY = 1013


class Kind(IntEnum):
    READY = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6


def message(kind: Kind, payload: bytes = b"") -> bytes:
    return bytes([kind]) + payload


# -- audio


def pcm_bytes(pcm: np.ndarray) -> bytes:
    """float32 [S] in [-1, 1] -> int16 little endian; what is louder is clipped."""
    return np.round(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes()


def pcm_samples(content: bytes) -> np.ndarray:
    """int16 little endian -> float32 [S] in [-1, 1]."""
    return np.frombuffer(content, dtype="<i2").astype(np.float32) / 32767


# -- what was asked for


@dataclass(frozen=True)
class ChatRequest:
    """The query of `/api/chat`. `seed` None: the server draws one and says which."""

    text_prompt: str = ""
    voice_prompt: str = ""
    seed: int | None = None
    sampling: SamplingSection = field(default_factory=SamplingSection)
    audio_format: Literal["opus", "pcm"] = "opus"
    greeting: str = ""


SAMPLING_KEYS = tuple(SamplingSection.model_fields)
KNOWN_KEYS = (
    "text_prompt", "prompt_id", "voice_prompt", "greeting", "seed", "format", "token", "pass",
    *SAMPLING_KEYS,
)  # fmt: skip


OTHER_WORDS = {
    "prompt": "text_prompt",
    "system_prompt": "text_prompt",
    "system": "text_prompt",
    "voice": "voice_prompt",
    "temperature": "text_temperature or audio_temperature",
    "topk": "text_topk or audio_topk",
    "top_k": "text_topk or audio_topk",
}


def parse_chat_request(
    query: Iterable[tuple[str, str]], defaults: SamplingSection | None = None
) -> ChatRequest:
    """Read the decoded pairs of a query. Missing and empty keys have defaults.

    Unknown keys are ignored, since stock clients send some. Refused are those that mean a known
    one: a letter or two away from it, in other case, or another word for it (`OTHER_WORDS`); and
    the shape that a bare `&` inside a prompt leaves behind.

    Raises:
        RequestError: with every fault found; the server answers 400.
    """
    faults: list[str] = []
    given = _first_values(query, faults)
    defaults = defaults or SamplingSection()
    audio_format = given.get("format", "opus")
    if audio_format not in ("opus", "pcm"):
        faults.append(f"format must be opus or pcm, found {audio_format!r}")
    for key in ("voice_prompt", "greeting"):
        name = given.get(key, "")
        if not all(c.isalnum() or c in "._-" for c in name) or name.startswith("."):
            faults.append(f"{key} must be the name of a voice, never a path, found {name!r}")
    request = ChatRequest(
        text_prompt=given.get("text_prompt", "").strip(),
        voice_prompt=given.get("voice_prompt", ""),
        greeting=given.get("greeting", ""),
        seed=_parse_seed(given.get("seed"), faults),
        sampling=_parse_sampling(given, defaults, faults),
        audio_format=cast(Literal["opus", "pcm"], audio_format),
    )
    if faults:
        raise RequestError("; ".join(faults))
    return request


def _first_values(query: Iterable[tuple[str, str]], faults: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for key, value in query:
        if key in KNOWN_KEYS:
            if given.get(key, value) != value:
                faults.append(f"{key} must be given once, found it twice")
            if value:
                given.setdefault(key, value)
        elif meant := OTHER_WORDS.get(key.lower()):
            faults.append(f"{key} is not known; did you mean {meant}?")
        elif near := difflib.get_close_matches(key.lower(), KNOWN_KEYS, n=1, cutoff=0.85):
            faults.append(f"{key} is not known; did you mean {near[0]}?")
        elif not value or key != key.strip() or " " in key:
            # `Salt & Straw` unencoded ends the prompt at `Salt` and nobody would notice.
            faults.append(
                f"an & inside a value must be written %26, found a bare one before {key!r}"
            )
    return given


def _parse_seed(value: str | None, faults: list[str]) -> int | None:
    if value is None or value == "-1":  # -1: how other clients write "any"
        return None
    try:
        seed = int(value)
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        faults.append(f"seed must be a whole number from 0 to 2^63 - 1, found {value!r}")
        return None
    return seed


def _parse_sampling(
    given: dict[str, str], defaults: SamplingSection, faults: list[str]
) -> SamplingSection:
    values: dict[str, Any] = defaults.model_dump()
    values |= {key: given[key] for key in SAMPLING_KEYS if key in given}
    try:
        return SamplingSection.model_validate(values)
    except ValidationError as error:
        for fault in error.errors():
            key = str(fault["loc"][0])
            faults.append(f"{key}: {fault['msg']}, found {given.get(key)!r}")
        return defaults


# -- URLs


def query_pairs(url: str) -> list[tuple[str, str]]:
    """The decoded query of a URL.

    Raises:
        RequestError: an unencoded # or & cut the prompt short, as far as that can be seen.
    """
    parts = urlsplit(url)
    if parts.fragment:
        raise RequestError(
            f"a # inside a URL's value must be written %23, found a bare one before "
            f"{parts.fragment[:40]!r}"
        )
    return parse_qsl(parts.query, keep_blank_values=True)


def authority(host: str, port: int) -> str:
    """`host:port` of a server that listens on `host`: on any address means on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def base_url(url: str) -> str:
    """`http(s)://host:port[/prefix]` of any URL of a server, without a slash at its end."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    schemes = {"ws": "http", "wss": "https", "http": "http", "https": "https"}
    if parts.scheme not in schemes or not parts.netloc:
        raise RequestError(
            f"a server's URL must read http(s)://host:port/ or ws(s)://, found {url}"
        )
    path = parts.path.rstrip("/").removesuffix(CHAT_PATH)
    return urlunsplit((schemes[parts.scheme], parts.netloc, path, "", ""))


def chat_url(url: str, /, **changes: str | int | float) -> str:
    """The WebSocket URL of any URL of a server, with its query and `changes` to that.

    Accepts `http(s)://host:port/?text_prompt=…` as a browser shows it, `ws(s)://…/api/chat?…`
    and a bare `host:port`.
    """
    pairs = [(key, value) for key, value in query_pairs(url) if key not in changes]
    pairs += [(key, str(value)) for key, value in changes.items()]
    query = urlencode(pairs, quote_via=quote, safe="")
    return f"ws{base_url(url).removeprefix('http')}{CHAT_PATH}" + (f"?{query}" if query else "")


def prompt_audio(persona_id: str, voices: Iterable[str]) -> dict[str, str]:
    """The query keys for a persona's own voice and for the greeting, where a run has them."""
    wanted = {"voice_prompt": persona_id, "greeting": "greeting"}
    return {key: name for key, name in wanted.items() if name in set(voices)}


def page_url(base: str, prompt: str, /, **more: str) -> str:
    """The page of a server, opened with a prompt; percent-encoded throughout."""
    query = urlencode({"text_prompt": prompt, **more}, quote_via=quote, safe="")
    return f"{base_url(base)}/?{query}"


# -- what was fed


def prompt_digest(tokens: Sequence[int] | np.ndarray) -> str:
    """sha256 (hex) of ids as int32 little endian, in C order."""
    return hashlib.sha256(np.asarray(tokens, dtype="<i4").tobytes()).hexdigest()
