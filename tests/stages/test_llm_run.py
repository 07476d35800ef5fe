"""The dialogues stage against an endpoint that misbehaves: everything arrives, is paid once, and
stays within the budget, however often the stage is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from duplex.config import Config
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT, load_domain, load_personas, load_scenarios
from duplex.files import read_lines
from pipeline.clean import plan_removals, remove
from pipeline.engines.llm.brief import messages, schema
from pipeline.engines.llm.budget import Budget
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.dialect import Dialect
from pipeline.engines.llm.exchanges import Exchanges, account
from pipeline.engines.llm.wire import Failure, Whole, Wire
from pipeline.entry import main
from tests.stages.llm_server import KEY, PRICE_IN, PRICE_OUT, Books, MisbehavingServer

LIMIT = 6


class Workplace:
    """A config, a run root, and the stage as a process of its own."""

    def __init__(self, folder: Path, base_url: str, **dialogues: Any):
        self.folder, self.runs = folder, folder / "runs"
        runtime = {
            "base_url": base_url, "api_key": "${DUPLEX_TEST_LLM_KEY}", "timeout_s": 0.5,
            "deadline_s": 10, "concurrency": LIMIT, "max_wait_s": 1,
            "price_in": PRICE_IN, "price_out": PRICE_OUT,
        }  # fmt: skip
        runtime |= dialogues.pop("runtime", {})
        section = {"writer": "openai", "llm": "tiny", "per_persona": 10, "max_candidates": 8,
                   "runtime": runtime}  # fmt: skip
        self.value = {"name": "llm", "dialogues": section | dialogues}
        self.config = folder / "llm.yaml"
        self.set()
        arguments = [str(self.config), "--runs", str(self.runs)]
        assert main("personas", arguments) == 0  # in this process: it has no part in the test

    def set(self, runtime: dict[str, Any] | None = None, **dialogues: Any) -> None:
        self.value["dialogues"]["runtime"] |= runtime or {}
        self.value["dialogues"] |= dialogues
        self.config.write_text(yaml.safe_dump(self.value))

    def load(self, monkeypatch: pytest.MonkeyPatch) -> Config:
        monkeypatch.setenv("DUPLEX_TEST_LLM_KEY", KEY)
        return load_config(self.config)

    def start(self, name: str = "dialogues") -> subprocess.Popen[str]:
        environment = os.environ | {"DUPLEX_TEST_LLM_KEY": KEY, "PYTHONPATH": str(CHECKOUT)}
        command = [sys.executable, "-m", f"pipeline.{name}", str(self.config)]
        return subprocess.Popen(
            [*command, "--runs", str(self.runs)], env=environment, cwd=self.folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def stage(self, name: str = "dialogues") -> subprocess.CompletedProcess[str]:
        process = self.start(name)
        output, _ = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def stage_folders(self) -> list[Path]:
        return sorted((self.runs / "llm").glob("02-dialogues-*"), key=lambda p: p.stat().st_mtime)

    @property
    def stage_folder(self) -> Path:
        (folder,) = self.stage_folders()
        return folder

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.stage_folders()[-1] / "manifest.json").read_text())

    def log(self) -> list[dict[str, Any]]:
        return list(read_lines(self.stage_folder / "exchanges.jsonl"))


def assert_books_agree(workplace: Workplace, books: Books, *, kills: int) -> None:
    """The log against the server's books: paid once, and paid what was said."""
    log = workplace.log()
    total = account(log)
    billed = {line["answer_id"]: line for line in log if line["event"] == "reply"}
    assert len(billed) == total.replies, "an answer was logged twice"
    told = [books.answers[name] for name, line in billed.items() if line["usage"] is not None]
    assert total.spent.usd == pytest.approx(sum(usd for usd, _, _ in told), abs=1e-9)
    assert total.spent.tokens == sum(tokens for _, tokens, _ in told)
    assert books.billed_usd <= total.spent.usd + total.unknown.usd
    assert books.billed_tokens <= total.spent.tokens + total.unknown.tokens

    answered: set[str] = set()
    for line in log:
        assert not (line["event"] == "sent" and line["id"] in answered), "sent after its reply"
        if line["event"] == "reply":
            answered.add(line["id"])
    # Only where a kill fell between the last byte and its line in the log is a reply asked for
    # again; each such request is among those whose bill is unknown.
    again = sum(count - 1 for count in books.completed.values() if count > 1)
    assert again <= kills * LIMIT
    sends = Counter(line["id"] for line in log if line["event"] == "sent")
    assert sum(sends.values()) >= sum(books.requests.values())


def assert_no_key(folder: Path, output: str) -> None:
    assert KEY not in output
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_two_hundred_dialogues_arrive_whatever_the_endpoint_does(tmp_path: Path) -> None:
    with MisbehavingServer(seed=3, share=0.35, think_s=0.02) as server:
        workplace = Workplace(tmp_path, server.base_url)
        result = workplace.stage()
        books = server.books

    assert result.returncode == 0, result.stdout
    manifest = workplace.manifest()
    assert manifest["counts"] == {"tasks": 200, "records": 200, "rejected": 0}
    assert_books_agree(workplace, books, kills=0)
    assert sum(count - 1 for count in books.completed.values()) == 0
    assert books.most_in_flight == LIMIT  # never above it, and it was used
    assert len(books.deeds) > 15, "the plan must have met most of its misdeeds"
    notes = manifest["provenance"]["llm"]
    assert notes["requests"] == sum(books.requests.values())
    assert {"http-429", "http-500", "timed-out", "broken-off"} <= notes["retries"].keys()
    assert books.keys == {f"Bearer {KEY}"}
    assert_no_key(workplace.runs, result.stdout)
    codes = {line["code"] for line in read_lines(workplace.stage_folder / "candidates.jsonl")}
    assert codes >= {"refused", "cut-short", "unreadable", "unknown-role"}


@pytest.mark.slow  # many kills; one stop, and what its log holds: the last test here
def test_kills_and_a_budget_pay_nothing_twice_and_never_too_much(tmp_path: Path) -> None:
    draw = random.Random()
    seed = draw.randrange(2**32)
    print(f"moments drawn with seed {seed}")
    draw.seed(seed)
    deeds = ("429-ms", "503", "cut", "reset", "no-usage", "broken", "slow", "fenced")
    kills, budget = 3, 0.45
    with MisbehavingServer(seed=seed, share=0.15, deeds=deeds, think_s=0.01) as server:
        books = server.books
        workplace = Workplace(tmp_path, server.base_url, runtime={"budget_usd": budget})
        for _ in range(kills):
            before = sum(books.requests.values())
            process = workplace.start()
            deadline = time.monotonic() + 30
            while sum(books.requests.values()) < before + 10:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.6))
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            assert books.billed_usd <= budget
        assert_books_agree(workplace, books, kills=kills)
        total = account(workplace.log())
        assert total.failures["killed"] >= 1, "no kill fell into a request"

        stopped = workplace.stage()
        assert stopped.returncode == 1
        assert f"at most {budget:.2f} USD" in stopped.stdout
        assert "Kept: " in stopped.stdout and "Raise dialogues.runtime.budget_usd" in stopped.stdout
        assert books.billed_usd <= budget
        total = account(workplace.log())
        assert total.spent.usd + total.unknown.usd <= budget
        assert_books_agree(workplace, books, kills=kills)

        workplace.set({"budget_usd": 5.0})
        result = workplace.stage()

    assert result.returncode == 0, result.stdout
    assert workplace.manifest()["counts"]["records"] == 200
    assert_books_agree(workplace, books, kills=kills)
    assert books.most_in_flight <= LIMIT
    assert_no_key(workplace.runs, stopped.stdout + result.stdout)


@pytest.mark.slow  # kills pay for none, either: above
def test_another_config_and_clean_pay_for_no_reply_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MisbehavingServer() as server:
        # Patient: what is answered after its time-out is billed and unknown, on a busy machine.
        workplace = Workplace(tmp_path, server.base_url, per_persona=1, runtime={"timeout_s": 3})
        assert workplace.stage().returncode == 0
        asked = sum(server.books.requests.values())
        notes = workplace.manifest()["provenance"]["llm"]
        assert notes["usd"] == round(server.books.billed_usd, 6)  # nothing was unknown
        assert notes["tokens_in"] + notes["tokens_out"] == server.books.billed_tokens
        workplace.set(max_candidates=5)  # other keys, the same requests
        assert workplace.stage().returncode == 0
        assert len(workplace.stage_folders()) == 2
        assert workplace.manifest()["provenance"]["llm"]["answered_from_other_logs"] == asked

        config = workplace.load(monkeypatch)
        removals = plan_removals(config, workplace.runs)
        assert [r.path for r in removals] == workplace.stage_folders()[:1]
        remove(removals, config, workplace.runs)
        workplace.set(max_candidates=6)
        # Spent is what was spent, cleaned or not: this budget is used up, and no request is due.
        workplace.set({"budget_usd": 0.001})
        result = workplace.stage()

    assert result.returncode == 0, result.stdout
    assert sum(server.books.requests.values()) == asked >= 20


def some_request(seed: int) -> Request:
    domain = load_domain(CHECKOUT / "data/domains/coffee-shop.yaml")
    (persona,) = load_personas(CHECKOUT / "data/personas", ("nervous-mei",))
    (scenario,) = load_scenarios(CHECKOUT / "data/scenarios", ("remake",))
    asked = messages(
        domain, persona, scenario, persona.prompts[0], min_turns=15, max_turns=25, min_facts=2
    )
    return Request("tiny", asked, seed, 0.8, 4096, "dialogue", schema())


def test_the_limit_holds_whoever_asks(tmp_path: Path) -> None:
    with MisbehavingServer(think_s=0.05, deeds=("429-ms",), share=0.5) as server:
        wire = Wire(base_url=server.base_url, api_key=KEY, timeout_s=5, deadline_s=9)
        log = Exchanges(tmp_path / "exchanges.jsonl")
        client = Client(wire, log, Budget(), prices={}, concurrency=2)
        with ThreadPoolExecutor(8) as pool:
            for seed in [*range(12), *range(12)]:  # each twice, as two tasks may
                pool.submit(client.ask, some_request(seed), "t")
        client.close()

    assert server.books.most_in_flight == 2
    assert account(read_lines(log.path)).replies == 12 == len(server.books.completed)


@pytest.mark.parametrize(("deed", "reason"), [("pings", "past-deadline"), ("stall", "timed-out")])
def test_a_reply_that_does_not_end_is_given_up(deed: str, reason: str) -> None:
    with MisbehavingServer(script=[deed, "slow"]) as server:
        wire = Wire(base_url=server.base_url, api_key=KEY, timeout_s=0.6, deadline_s=1.0)
        wire.connect()
        body = Dialect().speak(some_request(1).body)
        started = time.monotonic()
        outcome = wire.post(body)
        assert isinstance(outcome, Failure) and outcome.reason == reason
        assert outcome.billed is None and time.monotonic() - started < 2.5
        assert isinstance(wire.post(body), Whole)  # slow tokens are fine: 12 in 0.24 s
        wire.close()


def test_a_wrong_key_stops_the_stage_at_once(tmp_path: Path) -> None:
    with MisbehavingServer(share=1.0, deeds=("status-401",), patience=999) as server:
        workplace = Workplace(tmp_path, server.base_url)
        result = workplace.stage()
        requests = sum(server.books.requests.values())

    assert result.returncode == 2, result.stdout
    assert "answered 401" in result.stdout and "api_key" in result.stdout
    assert requests <= LIMIT
    assert_no_key(workplace.runs, result.stdout)


def test_after_a_sigterm_no_request_is_begun_and_those_under_way_are_logged(tmp_path: Path) -> None:
    with MisbehavingServer(share=1.0, deeds=("broken",), patience=999, think_s=0.3) as server:
        accepted = server.books.accepted
        workplace = Workplace(tmp_path, server.base_url, runtime={"timeout_s": 5})
        process = workplace.start()
        deadline = time.monotonic() + 30
        while len(accepted) < 2 * LIMIT:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        at = time.monotonic()
        output, _ = process.communicate(timeout=30)
        took = time.monotonic() - at

    assert process.returncode == 130 and "interrupted; finished records are kept" in output
    assert max(accepted) - at < 0.5 and took < 5
    total = account(workplace.log())
    assert total.replies == total.requests == len(accepted) and total.unknown_requests == 0
