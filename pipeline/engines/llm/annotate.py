"""Back-annotation: system prompts for dialogues that exist, written by a model.

Recorded or imported conversations often have no prompt, or one for all. Here a model reads the
dialogue and writes the prompt that would have led to it, at three levels of detail, so that what
is trained on has prompts as short and as long as people write. One level, drawn by seed, becomes
the record's `system_prompt`; all three are in its `prompts`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from duplex.characters import Domain
from duplex.errors import RecordError
from duplex.records import Dialogue
from pipeline.engines.llm.brief import AGAIN, again
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.exchanges import Reply
from pipeline.engines.llm.prompts import LEVELS, prompt_fault
from pipeline.engines.llm.replies import fault_of, read_object
from pipeline.engines.writers import Candidate, Fault

VERSION = 1  # raise it when this code asks or reads in another way

SYSTEM = """\
You write system prompts for a speech model that plays one side of a conversation. Two people talk
{place}: the agent is the {agent_role}, the user is the {user_role}. You are given a dialogue and
write the prompt that would lead the model to play the {agent_role} in it, three times:
{levels}.
Each speaks to the character in the second person and begins like "You are {name}, …". Say who the
{agent_role} is, how it feels and speaks, and the facts that it knows: names, wishes, amounts. Take
every name and every number from the dialogue, invent none, and quote no whole sentence. Language:
{language} (ISO 639-1). No markup.
Answer with one JSON object and nothing else: {{"brief": "...", "standard": "...",
"detailed": "..."}}"""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {level: {"type": "string"} for level in LEVELS},
    "required": list(LEVELS),
    "additionalProperties": False,
}


def revision(model: str, temperature: float) -> str:
    """Part of every record's key, and the records' `writer`."""
    material = "\0".join((SYSTEM, AGAIN, repr(LEVELS)))
    wording = hashlib.sha256(material.encode()).hexdigest()[:12]
    return f"annotate-{VERSION}:{model}:t{temperature:g}:{wording}"


class Annotator:
    """Thread-safe. `on_reject` is told of each reply that is not kept."""

    def __init__(
        self,
        client: Client,
        domain: Domain,
        *,
        model: str,
        temperature: float,
        max_tokens: int,
        max_candidates: int,
        on_reject: Callable[[Candidate], None],
    ):
        self._client, self._domain = client, domain
        self._model, self._temperature, self._max_tokens = model, temperature, max_tokens
        self._max_candidates, self._on_reject = max_candidates, on_reject

    def annotate(self, dialogue: Dialogue, *, seed: int, attempt: int = 0) -> Dialogue:
        """The dialogue with prompts of its own.

        Raises:
            TransientError, RequestError, BudgetError: see `Client.ask`.
            RecordError: no reply could be used.
        """
        request = self.first_request(dialogue, seed)
        first, fault = request.messages, None
        for number in range(1, self._max_candidates + 1):
            reply = self._client.ask(request, dialogue.id)
            prompts = self._read(reply, dialogue)
            if not isinstance(prompts, Fault):
                chosen = random.Random(f"{seed}/{dialogue.id}").choice(prompts)
                update = {
                    "system_prompt": chosen,
                    "prompts": prompts,
                    "writer": revision(self._model, self._temperature),
                }
                return dialogue.model_copy(update=update)
            fault = prompts
            self._on_reject(Candidate(dialogue.id, attempt, number, fault, ()))
            shown = "" if fault.code in ("refused", "cut-short") else reply.text
            request = self._request(again(first, shown, fault.message), seed + number)
        assert fault is not None, "there is at least one candidate"
        raise RecordError(
            f"{self._model} must answer with usable prompts for {dialogue.id}; none came in "
            f"{self._max_candidates} replies, the last one failed because {fault.message} "
            f"({fault.code}). Choose another model, or raise dialogues.max_candidates and run "
            "with --retry-rejected."
        )

    def first_request(self, dialogue: Dialogue, seed: int) -> Request:
        levels = "\n".join(
            f'- "{level}", {low} to {high} words' for level, (low, high) in LEVELS.items()
        )
        system = SYSTEM.format(
            place=self._domain.place,
            agent_role=self._domain.agent_role,
            user_role=self._domain.user_role,
            levels=levels,
            name=dialogue.persona_name,
            language=self._domain.language,
        )
        script = "\n".join(f"{turn.role}: {turn.text}" for turn in dialogue.turns)
        ask = f"The agent's name: {dialogue.persona_name}\n\n{script}"
        messages = ({"role": "system", "content": system}, {"role": "user", "content": ask})
        return self._request(messages, seed)

    def _request(self, messages: tuple[dict[str, str], ...], seed: int) -> Request:
        return Request(
            self._model, messages, seed, self._temperature, self._max_tokens, "prompts", SCHEMA
        )

    def _read(self, reply: Reply, dialogue: Dialogue) -> tuple[str, ...] | Fault:
        fault = fault_of(reply)
        if fault is not None:
            return fault
        value = read_object(reply.text)
        if isinstance(value, Fault):
            return value
        prompts = []
        for level in LEVELS:
            text = value.get(level) if isinstance(value, dict) else None
            if not isinstance(text, str) or not text.strip():
                return Fault("unreadable", f'the JSON object must hold "{level}", a text')
            text = " ".join(text.encode("utf-8", "ignore").decode().split())
            if found := prompt_fault(level, text, dialogue, self._domain):
                return Fault("prompt", found)
            prompts.append(text)
        return tuple(prompts)
