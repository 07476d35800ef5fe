"""A model's word on a candidate: consistent, natural, in role. Through the same log and budget."""

from __future__ import annotations

import hashlib

from duplex.characters import Domain, Persona, Scenario
from duplex.records import Turn
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.replies import fault_of, read_object
from pipeline.engines.writers import Fault

MAX_TOKENS = 1024  # models that reason need some before the verdict
ATTEMPTS = 2
SCHEMA = {
    "type": "object",
    "properties": {"reason": {"type": "string"}, "keep": {"type": "boolean"}},
    "required": ["reason", "keep"],
    "additionalProperties": False,
}

SYSTEM = """\
You judge spoken dialogues that are to train a speech model. Two people talk {place}: the agent is
the {agent_role}, the user is the {user_role}. Say no to a dialogue in which
- the {agent_role} contradicts the description, or invents what it does not give;
- either side falls out of its role, or one speaks the other one's lines;
- a turn does not answer the one before it, or the talk goes round in circles;
- people would not speak like that.
Small slips are fine. Answer with one JSON object and nothing else:
{{"reason": "one sentence", "keep": true or false}}"""

ASK = """\
The {agent_role}: {prompt}
The situation: {title}. {setting}

{script}"""


class Critic:
    def __init__(self, client: Client, model: str):
        self._client = client
        self.model = model

    def judge(
        self,
        domain: Domain,
        persona: Persona,
        scenario: Scenario,
        turns: tuple[Turn, ...],
        task_id: str,
    ) -> Fault | None:
        """Raises as `Client.ask` does."""
        messages = (
            {
                "role": "system",
                "content": SYSTEM.format(
                    place=domain.place, agent_role=domain.agent_role, user_role=domain.user_role
                ),
            },
            {
                "role": "user",
                "content": ASK.format(
                    agent_role=domain.agent_role,
                    prompt=persona.prompts[0],
                    title=scenario.title,
                    setting=scenario.setting,
                    script="\n".join(_line(turn) for turn in turns),
                ),
            },
        )
        for seed in range(ATTEMPTS):
            request = Request(self.model, messages, seed, 0.0, MAX_TOKENS, "verdict", SCHEMA)
            reply = self._client.ask(request, task_id)
            value = None if fault_of(reply) else read_object(reply.text)
            if isinstance(value, dict) and isinstance(value.get("keep"), bool):
                if value["keep"]:
                    return None
                return Fault("critic", str(value.get("reason") or "it gave no reason")[:300])
        return Fault("critic", f"{self.model} gave no verdict in {ATTEMPTS} replies")


def _line(turn: Turn) -> str:
    if turn.cut_after_words:
        heard = " ".join(turn.text.split()[: turn.cut_after_words])
        return f"{turn.role}: {heard}... (is cut short)"
    return f"{turn.role}: {turn.text}"


def wording() -> str:
    return hashlib.sha256("\0".join((SYSTEM, ASK)).encode()).hexdigest()[:12]
