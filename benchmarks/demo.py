"""What `make demo` gave: its finished run folder as a page, so that nobody types its numbers.

    python -m benchmarks.demo runs            # prints
    python -m benchmarks.demo runs --write    # and writes docs/results/demo.{json,md}

The argument is the run root. Nothing is measured anew: seconds are the stages' own clocks. The
page of `benchmarks.claims before-after` has the same model, seed and items among its own
(`tests/unit/test_demo_page.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.page import shown
from benchmarks.claims.tables import VERDICTS
from duplex.base import rounded
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.errors import DuplexError, MissingInputError
from duplex.files import read_lines, write_atomic, write_json
from duplex.frames import SAMPLE_RATE
from duplex.records import Speech
from pipeline.evaluation.found import training_curves
from pipeline.run import plan
from training.device import cpu_name

CONFIG = CHECKOUT / "configs" / "pocket.yaml"
RESULTS = CHECKOUT / "docs" / "results"
LOSSES = {
    "loss": "validation loss, as it is weighted",
    "text_nonpad": "words",
    "semantic": "semantic codes",
}


def read_run(root: Path) -> dict[str, Any]:
    """
    Raises:
        MissingInputError: a stage of configs/pocket.yaml is not finished there.
    """
    steps = plan(load_config(CONFIG), root)
    missing = [step.stage.name for step in steps if not (step.folder and step.done)]
    if missing:
        raise MissingInputError(
            f"the run of {CONFIG.name} in {root} must be finished, found no {', '.join(missing)}. "
            "Run `make demo` first."
        )
    folders = {step.stage.name: step.folder for step in steps if step.folder}
    report = json.loads((folders["evaluate"].path / "report.json").read_text())
    certificate = json.loads(folders["merge"].artifact("certificate").read_text())
    manifests = {name: folder.manifest() or {} for name, folder in folders.items()}
    curves = training_curves(list(read_lines(folders["train"].artifact("metrics"))))
    (verdict,) = report["verdicts"]
    spoken = [one for one in folders["speech"].records() if isinstance(one, Speech)]
    return {
        "measured": f"{cpu_name()}, {os.cpu_count()} cores, "
        f"{manifests['evaluate']['provenance']['finished'][:10]}",
        "stages": [
            {
                "stage": name,
                "seconds": one["provenance"]["seconds"],
                "records": one["counts"]["records"],
            }
            for name, one in manifests.items()
        ],
        "minutes": round(sum(one.num_samples for one in spoken) / SAMPLE_RATE / 60, 1),
        "losses": {
            key: [curves[key]["valid"][0], curves[key]["valid"][-1]]
            for key in LOSSES
            if key in curves
        },
        "modules": [certificate["modules_changed"], certificate["modules_targeted"]],
        "logits": certificate["logits"],
        "models": [
            {key: one[key] for key in ("label", "repeats", "served")} for one in report["models"]
        ],
        "changed": report["changed"],
        "rows": [rounded(row) for row in verdict["rows"]],
        "pooled": {
            row["key"]: {label: one["value"] for label, one in row["by_model"].items()}
            for row in [*report["summary"], *(report["likelihood"] or {}).get("summary", [])]
        },
    }


def describe(found: Mapping[str, Any]) -> str:
    """The page."""
    first, last = (one["label"] for one in found["models"])
    lines = [
        "# What `make demo` gives",
        "",
        f"`make demo`, then `python -m benchmarks.demo runs --write`: {found['measured']}. "
        "A newcomer's run gives the same words on a machine that rounds alike; seconds hang "
        "on the machine. [Before and after tuning](claims/before-after.md) asks the same with more "
        "items and seeds.",
        "",
        "| stage | seconds | records |",
        "| --- | ---: | ---: |",
        *(f"| {one['stage']} | {one['seconds']:.1f} | {one['records']} |"
          for one in found["stages"]),
        "",
        f"In all {sum(one['seconds'] for one in found['stages']):.0f} s, and about one second of "
        f"start-up for each stage. The recordings last {found['minutes']:g} minutes.",
        "",
        "| loss on held-out personas, nats | before | after |",
        "| --- | ---: | ---: |",
        *(
            f"| {title} | {values[0][1]:.2f} | {values[1][1]:.2f} (step {values[1][0]}) |"
            for key, title in LOSSES.items()
            if (values := found["losses"].get(key))
        ),
        "",
        f"The merge changed {found['modules'][0]} of {found['modules'][1]} targeted modules; "
        f"merged against unmerged logits {found['logits']['error']:.1e} (allowed "
        f"{found['logits']['tolerance']:.0e}), merged against base "
        f"{found['logits']['effect']:.2f}. {found['changed']['differ']} of "
        f"{found['changed']['conversations']} conversations differ between the models. "
        + " ".join(_repeats(one) for one in found["models"]),
        "",
        f"## {first} against {last}",
        "",
        "The means over items, their difference with its 95 % interval, and the verdict, corrected "
        "for the number of measures ([evaluation](../evaluation.md)); four items never give one. "
        "Measures that neither model gave anything to are left out.",
        "",
        f"| measure | n | {first} | {last} | difference | 95 % | verdict |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
        *(_row(row) for row in found["rows"] if row["word"] != "not measured"),
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _repeats(model: Mapping[str, Any]) -> str:
    text = f"`{model['label']}` {'repeats' if model['repeats'] else 'does not repeat'} itself"
    if model["served"] is not None:
        text += f", and a server gives {'the same' if model['served'] else 'something else'}"
    return f"{text} (to the bit)."


def _row(row: Mapping[str, Any]) -> str:
    bounds = (
        f"{shown(row, row['low'], '+')} to {shown(row, row['high'], '+')}"
        if row["low"] is not None
        else ""
    )
    word = f"**{row['word']}**" if row["word"] in VERDICTS else row["word"]
    return (
        f"| {row['label']} | {row['n']} | {shown(row, row['value_a'])} "
        f"| {shown(row, row['value_b'])} | {shown(row, row['difference'], '+')} | {bounds} "
        f"| {word} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="The demo.")
    parser.add_argument("root", type=Path, help="the run root that `make demo` filled: runs")
    parser.add_argument("--write", action="store_true", help="write docs/results/demo.{json,md}")
    options = parser.parse_args(arguments)
    try:
        found = read_run(options.root)
    except DuplexError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    page = describe(found)
    print(page)
    if options.write:
        write_json(RESULTS / "demo.json", found)
        write_atomic(RESULTS / "demo.md", page.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
