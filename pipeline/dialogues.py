"""Stage 2: conversations in words. Each persona meets `per_persona` scenarios.

A persona's scenarios are a seeded choice without repetition (with repetition only when it
must have more dialogues than there are scenarios), drawn from the persona's id alone: more
dialogues later keep those that are there.
"""

from __future__ import annotations

import random

from duplex.base import Record
from duplex.characters import Persona, Scenario
from duplex.config import Config
from duplex.datafiles import find_path, load_personas
from duplex.errors import RequestError
from duplex.records import Dialogue
from duplex.stage import BlobSink, MapStage, StageContext, Task, record_seed
from pipeline.engines.scripted import ScriptedWriter
from pipeline.engines.writers import DialogueWriter


class DialoguesStage(MapStage):
    name = "dialogues"
    number = 2
    reads = ("personas",)
    set_only = frozenset({"per_persona"})

    def __init__(self) -> None:
        self._writer: DialogueWriter | None = None
        self._turns = (2, 2)

    def engine(self, config: Config) -> str:
        return _writer(config, check=False).revision

    def tasks(self, context: StageContext) -> list[Task]:
        scenarios = list(context.records("personas", Scenario))
        return [
            Task(f"{persona.id}.{scenario.id}.{index:02d}", (persona.digest, scenario.digest),
                 (persona, scenario))
            for persona in context.records("personas", Persona)
            for index, scenario in enumerate(
                choose_scenarios(persona.id, scenarios, context.config.dialogues.per_persona,
                                 context.config.seed))
        ]  # fmt: skip

    def setup(self, context: StageContext) -> None:
        self._writer = _writer(context.config, check=True)
        section = context.config.dialogues
        self._turns = (section.min_turns, section.max_turns)

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        persona, scenario = task.payload
        assert self._writer is not None, "setup comes first"
        low, high = self._turns
        written = self._writer.write(persona, scenario, seed=seed, min_turns=low, max_turns=high)
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


def _writer(config: Config, *, check: bool) -> DialogueWriter:
    """
    Raises:
        RequestError: the endpoint's key is missing (only when `check`).
    """
    section = config.dialogues
    if section.writer == "scripted":
        return ScriptedWriter()
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
