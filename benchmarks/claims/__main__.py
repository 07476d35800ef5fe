"""Measure a claim and write its page.

    python -m benchmarks.claims --list
    python -m benchmarks.claims alignment            # runs the grid, writes docs/results/claims/
    python -m benchmarks.claims alignment --page     # the page again, of the numbers that are there
    python -m benchmarks.claims all                  # one after the other: hours
    python -m benchmarks.claims index                # docs/results/claims/README.md

A grid that was cut off goes on where it was: a cell is kept in --work by what it hangs on. Arms
that claims share are run once. A cell of the demo's size takes two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims.cells import digest_of, rounding_of_cell, run_cell
from benchmarks.claims.index import write_index
from benchmarks.claims.page import describe
from benchmarks.claims.plan import (
    BASE,
    Claim,
    Common,
    cells_of,
    claim_names,
    load_claim,
    load_common,
    pocket_base,
)
from benchmarks.claims.plots import draw_curves, draw_measures
from benchmarks.claims.tables import compared, held_out_personas, mean_curves
from duplex.config import Config
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.errors import DuplexError
from duplex.files import write_atomic, write_json
from duplex.frames import FRAME_S
from pipeline.run import STAGE_NAMES

OUT = CHECKOUT / "docs" / "results" / "claims"
WORK = CHECKOUT / "runs" / ".claims"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description="Claims.")
    parser.add_argument("name", nargs="?", help=f"{', '.join(claim_names())}, all or index")
    parser.add_argument("--list", action="store_true", help="claims and their cells")
    parser.add_argument("--page", action="store_true", help="write the page again, run nothing")
    parser.add_argument("--work", type=Path, default=WORK, help="where runs and cells are kept")
    parser.add_argument("--out", type=Path, default=OUT, help="where the pages go")
    parser.add_argument("--lane", help="a run folder of its own, to measure beside another process")
    parser.add_argument(
        "--processes", type=int, default=1, help="of an evaluation; rounding hangs on it"
    )
    parser.add_argument("--seeds", type=int, help="the first so many: a trial")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a trial")
    options = parser.parse_args(arguments)
    try:
        if options.list or not options.name:
            print("\n".join(_listed()))
            return 0
        if options.name == "index":
            write_index(options.out)
            return 0
        trial = bool(options.seeds or options.set)
        if trial and options.out == OUT:
            parser.error("--seeds and --set make a trial: give --out another folder")
        for name in claim_names() if options.name == "all" else [options.name]:
            measure_claim(name, options)
    except DuplexError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _listed() -> list[str]:
    common = load_common()
    claims = {name: load_claim(name) for name in claim_names()}
    return [
        f"{name:16} {len(cells_of(claim, common)):3} cells  {claim.title}"
        for name, claim in claims.items()
    ]


def measure_claim(name: str, options: argparse.Namespace) -> None:
    """Run what is missing of the grid, and write NAME.json, its figures and its page.

    Raises:
        DuplexError: as `run_cell`; the cells that are done are kept.
    """
    claim, common = load_claim(name), load_common()
    path = options.out / f"{name}.json"
    if not options.page:
        if options.seeds:
            common = common.model_copy(update={"seeds": common.seeds[: options.seeds]})
        own = dict(one.split("=", 1) for one in options.set)
        common = common.model_copy(
            update={"set": common.set | {k: yaml.safe_load(v) for k, v in own.items()}}
        )
        cells = run_grid(name, claim, common, options)
        result = result_of(claim, common, cells)
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
    result = json.loads(path.read_text())
    figure = draw_measures(result["measures"], claim.reference, claim.key)
    write_atomic(options.out / f"{name}.svg", figure)
    if claim.curves:
        curves = {arm: result["curves"][arm] for arm in claim.arms if arm in result["curves"]}
        figure = draw_curves(curves, claim.expected, result["steps_per_epoch"])
        write_atomic(options.out / f"{name}-curves.svg", figure)
    page = describe(name, claim, result, pocket_base())
    write_atomic(options.out / f"{name}.md", page.encode())
    print(f"{options.out / f'{name}.md'}", file=sys.stderr)


def run_grid(
    name: str, claim: Claim, common: Common, options: argparse.Namespace
) -> list[dict[str, Any]]:
    lane = {"name": options.lane} if options.lane else {}
    cells = cells_of(claim, common.model_copy(update={"set": common.set | lane}))
    done = []
    for number, cell in enumerate(cells, 1):
        started_s = time.monotonic()
        done.append(run_cell(cell, common, options.work, lambda line: None, options.processes))
        if claim.survival:
            rounding = rounding_of_cell(cell, common, options.work, lambda line: None)
            done[-1]["rounding"] = rounding
        print(
            f"{name}: cell {number} of {len(cells)}, {cell.arm}, seed {cell.seed}: "
            f"{time.monotonic() - started_s:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return done


def result_of(claim: Claim, common: Common, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All that the page says, but for the claim's own words."""
    configs = {
        cell.arm: load_config(CHECKOUT / common.config, list(cell.overrides))
        for cell in cells_of(claim, common)
    }
    reference = configs[claim.reference]
    clips = max(
        (cell["clips"] for cell in cells if cell["trained"]), default=reference.train.batch_size
    )
    return {
        "config": common.config,
        "config_digest": config_digest(claim, common),
        "base": pocket_base(),
        "set": common.set | claim.set,
        "seeds": list(common.seeds),
        "measured": sorted({cell["measured"] for cell in cells}),
        "held_out": held_out_personas(cells, claim.reference),
        "items": len({one["item"] for cell in cells for one in cell["conversations"]}),
        "seconds": reference.evaluate.seconds,
        "steps_per_epoch": clips / reference.train.batch_size,
        "arms": [_arm(arm, claim.arms[arm], configs[arm], cells) for arm in claim.arms],
        "measures": compared(claim, cells),
        "curves": {arm: mean_curves(cells, arm) for arm in claim.arms if arm != BASE}
        if claim.curves
        else {},
    }


def config_digest(claim: Claim, common: Common) -> str:
    """Of all that the cells' configs set: a page of another digest is of another protocol."""
    configs = [
        keyed_sections(load_config(CHECKOUT / common.config, list(cell.overrides)))
        for cell in cells_of(claim, common)
    ]
    return digest_of(configs)


def keyed_sections(config: Config) -> dict[str, Any]:
    """What enters the keys of stages."""
    return {stage: config.keyed(stage) for stage in STAGE_NAMES} | {"seed": config.seed}


def _arm(
    arm: str, overrides: dict[str, Any], config: Config, cells: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    mine = [cell for cell in cells if cell["arm"] == arm and arm != BASE]
    found: dict[str, Any] = {"arm": arm, "overrides": overrides, "clips": [], "refused": ""}
    if not mine:
        return found
    frames, clips = (sum(cell[key] for cell in mine) / len(mine) for key in ("frames", "clips"))
    return found | {
        "clips": [cell["clips"] for cell in mine],
        "minutes": frames * FRAME_S / 60,
        "steps": config.train.steps,
        "epochs": config.train.steps * config.train.batch_size / clips,
        "train_s": statistics.median(cell["train_s"] for cell in mine),
        "rounding": _mean_rounding(mine),
        "refused": _refused([cell.get("refused") for cell in mine]),
    }


def _refused(reasons: Sequence[str | None]) -> str:
    found = [reason for reason in reasons if reason]
    return f"refused with {len(found)} of {len(reasons)} seeds: {found[0]}" if found else ""


def _mean_rounding(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = [cell["rounding"] for cell in cells if cell.get("rounding")]
    return {key: sum(one[key] for one in found) / len(found) for key in (found or [{}])[0]}


if __name__ == "__main__":
    sys.exit(main())
