"""What the conversions share: where their input is, what came of it, a bar on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from duplex.base import Record
from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import CorruptFileError, MissingInputError, RequestError, StageFailedError
from duplex.store import MANIFEST, StageFolder
from pipeline.run import plan, run_folder_of

Item = TypeVar("Item")
CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass
class ConversionReport:
    """What a conversion wrote and what it refused, with the reason of each."""

    written: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def check(self, source: Path, *, skip_refused: bool) -> None:
        """
        Raises:
            StageFailedError: something was refused and may not be left out, or all of it was.
        """
        if self.refused and not (skip_refused and self.written):
            total = self.written + len(self.refused)
            reasons = "\n".join(f"  - {name}: {why}" for name, why in self.refused[:10])
            hint = " --skip-refused writes the others." if self.written and not skip_refused else ""
            raise StageFailedError(
                f"{source}: each record must be convertible, {len(self.refused)} of {total} are "
                f"not; nothing was written.{hint}\n{reasons}"
            )


def is_config(source: Path) -> bool:
    return source.suffix in CONFIG_SUFFIXES and source.is_file()


def stage_folders(
    source: Path, stages: Sequence[str], runs: Path, overrides: list[str] | None = None
) -> dict[str, StageFolder]:
    """The finished stage folders that `source` means, by stage: those of a config, or itself.

    Raises:
        RequestError: `source` is neither.
        MissingInputError: none of `stages` is finished for that config.
    """
    if is_config(source):
        return _folders_of_config(load_config(source, overrides), stages, runs)
    if not source.exists():
        raise MissingInputError(f"{source} must exist, found nothing there")
    if overrides:
        raise RequestError("--set changes a config; the source is a folder")
    if not (source / MANIFEST).is_file():
        raise RequestError(
            f"{source} must be a config (.yaml) or a finished stage folder with {MANIFEST}"
        )
    stage = _stage_of(source / MANIFEST)
    if stage not in stages:
        raise RequestError(f"{source} must hold {' or '.join(stages)}, found {stage}")
    return {stage: StageFolder(source, stage, "")}


def _stage_of(manifest: Path) -> str:
    try:
        return str(json.loads(manifest.read_bytes())["stage"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(f"{manifest}: must be a stage's manifest: {error}") from None


def records_of(folder: StageFolder) -> list[Record]:
    """
    Raises:
        CorruptFileError: the folder is damaged, or not one of ours.
    """
    try:
        return list(folder.records())
    except (KeyError, TypeError, AttributeError, OSError) as error:
        raise CorruptFileError(f"{folder.path}: must be a finished stage folder: {error}") from None


def _folders_of_config(config: Config, stages: Sequence[str], runs: Path) -> dict[str, StageFolder]:
    steps = {step.stage.name: step for step in plan(config, runs)}
    found = {
        name: step.folder
        for name in stages
        if (step := steps[name]).done and step.folder is not None
    }
    if not found:
        raise MissingInputError(
            f"{' or '.join(stages)} must be finished in {run_folder_of(config, runs)}, and is not. "
            f"Run `duplex run CONFIG --to {stages[0]}` first"
        )
    return found


def track(label: str, items: Sequence[Item]) -> Iterator[Item]:
    """The items, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    visible: Iterable[Item] = items
    if console.is_terminal:
        visible = rich_track(items, description=label, console=console, transient=True)
    yield from visible
