"""A persona as a model drafts it: asked for by schema, checked like any other, asked again.

What comes back is a draft: a person reads it before a run may take it. Requests go through the
client of the dialogues: they count in the run folder's budget, are kept in its log of exchanges,
and one that was answered before is not paid again.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from duplex.characters import Domain, Persona
from duplex.datafiles import describe_faults
from duplex.errors import RecordError
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.replies import fault_of, read_object
from pipeline.engines.writers import Fault
from pipeline.persona_review import review_persona

ATTEMPTS = 3
ASSIGNED = ("id", "domain", "type", "language")  # not the model's to choose

_SYSTEM = """\
You write characters for training a speech model in role play. The model will play the character;
staff will practise with it. Write real, varied, dignified people: no stereotypes, no real persons,
no real companies. Answer with one JSON object and nothing else."""

_ASK = """\
The place: {title}. The model plays the {agent_role}, the person who practises is the {user_role}.
The character: {about}
Its type is {type}; others of this place are: {types}.

The JSON object has these keys:
  name              a first name, invented
  traits            3 or 4 short strings
  speech_patterns   3 strings, one of each form: one that stands before a turn and ends in a comma
                    ("Oh my,"), one that ends a sentence and starts with a comma (", I think"), one
                    short sentence that stands after a turn ("I expected better.")
  facts             4 to 6 objects {{"key", "value", "says"}}: key is one lower-case word and one of
                    them is "name"; value is how it is spoken, numbers in words; says lists wordings
                    that count as having said it, and value holds one of them
  gap_after_user    {{"low", "high"}}: pause before they answer, in frames of 80 ms, within 1 and 24
  gap_other         {{"low", "high"}}: other pauses
  interrupts        0 to 0.4: how readily they cut in
  backchannels      0 to 0.4: how often they say mm-hm while listening
  backchannel_words 1 to 3 short strings
  voice             {{"gender": "female" or "male", "age": "young", "adult" or "old",
                    "accent": "en-us", "en-gb" or "en-gb-scotland", "pitch": 30 to 70,
                    "rate_wpm": 130 to 210}}
  prompts           3 strings of 45 to 70 words, each in the second person ("You are NAME, ..."),
                    each holding every fact in a wording of its says, in another order and other
                    words; no digits, no markup, and no name or number that is not a fact

The whole schema: {schema}"""

_AGAIN = "That cannot be used:\n{reasons}\nSend the whole JSON object again, mended."


def write_draft(
    persona_id: str,
    about: str,
    kind: str,
    domain: Domain,
    client: Client,
    *,
    model: str,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """The fields of a persona that breaks no rule.

    Raises:
        RecordError: no usable reply in `ATTEMPTS`; what the last one lacked.
        TransientError, RequestError, BudgetError: see `Client.ask`.
    """
    own = {"id": persona_id, "domain": domain.id, "type": kind, "language": domain.language}
    question = _ASK.format(
        title=domain.title, agent_role=domain.agent_role, user_role=domain.user_role,
        about=about, type=kind, types=", ".join(domain.types), schema=json.dumps(_schema()),
    )  # fmt: skip
    first = ({"role": "system", "content": _SYSTEM}, {"role": "user", "content": question})
    messages, reasons = first, [""]
    for number in range(ATTEMPTS):
        request = Request(
            model, messages, seed + number, temperature, max_tokens, "persona", _schema()
        )
        reply = client.ask(request, f"draft of {persona_id}")
        fault = fault_of(reply)
        value = fault or read_object(reply.text)
        if isinstance(value, dict):
            try:
                persona = Persona.model_validate(value | own)
            except ValidationError as error:
                reasons = [describe_faults(error)]
            else:
                reasons = _faults(persona, domain)
                if not reasons:
                    return own | persona.model_dump(mode="json", exclude=set(own))
        else:
            found = value.message if isinstance(value, Fault) else "it must be a JSON object"
            reasons = [found]
        listing = "\n".join(f"- {reason}" for reason in reasons)
        # What was refused or cut short is not shown again: it brings the next one.
        said = () if fault else ({"role": "assistant", "content": reply.text},)
        messages = (*first, *said, {"role": "user", "content": _AGAIN.format(reasons=listing)})
    raise RecordError(
        f"{model} must draft a persona that breaks no rule; none came in {ATTEMPTS} "
        f"replies. The last one: {'; '.join(reasons)}. Ask anew with --again, say more in --about, "
        "or choose another model"
    )


def _schema() -> dict[str, Any]:
    schema = Persona.model_json_schema()
    for name in ASSIGNED:
        schema["properties"].pop(name)
    schema["required"] = [name for name in schema["required"] if name not in ASSIGNED]
    return schema


def _faults(persona: Persona, domain: Domain) -> list[str]:
    frames = [0] * len(persona.prompts)  # a reply is too short to be too long a prompt
    return [f.message for f in review_persona(persona, domain, "", frames) if f.level == "fault"]
