"""Stage 2: conversations in words. Each persona meets `per_persona` scenarios.

A persona's scenarios are a seeded choice without repetition (with repetition only when it
must have more dialogues than there are scenarios), drawn from the persona's id alone: more
dialogues later keep those that are there.

`writer: annotate` writes none: it takes the dialogues of a file and gives each its prompts.

A candidate is kept when it passes the checks (`duplex/dialogue_checks.py`), and when no dialogue
before it says nearly the same (`engines/set_review.py`). The others are noted, with their reasons.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.config import Config
from duplex.datafiles import find_path, load_domain, load_personas, load_scenarios
from duplex.dialogue_checks import CHECKS_VERSION, Check, Rule, dialogue_check
from duplex.errors import DuplexError, MissingInputError, RecordError, RequestError
from duplex.files import sha256_file
from duplex.records import Dialogue, Turn
from duplex.stage import BlobSink, MapStage, StageContext, Task, record_seed
from duplex.store import StageFolder
from pipeline.engines.dialogue_file import read_dialogues, require_records
from pipeline.engines.funnel import CandidateLog, read_funnel
from pipeline.engines.llm import annotate, writer
from pipeline.engines.llm.annotate import Annotator
from pipeline.engines.llm.build import Estimate, build_client, estimate, pending, spending_notes
from pipeline.engines.llm.client import Client, Request
from pipeline.engines.llm.critic import Critic
from pipeline.engines.llm.writer import OpenAIWriter
from pipeline.engines.scripted import GRAMMAR_DIR, ScriptedWriter
from pipeline.engines.scripted_menu import MENU, digest_menu
from pipeline.engines.writers import OnReject, WrittenDialogue

if TYPE_CHECKING:
    from pipeline.engines.set_review import SetReview

COFFEE_SHOP = "coffee-shop"  # the domain that data/grammar has a menu for


class DialoguesStage(MapStage):
    name = "dialogues"
    number = 2
    reads = ("personas",)
    set_only = frozenset({"per_persona", "source"})

    def __init__(self) -> None:
        self._write: Callable[[Task, int], Dialogue] | None = None
        self._client: Client | None = None
        self._logs: dict[Path, CandidateLog] = {}
        self._reviews: dict[float, SetReview] = {}

    def engine(self, config: Config) -> str:
        """The writer, and what decides which of its candidates are kept."""
        section = config.dialogues
        if section.writer == "annotate":  # its prompts are checked by its own rules alone
            return annotate.revision(section.llm or "", section.temperature)
        if section.writer == "scripted":  # its revision has the menu
            return f"{_scripted().revision}:checks {CHECKS_VERSION}"
        revision = writer.revision(section.llm or "", section.temperature, section.checks.critic)
        return f"{revision}:checks {CHECKS_VERSION}{_rules_revision(config)}"

    def files(self, config: Config) -> dict[str, str]:
        """The dialogues that are annotated.

        Raises:
            MissingInputError: they are not there.
        """
        if config.dialogues.source is None:
            return {}
        path = find_path(config.dialogues.source)
        if not path.is_file():
            raise MissingInputError(f"dialogues.source must be a file, found none at {path}")
        return {str(path): sha256_file(path)}

    def threads(self, config: Config) -> int:
        section = config.dialogues
        return 1 if section.writer == "scripted" else section.runtime.concurrency

    def tasks(self, context: StageContext) -> list[Task]:
        domain = domain_of(context)
        if context.config.dialogues.source is not None:
            return _annotation_tasks(context.config, domain)
        return _writing_tasks(
            context.config, domain, list(context.records("personas", Persona)),
            list(context.records("personas", Scenario)),
        )  # fmt: skip

    def setup(self, context: StageContext) -> None:
        section, folder = context.config.dialogues, context.folder
        domain = domain_of(context)
        turns = {"min_turns": section.min_turns, "max_turns": section.max_turns}
        if section.writer == "scripted":
            scripted = ScriptedWriter(
                domain=domain,
                check=_check(context.config, domain),
                on_reject=self._candidates(context).add,
                max_candidates=section.max_candidates,
            )

            def write_scripted(task: Task, seed: int) -> Dialogue:
                persona, scenario = task.payload
                written = scripted.write(
                    persona, scenario, seed=seed, task_id=task.id, attempt=task.attempt, **turns
                )
                return _dialogue(task.id, persona, scenario, written, scripted.revision)

            self._write = write_scripted
            return
        assert folder is not None, "a stage at work has a folder"
        check_key(context.config)
        self._client = build_client(section, folder, self.number)
        tasks = self.tasks(context)
        undone = pending([task.id for task in tasks], folder)
        cost = _estimate(context.config, domain, [task for task in tasks if task.id in undone])
        print(f"dialogues: {cost.describe()}", file=sys.stderr, flush=True)
        on_reject = self._candidates(context).add
        if section.writer == "annotate":
            annotator = _annotator(context.config, self._client, domain, on_reject)

            def write_prompts(task: Task, seed: int) -> Dialogue:
                if isinstance(task.payload, str):
                    raise RecordError(f"{task.id}: it cannot be read: {task.payload}")
                return annotator.annotate(task.payload, seed=seed, attempt=task.attempt)

            self._write = write_prompts
            return
        llm = _openai_writer(context.config, self._client, domain, on_reject)

        def write_new(task: Task, seed: int) -> Dialogue:
            persona, scenario = task.payload
            written = llm.write(
                persona, scenario, seed=seed, task_id=task.id, attempt=task.attempt, **turns
            )
            return _dialogue(task.id, persona, scenario, written, llm.revision)

        self._write = write_new

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        assert self._write is not None, "setup comes first"
        return [self._write(task, seed)]

    def review(self, done: list[tuple[str, list[Record]]], context: StageContext) -> dict[str, str]:
        """Sends back what says nearly the same as a dialogue before it; not what was given."""
        from pipeline.engines.set_review import SetReview

        if context.config.dialogues.writer == "annotate":
            return {}
        limit = context.config.dialogues.checks.near_duplicate
        review = self._reviews.setdefault(limit, SetReview(limit))
        dialogues = {r.id: r for _, records in done for r in records if isinstance(r, Dialogue)}
        faults = review.faults(list(dialogues.values()))
        for name, fault in sorted(faults.items()):
            self._candidates(context).send_back(name, dialogues[name].turns, fault)
        return {name: f"{fault.code}: {fault.message}" for name, fault in faults.items()}

    def page(self, folder: StageFolder, context: StageContext) -> str | None:
        from pipeline.pages.dialogue_page import render_page

        return render_page(folder, context)

    def _candidates(self, context: StageContext) -> CandidateLog:
        assert context.folder is not None, "the runner names the stage's own folder"
        path = context.folder.path
        if path not in self._logs:
            self._logs[path] = CandidateLog(path)
        return self._logs[path]

    def notes(self, folder: StageFolder) -> dict[str, Any]:
        notes = {"funnel": read_funnel(folder).to_json()} | spending_notes(folder)
        if "llm" in notes and self._client is not None:
            notes["llm"]["endpoint_takes"] = self._client.dialects
        return notes

    def stop(self) -> None:
        if self._client is not None:
            self._client.stop()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            print(f"dialogues: {self._client.describe()}", file=sys.stderr, flush=True)


def domain_of(context: StageContext) -> Domain:
    """
    Raises:
        MissingInputError: the personas stage holds no domain.
    """
    for domain in context.records("personas", Domain):
        return domain
    raise MissingInputError(
        "the dialogues stage needs the domain among the personas, found none in "
        f"{context.inputs['personas'].path}. Run the personas stage again (--from personas)."
    )


@cache
def _scripted() -> ScriptedWriter:
    """One for all keys of a run: its revision reads the grammar's files."""
    return ScriptedWriter()


def _rules_revision(config: Config) -> str:
    """The menu by which `_coffee_rule` judges; nothing for another domain."""
    try:
        domain = load_domain(find_path(config.personas.domain)).id
    except DuplexError:  # personas that were imported may have no such file
        domain = COFFEE_SHOP
    return f":menu {_menu_digest()[:12]}" if domain == COFFEE_SHOP else ""


@cache
def _menu_digest() -> str:
    return digest_menu(GRAMMAR_DIR / MENU)


def check_writer(config: Config) -> None:
    """What can be known of the writer before anything is written.

    Raises:
        RequestError: no key for a paid writer, a source that cannot be read, or personas that
            the scripted one cannot speak for.
    """
    section = config.dialogues
    if section.writer == "scripted":
        personas = load_personas(find_path(config.personas.folder), config.personas.only)
        _scripted().check(personas)
        return
    check_key(config)
    if section.source is not None:
        require_records(read_dialogues(find_path(section.source), prompted=False), section.source)


def check_key(config: Config) -> None:
    """
    Raises:
        RequestError: the endpoint's key is missing.
    """
    if not (config.dialogues.runtime.api_key or "").strip():
        raise RequestError(
            f"dialogues.runtime.api_key must be given for writer: {config.dialogues.writer}, found "
            "nothing. Write api_key: ${OPENAI_API_KEY} in the config and set that variable (any "
            "word will do for a local server without keys)."
        )


def estimate_cost(config: Config) -> Estimate | None:
    """What the endpoint would be asked for, from the data files; None for the scripted writer."""
    section, data = config.dialogues, config.personas
    if section.writer == "scripted":
        return None
    domain = load_domain(find_path(data.domain))
    if section.source is not None:
        return _estimate(config, domain, _annotation_tasks(config, domain))
    personas = load_personas(find_path(data.folder), data.only)
    scenarios = load_scenarios(find_path(data.scenarios), data.only_scenarios)
    return _estimate(config, domain, _writing_tasks(config, domain, personas, scenarios))


def choose_scenarios(
    persona_id: str, scenarios: list[Scenario], count: int, run_seed: int
) -> list[Scenario]:
    """`count` scenarios for a persona; asking for more keeps those chosen for fewer."""
    chosen: list[Scenario] = []
    draw = random.Random(record_seed(run_seed, "dialogues", f"scenarios of {persona_id}"))
    while len(chosen) < count:
        deck = sorted(scenarios, key=lambda scenario: scenario.id)
        draw.shuffle(deck)
        chosen += deck[: count - len(chosen)]
    return chosen


def _writing_tasks(
    config: Config, domain: Domain, personas: list[Persona], scenarios: list[Scenario]
) -> list[Task]:
    count = config.dialogues.per_persona
    return [
        Task(f"{persona.id}.{scenario.id}.{index:02d}",
             (persona.digest, scenario.digest, domain.digest), (persona, scenario))
        for persona in personas
        for index, scenario in enumerate(
            choose_scenarios(persona.id, scenarios, count, config.seed))
    ]  # fmt: skip


def _annotation_tasks(config: Config, domain: Domain) -> list[Task]:
    """A task for each dialogue; one that cannot be read has the reason as its payload."""
    imported = read_dialogues(find_path(config.dialogues.source or ""), prompted=False)
    tasks = [Task(d.id, (d.digest, domain.digest), d) for d in imported.records]
    tasks += [
        Task(f"unreadable-{index:05d}", (why,), f"{name}: {why}")
        for index, (name, why) in enumerate(imported.refused)
    ]
    return tasks


def _estimate(config: Config, domain: Domain, tasks: list[Task]) -> Estimate:
    return estimate(_first_requests(config, domain, tasks), config.dialogues)


def _first_requests(config: Config, domain: Domain, tasks: list[Task]) -> Iterator[Request]:
    section = config.dialogues
    unsent: Any = None  # requests are only measured
    if section.writer == "annotate":
        annotator = _annotator(config, unsent, domain, print)
        dialogues = (task.payload for task in tasks if isinstance(task.payload, Dialogue))
        yield from (annotator.first_request(dialogue, 0) for dialogue in dialogues)
        return
    llm = _openai_writer(config, unsent, domain, print)
    for persona, scenario in (task.payload for task in tasks):
        yield llm.first_request(persona, scenario, 0, section.min_turns, section.max_turns)


def _check(config: Config, domain: Domain) -> Check:
    """What one candidate must show, whoever wrote it."""
    section = config.dialogues
    return dialogue_check(
        domain,
        section.checks,
        min_turns=section.min_turns,
        max_turns=section.max_turns,
        rules=(_coffee_rule(),) if domain.id == COFFEE_SHOP else (),
    )


def _coffee_rule() -> Rule:
    from pipeline.engines.scripted_check import claims

    menu = _scripted().grammar.menu

    def rule(persona: Persona, turns: tuple[Turn, ...]) -> list[str]:
        return claims(persona, turns, menu)

    return rule


def _openai_writer(
    config: Config, client: Client, domain: Domain, on_reject: OnReject
) -> OpenAIWriter:
    section = config.dialogues
    critic = section.checks.critic
    return OpenAIWriter(
        client,
        domain,
        model=section.llm or "",
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        max_candidates=section.max_candidates,
        min_facts=section.checks.min_facts,
        check=_check(config, domain),
        on_reject=on_reject,
        critic=Critic(client, critic) if critic else None,
    )


def _annotator(config: Config, client: Client, domain: Domain, on_reject: OnReject) -> Annotator:
    section = config.dialogues
    return Annotator(
        client,
        domain,
        model=section.llm or "",
        temperature=section.temperature,
        max_tokens=section.max_tokens,
        max_candidates=section.max_candidates,
        on_reject=on_reject,
    )


def _dialogue(
    task_id: str, persona: Persona, scenario: Scenario, written: WrittenDialogue, revision: str
) -> Dialogue:
    return Dialogue(
        id=task_id,
        persona_id=persona.id,
        persona_name=persona.name,
        scenario_id=scenario.id,
        system_prompt=written.system_prompt,
        mood=written.mood,
        first_speaker=scenario.first_speaker,
        gap_after_user=persona.gap_after_user,
        gap_other=persona.gap_other,
        turns=written.turns,
        writer=revision,
    )


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("dialogues")
