"""Stage 1: the personas and scenarios that people wrote, checked and taken into the run."""

from __future__ import annotations

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.config import Config, PersonasSection
from duplex.datafiles import find_path, load_domain, load_personas, load_scenarios
from duplex.stage import BlobSink, MapStage, StageContext, Task


class PersonasStage(MapStage):
    name = "personas"
    number = 1
    set_only = frozenset({"domain", "folder", "scenarios", "only", "only_scenarios"})

    def files(self, config: Config) -> dict[str, str]:
        """Every record by the digest of its content: a comment in a YAML file changes nothing.

        Raises:
            DataFileError: a file breaks its schema, or an id is not there.
        """
        return {f"{type(record).__name__}:{record.id}": record.digest
                for record in _load(config.personas)}  # fmt: skip

    def tasks(self, context: StageContext) -> list[Task]:
        return [
            Task(f"{type(record).__name__.lower()}-{record.id}", (record.digest,), record)
            for record in _load(context.config.personas)
        ]

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        return [task.payload]


def _load(section: PersonasSection) -> list[Domain | Persona | Scenario]:
    domain = load_domain(find_path(section.domain))
    personas = load_personas(find_path(section.folder), section.only)
    scenarios = load_scenarios(find_path(section.scenarios), section.only_scenarios)
    return [domain, *personas, *scenarios]


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("personas")
