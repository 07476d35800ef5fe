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

# What a refusal says that is about the form of the reply: OpenAI, vLLM, Ollama, routers. A prompt
# may be quoted in it, so common words count beside a complaint alone.
_FORM_WORDS = re.compile(
    r"response_format|json_schema|json_object|json mode|structured[ _]output|"
    r"guided_(?:json|decoding|grammar)|"
    r"(?:pars(?:e|ing)|compil(?:e|ing)|convert|invalid|unsupported)\W+(?:\w+\W+){0,3}?"
    r"(?:grammar|schema)\b|"
    r"\b(?:grammar|schema)\W+(?:\w+\W+){0,3}?(?:error|invalid|failed|unsupported|not supported)",
    re.IGNORECASE,
)
_COMPLAINT = re.compile(
    r"un(?:supported|known|recogni[sz]ed|expected)|invalid|forbidden|deprecated|cannot find|"
    r"(?:not|n't|never) (?:be )?(?:support|allow|permit|implement|available|accept|recogni)",
    re.IGNORECASE,
)
_OF_THE_CONTENT = re.compile(r"content|policy|safety|moderation|flagged", re.IGNORECASE)
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

    def after_refusal(self, detail: str, param: str = "", code: str = "") -> Dialect | None:
        """What to try next when a request was refused; None: it was not this.

        Args:
            detail: all that the server said. It may quote the prompt.
            param, code: the error's own fields, where it has them: they are believed first.
        """
        if _OF_THE_CONTENT.search(code):
            return None
        named = param.split(".")[0].split("[")[0]
        if named in ("messages", "prompt", "input", "model"):
            return None
        if self.token_limit == "max_tokens" and "max_completion_tokens" in detail:
            return replace(self, token_limit="max_completion_tokens")
        for name in _OPTIONAL:
            if name not in self.without and (named == name or _complains_of(detail, name)):
                return replace(self, without=self.without | {name})
        following = _NEXT_FORM[self.form]
        if following and (named == "response_format" or _FORM_WORDS.search(detail)):
            return replace(self, form=following)
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "reply_form": self.form,
            "token_limit": self.token_limit,
            "left_out": sorted(self.without),
        }


def _complains_of(detail: str, name: str) -> bool:
    """Whether a parameter is named as one: `'seed' is not supported`, `unknown field: seed`.

    A quoted name before a colon is a key of a request that is quoted whole.
    """
    quoted = rf"""(["'`])(?:\w+\.)*{name}\1(?!\s*:)"""
    noun = "(?:parameter|argument|field|option|input|key|name|property)s?"
    listed = rf"{noun}(?: supplied)?[\s:=\"'`]{{1,4}}{name}\b|\b{name}[\"'`]? {noun}"
    found = re.search(rf"{quoted}|{listed}", detail, re.IGNORECASE)
    return found is not None and _COMPLAINT.search(detail) is not None


class Dialects:
    """The dialect of each model at an endpoint, shared by all threads."""

    def __init__(self) -> None:
        self._by_model: dict[str, Dialect] = {}
        self._lock = threading.Lock()

    def of(self, model: str) -> Dialect:
        with self._lock:
            return self._by_model.get(model, Dialect())

    def refused(
        self, model: str, used: Dialect, detail: str, param: str = "", code: str = ""
    ) -> bool:
        """Learn from a refusal of a request in `used`; whether it is worth another try."""
        with self._lock:
            now = self._by_model.get(model, Dialect())
            if now != used:  # another thread has learnt it meanwhile
                return True
            following = used.after_refusal(detail, param, code)
            if following is not None:
                self._by_model[model] = following
            return following is not None

    def describe(self) -> dict[str, Any]:
        with self._lock:
            return {model: dialect.describe() for model, dialect in self._by_model.items()}
