"""Which parameters an endpoint takes: learnt from what it refuses, and kept for the run.

A reply's form is asked for as a strict JSON schema; where that is refused as any JSON object, and
then not at all: the messages say what is wanted in any case. A request's id is made before this,
so a resume finds its reply in the log whatever the endpoint had to be asked.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal

Form = Literal["json_schema", "json_object", "text"]
_NEXT_FORM: dict[Form, Form | None] = {
    "json_schema": "json_object",
    "json_object": "text",
    "text": None,
}

# What a refusal says that is about the form of the reply: OpenAI, vLLM, Ollama, routers.
_FORM_WORDS = re.compile(
    r"response_format|json_schema|json_object|json mode|structured output|guided|grammar|schema",
    re.IGNORECASE,
)
# What can be left out without changing what is asked for.
_OPTIONAL = ("stream_options", "seed", "temperature")


@dataclass(frozen=True)
class Dialect:
    form: Form = "json_schema"
    token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    without: frozenset[str] = frozenset()

    def speak(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request's body, as this endpoint takes it."""
        spoken = {key: value for key, value in body.items() if key not in self.without}
        if self.token_limit != "max_tokens":
            spoken[self.token_limit] = spoken.pop("max_tokens")
        if "response_format" in spoken and self.form != "json_schema":
            spoken.pop("response_format")
            if self.form == "json_object":
                spoken["response_format"] = {"type": "json_object"}
        spoken["stream"] = True
        if "stream_options" not in self.without:
            spoken["stream_options"] = {"include_usage": True}
        return spoken

    def after_refusal(self, detail: str) -> Dialect | None:
        """What to try next when a request was refused with `detail`; None: it was not this."""
        if self.token_limit == "max_tokens" and "max_completion_tokens" in detail:
            return replace(self, token_limit="max_completion_tokens")
        for name in _OPTIONAL:
            if name not in self.without and re.search(rf"\b{name}\b", detail):
                return replace(self, without=self.without | {name})
        following = _NEXT_FORM[self.form]
        if following and _FORM_WORDS.search(detail):
            return replace(self, form=following)
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "reply_form": self.form,
            "token_limit": self.token_limit,
            "left_out": sorted(self.without),
        }


class Dialects:
    """The dialect of each model at an endpoint, shared by all threads."""

    def __init__(self) -> None:
        self._by_model: dict[str, Dialect] = {}
        self._lock = threading.Lock()

    def of(self, model: str) -> Dialect:
        with self._lock:
            return self._by_model.get(model, Dialect())

    def refused(self, model: str, used: Dialect, detail: str) -> bool:
        """Learn from a refusal of a request in `used`; whether it is worth another try."""
        with self._lock:
            now = self._by_model.get(model, Dialect())
            if now != used:  # another thread has learnt it meanwhile
                return True
            following = used.after_refusal(detail)
            if following is not None:
                self._by_model[model] = following
            return following is not None

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return {model: dialect.describe() for model, dialect in self._by_model.items()}
