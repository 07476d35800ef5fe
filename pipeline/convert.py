"""`duplex convert`: other programs' data forms, in and out. Parsing is in `duplex/cli.py`."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.converters.common import ConversionReport


def tensors(
    source: Path,
    out: Path,
    form: str,
    model: str | None,
    dialogues: Path | None,
    prompt_fill: str,
    *,
    skip_refused: bool,
    runs: Path,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    from pipeline.converters.coffee_files import REPORT, convert_tensors

    outcome = convert_tensors(
        source, out, form, model=model, dialogues=dialogues, prompt_fill=prompt_fill,
        skip_refused=skip_refused, runs=runs, overrides=overrides,
    )  # fmt: skip
    counts = [row["dropped_tokens"] for row in outcome.rows]
    known = [count for count in counts if count is not None]
    unknown = len(counts) - len(known)
    said = [f"{sum(known)} tokens were dropped before, in {len(known)} files"] if known else []
    said += [f"how many were dropped before is not known of {unknown} files"] if unknown else []
    outcome.notes.append(f"{'; '.join(said)}. {out / REPORT} has each file")
    show(outcome, out, "tensors", as_json=as_json)


def moshi_finetune(
    source: Path,
    out: Path,
    *,
    skip_refused: bool,
    runs: Path,
    overrides: list[str] | None,
    as_json: bool,
) -> None:
    from pipeline.converters.moshi_finetune import convert_speech

    outcome = convert_speech(
        source, out, skip_refused=skip_refused, runs=runs, overrides=overrides
    )  # fmt: skip
    show(outcome, out, "recordings", as_json=as_json)


def datasets(
    source: Path, out: Path, *, runs: Path, overrides: list[str] | None, as_json: bool
) -> None:
    from pipeline.converters.datasets_view import convert_datasets

    show(
        convert_datasets(source, out, runs=runs, overrides=overrides), out, "rows", as_json=as_json
    )


def show(outcome: ConversionReport, out: Path, what: str, *, as_json: bool) -> None:
    if as_json:
        value = {"out": str(out), "written": outcome.written, "refused": dict(outcome.refused),
                 "notes": outcome.notes, "rows": outcome.rows}  # fmt: skip
        print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))
        return
    print(f"{out}: {outcome.written} {what} written, {len(outcome.refused)} refused")
    for name, why in outcome.refused[:10]:
        print(f"  refused {name}: {why}")
    for note in outcome.notes[:10]:
        print(f"  {note}")
