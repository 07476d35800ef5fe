"""One HTTP exchange with `/v1/chat/completions`, by openai's library, streamed.

Slow tokens are fine: `timeout_s` bounds each silence, `deadline_s` the whole reply. The library
waits for whole events, so both are watched below it, where the bytes come in; with them the size.
A reply is whole once its `finish_reason` has come. Failures are returned, not raised: the
library's exceptions carry the request with its headers, and so the key.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pipeline.engines.llm.exchanges import Reply
from pipeline.engines.redaction import redacted

if TYPE_CHECKING:
    import openai

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MAX_REPLY_BYTES = 16 << 20  # with an event for each token, about 100 000 tokens

# HTTP statuses that may go away by themselves; all from 500 on are, too.
_PASSING = frozenset({408, 409, 425, 429})
# No record will fare better: the key, the account or the address is wrong.
_STOPPING = frozenset({401, 402, 403, 404})
# Said by what stands before the server, when nobody knows what the server did.
_BILL_UNKNOWN = frozenset({408, 502, 504, 520, 521, 522, 523, 524})
_NO_CREDIT = "insufficient_quota"


@dataclass(frozen=True)
class Failure:
    """A request without a whole reply.

    kind: `retry` may work later; `stop` no request will work; `refused` this one won't.
    billed: False where the server refused it or was never reached; None where nobody knows.
    """

    reason: str  # a slug: http-429, timed-out
    kind: Literal["retry", "stop", "refused"]
    detail: str
    said: str = field(default="", repr=False)  # the whole of it, for the dialect alone
    billed: bool | None = False
    headers: Mapping[str, str] = field(default_factory=dict)
    param: str = ""  # which parameter the server's error is about, where it says so
    code: str = ""


@dataclass(frozen=True)
class Whole:
    reply: Reply
    headers: Mapping[str, str]


class Wire:
    """A connection pool to one endpoint. Thread-safe."""

    def __init__(self, *, base_url: str | None, api_key: str, timeout_s: float, deadline_s: float):
        self._base_url = base_url or DEFAULT_BASE_URL
        self._api_key = api_key.strip()
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        self._client: openai.OpenAI | None = None

    def connect(self) -> None:
        """Imports the library, 1 s: only a run with something to write pays for it."""
        import openai

        self._client = openai.OpenAI(
            api_key=self._api_key,
            base_url=self._base_url,
            timeout=self._timeout_s,
            max_retries=0,
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def place(self) -> str:
        # The host alone: an address may carry a password.
        return f"the endpoint at {urlsplit(self._base_url).hostname or 'base_url'}"

    def post(self, body: dict[str, Any]) -> Whole | Failure:
        """Send a request and read its reply to the end."""
        import openai

        assert self._client is not None, "connect comes first"
        started = time.monotonic()
        gathered = _Gathered()
        try:
            stream = self._client.chat.completions.create(**body)
            response = stream.response
            headers = {key.lower(): value for key, value in response.headers.items()}
            _watch(response, started + self._deadline_s)
            if "text/event-stream" in headers.get("content-type", "text/event-stream"):
                for chunk in stream:
                    gathered.add(chunk)
            else:  # a server that does not stream
                gathered.take(json.loads(response.read()))
        except openai.APIStatusError as error:
            return self._status_failure(error)
        except Exception as error:  # noqa: BLE001 - by what it is called: see _reason_of
            if not gathered.is_whole:
                return self._failure(error)
            headers = {}
        if not gathered.is_whole:
            said = f"{self.place} stopped before the end of its reply"
            return Failure("cut-off", "retry", said, billed=None)
        return Whole(gathered.reply(), headers)

    def _status_failure(self, error: openai.APIStatusError) -> Failure:
        status = error.status_code
        reason, said = f"http-{status}", str(error)
        detail = f"{self.place} answered {status}: {self._clean(said)}"
        headers = {key.lower(): value for key, value in error.response.headers.items()}
        if status in _STOPPING or _NO_CREDIT in said:
            return Failure(reason, "stop", detail, said, headers=headers)
        if status in _PASSING or status >= 500:
            billed = None if status in _BILL_UNKNOWN else False
            return Failure(reason, "retry", detail, said, billed, headers)
        param, code = str(error.param or ""), str(error.code or "")
        return Failure(reason, "refused", detail, said, headers=headers, param=param, code=code)

    def _failure(self, error: Exception) -> Failure:
        reason, unsent = _reason_of(error)
        said = {
            "timed-out": f"said nothing for {self._timeout_s:g} s",
            "past-deadline": f"took more than {self._deadline_s:g} s for one reply",
            "unreachable": "cannot be reached",
            "broken-off": "broke the connection off",
            "not-chat": "did not answer in the format of /v1/chat/completions",
            "stream-error": "ended its reply with an error",
            "too-long": f"sent more than {MAX_REPLY_BYTES >> 20} MiB for one reply",
        }[reason]
        told = f": {self._clean(str(error))}" if reason == "stream-error" else ""
        billed = False if unsent else None
        return Failure(reason, "retry", f"{self.place} {said}{told}", billed=billed)

    def _clean(self, text: str) -> str:
        return redacted(text, self._api_key)


class _PastDeadlineError(Exception):
    pass


class _TooLongError(Exception):
    pass


def _watch(response: Any, deadline: float) -> None:
    """Make reading the response's bytes fail past a moment, or past a size.

    The library speaks through httpx or httpx2, by version; either wants its own class.
    """
    package = importlib.import_module(type(response).__module__.partition(".")[0])
    inner = response.stream

    class Watched(package.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for part in inner:
                size += len(part)
                if time.monotonic() > deadline:
                    raise _PastDeadlineError
                if size > MAX_REPLY_BYTES:
                    raise _TooLongError
                yield part

        def close(self) -> None:
            inner.close()

    response.stream = Watched()


def _reason_of(error: Exception) -> tuple[str, bool]:
    """Why an exchange failed, and whether its request surely never reached the server.

    By class name: the library wraps httpx's errors, or not, by version and by when they come.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    if "_PastDeadlineError" in names:
        return "past-deadline", False
    if "_TooLongError" in names:
        return "too-long", False
    if names & {"ConnectError", "ConnectTimeout", "PoolTimeout"}:
        return "unreachable", True
    if names & {"TimeoutException", "APITimeoutError"}:
        return "timed-out", False
    if names & {"TransportError", "APIConnectionError", "OSError"}:
        return "broken-off", False
    if type(error).__name__ == "APIError":  # an event of the stream that says `error`
        return "stream-error", False
    return "not-chat", False


class _Gathered:
    """The parts of a reply, as they come."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._refusal: list[str] = []
        self._finish = ""
        self._usage: tuple[int, int] | None = None
        self._id = ""

    @property
    def is_whole(self) -> bool:
        return bool(self._finish)

    def add(self, chunk: Any) -> None:
        self._id = self._id or str(getattr(chunk, "id", "") or "")
        for choice in getattr(chunk, "choices", None) or []:
            if getattr(choice, "index", 0):
                continue
            delta = choice.delta
            self._text.append(getattr(delta, "content", None) or "")
            self._refusal.append(getattr(delta, "refusal", None) or "")
            self._finish = getattr(choice, "finish_reason", None) or self._finish
        usage = getattr(chunk, "usage", None)
        if usage is not None:
            self._count(usage.prompt_tokens, usage.completion_tokens)

    def take(self, value: dict[str, Any]) -> None:
        """A reply that came in one piece.

        Raises:
            LookupError, TypeError: it is not one.
        """
        choice = value["choices"][0]
        self._id = str(value.get("id") or "")
        self._text.append(choice["message"].get("content") or "")
        self._refusal.append(choice["message"].get("refusal") or "")
        usage = value.get("usage") or {}
        self._count(usage.get("prompt_tokens"), usage.get("completion_tokens"))
        self._finish = choice.get("finish_reason") or "stop"

    def _count(self, tokens_in: Any, tokens_out: Any) -> None:
        known = isinstance(tokens_in, int) and isinstance(tokens_out, int)
        if known and min(tokens_in, tokens_out) >= 0:
            self._usage = (tokens_in, tokens_out)

    def reply(self) -> Reply:
        tokens_in, tokens_out = self._usage or (None, None)
        return Reply(
            "".join(self._text), self._finish, "".join(self._refusal), tokens_in, tokens_out,
            self._id,
        )  # fmt: skip
