"""The LLM writer: candidate after candidate for a slot, each with the reason why the last failed.

A slot's candidates depend on its seed and on the replies alone, so a resume that finds the replies
in the log walks the same path without a request.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from duplex.base import Role
from duplex.characters import Domain, Persona, Scenario
from duplex.errors import RecordError
from duplex.records import Turn
from pipeline.engines.llm import brief
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.critic import Critic
from pipeline.engines.llm.critic import wording as judging
from pipeline.engines.llm.exchanges import Reply
from pipeline.engines.llm.replies import fault_of, read_turns
from pipeline.engines.writers import Candidate, Check, Fault, WrittenDialogue, draw_prompt

VERSION = 3  # raise it when this code asks or reads in another way


def revision(model: str, temperature: float, critic: str | None) -> str:
    """Model, temperature and wording of the request; not the address that serves it."""
    judged = f":critic {critic} {judging()}" if critic else ""
    return f"openai-{VERSION}:{model}:t{temperature:g}:{brief.wording()}{judged}"


class OpenAIWriter:
    """A `DialogueWriter` on a chat endpoint. Thread-safe.

    `on_reject` is told of each candidate that is not kept, from whichever thread made it.
    """

    def __init__(
        self,
        client: Client,
        domain: Domain,
        *,
        model: str,
        temperature: float,
        max_tokens: int,
        max_candidates: int,
        min_facts: int,
        check: Check,
        on_reject: Callable[[Candidate], None],
        critic: Critic | None = None,
    ):
        self._client, self._domain = client, domain
        self._model, self._temperature, self._max_tokens = model, temperature, max_tokens
        self._max_candidates, self._min_facts = max_candidates, min_facts
        self._check, self._on_reject, self._critic = check, on_reject, critic
        self._role_names: dict[str, Role] = {
            domain.agent_role.lower(): "agent",
            domain.user_role.lower(): "user",
            "agent": "agent",
            "user": "user",
        }

    @property
    def revision(self) -> str:
        return revision(
            self._model, self._temperature, self._critic.model if self._critic else None
        )

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
        """
        Raises:
            TransientError, RequestError, BudgetError: see `Client.ask`.
            RecordError: no candidate could be kept.
        """
        request = self.first_request(persona, scenario, seed, min_turns, max_turns)
        system_prompt = self._prompt(persona, scenario, seed)
        first, fault = request.messages, None
        for number in range(1, self._max_candidates + 1):
            reply = self._client.ask(request, task_id)
            turns, fault = self._judge(reply, persona, scenario, seed, task_id)
            if fault is None:
                return WrittenDialogue(turns, system_prompt, mood=persona.type)
            self._on_reject(Candidate(task_id, attempt, number, fault, turns))
            # A refusal in the history brings the next one; an empty reply says nothing.
            shown = "" if fault.code in ("refused", "cut-short") else reply.text
            request = self._request(brief.again(first, shown, fault.message), seed + number)
        assert fault is not None, "there is at least one candidate"
        raise RecordError(
            f"{self._model} must answer with a usable dialogue for {persona.id} in {scenario.id}; "
            f"none came in {self._max_candidates} candidates, the last one failed because "
            f"{fault.message} ({fault.code}). Choose another model, or raise "
            "dialogues.max_candidates and run with --retry-rejected."
        )

    def first_request(
        self, persona: Persona, scenario: Scenario, seed: int, min_turns: int, max_turns: int
    ) -> Request:
        messages = brief.messages(
            self._domain, persona, scenario, self._prompt(persona, scenario, seed),
            min_turns=min_turns, max_turns=max_turns, min_facts=self._min_facts,
        )  # fmt: skip
        return self._request(messages, seed)

    def _request(self, messages: tuple[dict[str, str], ...], seed: int) -> Request:
        return Request(
            self._model, messages, seed, self._temperature, self._max_tokens,
            "dialogue", brief.schema(),
        )  # fmt: skip

    def _prompt(self, persona: Persona, scenario: Scenario, seed: int) -> str:
        return draw_prompt(persona, random.Random(f"{seed}/{persona.id}/{scenario.id}"))

    def _judge(
        self, reply: Reply, persona: Persona, scenario: Scenario, seed: int, task_id: str
    ) -> tuple[tuple[Turn, ...], Fault | None]:
        fault = fault_of(reply)
        if fault is not None:
            return (), fault
        turns = read_turns(reply.text, persona, self._role_names, seed)
        if isinstance(turns, Fault):
            return (), turns
        fault = self._check(persona, scenario, turns)
        if fault is None and self._critic is not None:
            fault = self._critic.judge(self._domain, persona, scenario, turns, task_id)
        return turns, fault
