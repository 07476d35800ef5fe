"""Back-annotation: prompts for dialogues that exist, from a real endpoint on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from duplex.characters import GapRange
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT, load_domain
from duplex.errors import ConfigError
from duplex.records import Dialogue, Turn
from pipeline.engines.llm.prompts import LEVELS, prompt_fault
from pipeline.entry import main

DOMAIN = load_domain(CHECKOUT / "data/domains/coffee-shop.yaml")
SOURCE = [  # the predecessor's form
    {
        "conversation_id": f"conv_{index}",
        "persona_id": "angry_marcus",
        "persona_name": "Marcus",
        "scenario": "rush hour",
        "system_prompt": "You are a customer.",
        "mood": "angry",
        "turns": [
            {"role": "agent", "text": "Marcus. A large black coffee, and I have five dollars."},
            {"role": "user", "text": f"Number {index} in line. Is the Colombian one fine?"},
            {"role": "agent", "text": "Just pour it, my crew waits on Elm Street."},
            {"role": "user", "text": "Coming up."},
        ],
    }
    for index in range(4)
]
BRIEF = "You are Marcus, an angry customer who wants a large black coffee."
MIDDLE = (
    "You are Marcus, an angry customer in a coffee shop. You want a large black coffee and have "
    "5 dollars. You are in a hurry, since your crew waits for you on Elm Street."
)
LONG = (
    f"{MIDDLE} You speak in short sentences and have no patience for questions about the beans, "
    "Colombian or not. You tell the barista to just pour it. Every delay makes you angrier, you "
    "never thank anybody, and you give your name at once so that nobody has to ask for it."
)
GOOD = {"brief": BRIEF, "standard": MIDDLE, "detailed": LONG}


def dialogue() -> Dialogue:
    turns = tuple(Turn.model_validate(turn) for turn in SOURCE[0]["turns"])
    gaps = GapRange(low=1, high=2)
    return Dialogue(
        id="d", persona_id="p", persona_name="Marcus", scenario_id="s", system_prompt="x",
        mood="angry", first_speaker="agent", gap_after_user=gaps, gap_other=gaps, turns=turns,
        writer="import",
    )  # fmt: skip


@pytest.mark.parametrize(("level", "text"), list(GOOD.items()))
def test_a_prompt_that_the_dialogue_bears_out_has_no_fault(level: str, text: str) -> None:
    assert prompt_fault(level, text, dialogue(), DOMAIN) is None


@pytest.mark.parametrize(
    ("level", "text", "said"),
    [
        ("brief", LONG, "6 to 30 words, found"),
        ("detailed", BRIEF, "60 to 160 words, found 12"),
        ("brief", BRIEF.replace("Marcus", "him"), "the name Marcus"),
        ("brief", f"Act out a scene. {BRIEF}", 'begin with "You"'),
        ("brief", f"{BRIEF} I am rude.", "say you, not I"),
        ("standard", MIDDLE.replace("Elm", "Oak"), "names Oak"),
        ("standard", MIDDLE.replace("5", "ten"), "says ten"),
        ("standard", MIDDLE.replace("5", "50"), "says 50"),
    ],
)
def test_what_nobody_said_and_what_is_no_such_prompt_is_a_fault(
    level: str, text: str, said: str
) -> None:
    assert said in (prompt_fault(level, text, dialogue(), DOMAIN) or "")


class Endpoint:
    """Answers good prompts; to a dialogue's first request, those of `first` by its number."""

    def __init__(self, first: dict[int, str]):
        self.requests: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body)
                content = json.dumps(GOOD)
                for number, other in first.items():
                    if f"Number {number} in" in body["messages"][1]["content"]:
                        content = other if len(body["messages"]) == 2 else content
                message = {"role": "assistant", "content": content}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
                data = json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode()
                self.send_response(200)
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


INVENTED = json.dumps(GOOD | {"standard": MIDDLE.replace("Elm", "Oak")})


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint({1: INVENTED})
    yield found
    found.close()


def annotate(folder: Path, endpoint: Endpoint, source: list[Any]) -> tuple[int, dict[str, Any]]:
    (folder / "training.json").write_text(json.dumps(source))
    section = {
        "writer": "annotate", "source": str(folder / "training.json"), "llm": "tiny",
        "runtime": {"base_url": endpoint.base_url, "api_key": "some-key", "max_reject_rate": 0.5},
    }  # fmt: skip
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "notes", "dialogues": section}))
    code = 0
    for stage in ("personas", "dialogues"):
        code = main(stage, [str(path), "--runs", str(folder / "runs")])
    (stage_folder,) = (folder / "runs" / "notes").glob("02-dialogues-*")
    lines = (stage_folder / "parts" / "part-00000.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    return code, {value["id"]: value for value in values} | {"folder": stage_folder}


def test_each_dialogue_gets_three_prompts_and_one_of_them_by_seed(
    tmp_path: Path, endpoint: Endpoint
) -> None:
    code, found = annotate(tmp_path, endpoint, [*SOURCE, {"conversation_id": "odd", "turns": 7}])
    assert code == 0
    folder = found.pop("folder")
    assert sorted(found) == ["conv_0", "conv_1", "conv_2", "conv_3"]
    for number, value in enumerate(found.values()):
        assert value["prompts"] == [GOOD[level] for level in LEVELS]
        assert value["system_prompt"] in value["prompts"]
        assert value["writer"].startswith("annotate-1:tiny:")
        assert [turn["text"] for turn in value["turns"]] == [
            turn["text"] for turn in SOURCE[number]["turns"]
        ]
    assert len({value["system_prompt"] for value in found.values()}) > 1
    assert len(endpoint.requests) == 5  # one had invented a street, and was asked again
    (again,) = (r for r in endpoint.requests if len(r["messages"]) == 4)
    assert "names Oak, which nobody says" in again["messages"][3]["content"]
    candidates = (folder / "candidates.jsonl").read_text().splitlines()
    assert [json.loads(line)["code"] for line in candidates] == ["prompt"]
    rejected = (folder / "rejected.jsonl").read_text()
    assert "it cannot be read: odd" in rejected
    assert "some-key" not in (folder / "exchanges.jsonl").read_text()


def test_annotate_needs_its_source(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "c", "dialogues": {"writer": "annotate", "llm": "m"}}))
    with pytest.raises(ConfigError, match="annotate and source belong together"):
        load_config(path)
