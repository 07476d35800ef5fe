"""One question to an OpenAI-compatible endpoint that is answered by a JSON object.

The key is in no message: servers repeat it in their errors, so what they say is cleaned of it, and
the library's own exceptions are not chained to ours.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from duplex.config import Config
from duplex.errors import DuplexError, RecordError, RequestError, TransientError

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MAX_DETAIL = 300  # characters of what a server says that go into a message
_PASSING = frozenset({408, 409, 425, 429})


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how it is asked."""

    base_url: str
    model: str
    api_key: str = field(repr=False)
    temperature: float = 0.8
    timeout_s: float = 120.0
    max_tokens: int = 4096

    @classmethod
    def of(cls, config: Config) -> Endpoint:
        """The endpoint of a config's dialogues.

        Raises:
            RequestError: it names no model, or there is no key.
        """
        section = config.dialogues
        if not section.llm:
            raise RequestError(
                f"dialogues.llm must name a model to ask, found nothing in {config.name}. Choose a "
                "config with an LLM writer: --config configs/coffee.yaml"
            )
        key = (section.runtime.api_key or "").strip()
        if not key:
            raise RequestError(
                "dialogues.runtime.api_key must be given, found nothing. Write api_key: "
                "${OPENAI_API_KEY} in the config and set that variable (any word will do for a "
                "local server without keys)."
            )
        return cls(
            section.runtime.base_url or DEFAULT_BASE_URL, section.llm, key,
            section.temperature, section.runtime.timeout_s, section.max_tokens,
        )  # fmt: skip

    @property
    def place(self) -> str:
        # The host alone: an address may carry a password.
        return f"the endpoint at {urlsplit(self.base_url).hostname or 'base_url'}"

    def clean(self, text: str) -> str:
        """What a server said, short and without the key."""
        text = text.replace(self.api_key, "***")
        text = re.sub(r"\b(?:sk|key|token)-[\w*-]{4,}", "***", text)
        return text if len(text) <= MAX_DETAIL else text[:MAX_DETAIL] + "…"


def ask_json(endpoint: Endpoint, messages: list[dict[str, str]]) -> dict[str, Any]:
    """The JSON object that the model answers with.

    Raises:
        ValueError: the reply is no JSON object; what it was instead.
        TransientError: the endpoint is not reachable, or busy.
        RequestError: it refuses the key or does not know the model.
        RecordError: it rejects the request.
    """
    import openai  # 1 s to import

    client = openai.OpenAI(
        api_key=endpoint.api_key, base_url=endpoint.base_url, timeout=endpoint.timeout_s,
        max_retries=2,
    )  # fmt: skip
    failure: DuplexError | None = None
    completion: Any = None
    try:
        completion = client.chat.completions.create(
            model=endpoint.model,
            messages=messages,  # pyright: ignore[reportArgumentType]  # plain dicts do
            temperature=endpoint.temperature,
            max_tokens=endpoint.max_tokens,
            response_format={"type": "json_object"},
        )
    except openai.APIStatusError as error:
        failure = _status_failure(endpoint, error.status_code, endpoint.clean(str(error)))
    except openai.APITimeoutError:
        failure = TransientError(f"{endpoint.place} must answer within {endpoint.timeout_s:g} s")
    except openai.APIConnectionError as error:
        failure = TransientError(
            f"{endpoint.place} must be reachable: {endpoint.clean(str(error))}"
        )
    except (openai.OpenAIError, ValueError):
        failure = RecordError(f"{endpoint.place} must speak /v1/chat/completions, and does not")
    finally:
        client.close()
    if failure is not None:
        raise failure  # outside of the handler, so that it does not carry the library's error
    return _read_object(completion)


def _status_failure(endpoint: Endpoint, status: int, detail: str) -> DuplexError:
    if status in _PASSING or status >= 500:
        return TransientError(f"{endpoint.place} answered {status}: {detail}. Try again")
    if status in (401, 403, 404):
        return RequestError(
            f"{endpoint.place} refused the request with {status}: {detail}. Check "
            f"dialogues.runtime.api_key, dialogues.llm ({endpoint.model}) and base_url"
        )
    return RecordError(f"{endpoint.place} rejected the request with {status}: {detail}")


def _read_object(completion: Any) -> dict[str, Any]:
    try:
        choice = completion.choices[0]
        content, finish = choice.message.content, choice.finish_reason
        refusal = getattr(choice.message, "refusal", None)
    except (AttributeError, IndexError, TypeError):
        raise ValueError("the reply is not one of /v1/chat/completions") from None
    if refusal:
        raise ValueError(f"the model refused: {str(refusal)[:MAX_DETAIL]}")
    if finish == "length":
        raise ValueError("the reply was cut off before its end")
    try:
        value = json.loads(content or "")
    except (ValueError, RecursionError, TypeError):
        raise ValueError(f"the reply is no JSON: {str(content)[:80]!r}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the reply must be a JSON object, found {type(value).__name__}")
    return value
