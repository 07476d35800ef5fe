"""What an endpoint's refusal teaches, and what it must not: prompts are quoted in errors."""

from __future__ import annotations

import pytest

from pipeline.engines.llm.dialect import Dialect


@pytest.mark.parametrize(
    "detail",
    [
        "Error code: 400 - flagged by policy: 'a poppy seed bagel'",
        "400: invalid prompt: 'I want a poppy seed bagel, not allowed'",
        "blocked: 'what is the temperature of the milk?' is not supported by our policy",
        "invalid content: 'a guided tour of grammar, with a schema'",
        "Invalid request: {'model': 'm', 'seed': 5, 'temperature': 0.8}",
        "too long: 9000 tokens, at most 8192 are supported",
    ],
)
def test_a_refusal_that_quotes_the_prompt_switches_nothing_off(detail: str) -> None:
    assert Dialect().after_refusal(detail) is None


@pytest.mark.parametrize(
    ("detail", "left_out"),
    [
        ("Unrecognized request argument supplied: seed", "seed"),
        ("{'error': {'message': \"'seed' is not supported here\"}}", "seed"),
        ('json: unknown field "seed"', "seed"),
        ('Unknown name "seed": Cannot find field.', "seed"),
        ("{'loc': ('body', 'seed'), 'msg': 'Extra inputs are not permitted'}", "seed"),
        ("Unsupported parameter: temperature", "temperature"),
        ("The temperature parameter isn't supported by this model", "temperature"),
        ("Unsupported value: 'temperature' does not support 0.8", "temperature"),
        ("`stream_options` is not allowed", "stream_options"),
    ],
)
def test_a_refused_parameter_is_left_out(detail: str, left_out: str) -> None:
    learnt = Dialect().after_refusal(detail)
    assert learnt is not None and learnt.without == {left_out}


def test_the_errors_own_fields_are_believed_first() -> None:
    learnt = Dialect().after_refusal("no", param="seed")
    assert learnt is not None and learnt.without == {"seed"}
    learnt = Dialect().after_refusal("no", param="response_format.json_schema")
    assert learnt is not None and learnt.form == "json_object"
    said = "'seed' is not supported"
    assert Dialect().after_refusal(said, code="content_policy_violation") is None
    assert Dialect().after_refusal(said, param="messages[1].content") is None


@pytest.mark.parametrize(
    "detail",
    [
        "'response_format' of type 'json_schema' is not supported",
        "failed to parse grammar",
        "Invalid JSON schema for guided_json",
        "schema not supported by backend",
    ],
)
def test_a_refused_form_is_asked_for_in_another_way(detail: str) -> None:
    learnt = Dialect().after_refusal(detail)
    assert learnt is not None and learnt.form == "json_object" and not learnt.without
