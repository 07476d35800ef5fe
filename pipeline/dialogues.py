"""Stage 2: conversations in words. Each persona meets `per_persona` scenarios.

A persona's scenarios are a seeded choice without repetition (with repetition only when it
must have more dialogues than there are scenarios), drawn from the persona's id alone: more
dialogues later keep those that are there.

A candidate is kept when it passes the checks (`duplex/dialogue_checks.py`), and when no dialogue
before it says nearly the same (`pipeline/engines/set_review.py`). What was not kept is noted in
`candidates.jsonl`, with its reason.
"""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING, Any

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.config import Config
from duplex.datafiles import find_path, load_personas
from duplex.dialogue_checks import Check, Rule, dialogue_check
from duplex.errors import MissingInputError, RequestError
from duplex.records import Dialogue, Turn
from duplex.stage import BlobSink, MapStage, StageContext, Task, record_seed
from duplex.store import StageFolder
from pipeline.engines.funnel import CandidateLog, read_funnel
from pipeline.engines.scripted import ScriptedWriter
from pipeline.engines.writers import DialogueWriter

if TYPE_CHECKING:
    from pipeline.engines.set_review import SetReview


COFFEE_SHOP = "coffee-shop"  # the domain that data/grammar has a menu for


class DialoguesStage(MapStage):
    name = "dialogues"
    number = 2
    reads = ("personas",)
    set_only = frozenset({"per_persona"})

    def __init__(self) -> None:
        self._writer: DialogueWriter | None = None
        self._turns = (2, 2)
        self._log: CandidateLog | None = None
        self._review: SetReview | None = None

    def engine(self, config: Config) -> str:
        return _writer(config, check=False).revision

    def tasks(self, context: StageContext) -> list[Task]:
        scenarios = list(context.records("personas", Scenario))
        domain = domain_of(context)
        return [
            Task(f"{persona.id}.{scenario.id}.{index:02d}",
                 (persona.digest, scenario.digest, domain.digest), (persona, scenario))
            for persona in context.records("personas", Persona)
            for index, scenario in enumerate(
                choose_scenarios(persona.id, scenarios, context.config.dialogues.per_persona,
                                 context.config.seed))
        ]  # fmt: skip

    def setup(self, context: StageContext) -> None:
        section = context.config.dialogues
        if section.writer == "scripted":
            self._writer = ScriptedWriter(
                domain=domain_of(context),
                check=stage_check(context),
                on_reject=self._candidates(context).add,
                max_candidates=section.max_candidates,
            )
        else:
            self._writer = _writer(context.config, check=True)
        self._turns = (section.min_turns, section.max_turns)

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        persona, scenario = task.payload
        assert self._writer is not None, "setup comes first"
        low, high = self._turns
        written = self._writer.write(
            persona,
            scenario,
            seed=seed,
            min_turns=low,
            max_turns=high,
            task_id=task.id,
            attempt=task.attempt,
        )
        return [
            Dialogue(
                id=task.id,
                persona_id=persona.id,
                persona_name=persona.name,
                scenario_id=scenario.id,
                system_prompt=written.system_prompt,
                mood=written.mood,
                first_speaker=scenario.first_speaker,
                gap_after_user=persona.gap_after_user,
                gap_other=persona.gap_other,
                turns=written.turns,
                writer=self._writer.revision,
            )
        ]

    def review(self, done: list[tuple[str, list[Record]]], context: StageContext) -> dict[str, str]:
        """Sends back what says nearly the same as a dialogue before it."""
        from pipeline.engines.set_review import SetReview

        if self._review is None:
            self._review = SetReview(context.config.dialogues.checks.near_duplicate)
        dialogues = {r.id: r for _, records in done for r in records if isinstance(r, Dialogue)}
        faults = self._review.faults(list(dialogues.values()))
        for name, fault in sorted(faults.items()):
            self._candidates(context).send_back(name, dialogues[name].turns, fault)
        return {name: f"{fault.code}: {fault.message}" for name, fault in faults.items()}

    def notes(self, folder: StageFolder) -> dict[str, Any]:
        return {"funnel": read_funnel(folder).to_json()}

    def page(self, folder: StageFolder, context: StageContext) -> str | None:
        from pipeline.engines.dialogue_page import render_page

        return render_page(folder, context)

    def _candidates(self, context: StageContext) -> CandidateLog:
        assert context.folder is not None, "the runner names the stage's own folder"
        if self._log is None:
            self._log = CandidateLog(context.folder.path)
        return self._log


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


def stage_check(context: StageContext) -> Check:
    """What one candidate must show, whoever wrote it."""
    section, domain = context.config.dialogues, domain_of(context)
    return dialogue_check(
        domain,
        section.checks,
        min_turns=section.min_turns,
        max_turns=section.max_turns,
        rules=(_coffee_rule(),) if domain.id == COFFEE_SHOP else (),
    )


def _coffee_rule() -> Rule:
    from pipeline.engines.scripted_check import claims

    menu = ScriptedWriter().grammar.menu

    def rule(persona: Persona, turns: tuple[Turn, ...]) -> list[str]:
        return claims(persona, turns, menu)

    return rule


def check_writer(config: Config) -> None:
    """What can be known of the writer before anything is written.

    Raises:
        RequestError: no key for a paid writer, or personas that the scripted one cannot speak for.
    """
    if config.dialogues.writer == "openai":
        _writer(config, check=True)
        return
    section = config.personas
    ScriptedWriter().check(load_personas(find_path(section.folder), section.only))


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


@cache
def _scripted() -> ScriptedWriter:
    """One for all keys of a run: its revision reads the grammar's files."""
    return ScriptedWriter()


def _writer(config: Config, *, check: bool) -> DialogueWriter:
    """
    Raises:
        RequestError: the endpoint's key is missing (only when `check`).
    """
    section = config.dialogues
    if section.writer == "scripted":
        return _scripted()
    from pipeline.engines.llm import OpenAIWriter

    if check and not section.runtime.api_key:
        raise RequestError(
            "dialogues.runtime.api_key must be given for writer: openai, found nothing. Write "
            "api_key: ${OPENAI_API_KEY} in the config and set that variable (any word will do "
            "for a local server without keys)."
        )
    return OpenAIWriter(
        base_url=section.runtime.base_url,
        model=section.llm or "",
        temperature=section.temperature,
        api_key=section.runtime.api_key or "",
        timeout_s=section.runtime.timeout_s,
    )


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("dialogues")
