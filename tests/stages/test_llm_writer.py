"""The LLM writer against a real HTTP server on this machine: replies, failures, secrecy."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from duplex.characters import Beat, Fact, GapRange, Persona, Scenario, VoiceTraits
from duplex.errors import RecordError, RequestError, TransientError
from pipeline.engines.llm import OpenAIWriter

KEY_ENV = "DUPLEX_TEST_LLM_KEY"
KEY = "tiger-lily-must-not-be-seen-0123456789"  # no known form: found by its value alone

PERSONA = Persona(
    id="angry-test",
    name="Marcus",
    type="angry",
    traits=("blunt",),
    speech_patterns=("Come on,",),
    facts=(Fact(key="order", value="a large black coffee", says=("black coffee",)),),
    gap_after_user=GapRange(low=1, high=3),
    gap_other=GapRange(low=1, high=4),
    voice=VoiceTraits(gender="male"),
    prompts=(
        "You are Marcus, an angry customer. You want a black coffee.",
        "Your name is Marcus, you are angry and you want black coffee.",
    ),
)
SCENARIO = Scenario(
    id="test",
    title="Test",
    setting="A counter.",
    arc=(
        Beat(role="user", intent="greet"),
        Beat(role="agent", intent="greet-back"),
        Beat(role="user", intent="ask-order"),
        Beat(role="agent", intent="give-order"),
    ),
)
GOOD = [
    {"role": "user", "text": "Hi, what can I get you?"},
    {"role": "agent", "text": "Come on, a large black coffee."},
    {"role": "user", "text": "That's three dollars."},
    {"role": "agent", "text": "Fine. Here."},
]


class Endpoint:
    """Answers /v1/chat/completions with a queue of (status, body); the last one repeats."""

    def __init__(self, answers: list[tuple[int, str]], delay_s: float = 0.0):
        self.requests: list[dict[str, Any]] = []
        self.headers: list[str] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append(json.loads(body))
                endpoint.headers.append(self.headers["Authorization"])
                time.sleep(delay_s)
                if self.path != "/v1/chat/completions":
                    status, answer = 404, "{}"
                else:
                    status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
                data = answer.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def completion(content: str | None, finish_reason: str = "stop") -> str:
    return json.dumps(
        {
            "id": "c1",
            "object": "chat.completion",
            "created": 0,
            "model": "tiny",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": finish_reason,
                }
            ],
        }
    )


def reply(turns: list[dict[str, str]]) -> str:
    return completion(json.dumps({"turns": turns}))


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, KEY)


@pytest.fixture
def serve() -> Iterator[Any]:
    endpoints: list[Endpoint] = []

    def start(*answers: tuple[int, str], delay_s: float = 0.0) -> Endpoint:
        endpoints.append(Endpoint(list(answers), delay_s))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


def writer(endpoint: Endpoint, **settings: Any) -> OpenAIWriter:
    return OpenAIWriter(base_url=endpoint.base_url, model="tiny", api_key_env=KEY_ENV, **settings)


def write(target: OpenAIWriter, seed: int = 7) -> Any:
    return target.write(PERSONA, SCENARIO, seed=seed, min_turns=4, max_turns=6)


def assert_secret(error: BaseException) -> None:
    """The key is in no part of what a person could see of the error."""
    seen = "".join(traceback.format_exception(error)) + repr(error)
    chained = [error.__cause__, error.__context__]
    assert KEY not in seen
    assert KEY not in "".join(str(link) for link in chained)


def test_a_good_reply_becomes_the_turns_and_the_request_holds_the_persona(serve: Any) -> None:
    endpoint = serve((200, reply(GOOD)))

    dialogue = write(writer(endpoint, temperature=0.5))

    assert [(t.role, t.text) for t in dialogue.turns] == [(t["role"], t["text"]) for t in GOOD]
    assert dialogue.system_prompt in PERSONA.prompts
    assert dialogue.mood == "angry"
    (request,) = endpoint.requests
    assert request["model"] == "tiny"
    assert request["temperature"] == 0.5
    assert request["seed"] == 7
    assert request["response_format"] == {"type": "json_object"}
    asked = request["messages"][1]["content"]
    assert dialogue.system_prompt in asked
    assert "a large black coffee" in asked
    assert "between 4 and 6 turns" in asked
    assert endpoint.headers == [f"Bearer {KEY}"]


def test_the_prompt_is_drawn_by_seed(serve: Any) -> None:
    target = writer(serve((200, reply(GOOD))))

    drawn = [write(target, seed=seed).system_prompt for seed in range(12)]

    assert set(drawn) == set(PERSONA.prompts)
    assert drawn == [write(target, seed=seed).system_prompt for seed in range(12)]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_or_failing_endpoint_is_transient_and_not_asked_again(
    serve: Any, status: int
) -> None:
    endpoint = serve((status, json.dumps({"error": {"message": f"try later, {KEY}"}})))

    with pytest.raises(TransientError, match=str(status)) as caught:
        write(writer(endpoint))

    assert len(endpoint.requests) == 1
    assert_secret(caught.value)


def test_an_endpoint_that_is_too_slow_is_transient(serve: Any) -> None:
    with pytest.raises(TransientError, match=r"within 0\.2 s") as caught:
        write(writer(serve((200, reply(GOOD)), delay_s=1.0), timeout_s=0.2))
    assert_secret(caught.value)


def test_an_endpoint_that_is_not_there_is_transient(serve: Any) -> None:
    endpoint = serve((200, reply(GOOD)))
    endpoint.close()
    with pytest.raises(TransientError, match=r"127\.0\.0\.1") as caught:
        write(writer(endpoint))
    assert_secret(caught.value)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_is_a_wrong_request(serve: Any, status: int) -> None:
    endpoint = serve((status, json.dumps({"error": {"message": f"bad key {KEY}, sk-a****6789"}})))

    with pytest.raises(RequestError, match=KEY_ENV) as caught:
        write(writer(endpoint))

    assert_secret(caught.value)
    assert "6789" not in str(caught.value)


def test_a_request_that_the_endpoint_cannot_serve_rejects_the_record(serve: Any) -> None:
    endpoint = serve((400, json.dumps({"error": {"message": "content filter"}})))
    with pytest.raises(RecordError, match=r"400.*content filter"):
        write(writer(endpoint))


def test_invalid_json_is_asked_for_again_with_the_reason_and_another_seed(serve: Any) -> None:
    endpoint = serve((200, completion("Sure! Here is your dialogue.")), (200, reply(GOOD)))

    dialogue = write(writer(endpoint, max_attempts=2))

    assert len(dialogue.turns) == 4
    first, second = endpoint.requests
    assert second["messages"][2] == {
        "role": "assistant",
        "content": "Sure! Here is your dialogue.",
    }
    assert "JSON object" in second["messages"][3]["content"]
    assert first["seed"] != second["seed"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (reply([{"role": "barista", "text": "Hi."}] * 4), "turns.0.role"),
        (reply([GOOD[1], GOOD[0], GOOD[1], GOOD[2]]), "first turn must be spoken by user"),
        (reply([GOOD[0], GOOD[1], GOOD[1], GOOD[0]]), "alternate.*turn 2"),
        (reply(GOOD[:2]), "4 to 6 turns, found 2"),
        (reply([*GOOD[:3], {"role": "agent", "text": ""}]), "turns.3.text"),
        (reply([*GOOD[:3], {"role": "agent", "text": "Here is $4."}]), "'4', which cannot"),
        (reply([*GOOD[:3], {"role": "agent", "text": "*sighs* Fine."}]), "which cannot be spoken"),
        (completion(json.dumps({"turns": GOOD, "mood": "x"})), "mood"),
        (completion(json.dumps(GOOD)), "JSON object"),
        (completion("```json\n{}\n```"), "JSON object"),
        (completion(json.dumps({"turns": GOOD}), finish_reason="length"), "cut off"),
        (completion(None), "empty"),
        ("<html>a proxy</html>", "format of /v1/chat/completions"),
        (json.dumps({"choices": []}), "format of /v1/chat/completions"),
    ],
)
def test_a_reply_that_is_never_usable_rejects_the_record_with_the_reason(
    serve: Any, body: str, reason: str
) -> None:
    endpoint = serve((200, body))

    with pytest.raises(RecordError, match=f"(?s)3 attempts.*{reason}") as caught:
        write(writer(endpoint, max_attempts=3))

    assert len(endpoint.requests) == 3
    assert_secret(caught.value)


def test_a_missing_key_names_the_variable_before_anything_is_sent(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = serve((200, reply(GOOD)))
    monkeypatch.delenv(KEY_ENV)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-that-is-not-meant")

    with pytest.raises(RequestError, match=KEY_ENV):
        write(writer(endpoint))

    assert endpoint.requests == []


def test_a_key_that_the_config_resolved_goes_before_the_variable(serve: Any) -> None:
    given = "another-key-that-must-not-be-seen"
    endpoint = serve((200, reply(GOOD)), (401, json.dumps({"error": {"message": given}})))
    target = writer(endpoint, api_key=given)
    write(target)

    with pytest.raises(RequestError) as caught:
        write(target)

    assert endpoint.headers == [f"Bearer {given}"] * 2
    assert given not in "".join(traceback.format_exception(caught.value))


def test_the_revision_changes_with_what_changes_the_words() -> None:
    def revision(**settings: Any) -> str:
        return OpenAIWriter(**{"base_url": "http://a/v1", "model": "m", **settings}).revision

    assert revision() == revision(base_url="http://b/v1")
    assert len({revision(), revision(model="n"), revision(temperature=0.1)}) == 3


def test_keys_can_be_computed_without_torch_and_without_openai() -> None:
    code = (
        "import sys\n"
        "from pipeline.engines.llm import OpenAIWriter\n"
        "print(OpenAIWriter(base_url='http://a/v1', model='m').revision)\n"
        "print([name for name in ('torch', 'openai') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
