"""The LLM writer: dialogues from any OpenAI-compatible endpoint.

One request for a dialogue, answered by a JSON object that is checked to the letter; an answer
that is not usable is asked for again, with the reason, up to `max_attempts` times. Budget,
concurrency and back-off belong to the caller: nothing is retried here that failed on the way.

The key is read when the first dialogue is written. It is in no message: servers repeat it in
their errors, so what they say is cleaned of it, and the library's own exceptions are not chained
to ours.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from duplex.base import Frozen, Role, Text
from duplex.characters import Persona, Scenario
from duplex.errors import DuplexError, RecordError, RequestError, TransientError
from duplex.records import Turn
from pipeline.engines.writers import WrittenDialogue, draw_prompt

if TYPE_CHECKING:
    import openai

DEFAULT_BASE_URL = "https://api.openai.com/v1"
VERSION = 1  # raise it when this code asks or checks in another way
_SEEDS = 2**31  # some servers take no larger seed
_MAX_DETAIL = 300  # characters of what a server says that go into a message

# HTTP statuses that may go away by themselves: timeout, conflict, too early, too many requests.
_PASSING = frozenset({408, 409, 425, 429})
_REFUSED = frozenset({401, 403, 404})  # no record will fare better: the request is wrong

# What would be read aloud as symbols, or not at all.
_UNSPEAKABLE = re.compile(r"[\d*_#<>\[\]{}()|\\/\n\r\t]")

_SYSTEM = """\
You write short spoken dialogues for training a speech model. Two people talk in a coffee shop:
the agent is the customer, the user is the barista. Write the way people speak: plain words,
contractions, no stage directions, no emoji, no markup, no digits (write numbers and prices as
words). The customer never contradicts the facts. The barista knows only what has been said.
Answer with one JSON object and nothing else:
{"turns": [{"role": "user", "text": "..."}, {"role": "agent", "text": "..."}]}"""

_ASK = """\
The customer: {prompt}
Type: {type}. Traits: {traits}.
Speech patterns to use now and then: {patterns}
Facts, of which the customer says at least two: {facts}

The situation: {title}. {setting}
It goes roughly like this: {arc}.

Write between {min_turns} and {max_turns} turns. The roles alternate, and the first turn is spoken
by the {first_speaker}."""

_AGAIN = "Your last reply cannot be used: {reason}. Send the whole JSON object again."


class _Reply(Frozen):
    class Line(Frozen):
        role: Role
        text: Text

    turns: tuple[Line, ...]


class OpenAIWriter:
    """A `DialogueWriter` on a chat endpoint.

    `base_url` ends in `/v1` for most servers; None is OpenAI's own. The key is `api_key` where
    a config has resolved it, else what the variable `api_key_env` holds.
    """

    def __init__(
        self,
        *,
        base_url: str | None,
        model: str,
        temperature: float = 0.8,
        api_key: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_attempts: int = 3,
        timeout_s: float = 120.0,
    ):
        if max_attempts < 1:
            raise RequestError(f"max_attempts must be at least 1, found {max_attempts}")
        self._base_url = base_url or DEFAULT_BASE_URL
        self._api_key = api_key
        self._model = model
        self._temperature = temperature
        self._api_key_env = api_key_env
        self._max_attempts = max_attempts
        self._timeout_s = timeout_s
        self._client: openai.OpenAI | None = None

    @property
    def revision(self) -> str:
        """Model, temperature and wording of the request; not the address that serves it."""
        wording = hashlib.sha256("\0".join((_SYSTEM, _ASK, _AGAIN)).encode()).hexdigest()[:12]
        return f"openai-{VERSION}:{self._model}:t{self._temperature:g}:{wording}"

    def write(
        self,
        persona: Persona,
        scenario: Scenario,
        *,
        seed: int,
        min_turns: int,
        max_turns: int,
        task_id: str = "",
        attempt: int = 0,
    ) -> WrittenDialogue:
        """Raises TransientError when the endpoint cannot be reached or is busy, RequestError for
        a missing or refused key, RecordError when no reply could be used."""
        system_prompt = draw_prompt(persona, random.Random(f"{seed}/{persona.id}/{scenario.id}"))
        messages: list[dict[str, str]] = [
            {"role": "system", "content": _SYSTEM},
            {
                "role": "user",
                "content": _brief(persona, scenario, system_prompt, min_turns, max_turns),
            },
        ]
        reason = ""
        for attempt in range(self._max_attempts):
            # The same seed would bring the same useless reply.
            content, reason = self._ask(messages, seed=(seed + attempt) % _SEEDS)
            if not reason:
                turns, reason = _read_reply(content, scenario.first_speaker, min_turns, max_turns)
                if not reason:
                    return WrittenDialogue(turns, system_prompt, mood=persona.type)
            messages = messages[:2]
            if content:
                messages += [
                    {"role": "assistant", "content": content},
                    {"role": "user", "content": _AGAIN.format(reason=reason)},
                ]
        raise RecordError(
            f"{self._model} must answer with a usable dialogue for {persona.id} in {scenario.id}; "
            f"none came in {self._max_attempts} attempts, the last one failed because {reason}. "
            f"Choose another model, or try again with --retry-rejected."
        )

    def _ask(self, messages: list[dict[str, str]], *, seed: int) -> tuple[str, str]:
        """The reply's text and why it cannot be used: one of the two is empty."""
        import openai  # 1 s to import: only a run with something to write pays for it

        client = self._connect()
        failure: DuplexError | None = None
        completion: Any = None
        try:
            completion = client.chat.completions.create(
                model=self._model,
                messages=messages,  # pyright: ignore[reportArgumentType]  # plain dicts do
                temperature=self._temperature,
                seed=seed,
                response_format={"type": "json_object"},
            )
        except openai.APIStatusError as error:
            failure = self._status_failure(error.status_code, str(error))
        except openai.APITimeoutError:
            failure = TransientError(f"{self._place} must answer within {self._timeout_s:g} s")
        except openai.APIConnectionError as error:
            failure = TransientError(f"{self._place} must be reachable: {self._clean(str(error))}")
        except (openai.OpenAIError, ValueError):
            return "", "the endpoint did not answer in the format of /v1/chat/completions"
        if failure is not None:
            raise failure  # outside of the handler, so that it does not carry the library's error
        return _first_choice(completion)

    def _connect(self) -> openai.OpenAI:
        if self._client is None:
            import openai

            self._client = openai.OpenAI(
                api_key=self._read_key(),
                base_url=self._base_url,
                timeout=self._timeout_s,
                max_retries=0,
            )
        return self._client

    def _find_key(self) -> str:
        return (self._api_key or os.environ.get(self._api_key_env, "")).strip()

    def _read_key(self) -> str:
        key = self._find_key()
        if not key:
            raise RequestError(
                f"the LLM writer needs an API key in the environment variable "
                f"{self._api_key_env}, which is not set; export it (any word will do for a "
                f"server that asks for none)"
            )
        return key

    @property
    def _place(self) -> str:
        # The host alone: an address may carry a password.
        return f"the endpoint at {urlsplit(self._base_url).hostname or 'base_url'}"

    def _status_failure(self, status: int, detail: str) -> DuplexError:
        detail = self._clean(detail)
        if status in _PASSING or status >= 500:
            return TransientError(f"{self._place} answered {status}: {detail}")
        if status in _REFUSED:
            return RequestError(
                f"{self._place} refused the request with {status}: {detail}. Check the key in "
                f"{self._api_key_env}, the model {self._model!r} and base_url"
            )
        return RecordError(f"{self._place} rejected the request with {status}: {detail}")

    def _clean(self, text: str) -> str:
        """What a server said, short and without the key."""
        key = self._find_key()
        if key:
            text = text.replace(key, "***")
        # Servers that mask the key themselves leave its ends to be read.
        text = re.sub(r"\b(?:sk|key|token)-[\w*-]{4,}", "***", text)
        return text if len(text) <= _MAX_DETAIL else text[:_MAX_DETAIL] + "…"


def _brief(
    persona: Persona, scenario: Scenario, prompt: str, min_turns: int, max_turns: int
) -> str:
    speakers = {"agent": "customer", "user": "barista"}
    return _ASK.format(
        prompt=prompt,
        type=persona.type,
        traits=", ".join(persona.traits),
        patterns=" / ".join(persona.speech_patterns),
        facts="; ".join(f"{fact.key}: {fact.value}" for fact in persona.facts),
        title=scenario.title,
        setting=scenario.setting,
        arc=", then ".join(f"{speakers[beat.role]} {beat.intent}" for beat in scenario.arc),
        min_turns=min_turns,
        max_turns=max_turns,
        first_speaker=f"{scenario.first_speaker} (the {speakers[scenario.first_speaker]})",
    )


def _first_choice(completion: Any) -> tuple[str, str]:
    try:
        choice = completion.choices[0]
        content, finish = choice.message.content, choice.finish_reason
    except (AttributeError, IndexError, TypeError):
        return "", "the endpoint did not answer in the format of /v1/chat/completions"
    if finish == "length":
        return "", "the reply was cut off before its end"
    if not isinstance(content, str) or not content.strip():
        return "", f"the reply was empty (finish_reason {finish})"
    return content, ""


def _read_reply(
    content: str, first_speaker: Role, min_turns: int, max_turns: int
) -> tuple[tuple[Turn, ...], str]:
    """The turns of a reply and why they cannot be used: one of the two is empty."""
    try:
        lines = _Reply.model_validate_json(content, strict=True).turns
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the reply"
        return (), f"it is not the JSON object that was asked for ({place}: {first['msg']})"
    if not min_turns <= len(lines) <= max_turns:
        return (), f"there must be {min_turns} to {max_turns} turns, found {len(lines)}"
    if lines[0].role != first_speaker:
        return (), f"the first turn must be spoken by {first_speaker}, found {lines[0].role}"
    for index, (before, line) in enumerate(itertools.pairwise(lines), start=1):
        if before.role == line.role:
            return (), f"the roles must alternate, found {line.role} again at turn {index}"
    for index, line in enumerate(lines):
        found = _UNSPEAKABLE.search(line.text)
        if found:
            return (), (
                f"turn {index} holds {found[0]!r}, which cannot be spoken; "
                f"write numbers as words and leave out markup"
            )
    return tuple(Turn(role=line.role, text=line.text) for line in lines), ""
