"""`duplex convert`: other programs' data forms, in and out. Parsing is in `duplex/cli.py`."""

from __future__ import annotations

import json
from pathlib import Path

from duplex.errors import RequestError
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


def failures(
    source: Path, out: Path, personas: list[Path], *, skip_refused: bool, as_json: bool
) -> None:
    from pipeline.converters.failures import convert_failures

    outcome = convert_failures(source, out, personas=personas, skip_refused=skip_refused)
    show(outcome, out, "dialogues", as_json=as_json)


def adapter(
    source: Path, out: Path, form: str, base: str | None, *, runs: Path, as_json: bool
) -> None:
    """`duplex convert adapter`: PEFT's layout and moshi's own.

    Raises:
        RequestError: another form, or one that `source` has already; moshi's without a base.
    """
    from duplex.config import ModelSection
    from pipeline.engines.checkpoint import resolve_checkpoint
    from training.process import prepare_process

    if form not in ("moshi", "peft"):
        raise RequestError(f"--to must be moshi or peft, found {form}")
    if form == "moshi" and base is None:
        raise RequestError(
            "--to moshi needs --base, the model that the adapter was trained on: moshi's loader "
            "wants an adapter for each of its Linear layers, and its config.json"
        )
    prepare_process()
    from training.adapter_formats import attach_base, is_peft, to_moshi, to_peft

    model = resolve_checkpoint(ModelSection(base=base), runs) if base is not None else None
    if form == "moshi":
        assert model is not None
        done = to_moshi(source, model, out)
    elif not is_peft(source):
        done = to_peft(source, out, model)
    elif model is not None:
        done = attach_base(source, model, out)
    else:
        raise RequestError(f"{source} is in PEFT's form already; --base would name its base in it")
    outcome = ConversionReport(written=1)
    zeros = "filled with zeros" if form == "moshi" else "of zeros left out"
    outcome.notes.append(f"{done.adapted} modules adapted, {done.filled} {zeros}")
    known = f"trained on {done.base_sha256[:12]}…" if done.base_sha256 else (
        "its base is not known: --base names it, and lets merges check it"
    )  # fmt: skip
    outcome.notes.append(known)
    show(outcome, out, "adapter", as_json=as_json)


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
