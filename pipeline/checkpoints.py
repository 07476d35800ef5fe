"""`duplex merge` and `duplex convert checkpoint`. Parsing is in `duplex/cli.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from duplex.config import ModelSection
from duplex.errors import RequestError
from pipeline.commands import show_json


def merge(
    base: str,
    adapter: Path,
    out: Path,
    dtype: str,
    dep_q: int | None,
    runs: Path,
    *,
    as_json: bool,
) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise RequestError(f"--dtype must be float32 or bfloat16, found {dtype}")
    _require_eight(dep_q)
    from pipeline.engines.checkpoint import resolve_checkpoint
    from training.process import prepare_process

    prepare_process()
    from training.merge import merge_checkpoint, summary

    checkpoint = resolve_checkpoint(ModelSection(base=base), runs)
    with _bars() as tell:
        certificate = merge_checkpoint(
            checkpoint.folder, adapter, out, dtype, cut=dep_q is not None, tell=tell
        )
    if as_json:
        show_json(certificate)
        return
    print(f"{out}: merged; the certificate is {out / 'certificate.json'}")
    for line in summary(certificate):
        print(f"  {line}")


def cut(base: str, out: Path, dep_q: int, runs: Path, *, as_json: bool) -> None:
    _require_eight(dep_q)
    from pipeline.engines.checkpoint import resolve_checkpoint
    from training.process import prepare_process

    prepare_process()
    from training.merge import cut_checkpoint

    checkpoint = resolve_checkpoint(ModelSection(base=base), runs)
    with _bars() as tell:
        certificate = cut_checkpoint(checkpoint.folder, out, tell=tell)
    if as_json:
        show_json(certificate)
        return
    steps, tensors = certificate["dep_q"], certificate["tensors"]
    print(
        f"{out}: dep_q {steps['base']} cut to {steps['output']}, {tensors['output']} of "
        f"{tensors['base']} tensors written; text and agent logits differ by "
        f"{certificate['logits']['error']:.1e} (allowed {certificate['logits']['tolerance']:.0e})"
    )


def _require_eight(dep_q: int | None) -> None:
    if dep_q not in (None, 8):
        raise RequestError(f"--dep-q must be 8, the codebooks of the agent, found {dep_q}")


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each part of the work, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        progress.disable = not progress.console.is_terminal

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell
