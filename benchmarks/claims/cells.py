"""A cell: an arm with a seed, run through the pipeline as a user would, and what came of it.

The run goes up to `merge` (`base`: to `tensors`), stage by stage in the run folder of --work, so
that arms share what they have in common and a grid that was cut off goes on. The conversations are
held and scored by the functions of the evaluate stage, and kept as JSON under the key of all that
they hang on; so are the clips that are scored teacher-forced, apart, since either may be measured
anew. The merged weights are deleted then.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.plan import BASE, Cell, Common
from benchmarks.claims.rounding import ROUNDING_VERSION, rounding_of
from duplex.base import canonical_json
from duplex.characters import Persona
from duplex.config import Config
from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT
from duplex.errors import StageFailedError
from duplex.files import read_lines, sha256_bytes, write_json
from duplex.records import TensorClip
from duplex.store import StageFolder
from pipeline.engines.checkpoint import Checkpoint, model_identity
from pipeline.evaluate import EvaluateStage, require_proofs, settings_of_run, speak_items
from pipeline.evaluation.found import report_data, training_curves
from pipeline.evaluation.likelihood import LIKELIHOOD_VERSION, teacher_force
from pipeline.evaluation.measures import MEASURES_VERSION
from pipeline.evaluation.offline import play_checkpoint
from pipeline.merge import MergeStage
from pipeline.run import STAGE_NAMES, Selection, Step, plan, run
from training.device import cpu_name
from training.servable import servable_checkpoint

Report = Callable[[str], None]
CONVERSATIONS_VERSION = 6  # raise it when conversations are held otherwise


def run_cell(
    cell: Cell, common: Common, work: Path, report: Report, processes: int = 1
) -> dict[str, Any]:
    """What the cell gave, from `work` where it was made before of the same.

    Args:
        processes: of the evaluation. Rounding hangs on it.

    Returns:
        `arm`, `seed`; `conversations` and `likelihood` as report.json has them, in part;
        `trained` (ids of personas), `clips` and `frames` trained on; and of a trained arm `curves`
        (`found.training_curves`), `train_s`, and where its merge was `refused`, why.

    Raises:
        DuplexError: what a stage or an evaluation raises.
    """
    path = CHECKOUT / common.config
    overrides = list(cell.overrides)
    config = load_config(path, overrides)
    trained = cell.arm != BASE

    def run_up_to(last: Selection) -> None:
        run(config, path, work, last, overrides=overrides, report=report)

    run_up_to(Selection.of(last="tensors"))
    folders = {step.stage.name: step.folder for step in plan(config, work)}
    tensors, train = folders["tensors"], folders["train"]
    assert tensors is not None and train is not None, "the inputs of train are there"
    hangs_on = {
        # Of the base nothing but the clips hangs on the run, and the prompts' voices.
        "weights": [train.key, config.keyed("merge")] if trained else model_identity(config.model),
        "tensors": tensors.digest,
        "evaluate": config.keyed("evaluate") | {"files": EvaluateStage().files(config)},
        "versions": [MergeStage.version, CONVERSATIONS_VERSION, MEASURES_VERSION],
    }
    kept = work / "cells" / f"{digest_of(hangs_on)}.json"
    scored = work / "cells" / f"likelihood-{digest_of([hangs_on, LIKELIHOOD_VERSION])}.json"
    if not (kept.exists() and scored.exists()):
        refused = None
        try:
            if trained:
                run_up_to(Selection.of(last="merge"))
        except StageFailedError:
            refused = refusal(plan(config, work))
            if refused is None:
                raise
        steps = plan(config, work)
        stages = {step.stage.name: step.folder for step in steps if step.folder and step.done}
        base = servable_checkpoint(config.model, work, report)
        label, weights = BASE, base.folder
        if trained and not refused:
            label, weights = "tuned", stages["merge"].artifact("weights").parent
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            found = of_data(stages["tensors"], trained=trained)
            found |= of_training(stages["train"]) if trained else {}
            found |= {"refused": refused} if refused else {}
            found["conversations"] = (
                [] if refused else evaluate(config, stages, label, weights, base, report, processes)
            )
            found["measured"] = (
                f"{cpu_name()}, {os.cpu_count()} cores, {datetime.date.today().isoformat()}, "
                f"processes of an evaluation: {processes}"
            )
            write_json(kept, found)
        if not scored.exists():
            clips = []
            if not refused:
                clips = teacher_force(
                    {label: weights}, stages["tensors"], config.evaluate, config.seed, report,
                    processes=processes,
                )  # fmt: skip
            write_json(scored, clips)
        merged = plan(config, work)[STAGE_NAMES.index("merge")].folder
        if trained and merged is not None:
            shutil.rmtree(merged.path)  # 56 MB of weights, which the adapter makes again
    return json.loads(kept.read_text()) | {
        "arm": cell.arm,
        "seed": cell.seed,
        "likelihood": json.loads(scored.read_text()),
    }


def digest_of(hangs_on: Any) -> str:
    return sha256_bytes(canonical_json(hangs_on).encode())[:16]


def rounding_of_cell(
    cell: Cell, common: Common, work: Path, report: Report
) -> dict[str, float] | None:
    """What rounding takes from the cell's update (`rounding_of`); None of the base. Kept beside
    the cells."""
    if cell.arm == BASE:
        return None
    path = CHECKOUT / common.config
    overrides = list(cell.overrides)
    config = load_config(path, overrides)
    run(config, path, work, Selection.of(last="train"), overrides=overrides, report=report)
    train = plan(config, work)[STAGE_NAMES.index("train")].folder
    assert train is not None
    base = servable_checkpoint(config.model, work, report)
    hangs_on = [train.digest, model_identity(config.model), ROUNDING_VERSION]
    kept = work / "cells" / f"rounding-{digest_of(hangs_on)}.json"
    if not kept.exists():
        write_json(kept, rounding_of(base.folder, train.artifact("adapter").parent))
    return json.loads(kept.read_text())


def refusal(steps: Sequence[Step]) -> str | None:
    """Why the merge was refused, where rounding took the update or drowns it (`training/merge.py`):
    a result, and no accident."""
    folder = next(step.folder for step in steps if step.stage.name == "merge")
    message = folder.failure() if folder else None
    found = re.search(
        r"survive rounding, found [\d.]+%|its rounding error is .+ \(\w+\)|found \d+ unchanged",
        message or "",
    )
    return found[0] if found else None


def of_data(tensors: StageFolder, *, trained: bool) -> dict[str, Any]:
    clips = [one for one in tensors.records() if isinstance(one, TensorClip)]
    of_train = [one for one in clips if one.split == "train"]
    return {
        "trained": sorted({one.persona_id for one in of_train}) if trained else [],
        "clips": len(of_train),
        "frames": sum(one.num_frames for one in of_train),
    }


def of_training(train: StageFolder) -> dict[str, Any]:
    manifest = train.manifest()
    assert manifest is not None
    return {
        "curves": training_curves(list(read_lines(train.artifact("metrics")))),
        "train_s": manifest["provenance"]["seconds"],
    }


def evaluate(
    config: Config,
    stages: Mapping[str, StageFolder],
    label: str,
    weights: Path,
    base: Checkpoint,
    report: Report,
    processes: int,
) -> list[dict[str, Any]]:
    """Talk to one model and score it, as the evaluate stage does with both.

    Args:
        weights: its checkpoint folder; `base` has the tokenizer.

    Returns:
        A conversation each, as report.json has them, in part, with its item's `situation`.
    """
    section = config.evaluate
    spoken = speak_items(section)
    tokenizer = base.files()["tokenizer"].read_bytes()
    personas = [one for one in stages["personas"].records() if isinstance(one, Persona)]
    settings, voices = settings_of_run(config, spoken, personas, stages["tensors"], tokenizer)
    played = play_checkpoint(
        label, weights, spoken, settings, report,
        tokenizer=tokenizer, device=section.runtime.device, voices=voices,
        slots=section.runtime.slots, processes=processes,
    )  # fmt: skip
    require_proofs([played])
    data = report_data([played], about={}, protocol={}, likelihood=[])
    kept = ("item", "seed", "persona", "grade", "sums", "transcript")
    situations = {one.item.id: one.item.situation for one in spoken}
    return [
        {key: one[key] for key in kept} | {"situation": situations[one["item"]]}
        for one in data["conversations"]
    ]
