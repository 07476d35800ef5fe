"""`duplex inspect`: what a tensor holds, phase by phase, and what is wrong with it.

Named so that it never stands in the way of Python's own `inspect`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import track

from duplex.errors import EXIT_WORK_FAILED, MissingInputError, RequestError
from duplex.judgement import Inspection
from duplex.phases import Known
from pipeline.commands import show_json
from pipeline.inspecting.folders import FolderReport, Stage, inspect_file, inspect_folder
from pipeline.inspecting.known import requested
from pipeline.inspecting.view import show_folder, show_inspection


def show(
    path: Path,
    *,
    model: Path | None = None,
    tokenizer: Path | None = None,
    picture: Path | None = None,
    audio: bool = True,
    as_json: bool = False,
) -> None:
    """Inspect a file or folder and print it.

    Raises:
        RequestError: the request cannot be met; nothing was written.
        typer.Exit: 1, when something would harm training.
    """
    check_request(path, picture)
    asked = requested(model, tokenizer)
    if path.is_dir():
        report = inspect_folder(path, asked, audio=audio, track=_progress)
        if as_json:
            show_json(report.to_json())
        else:
            show_folder(report, _console())
        _exit(report)
        return
    stage = Stage.around(path)
    known = replace(stage.known(asked), clip=stage.clip_of(path)) if stage else asked or Known()
    speeches = stage.speeches if stage else {}
    inspection = inspect_file(path, known, name=path.name, speeches=speeches, audio=audio)
    if picture and inspection.measures is None:
        raise RequestError(
            f"--picture needs codes [17, T], found none in {path}: {inspection.findings[0].message}"
        )
    if picture:
        from pipeline.engines.tensor_file import read_codes
        from pipeline.inspecting.picture import draw_timeline

        draw_timeline(read_codes(path)[0], inspection, picture)
        print(f"drawn: {picture}", file=sys.stderr)
    if as_json:
        show_json(inspection.to_json() | {"file": str(path)})
    else:
        show_inspection(inspection, _console())
    _exit(inspection)


def check_request(path: Path, picture: Path | None) -> None:
    """
    Raises:
        RequestError: nothing to inspect, or a picture that cannot be written there.
    """
    if not path.is_dir() and not path.is_file():
        raise MissingInputError(f"{path}: must be a .pt file or a folder, found nothing there")
    if picture is None:
        return
    if path.is_dir():
        raise RequestError(
            f"--picture draws one file, found the folder {path}: name one of its .pt"
        )
    if picture.suffix.lower() != ".png" or picture.is_dir():
        raise RequestError(f"--picture must name a .png file, found {picture}")


def _progress(items: Iterable[Any], total: int) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(items, "inspecting", total=total, console=console, transient=True,
                 disable=not sys.stderr.isatty())  # fmt: skip


def _console() -> Console:
    return Console(highlight=False)


def _exit(looked_at: Inspection | FolderReport) -> None:
    if looked_at.harm:
        raise typer.Exit(EXIT_WORK_FAILED)
