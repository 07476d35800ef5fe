"""What checkpoints can be asked without talking: how likely they find what was said.

Teacher-forced, in nats a prediction; a clip's prompt carries no loss:

    held-out clips   of the run's tensors (split `valid`): mean NLL of each stream, and what it
                     costs to be given others' prompts (`training/prompt_swap.py`)
    base clips       of `evaluate.base_clips`, a folder of `.pt` that have nothing to do with the
                     personas: the same NLLs. Higher than the base's: something was forgotten.

All models score the same clips under the same other prompts, each clip by itself, so that neither
the number of processes nor its neighbours change a value. A clip is one item of the verdicts.

Cost: clips x (1 + swaps) + base clips forward passes of each model. Pocket model, two cores:
docs/evaluation.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duplex.base import canonical_json, rounded
from duplex.config import EvaluateSection
from duplex.datafiles import find_path
from duplex.errors import CorruptFileError, MissingInputError
from duplex.files import sha256_bytes, sha256_file
from duplex.metrics import mean_interval
from duplex.store import StageFolder
from duplex.verdict import Better

LIKELIHOOD_VERSION = 2  # 2: a prompt is swapped with other personas' alone
WORKER = "pipeline.evaluation.likelihood_worker"
ADVICE = (
    "Signal 9 that nobody sent is most often the system short of memory. evaluate.clips: 0 leaves "
    "out what is scored teacher-forced."
)
HELD_OUT, BASE_CLIPS = "held_out", "base_clips"
STREAMS = {
    "words": ("words", "text tokens that are no padding"),
    "text": ("text", "text tokens, padding included"),
    "semantic": ("semantic codes", "agent's semantic codes"),
    "acoustic": ("acoustic codes", "agent's seven acoustic codes, the mean of seven means"),
}


class Likelihood(NamedTuple):
    """A row of the verdicts and of the table; `group`: of which clips."""

    key: str
    label: str
    unit: str
    group: str
    better: Better
    meaning: str
    kind: str = "mean"


def _nlls(group: str, prefix: str, of: str) -> list[Likelihood]:
    return [
        Likelihood(
            f"{prefix}nll_{stream}", f"NLL of {name}, {of}", "nats", group, "low",
            f"Mean negative log-likelihood of a clip's {what}.",
        )
        for stream, (name, what) in STREAMS.items()
    ]  # fmt: skip


LIKELIHOODS = (
    *_nlls(HELD_OUT, "", "held-out clips"),
    Likelihood(
        "margin_words", "Prompt-swap margin of words", "nats", HELD_OUT, "high",
        "NLL of a clip's words under others' prompts minus under its own: about 0 says that the "
        "prompt is not read.",
    ),
    Likelihood(
        "margin_semantic", "Prompt-swap margin of semantic codes", "nats", HELD_OUT, "high",
        "The same of semantic codes.",
    ),
    *_nlls(BASE_CLIPS, "base_", "base clips"),
)  # fmt: skip


# -- measuring


def base_clip_digests(name: str) -> dict[str, str]:
    """File name -> sha256 of the `.pt` in a folder as `evaluate.base_clips` names it.

    Raises:
        MissingInputError: no such folder, or none in it.
    """
    folder = find_path(name)
    paths = sorted(folder.glob("*.pt")) if folder.is_dir() else []
    if not paths:
        found = "no .pt in it" if folder.is_dir() else "no such folder"
        raise MissingInputError(
            f"evaluate.base_clips must be a folder of .pt tensors [17, T] (docs/tensors.md), found "
            f"{found}: {folder}. Give another, or leave it out."
        )
    return {path.name: sha256_file(path) for path in paths}


def teacher_force(
    checkpoints: Mapping[str, Path],
    tensors: StageFolder,
    section: EvaluateSection,
    seed: int,
    report: Callable[[str], None] = print,
    processes: int | None = None,
) -> list[dict[str, Any]]:
    """Score each checkpoint on the same clips.

    Args:
        checkpoints: label -> folder.
        tensors: the run's finished tensors stage.
        seed: which clips are taken, where there are more than `section.clips`, and whose prompts.
        processes: None: as many as device and memory suggest.

    Returns:
        By model and clip: `group`, `clip`, `model`, `frames` (of its dialogue), `prompts` (clips
        whose prompts it was scored under too), `content` (digest of all that was scored) and
        `values` by key of `LIKELIHOODS`, None without such predictions. Empty without clips.

    Raises:
        CorruptFileError: a clip or a checkpoint that is not what it should be.
        RequestError: a base clip without frames after its prompt.
        WorkError: a process died.
    """
    from pipeline.evaluation.offline import fitting_processes
    from pipeline.serving.model import pick_device
    from training.launch import run_workers

    place = pick_device(section.runtime.device)
    if processes is None:
        # A process holds one model after the other.
        processes = min(fitting_processes(folder, place) for folder in checkpoints.values())
    base_clips = section.base_clips and str(find_path(section.base_clips).resolve())
    with tempfile.TemporaryDirectory(prefix="duplex-evaluate-") as out:
        job = {
            "checkpoints": {name: str(path.resolve()) for name, path in checkpoints.items()},
            "tensors": str(tensors.path.resolve()),
            "base_clips": base_clips,
            "clips": section.clips,
            "swaps": section.swaps,
            "seed": seed,
            "device": place,
            "out": out,
        }
        run_workers(WORKER, job, processes, report, advice=ADVICE)
        try:
            parts = [json.loads((Path(out) / f"{n}.json").read_text()) for n in range(processes)]
        except (OSError, ValueError) as error:
            raise CorruptFileError(f"each process must leave what it scored: {error}") from None
    groups, models = (HELD_OUT, BASE_CLIPS), list(checkpoints)
    return sorted(
        (entry for part in parts for entry in part),
        key=lambda e: (groups.index(e["group"]), e["clip"], models.index(e["model"])),
    )


# -- what it says


def likelihood_sums(
    entries: Sequence[Mapping[str, Any]], label: str
) -> dict[str, dict[str, list[float]]]:
    """Clip -> measure -> [value, 1], as `verdicts.item_sums` gives them of conversations."""
    return {
        f"{one['group']} {one['clip']}": {
            key: [value, 1.0] for key, value in one["values"].items() if value is not None
        }
        for one in entries
        if one["model"] == label
    }


def likelihood_data(
    entries: Sequence[Mapping[str, Any]], labels: Sequence[str]
) -> dict[str, Any] | None:
    """Of report.json: the clips, and a row for each measure with mean, n and Student's 95 %
    interval over clips (None: one clip) for each model. None where nothing was scored."""
    if not entries:
        return None
    rows = []
    for measure in LIKELIHOODS:
        values = {
            label: [
                one["values"][measure.key]
                for one in entries
                if one["model"] == label and one["values"].get(measure.key) is not None
            ]
            for label in labels
        }
        rows.append({
            **{k: v for k, v in measure._asdict().items() if k != "better"},
            "by_model": {label: _pooled(found) for label, found in values.items()},
        })  # fmt: skip
    return {"clips": list(entries), "summary": rows}


def _pooled(values: Sequence[float]) -> dict[str, Any]:
    low, high = mean_interval(values) or (None, None)
    found = {
        "value": sum(values) / len(values) if values else None,
        "n": len(values),
        "low": low,
        "high": high,
    }
    return rounded(found)


def protocol_of_clips(section: EvaluateSection) -> dict[str, Any]:
    """What these numbers hang on, besides the models and the run's own clips."""
    digest = None
    if section.base_clips and section.clips:
        digest = sha256_bytes(canonical_json(base_clip_digests(section.base_clips)).encode())
    return {"clips": section.clips, "swaps": section.swaps, "base_clips": digest}
