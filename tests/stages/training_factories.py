"""Tensors to train on, and the contexts that the train and merge stages run in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duplex.config import Config
from duplex.records import FrameSpan, TensorClip, record_line
from duplex.stage import StageContext
from duplex.store import FolderBlobs, StageFolder
from duplex.streams import NUM_ROWS, TEXT_PAD, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from pipeline.runners.local import execute
from training.batches import Clip

PROMPT_FRAMES = 8


def make_codes(seed: int, num_frames: int, card: int = 64, text_card: int = 340) -> np.ndarray:
    """int64 [17, T]: each row repeats a short figure of its own, the same in every clip, from
    another place on: something that can be learnt. A third of the text is padding."""
    figures = np.random.default_rng(0)
    start = np.random.default_rng(seed).integers(0, 6)
    places = (start + np.arange(num_frames)) % 6
    codes = figures.integers(0, card, (NUM_ROWS, 6))[:, places]
    text = figures.integers(TEXT_PAD + 1, text_card, 6)
    text[[1, 4]] = TEXT_PAD
    codes[TEXT_ROW] = text[places]
    return codes.astype(np.int64)


def make_clip(name: str, num_frames: int, seed: int = 0) -> Clip:
    return Clip(name, make_codes(seed, num_frames).astype(np.int16), PROMPT_FRAMES)


def tensor_bytes(codes: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(codes) if isinstance(codes, np.ndarray) else codes, buffer)
    return buffer.getvalue()


def write_tensors_stage(
    path: Path,
    checkpoint: Path,
    lengths: dict[str, list[int]],
    contents: dict[str, bytes] | None = None,
    **changes: Any,
) -> StageFolder:
    """A complete tensors stage: a clip for each length of each split.

    Args:
        contents: other bytes for the `.pt` of a clip id; the digests fit all the same.
        changes: fields of every TensorClip.
    """
    source = Checkpoint.open(checkpoint)
    folder = StageFolder(path, "tensors", "0" * 64)
    blobs = FolderBlobs(folder)
    lines = []
    for split, numbers in lengths.items():
        for index, num_frames in enumerate(numbers):
            name = f"{split}-{index}"
            content = (contents or {}).get(name) or tensor_bytes(make_codes(index, num_frames))
            fields: dict[str, Any] = {
                "id": name,
                "speech_id": name,
                "persona_id": f"persona-{split}",
                "tensor": blobs.put(content, ".pt"),
                "num_frames": num_frames,
                "prompt": (FrameSpan(label="text", start=0, end=PROMPT_FRAMES),),
                "turns": (),
                "text_tokens": 4,
                "dropped_tokens": 0,
                "alignment": "onset",
                "split": split,
                "codec_digest": source.digest("codec"),
                "tokenizer_digest": source.digest("tokenizer"),
            }
            lines.append(record_line(TensorClip(**(fields | changes))))
    folder.complete(lines, files=[], counts={"records": len(lines)}, provenance={})
    return folder


def make_config(checkpoint: Path, **train: Any) -> Config:
    section = {
        "steps": 6,
        "batch_size": 2,
        "crop_frames": 60,
        "learning_rate": 5e-3,
        "warmup_steps": 1,
        "validate_every": 3,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "runtime": {"checkpoint_every": 2, "device": "cpu"},
    }
    return Config.model_validate(
        {"name": "tiny", "model": {"base": str(checkpoint)}, "train": section | train}
    )


def run_stage(stage: Any, config: Config, path: Path, **inputs: StageFolder) -> StageFolder:
    """Run a whole stage in `path` to its manifest, as the local runner does."""
    context = StageContext(config, path.parent, inputs, report=lambda message: None)
    folder = StageFolder(path, stage.name, "1" * 64)
    execute(stage, context, folder)
    return folder
