"""Any server with OpenAI's `/v1/audio/speech`: OpenAI, kokoro-fastapi, openedai-speech, vLLM …

A voice's parameters: `voice`, its name there, and if wished `speed` (0.25-4), `instructions`;
any other one goes into the request as it is (`lang_code` for kokoro, say). WAV is asked for; what
comes may also be FLAC, Ogg, MP3 or raw samples. Such servers take no seed and give no word times:
the speaker times the words, and a try more is simply another request.

A busy server (429, 5xx, no connection) is asked again, at the time that its Retry-After names. The
key is in no message: what a server says is cleaned of it, and no exception of the HTTP library
is chained to ours.
"""

from __future__ import annotations

import email.utils
import os
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from duplex.config_data import SpeechSection
from duplex.errors import DuplexError, RecordError, RequestError, TransientError
from pipeline.engines.redaction import redacted
from pipeline.engines.sound_reply import NotSoundError, samples_of
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

if TYPE_CHECKING:
    import httpx

NAME = "openai-speech"
VERSION = 1  # raise it when this code asks or reads in another way
OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
CAPABILITIES = Capabilities(
    languages=None, licence="the server's model's", emotion=True, parallel=True
)
LARGEST_REPLY = 64 << 20  # bytes: 11 minutes of 48 kHz 16-bit stereo
LARGEST_ERROR = 4096
LONGEST_TEXT = 4096  # characters, OpenAI's own limit
LONGEST_WAIT_S = 60.0
_OURS = frozenset({"model", "input", "response_format", "stream", "stream_format"})
_PASSING = frozenset({408, 409, 425, 429})
_REFUSED = frozenset({401, 403, 404, 405})


def revision(section: SpeechSection) -> str:
    """Model and manner of asking; not the address that serves it."""
    return f"{NAME}-{VERSION} {section.model}"


def missing(section: SpeechSection) -> str | None:
    if not section.model:
        return "speech.model, the model's name at the server of speech.runtime.base_url"
    if not section.runtime.base_url and not _key(section):
        return f"speech.runtime.base_url, or a key for OpenAI in {KEY_VARIABLE}"
    return None


def make(section: SpeechSection) -> OpenAISpeech:
    return OpenAISpeech(section)


def _key(section: SpeechSection) -> str:
    """The config's key; the environment's is OpenAI's and goes to no other server."""
    given = section.runtime.api_key
    if given is None and section.runtime.base_url is None:
        given = os.environ.get(KEY_VARIABLE)
    return (given or "").strip()


class OpenAISpeech:
    """A `SpeechEngine`; `synthesize` may be called from several threads.

    Args:
        wait: sleeps for so many seconds; tests pass their own.

    Raises:
        RequestError: the config names no model, or no server.
    """

    capabilities = CAPABILITIES

    def __init__(self, section: SpeechSection, wait: Callable[[float], None] = time.sleep):
        if what := missing(section):
            raise RequestError(f"{NAME} needs {what}; found none")
        self._section = section
        self._runtime = section.runtime
        self._key = _key(section)
        self._url = (section.runtime.base_url or OPENAI_URL).rstrip("/") + "/audio/speech"
        self._wait = wait
        self._client: httpx.Client | None = None
        self._starting = threading.Lock()
        self._slots = threading.BoundedSemaphore(section.runtime.concurrency)

    def synthesize(self, request: SpeechRequest) -> Utterance:
        body = self._body(request)
        with self._slots:
            for attempt in range(self._runtime.retries + 1):
                try:
                    content, content_type = self._post(body)
                    break
                except _Busy as busy:
                    if attempt == self._runtime.retries:
                        raise TransientError(f"{busy}; run again later") from None
                    self._wait(min(busy.after_s or 2.0**attempt, LONGEST_WAIT_S))
        try:
            return Utterance(samples_of(content, content_type), None)
        except NotSoundError as error:
            said = self._clean(str(error))
        raise RecordError(f"{self._place} must answer with sound, found {said}")

    def close(self) -> None:
        with self._starting:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _body(self, request: SpeechRequest) -> dict[str, Any]:
        settings = dict(request.settings)
        if not self._section.instructions and "instructions" not in request.voice.params:
            settings.pop("instructions", None)
        if not isinstance(settings.get("voice"), str) or _OURS & set(settings):
            raise RequestError(
                f"a voice of {NAME} must have voice, its name at the server, and none of "
                f"{', '.join(sorted(_OURS))}; found {', '.join(sorted(settings)) or 'nothing'}"
            )
        if len(request.text) > LONGEST_TEXT:
            raise RecordError(
                f"a turn must have at most {LONGEST_TEXT} characters, found {len(request.text)}"
            )
        if settings.get("speed") == 1.0:
            del settings["speed"]  # not all servers know it
        ours = {"model": self._section.model, "input": request.text, "response_format": "wav"}
        return settings | ours

    def _post(self, body: dict[str, Any]) -> tuple[bytes, str]:
        """The reply's body and Content-Type; raises `_Busy` for what may go away by itself."""
        import httpx

        failure: Exception
        try:
            with self._connect().stream("POST", self._url, json=body) as reply:
                if reply.status_code != 200:
                    detail = self._read(reply, LARGEST_ERROR, whole=False)
                    failure = self._status_failure(reply, detail.decode("utf-8", "replace"))
                else:
                    content = self._read(reply, LARGEST_REPLY, whole=True)
                    return content, reply.headers.get("Content-Type", "")
        except httpx.TimeoutException:
            failure = _Busy(f"{self._place} must answer within {self._runtime.timeout_s:g} s")
        except httpx.HTTPError as error:
            failure = _Busy(f"{self._place} must be reachable: {self._clean(str(error))}")
        except (httpx.InvalidURL, httpx.StreamError):
            failure = RequestError("speech.runtime.base_url must be the address of a server")
        raise failure  # outside of the handler, so that it does not carry the library's error

    def _read(self, reply: httpx.Response, most: int, *, whole: bool) -> bytes:
        deadline = time.monotonic() + self._runtime.deadline_s
        content = bytearray()
        for part in reply.iter_bytes():
            content += part
            if len(content) > most:
                if whole:
                    raise RecordError(f"{self._place} must send at most {most >> 20} MB, sent more")
                break
            if time.monotonic() > deadline:
                raise _Busy(
                    f"{self._place} must finish a reply within {self._runtime.deadline_s:g} s"
                )
        return bytes(content)

    def _connect(self) -> httpx.Client:
        with self._starting:
            if self._client is None:
                import httpx

                headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
                self._client = httpx.Client(timeout=self._runtime.timeout_s, headers=headers)
            return self._client

    @property
    def _place(self) -> str:
        # The host alone: an address may carry a password.
        return f"the speech server at {urlsplit(self._url).hostname or 'base_url'}"

    def _status_failure(self, reply: httpx.Response, detail: str) -> DuplexError:
        status, said = reply.status_code, self._clean(detail)
        if status in _PASSING or status >= 500:
            after_s = _seconds(reply.headers.get("Retry-After", ""))
            return _Busy(f"{self._place} answered {status}: {said}", after_s)
        if status in _REFUSED or 300 <= status < 400:
            return RequestError(
                f"{self._place} refused the request with {status}: {said}. Check the key, "
                f"speech.model ({self._section.model}) and speech.runtime.base_url"
            )
        return RecordError(f"{self._place} rejected the request with {status}: {said}")

    def _clean(self, text: str) -> str:
        return redacted(text, self._key)


class _Busy(TransientError):
    """It may work in a moment; `after_s` is what the server asked for."""

    def __init__(self, message: str, after_s: float | None = None):
        super().__init__(message)
        self.after_s = after_s


def _seconds(value: str) -> float | None:
    """A Retry-After, in seconds or as a date."""
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    return max(date.timestamp() - time.time(), 0.0)
