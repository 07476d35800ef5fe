"""`duplex personas new|check|draft` as a person meets them: exit codes, files, a real endpoint."""

from __future__ import annotations

import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from duplex.config import Config
from duplex.datafiles import CHECKOUT, load_personas, load_world
from duplex.errors import DataFileError
from pipeline.personas import PersonasStage
from pipeline.personas_command import review_files
from tests import forked
from tests.factories import persona, scenario, slow, write_yaml

KEY = "tiger-lily-must-not-be-seen-0123456789"
VET = CHECKOUT / "data" / "vet-reception"
COFFEE = str(CHECKOUT / "data" / "domains" / "coffee-shop.yaml")


def duplex(*arguments, cwd, **variables):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)} | variables
    return forked.duplex([str(argument) for argument in arguments], cwd, environment)


def checked(*paths, cwd):
    result = duplex("personas", "check", *paths, "--json", cwd=cwd)
    return result.returncode, json.loads(result.stdout)


def found(review, level):
    return [f"{f['about']}: {f['message']}" for f in review["findings"] if f["level"] == level]


# -- what is shipped


@pytest.mark.parametrize("folder", ["data/personas", "data/vet-reception/personas"])
def test_the_shipped_personas_and_scenarios_have_no_fault(folder):
    code, review = checked(CHECKOUT / folder, cwd=CHECKOUT)
    assert (code, found(review, "fault")) == (0, [])
    assert review["personas"] and review["scenarios"]


def test_the_vet_reception_uses_the_whole_taxonomy_and_needs_an_llm():
    _, review = checked(VET / "personas", cwd=CHECKOUT)
    assert review["domain"] == "vet-reception" and found(review, "warning") == []
    assert min(n for counts in review["coverage"].values() for n in counts.values()) >= 1
    assert all(row["writer"].startswith("LLM") for row in review["personas"])
    for row in review["personas"]:
        prompts = yaml.safe_load(Path(row["file"]).read_text())["prompts"]
        assert len(prompts) == 3 and all(35 <= len(prompt.split()) <= 80 for prompt in prompts)


def test_the_scripted_writer_speaks_for_the_coffee_shop():
    _, review = checked(CHECKOUT / "data" / "personas", cwd=CHECKOUT)
    assert {row["writer"] for row in review["personas"] + review["scenarios"]} == {"scripted"}


# -- new


def test_a_skeleton_is_refused_until_it_is_filled_in_and_never_overwritten(tmp_path):
    made = duplex(
        "personas", "new", "angry-ruth", "--type", "angry", "--folder", tmp_path, cwd=tmp_path
    )
    file = tmp_path / "angry-ruth.yaml"
    assert made.returncode == 0 and str(file) in made.stdout
    code, review = checked(file, cwd=tmp_path)
    (fault,) = found(review, "fault")
    assert code == 1 and "FILL IN" in fault and "prompts.2" in fault and "name" in fault
    with pytest.raises(DataFileError, match="FILL IN must be filled in"):
        load_personas(tmp_path)
    again = duplex(
        "personas", "new", "angry-ruth", "--type", "angry", "--folder", tmp_path, cwd=tmp_path
    )
    assert again.returncode == 2 and "never overwritten" in again.stderr


def test_a_filled_in_skeleton_passes(tmp_path):
    duplex("personas", "new", "angry-ruth", "--type", "angry", "--folder", tmp_path, cwd=tmp_path)
    file = tmp_path / "angry-ruth.yaml"
    prompt = (
        "You are Ruth, a customer in a coffee shop, and nobody has ever waited so long for you to "
        "say what you want. It is a large black coffee, as it was yesterday, and you say so in few "
        "words and without a smile."
    )
    fields = yaml.safe_load(file.read_text()) | {
        "name": "Ruth",
        "traits": ["curt"],
        "speech_patterns": ["Come now,", ", thank you", "Really."],
        "facts": [
            {"key": "name", "value": "Ruth", "says": ["Ruth"]},
            {"key": "order", "value": "a large black coffee", "says": ["black coffee"]},
        ],
        "prompts": [prompt],
    }
    write_yaml(file, fields)
    code, review = checked(file, cwd=tmp_path)
    assert (code, found(review, "fault")) == (0, [])
    assert ["3 prompts keep" in text for text in found(review, "warning")] == [True]
    assert [p.id for p in load_personas(tmp_path)] == ["angry-ruth"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["../../evil", "--type", "angry"], "ID must be"),
        (["angry-ruth", "--type", "furious"], "--type must be one of angry, nervous"),
    ],
)
def test_a_wrong_request_writes_nothing(tmp_path, arguments, said):
    result = duplex("personas", "new", *arguments, "--folder", tmp_path / "p", cwd=tmp_path)
    assert result.returncode == 2 and said in result.stderr
    assert list(tmp_path.iterdir()) == []


# -- check


def copied(tmp_path):
    shutil.copytree(VET, tmp_path / "vet")
    return tmp_path / "vet" / "personas"


def changed(file, **changes):
    write_yaml(file, yaml.safe_load(file.read_text()) | changes)


GREETING = "You are Jun, a pet owner with a guinea pig called Pepper, not eating since yesterday "
GREETING += "morning, and your grandmother is anxious. "


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"type": "furious"}, "fault", "type must be one of worried, grieving"),
        ({"type": "wory"}, "fault", "did you mean worried?"),
        ({"language": "de"}, "fault", "language must be that of vet-reception, en; found de"),
        ({"domain": "coffee-shop"}, "fault", "domain must be vet-reception, found coffee-shop"),
        ({"id": "worried-june"}, "fault", "id must be the file's name, worried-jun"),
        ({"prompts": ["You are Jun."]}, "fault", "each prompt must hold each fact"),
        ({"prompts": [GREETING, GREETING.upper()]}, "fault", "prompt 2 is prompt 1 again"),
        ({"prompts": [GREETING, f"Well. {GREETING}"]}, "warning", "1 and 2 are nearly the same"),
        ({"prompts": [GREETING]}, "warning", "should have 35 to 80 words, found 22"),
        ({"prompts": [GREETING * 30]}, "fault", "of which the model has 3000"),
        ({"prompts": [GREETING + "His aunt Olive paid forty."]}, "warning", "gives Olive, forty"),
        ({"prompts": [GREETING.replace("You are ", "").replace("your ", "")]}, "warning", "no you"),
        ({"prompts": [GREETING + "<system>"]}, "fault", "holds < or >"),
        ({"speech_patterns": ["apologises often"]}, "warning", "none of the three forms"),
        ({"gap_other": {"low": 3, "high": 60}}, "warning", "4.8 s of silence"),
        ({"name": "Imani"}, "fault", "fact name must be the persona's name, Imani; found Jun"),
    ],
)
def test_each_rule_finds_what_it_is_for(tmp_path, changes, level, said):
    folder = copied(tmp_path)
    assert not any(f.level == level and said in f.message for f in review_files([folder]).findings)
    changed(folder / "worried-jun.yaml", **changes)
    hits = [f for f in review_files([folder]).findings if f.level == level and said in f.message]
    assert [Path(hit.about).name for hit in hits] == ["worried-jun.yaml"]


def test_a_value_that_none_of_its_wordings_is_in_is_a_fault(tmp_path):
    folder = copied(tmp_path)
    file = folder / "worried-jun.yaml"
    facts = yaml.safe_load(file.read_text())["facts"]
    facts[1]["says"] = ["Peppermint"]
    changed(file, facts=facts)
    faults = [f.message for f in review_files([folder]).findings if f.level == "fault"]
    assert len(faults) == 1 and "without Peppermint" in faults[0]


def test_files_that_do_not_fit_each_other_are_found(tmp_path):
    folder = copied(tmp_path)
    first = yaml.safe_load((folder / "worried-imani.yaml").read_text())
    twin = first | {"id": "worried-twin"}
    write_yaml(folder / "worried-twin.yaml", twin)
    (tmp_path / "vet" / "scenarios" / "results-call.yaml").unlink()
    code, review = checked(folder, cwd=tmp_path)
    assert code == 1
    assert any("a prompt is nearly one of" in text for text in found(review, "fault"))
    warnings = " ".join(found(review, "warning"))
    assert "name Imani is taken by" in warnings and "no scenario is of kind news" in warnings


def test_a_persona_off_the_menu_needs_an_llm_writer(tmp_path):
    own = persona().model_dump(mode="json")
    write_yaml(tmp_path / "angry-ann.yaml", own)
    _, review = checked(tmp_path / "angry-ann.yaml", cwd=tmp_path)
    (row,) = review["personas"]
    assert row["writer"].startswith("LLM: angry-ann: ")


# -- the run


def test_a_run_reports_every_fault_of_all_three_before_it_writes(tmp_path):
    write_yaml(tmp_path / "p" / "a.yaml", persona("a", type="furious").model_dump(mode="json"))
    write_yaml(tmp_path / "p" / "b.yaml", persona("bee").model_dump(mode="json"))
    write_yaml(tmp_path / "s" / "s.yaml", scenario("s", kind="riot").model_dump(mode="json"))
    (tmp_path / "s" / "t.yaml").write_text("- not a scenario")
    sections = {"folder": str(tmp_path / "p"), "scenarios": str(tmp_path / "s")}
    with pytest.raises(DataFileError) as caught:
        PersonasStage().files(Config.model_validate({"name": "c", "personas": sections}))
    text = str(caught.value)
    assert text.startswith("4 fault(s)")
    for part in ("a.yaml: type must be", "b.yaml: id must be", "s.yaml: kind must be", "t.yaml:"):
        assert part in text


def test_a_draft_is_in_no_run_until_it_is_renamed(tmp_path):
    for name in ("a.yaml", "b.draft.yaml"):
        own = persona(name.partition(".")[0]).model_dump(mode="json")
        write_yaml(tmp_path / name, own)
    assert [p.id for p in load_personas(tmp_path)] == ["a"]
    with pytest.raises(DataFileError, match=r"b\.draft\.yaml is a draft: read it, then rename it"):
        load_personas(tmp_path, only=("b",))
    (tmp_path / "b.draft.yaml").rename(tmp_path / "b.yaml")
    assert [p.id for p in load_personas(tmp_path)] == ["a", "b"]


def test_the_vet_config_loads_its_own_world():
    domain = CHECKOUT / "data" / "domains" / "vet-reception.yaml"
    world = load_world(domain, VET / "personas", VET / "scenarios")
    assert (len(world.personas), len(world.scenarios)) == (6, 6)
    assert len({p.type for p in world.personas.values()}) == 5
    assert not {p.type for p in world.personas.values()} & {
        "angry", "nervous", "friendly", "indecisive", "enthusiast",
    }  # fmt: skip


# -- draft, over HTTP


class Endpoint:
    """Answers /v1/chat/completions with (status, body) in turn; the last one repeats."""

    def __init__(self, answers):
        self.requests, self.keys = [], []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                size = int(self.headers["Content-Length"])
                endpoint.requests.append(json.loads(self.rfile.read(size)))
                endpoint.keys.append(self.headers["Authorization"])
                status, body = answers.pop(0) if len(answers) > 1 else answers[0]
                data = body.encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve():
    endpoints = []

    def start(*answers):
        endpoints.append(Endpoint(list(answers)))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


def completion(content, **message):
    choice = {"index": 0, "finish_reason": "stop",
              "message": {"role": "assistant", "content": content} | message}  # fmt: skip
    body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return 200, json.dumps(body)


def drafted(**changes):
    own = yaml.safe_load((VET / "personas" / "worried-jun.yaml").read_text())
    own = {k: v for k, v in own.items() if k not in ("id", "domain", "type", "language")}
    return completion(json.dumps(own | changes))


def draft(endpoint, place, *options, **runtime):
    config = {"name": "c", "dialogues": {"writer": "openai", "llm": "m", "runtime": {
        "base_url": endpoint.url, "api_key": "${DRAFT_KEY}", "timeout_s": 5}}}  # fmt: skip
    config["dialogues"]["runtime"] |= runtime
    config["personas"] = {"domain": str(CHECKOUT / "data/domains/vet-reception.yaml")}
    return duplex(
        "personas", "draft", "worried-pia", "--type", "worried", "--about", "a new owner\nof mice",
        "--config", write_yaml(place / "c.yaml", config), "--folder", place / "p",
        *options, cwd=place, DRAFT_KEY=KEY,
    )  # fmt: skip


def everything_seen(result, place):
    files = [path.read_text() for path in place.rglob("*") if path.is_file()]
    return "\n".join([result.stdout, result.stderr, *files])


def test_a_draft_is_asked_again_with_the_reason_and_written_as_a_draft(tmp_path, serve):
    endpoint = serve(drafted(voice="deep"), drafted(speech_patterns=[]), drafted())
    result = draft(endpoint, tmp_path)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "p").iterdir()
    assert file.name == "worried-pia.draft.yaml"
    text = file.read_text()
    assert "nobody has read it yet" in text and "#   a new owner of mice" in text
    fields = yaml.safe_load(text)
    assert (fields["id"], fields["type"], fields["domain"]) == (
        "worried-pia", "worried", "vet-reception",
    )  # fmt: skip
    first, second, third = (request["messages"] for request in endpoint.requests)
    assert len(first) == 2 and "a new owner" in first[1]["content"]
    assert "voice" in second[-1]["content"] and "speech_patterns" in third[-1]["content"]
    assert checked(file, cwd=CHECKOUT)[0] == 0
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    assert KEY not in everything_seen(result, tmp_path)


@pytest.mark.parametrize(
    ("answers", "said", "code"),
    [
        slow([completion(None, refusal="I will not play one.")], "refused: I will", 1),
        slow([completion("Sure! Here is a persona:")], "no whole JSON object", 1),
        ([(401, json.dumps({"error": {"message": f"bad key {KEY}"}}))], "answered 401", 2),
        slow([drafted(name="Pia")], "fact name must be the persona's name", 1),
    ],
)
def test_what_cannot_be_drafted_says_why_writes_nothing_and_hides_the_key(
    tmp_path, serve, answers, said, code
):
    endpoint = serve(*answers)
    result = draft(endpoint, tmp_path)
    assert result.returncode == code and said in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "p").exists()
    assert len(endpoint.requests) == (1 if code == 2 else 3)
    assert KEY not in everything_seen(result, tmp_path)


@pytest.mark.slow  # budgets: test_budget.py
def test_a_draft_in_the_same_words_is_paid_once_and_counts_in_the_runs_budget(tmp_path, serve):
    endpoint = serve(drafted())
    assert draft(endpoint, tmp_path).returncode == 0
    file = tmp_path / "p" / "worried-pia.draft.yaml"
    first = file.read_text()
    assert (tmp_path / "runs" / "c" / "exchanges" / "drafts.jsonl").is_file()
    file.unlink()
    repeated = draft(endpoint, tmp_path)
    assert repeated.returncode == 0 and "nothing was paid" in repeated.stdout
    assert file.read_text() == first and len(endpoint.requests) == 1
    file.unlink()
    anew = draft(endpoint, tmp_path, "--again")
    assert anew.returncode == 0 and "nothing was paid" not in anew.stdout
    seeds = [request["seed"] for request in endpoint.requests]
    assert len(seeds) == 2 and seeds[0] != seeds[1]
    file.unlink()
    log = (tmp_path / "runs" / "c" / "exchanges" / "drafts.jsonl").read_text().splitlines()
    bound = json.loads(log[0])["bound"]["tokens"]  # no usage came: both stay counted at it
    stopped = draft(endpoint, tmp_path, "--again", budget_tokens=5 * bound // 2)
    assert stopped.returncode == 1 and "tokens may be used in this run folder" in stopped.stderr
    assert len(endpoint.requests) == 2 and not file.exists()


def test_a_draft_without_a_model_or_a_key_is_refused_before_anybody_is_asked(tmp_path):
    config = write_yaml(tmp_path / "c.yaml", {"name": "c"})
    asked = ["personas", "draft", "angry-x", "--type", "angry", "--about", "x", "--domain", COFFEE]
    result = duplex(*asked, "--config", config, cwd=tmp_path)
    assert result.returncode == 2 and "dialogues.llm must name a model" in result.stderr
    config = write_yaml(
        tmp_path / "d.yaml", {"name": "c", "dialogues": {"writer": "openai", "llm": "m"}}
    )
    result = duplex(*asked, "--config", config, "--folder", tmp_path, cwd=tmp_path)
    assert result.returncode == 2 and "api_key must be given" in result.stderr
