"""What each of several processes scores of `likelihood.teacher_force`: every N-th clip.

Each process holds one model at a time. Values go back in a file, in nats to six digits.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.utils.compile import no_compile
from torch import nn

from duplex.errors import CorruptFileError, RecordError, RequestError, WorkError
from duplex.files import write_atomic
from duplex.frames import LM_CONTEXT_FRAMES
from duplex.phases import Known, find_prompt
from duplex.records import TensorClip
from duplex.store import StageFolder
from duplex.streams import check_codes
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.tensor_file import read_codes
from pipeline.evaluation.likelihood import BASE_CLIPS, HELD_OUT, STREAMS
from training.batches import Clip, read_clips
from training.device import deterministic
from training.fast import FastForward, unsupported
from training.forward import LibraryForward
from training.launch import work
from training.loss import AUDIO, WORDS, stream_means
from training.prompt_swap import (
    Forward,
    SwapTask,
    TaskScore,
    held_out_clips,
    plan_swaps,
    score_task,
)

DIGITS = 6


def score_share(job: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """This rank's share. job: `checkpoints`, `tensors` (a stage folder), `base_clips` (a folder or
    None), `clips`, `swaps`, `seed`, `device`, `out`."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(job["device"])
    found: list[dict[str, Any]] = []
    tasks: list[tuple[str, SwapTask]] | None = None
    for label, path in job["checkpoints"].items():
        checkpoint = Checkpoint.open(Path(path))
        if tasks is None:
            tasks = plan_tasks(job, checkpoint)
            report(f"{len(tasks)} clips teacher-forced")
        mine = tasks[rank::ranks]
        if not mine:
            break
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        lm = checkpoint.load_lm(str(device), dtype=dtype).eval()
        forward = scoring_forward(lm)
        with deterministic(device), no_compile():
            for group, task in mine:
                values = values_of(group, score_task(forward, task, device))
                found.append(_entry(group, task, label, values))
        del lm, forward  # a GPU need not hold both
    write_atomic(Path(job["out"]) / f"{rank}.json", json.dumps(found).encode())
    return {"clips": len(tasks or ())}


def plan_tasks(job: dict[str, Any], checkpoint: Checkpoint) -> list[tuple[str, SwapTask]]:
    """(group, task) of each clip that is scored.

    Args:
        checkpoint: what the codes are checked against; clips are cut to its context.
    """
    config, seed = checkpoint.config, job["seed"]
    sizes = {"card": config["card"], "text_card": config["text_card"]}
    longest = config.get("context") or LM_CONTEXT_FRAMES
    folder = StageFolder(Path(job["tensors"]), "tensors", "")
    records = [record for record in folder.records() if isinstance(record, TensorClip)]
    valid_records = [record for record in records if record.split == "valid"]
    valid = read_clips(folder, valid_records, crop_frames=longest, **sizes)
    chosen = held_out_clips(valid, job["clips"], seed)
    # Others' prompts: of held-out clips, then one of each persona that was trained on.
    others: dict[str, TensorClip] = {}
    for record in sorted(
        records, key=lambda r: hashlib.sha256(f"{seed}\0{r.id}".encode()).digest()
    ):
        if record.split == "train":
            others.setdefault(record.persona_id, record)
    trained = read_clips(folder, others.values(), crop_frames=longest, **sizes) if chosen else []
    base = read_base_clips(Path(job["base_clips"]), longest, **sizes) if job["base_clips"] else []
    return [
        *((HELD_OUT, task) for task in plan_swaps(chosen, [valid, trained], job["swaps"], seed)),
        *(
            (BASE_CLIPS, task)
            for task in plan_swaps(held_out_clips(base, job["clips"], seed), [], 0, seed)
        ),
    ]


def read_base_clips(folder: Path, longest: int, *, card: int, text_card: int) -> list[Clip]:
    """All `.pt` of a folder, whole integers [17, T]; the prompt is found in the codes.

    A text row may hold -1, which is never predicted (docs/tensors.md).

    Raises:
        CorruptFileError: a file that holds something else, or codes that the model hasn't.
        RequestError: a clip without frames after its prompt.
    """
    clips = []
    for path in sorted(folder.glob("*.pt")):
        try:
            codes, _ = read_codes(path)
        except (RecordError, OSError) as error:
            raise CorruptFileError(f"evaluate.base_clips: {path}: {error}") from None
        faults = check_codes(codes, card=card, text_card=text_card, zero_text=True)
        if faults:
            raise CorruptFileError(
                f"evaluate.base_clips: {path}: {'; '.join(faults)}. It must be a tensor of this "
                "model's codec and tokenizer (docs/tensors.md)."
            )
        prompt = find_prompt(codes, Known())
        clip = _cut(path.stem, codes, prompt.end if prompt else 0, longest)
        if clip.prompt_frames >= clip.num_frames:
            raise RequestError(
                f"evaluate.base_clips: {path} must have frames after its prompt, found "
                f"{clip.prompt_frames} of prompt in {clip.num_frames}. Take it out."
            )
        clips.append(clip)
    return clips


def _cut(name: str, codes: np.ndarray, prompt_frames: int, longest: int) -> Clip:
    return Clip(name, codes[:, :longest], prompt_frames, prompt_frames)


def scoring_forward(lm: Any) -> Forward:
    """Ours where it covers the model, which is faster, else the library's."""
    forward: nn.Module = LibraryForward(lm) if unsupported(lm) else FastForward(lm)
    return forward.eval()


def values_of(group: str, scored: TaskScore) -> dict[str, float | None]:
    """A clip's values by key of `LIKELIHOODS`."""
    means = stream_means(scored.own)
    acoustic = [v for name, v in means.items() if name.startswith("acoustic_") and v is not None]
    streams = {
        "words": means["text_nonpad"],
        "text": means["text"],
        "semantic": means["semantic"],
        "acoustic": statistics.fmean(acoustic) if acoustic else None,
    }
    assert list(streams) == list(STREAMS)
    prefix = "base_" if group == BASE_CLIPS else ""
    values = {f"{prefix}nll_{name}": value for name, value in streams.items()}
    if group == HELD_OUT:
        margins = {"margin_words": WORDS, "margin_semantic": AUDIO}
        values |= {key: scored.margins[part] for key, part in margins.items()}
    if bad := [key for key, v in values.items() if v is not None and not math.isfinite(v)]:
        raise WorkError(
            f"each clip must have a finite likelihood, found none for {', '.join(bad)}: the "
            "weights are broken, or a clip holds what no model can have said"
        )
    return {key: None if v is None else round(v, DIGITS) for key, v in values.items()}


def _entry(
    group: str, task: SwapTask, label: str, values: dict[str, float | None]
) -> dict[str, Any]:
    own = task.own
    return {
        "group": group,
        "clip": own.id,
        "model": label,
        "frames": own.num_frames - own.loss_from,
        "prompts": [other.id for other in task.others],
        "content": _digest([own.codes, *(o.codes[:, : o.prompt_frames] for o in task.others)]),
        "values": values,
    }


def _digest(parts: Sequence[np.ndarray]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(f"{part.shape}".encode() + np.ascontiguousarray(part, dtype="<i8").tobytes())
    return state.hexdigest()


if __name__ == "__main__":
    work(score_share)
