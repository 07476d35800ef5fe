"""Stage 1: the personas and scenarios that people wrote, checked and taken into the run."""

from __future__ import annotations

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.config import Config, PersonasSection
from duplex.datafiles import find_path, load_world
from duplex.stage import BlobSink, MapStage, StageContext, Task


class PersonasStage(MapStage):
    name = "personas"
    number = 1
    set_only = frozenset({"domain", "folder", "scenarios", "only", "only_scenarios"})

    def files(self, config: Config) -> dict[str, str]:
        """Every record by the digest of its content: a comment in a YAML file changes nothing.

        Raises:
            DataFileError: a file breaks its schema or does not fit its domain, or an id is not
                there; all faults at once.
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
    world = load_world(
        find_path(section.domain),
        find_path(section.folder),
        find_path(section.scenarios),
        only=section.only,
        only_scenarios=section.only_scenarios,
    )
    return [world.domain, *world.personas.values(), *world.scenarios.values()]


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("personas")
