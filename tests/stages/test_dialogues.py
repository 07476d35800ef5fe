"""The dialogues stage as it is run: scripted, checked, noted, reviewed, shown."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from duplex.config import Config
from duplex.dialogue_checks import CHECKS, CODES, OTHER_CODES, Fault
from duplex.errors import MissingInputError, StageFailedError
from duplex.records import Backchannel, Dialogue, Turn
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.dialogues import DialoguesStage
from pipeline.engines.funnel import CandidateLog, read_candidates, read_funnel
from pipeline.engines.writers import Candidate
from pipeline.pages.dialogue_page import finished_dialogues, render_page, turn_rows
from pipeline.personas import PersonasStage
from pipeline.runners.local import execute

ROOT = Path(__file__).resolve().parents[2]
WHO = ["angry-marcus", "friendly-june"]


def config(**dialogues: Any) -> Config:
    section: dict[str, Any] = {"per_persona": 10, "min_turns": 8, "max_turns": 10}
    return Config.model_validate(
        {"name": "toy", "personas": {"only": WHO}, "dialogues": section | dialogues}
    )


def run(root: Path, settings: Config | None = None, **options: Any):
    settings = settings or config()
    personas = StageFolder.of(root, 1, "personas", "1" * 64)
    if not personas.manifest():
        execute(PersonasStage(), StageContext(settings, root), personas)
    stage = DialoguesStage()
    folder = StageFolder.of(
        root, 2, "dialogues", stage.folder_key(settings, {"personas": personas.digest})
    )
    context = StageContext(settings, root, {"personas": personas})
    return execute(stage, context, folder, **options), folder, context


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """Checks that some candidates fail, and a set in which some are too near."""
    checks = {"min_facts": 3, "min_patterns": 2, "near_duplicate": 0.09}
    settings = config(checks=checks, runtime={"max_reject_rate": 1})
    return run(tmp_path_factory.mktemp("strict"), settings)


def test_every_persona_gets_its_dialogues_with_moods_for_each_turn(written):
    manifest, folder, _ = written
    dialogues = [record for record in folder.records() if isinstance(record, Dialogue)]
    assert len(dialogues) == 20 == manifest["counts"]["records"]
    assert all(turn.emotion and turn.intensity for d in dialogues for turn in d.turns)
    assert any(turn.cut_after_words for d in dialogues for turn in d.turns)
    assert any(turn.backchannels for d in dialogues for turn in d.turns)
    assert manifest["provenance"]["funnel"] == {"written": 20, "kept": 20, "reasons": {}}


def test_the_funnel_tells_what_was_written_and_why_it_was_not_kept(strict):
    manifest, folder, _ = strict
    lines = read_candidates(folder)
    funnel = read_funnel(folder)
    assert manifest["provenance"]["funnel"] == funnel.to_json()
    assert funnel.kept == manifest["counts"]["records"]
    assert funnel.written == funnel.kept + len(lines) and funnel.rejected == len(lines)
    assert {"too-few-facts", "no-pattern", "near-duplicate"} <= set(funnel.reasons) <= set(CODES)
    assert list(funnel.reasons.values()) == sorted(funnel.reasons.values(), reverse=True)
    keys = [(line["task"], line["attempt"], line["number"]) for line in lines]
    assert len(set(keys)) == len(keys)
    assert all(len(line["turns"]) >= 8 for line in lines)


def test_too_many_rejects_say_how_many_are_missing_and_a_retry_makes_only_those(tmp_path):
    checks = {"min_facts": 3, "min_patterns": 2}
    first = config(checks=checks, max_candidates=1)
    with pytest.raises(StageFailedError, match=r"(\d+) are missing.*--retry-rejected") as failed:
        run(tmp_path, first)
    missing = int(re.findall(r"(\d+) are missing", str(failed.value))[0])
    assert 0 < missing < 20
    before = next(iter(tmp_path.rglob("rejected.jsonl"))).read_text().splitlines()
    patient = first.model_copy(
        update={"dialogues": first.dialogues.model_copy(
            update={"runtime": first.dialogues.runtime.model_copy(update={"max_reject_rate": 1})}
        )}
    )  # fmt: skip
    manifest, folder, _ = run(tmp_path, patient, retry_rejected=True)
    assert manifest["provenance"]["made"] > 0
    again = {json.loads(line)["task"] for line in before}
    tried = {line["task"] for line in read_candidates(folder) if line["attempt"] == 1}
    new = {entry.task_id for entry in folder.finished() if entry.attempt == 1}
    assert tried | new == again and len(again) == missing


def test_a_run_of_personas_without_a_domain_says_what_to_do(tmp_path):
    empty = StageFolder.of(tmp_path, 1, "personas", "1" * 64)
    empty.complete([], files=[], counts={}, provenance={})
    with pytest.raises(MissingInputError, match="--from personas"):
        DialoguesStage().tasks(StageContext(config(), tmp_path, {"personas": empty}))


# -- the log of candidates


def candidate(number: int, *, task: str = "ann.00", attempt: int = 0) -> Candidate:
    turns = (Turn(role="user", text=f"Hello {number}."),)
    return Candidate(task, attempt, number, Fault("digits", "turn 0 holds digits"), turns)


def test_candidates_of_many_threads_are_all_there_and_each_once(tmp_path):
    log = CandidateLog(tmp_path / "folder")
    wanted = [candidate(n, task=f"ann.{t:02d}") for t in range(8) for n in range(6)]

    def add(part: list[Candidate]) -> None:
        for one in part:
            log.add(one)

    threads = [threading.Thread(target=add, args=(wanted[n::4] + wanted[:9],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "folder/candidates.jsonl").read_text().splitlines()
    assert len(lines) == len(wanted) == len(set(lines))


def test_a_log_that_is_opened_again_knows_what_it_holds(tmp_path):
    CandidateLog(tmp_path).add(candidate(0))
    path = tmp_path / "candidates.jsonl"
    path.write_bytes(path.read_bytes() + b'{"task": "torn')
    again = CandidateLog(tmp_path)
    again.add(candidate(0))
    again.add(candidate(1))
    again.send_back("ann.00", candidate(7).turns, Fault("near-duplicate", "as another"))
    CandidateLog(tmp_path).send_back("ann.00", candidate(7).turns, Fault("near-duplicate", "so"))
    folder = StageFolder(tmp_path, "dialogues", "")
    assert [(line["number"], line["by"]) for line in read_candidates(folder)] == [
        (0, "check"), (1, "check"), (2, "review"),
    ]  # fmt: skip


def test_sending_back_reads_through_no_other_tasks(tmp_path):
    class Unread(set):
        def __iter__(self):
            raise AssertionError("all that was sent back is gone through, for each one")

    fault = Fault("near-duplicate", "as another")
    log = CandidateLog(tmp_path)
    log._seen, log._sent_back = Unread(), Unread()
    for number in range(3):
        for task in ("ann.00", "ann.01"):
            log.add(candidate(0, task=task, attempt=number))
            log.send_back(task, candidate(number).turns, fault)
    found = read_candidates(StageFolder(tmp_path, "dialogues", ""))
    assert [(line["task"], line["attempt"], line["number"]) for line in found] == [
        (task, attempt, number)
        for task in ("ann.00", "ann.01") for attempt in range(3) for number in range(2)
    ]  # fmt: skip


# -- the page


def test_the_page_shows_funnel_figures_people_and_rejects(strict):
    _, folder, _ = strict
    page = (folder.path / "index.html").read_text()
    funnel = read_funnel(folder)
    assert f"{funnel.written} candidates were written, {funnel.kept} kept" in page
    for code, count in funnel.reasons.items():
        assert re.search(rf"<code>{code}</code></td><td class=\"number\">{count}</td>", page)
    for name in ("Marcus", "June"):
        assert f"<b>{name}</b>" in page
    assert page.count('<code class="bad">') == min(50, funnel.rejected)
    for title in ("Turns a dialogue", "Words a turn", "Emotions of the agent"):
        assert title in page
    assert page.count("<h3>") >= 4 + 2 * 2  # the charts, and two dialogues each
    assert not re.search(r"(?:src|href)=\"(?!#)", page), "the page needs nothing from outside"


def test_what_a_machine_wrote_is_escaped(tmp_path):
    _, folder, context = run(tmp_path)
    hostile = "<script>alert(1)</script>"
    turns = (Turn(role="user", text=hostile), Turn(role="agent", text="So."))
    CandidateLog(folder.path).add(
        Candidate("friendly-june.x.00", 0, 0, Fault("markup", hostile), turns)
    )
    page = render_page(folder, context)
    assert page and hostile not in page and page.count("&lt;script&gt;") == 2


def test_an_empty_folder_has_no_page(tmp_path):
    folder = StageFolder(tmp_path, "dialogues", "")
    assert finished_dialogues(folder) == []
    assert render_page(folder, StageContext(config(), tmp_path)) is None


def test_a_turn_is_shown_with_its_murmurs_and_what_a_cut_left_unsaid():
    turn = Turn(
        role="user", text="one two three four five six", cut_after_words=4,
        backchannels=(Backchannel(text="mm-hm", after_word=2),),
    )  # fmt: skip
    ((row),) = turn_rows((turn,))
    assert [(piece["kind"], piece["text"]) for piece in row["pieces"]] == [
        ("said", "one two"), ("murmur", "mm-hm"), ("said", "three four"), ("cut", ""),
        ("unsaid", "five six"),
    ]  # fmt: skip
    plain = turn_rows((Turn(role="user", text="one two"),))
    assert [piece["kind"] for piece in plain[0]["pieces"]] == ["said"]


# -- the document


def test_the_document_s_tables_are_the_lists_of_the_code():
    text = (ROOT / "docs/dialogue-checks.md").read_text(encoding="utf-8")
    rows = [tuple(line.strip("| ").split(" | ")) for line in text.splitlines() if "| `" in line]
    assert rows[: len(CHECKS)] == [(f"`{c.code}`", c.catches, c.misses) for c in CHECKS]
    others = [(f"`{code}`", reason) for code, reason in OTHER_CODES.items()]
    assert rows[len(CHECKS) : len(CODES)] == others
    assert len(text.splitlines()) <= 80
