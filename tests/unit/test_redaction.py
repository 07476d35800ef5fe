"""No key reaches a message, whichever way a server gives it back."""

from __future__ import annotations

import pytest

from duplex.tokens import masked, secret_values
from pipeline.engines.llm.wire import Wire
from pipeline.engines.redaction import MAX_DETAIL, redacted

SECRET = "pass-w0rd"


@pytest.mark.parametrize(
    "text",
    [
        f"wrong: {SECRET}",
        "wrong: sk-abcd****9876 given",
        f"cannot reach http://me:{SECRET}@host:1/v1",
        f"cannot reach http://me:a@{SECRET}@host:1/v1",
    ],
)
def test_keys_and_the_users_of_addresses_are_hidden(text: str) -> None:
    said = redacted(text, SECRET if text.startswith("wrong: pass") else "")
    assert "***" in said and SECRET not in said and "9876" not in said and "me:" not in said


def test_the_chat_endpoint_hides_the_password_of_an_address() -> None:
    wire = Wire(base_url=None, api_key="k", timeout_s=1, deadline_s=1)
    assert wire._clean(f"at http://me:{SECRET}@host/v1\nfailed") == "at http://***@host/v1 failed"


def test_a_long_text_is_cut() -> None:
    assert len(redacted("a " * 1000)) == MAX_DETAIL + 1


def test_a_secret_within_another_leaves_nothing_of_it():
    assert masked("with abcdefgh in it", ("abcdef", "abcdefgh")) == "with *** in it"


def test_secrets_are_known_by_their_names_and_short_values_are_none():
    environment = {"HF_TOKEN": " hf_123456 ", "MY_KEY": "short", "HOME": "/home/somebody"}
    assert secret_values(environment) == ("hf_123456",)
