"""Stage 1: the personas and scenarios that people wrote, checked and taken into the run."""

from __future__ import annotations

from duplex.config import Config, PersonasSection
from duplex.datafiles import find_path, load_personas, load_scenarios
from duplex.records import Persona, Record, Scenario
from duplex.stage import BlobSink, MapStage, StageContext, Task


class PersonasStage(MapStage):
    name = "personas"
    number = 1
    set_only = frozenset({"folder", "scenarios", "only", "only_scenarios"})

    def files(self, config: Config) -> dict[str, str]:
        """Every record by the digest of its content: a comment in a YAML file changes nothing.

        Raises:
            DataFileError: a file breaks its schema, or an id is not there.
        """
        personas, scenarios = _load(config.personas)
        return {f"{type(record).__name__}:{record.id}": record.digest
                for record in [*personas, *scenarios]}  # fmt: skip

    def tasks(self, context: StageContext) -> list[Task]:
        personas, scenarios = _load(context.config.personas)
        return [
            Task(f"{type(record).__name__.lower()}-{record.id}", (record.digest,), record)
            for record in [*personas, *scenarios]
        ]

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        return [task.payload]


def _load(section: PersonasSection) -> tuple[list[Persona], list[Scenario]]:
    personas = load_personas(find_path(section.folder), section.only)
    scenarios = load_scenarios(find_path(section.scenarios), section.only_scenarios)
    return personas, scenarios


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("personas")
