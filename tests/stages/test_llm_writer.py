"""The LLM writer against a real HTTP server on this machine: replies, failures, secrecy."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from duplex.characters import Beat, Domain, Scenario
from duplex.config_data import DialogueChecks
from duplex.datafiles import CHECKOUT, load_domain
from duplex.dialogue_checks import dialogue_check
from duplex.errors import BudgetError, RecordError, RequestError, TransientError
from duplex.files import read_lines
from pipeline.engines.llm.budget import Budget
from pipeline.engines.llm.client import Client
from pipeline.engines.llm.critic import Critic
from pipeline.engines.llm.exchanges import Exchanges
from pipeline.engines.llm.wire import Wire
from pipeline.engines.llm.writer import OpenAIWriter, revision
from pipeline.engines.writers import Candidate
from tests.factories import persona

KEY = "tiger-lily-must-not-be-seen-0123456789"  # no known form: found by its value alone
DOMAIN: Domain = load_domain(CHECKOUT / "data/domains/coffee-shop.yaml")
PERSONA = persona(prompts=("You are Ann, you want a large latte.", "A large latte, Ann."))
SCENARIO = Scenario(
    id="test",
    title="Test",
    setting="A counter.",
    interruptions=1,
    unanswerable=("What is the wifi's name?",),
    arc=tuple(
        Beat(role=role, intent=intent)
        for role, intent in (("user", "greet"), ("agent", "greet-back"), ("user", "ask"),
                             ("agent", "tell"))
    ),
)  # fmt: skip
GOOD = [
    {"role": "user", "text": "Hi, what can I get you?"},
    {"role": "agent", "text": "Come on, a large latte."},
    {"role": "user", "text": "That's three dollars."},
    {"role": "agent", "text": "Fine. Here."},
]
Answer = tuple[int, str]


class Endpoint:
    """Answers with a queue of (status, body), not streamed; the last one repeats."""

    def __init__(self, answers: list[Answer], delay_s: float = 0.0):
        self.requests: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append(json.loads(body))
                time.sleep(delay_s)
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
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(content: str | None, finish_reason: str = "stop", **message: Any) -> str:
    choice = {"index": 0, "finish_reason": finish_reason}
    choice["message"] = {"role": "assistant", "content": content} | message
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return json.dumps({"id": "c1", "object": "chat.completion", "created": 0, "model": "tiny",
                       "choices": [choice], "usage": usage})  # fmt: skip


def reply(turns: list[dict[str, Any]]) -> str:
    return completion(json.dumps({"turns": turns}))


def refusal_of(parameter: str) -> Answer:
    return 400, json.dumps({"error": {"message": f"'{parameter}' is not supported here"}})


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    endpoints: list[Endpoint] = []

    def start(*answers: Answer, delay_s: float = 0.0) -> Endpoint:
        endpoints.append(Endpoint(list(answers), delay_s))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


class Bench:
    """A writer on an endpoint, with what it rejected."""

    def __init__(
        self,
        folder: Path,
        base_url: str,
        *,
        critic: bool = False,
        candidates: int = 3,
        timeout_s: float = 5.0,
        retries: int = 0,
        budget: Budget | None = None,
    ):
        self.log = folder / "exchanges.jsonl"
        self.rejected: list[Candidate] = []
        wire = Wire(base_url=base_url, api_key=KEY, timeout_s=timeout_s, deadline_s=9)
        self.client = Client(
            wire, Exchanges(self.log), budget or Budget(), prices={}, max_retries=retries,
            max_wait_s=0.05,
        )  # fmt: skip
        self.writer = OpenAIWriter(
            self.client, DOMAIN, model="tiny", temperature=0.5, max_tokens=500,
            max_candidates=candidates, min_facts=1,
            check=dialogue_check(
                DOMAIN, DialogueChecks(min_facts=1), min_turns=4, max_turns=6
            ),
            on_reject=self.rejected.append,
            critic=Critic(self.client, "judge") if critic else None,
        )  # fmt: skip

    def write(self, seed: int = 7) -> Any:
        return self.writer.write(PERSONA, SCENARIO, seed=seed, min_turns=4, max_turns=6)


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Bench]:
    return lambda endpoint, **settings: Bench(tmp_path, endpoint.base_url, **settings)


def assert_secret(error: BaseException) -> None:
    """The key is in no part of what a person could see of the error."""
    seen = "".join(traceback.format_exception(error)) + repr(error)
    assert KEY not in seen
    assert KEY not in "".join(str(link) for link in (error.__cause__, error.__context__))


def test_a_good_reply_becomes_the_turns_and_the_request_holds_the_characters(
    serve: Any, bench: Any
) -> None:
    endpoint = serve((200, reply(GOOD)))
    dialogue = bench(endpoint).write()

    assert [(t.role, t.text) for t in dialogue.turns] == [(t["role"], t["text"]) for t in GOOD]
    assert dialogue.system_prompt in PERSONA.prompts and dialogue.mood == "angry"
    (request,) = endpoint.requests
    assert (request["model"], request["temperature"], request["seed"]) == ("tiny", 0.5, 7)
    assert request["stream"] and request["stream_options"] == {"include_usage": True}
    form = request["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"]
    system, asked = (message["content"] for message in request["messages"])
    assert "in a coffee shop" in system and "barista" in system
    assert dialogue.system_prompt in asked and "a large latte" in asked
    assert "between 4 and 6 turns" in asked and "What is the wifi's name?" in asked
    assert "cuts in" in asked and "angry, intensity 1.3" in asked


@pytest.mark.parametrize(
    ("refused", "forms"),
    [
        (["response_format"], ["json_schema", "json_object"]),
        (["json_schema", "json_object"], ["json_schema", "json_object", None]),
        (["stream_options"], ["json_schema", "json_schema"]),
        (["max_completion_tokens"], ["json_schema", "json_schema"]),
    ],
)
def test_what_the_endpoint_refuses_is_left_out_from_then_on(
    serve: Any, bench: Any, refused: list[str], forms: list[str | None]
) -> None:
    endpoint = serve(*(refusal_of(name) for name in refused), (200, reply(GOOD)))
    target = bench(endpoint)
    target.write()
    target.write(seed=8)

    found = [r.get("response_format", {}).get("type") for r in endpoint.requests]
    assert found == [*forms, forms[-1]]  # the second dialogue meets no refusal
    last = endpoint.requests[-1]
    assert ("stream_options" in last) == (refused != ["stream_options"])
    assert ("max_tokens" in last) == (refused != ["max_completion_tokens"])
    ids = {line["id"] for line in read_lines(target.log) if line["event"] == "sent"}
    assert len(ids) == 2  # a request keeps its name, whatever it had to be sent as


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_or_failing_endpoint_is_asked_again_and_then_transient(
    serve: Any, bench: Any, status: int
) -> None:
    endpoint = serve((status, json.dumps({"error": {"message": f"try later, {KEY}"}})))
    with pytest.raises(TransientError, match=str(status)) as caught:
        bench(endpoint, retries=2).write()
    assert len(endpoint.requests) == 3
    assert_secret(caught.value)


def test_an_endpoint_that_is_silent_or_not_there_is_transient(serve: Any, bench: Any) -> None:
    endpoint = serve((200, reply(GOOD)), delay_s=0.6)
    with pytest.raises(TransientError, match=r"said nothing for 0\.2 s") as caught:
        bench(endpoint, timeout_s=0.2).write()
    assert_secret(caught.value)
    endpoint.close()
    target = bench(endpoint)
    with pytest.raises(TransientError, match="cannot be reached") as caught:
        target.write()
    assert_secret(caught.value)
    billed = [line["billed"] for line in read_lines(target.log) if line["event"] == "failed"]
    assert billed == ["unknown", "no"]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, f"bad key {KEY}, sk-a****6789"),
        (404, "gone"),
        (402, "pay"),
        (429, "insufficient_quota"),
    ],
)
def test_what_no_request_gets_past_is_a_wrong_request(
    serve: Any, bench: Any, status: int, said: str
) -> None:
    endpoint = serve((status, json.dumps({"error": {"message": said}})))
    with pytest.raises(RequestError, match="api_key") as caught:
        bench(endpoint, retries=5).write()
    assert len(endpoint.requests) == 1
    assert_secret(caught.value)
    assert "6789" not in str(caught.value)


def test_a_request_that_the_endpoint_cannot_serve_rejects_the_record(
    serve: Any, bench: Any
) -> None:
    with pytest.raises(RecordError, match=r"400.*too long"):
        bench(serve((400, json.dumps({"error": {"message": "too long"}})))).write()


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        (completion("Here is your dialogue."), "unreadable", "no whole JSON object"),
        (completion(json.dumps({"turns": GOOD})[:-30]), "unreadable", "no whole|broken"),
        (completion("I'm sorry, but I can't do that."), "refused", "refused"),
        (completion("", refusal="No."), "refused", "refused: No"),
        (completion("{", finish_reason="content_filter"), "refused", "content filter"),
        (completion(json.dumps({"turns": GOOD}), finish_reason="length"), "cut-short", "cut off"),
        (completion(None), "unreadable", "empty"),
        (completion('{"turns": []}'), "unreadable", "a list of turns"),
        (reply([{"role": "narrator", "text": "Hi."}] * 4), "unknown-role", "narrator"),
        (reply([*GOOD[:3], {"role": "agent", "text": ""}]), "empty-turn", "turn 3"),
        (reply([GOOD[1], GOOD[0], GOOD[1], GOOD[2]]), "first-speaker", "by user"),
        (reply([GOOD[0], GOOD[1], GOOD[1], GOOD[0]]), "same-role-twice", "both spoken by agent"),
        (reply(GOOD[:2]), "too-few-turns", "at least 4"),
        (reply([*GOOD[:3], {"role": "agent", "text": "Here is $4."}]), "markup", r"'\$'"),
    ],
)
def test_a_reply_that_is_never_usable_rejects_the_record_with_the_reason(
    serve: Any, bench: Any, body: str, code: str, reason: str
) -> None:
    endpoint = serve((200, body))
    target = bench(endpoint)
    with pytest.raises(RecordError, match=f"(?s)3 candidates.*({reason})"):
        target.write()
    assert [(c.number, c.fault.code) for c in target.rejected] == [(n, code) for n in (1, 2, 3)]
    first, second, _ = endpoint.requests
    assert first["seed"] != second["seed"]
    told = len(second["messages"]) == 4 and "cannot be used" in second["messages"][3]["content"]
    assert told == (code not in ("refused", "cut-short") and body != completion(None))


def test_the_critic_has_its_word_and_is_asked_once_for_a_candidate(serve: Any, bench: Any) -> None:
    verdicts = ({"reason": "He forgets his own name.", "keep": False}, {"reason": "", "keep": True})
    no, yes = ((200, completion(json.dumps(verdict))) for verdict in verdicts)
    other = [*GOOD[:3], {"role": "agent", "text": "Fine, thanks."}]
    endpoint = serve((200, reply(GOOD)), no, (200, reply(other)), yes)
    target = bench(endpoint, critic=True)
    assert target.write().turns[-1].text == "Fine, thanks."
    (candidate,) = target.rejected
    assert candidate.fault.code == "critic" and "own name" in candidate.fault.message
    assert [r["model"] for r in endpoint.requests] == ["tiny", "judge", "tiny", "judge"]


def test_a_reply_in_the_log_is_not_asked_for_again(serve: Any, bench: Any) -> None:
    endpoint = serve((200, completion("nonsense")), (200, reply(GOOD)))
    first = bench(endpoint).write()
    again = bench(endpoint, budget=Budget(tokens=0)).write()  # may send nothing
    assert first == again and len(endpoint.requests) == 2
    with pytest.raises(BudgetError, match="at most 0 tokens"):
        bench(endpoint, budget=Budget(tokens=0)).write(seed=8)
    assert len(endpoint.requests) == 2


def test_the_revision_changes_with_what_changes_the_words() -> None:
    kinds = [("m", 0.8, None), ("n", 0.8, None), ("m", 0.1, None), ("m", 0.8, "c")]
    assert len({revision(*kind) for kind in kinds}) == 4


def test_keys_can_be_computed_without_torch_and_without_openai() -> None:
    code = (
        "import sys, pipeline.dialogues\n"
        "print([m for m in ('torch', 'openai', 'json_repair') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert done.stdout.splitlines()[-1] == "[]"
