"""Tensors to train on, adapters to merge, and the contexts that both stages run in."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from duplex.config import Config
from duplex.config_train import LoraSection
from duplex.records import FrameSpan, TensorClip, record_line
from duplex.sinks import FolderBlobs
from duplex.stage import StageContext
from duplex.store import StageFolder
from duplex.streams import NUM_ROWS, TEXT_PAD, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from pipeline.runners.local import execute
from training.adapter import write_adapter
from training.batches import Clip
from training.lora import (
    GROUPS,
    adapter_parameters,
    adapter_state,
    add_adapters,
    lora_config,
    target_modules,
)

PROMPT_FRAMES = 8
LORA = LoraSection(rank=4, alpha=8)
PREFIX = "base_model.model."


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
    return Clip(name, make_codes(seed, num_frames).astype(np.int16), PROMPT_FRAMES, PROMPT_FRAMES)


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
                "persona_id": "persona-train" if split == "train" else f"persona-valid-{index}",
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
        "guards": {"clips": 1, "swaps": 1, "free_seconds": 0.8},
        "runtime": {"checkpoint_every": 2, "device": "cpu"},
    }
    return Config.model_validate(
        {"name": "tiny", "model": {"base": str(checkpoint)}, "train": section | train}
    )


def make_trainer(
    checkpoint: Path,
    work: Path,
    train_clips: list[Clip],
    valid_clips: list[Clip],
    watch: Any = None,
    **train: Any,
) -> Any:
    """A Trainer by itself, without the stage around it."""
    from training.loop import Trainer

    section = make_config(checkpoint, **train).train
    model = Checkpoint.open(checkpoint).load_lm()
    targets = target_modules(model, section.lora.targets)
    add_adapters(model, section.lora, targets, seed=3)
    work.mkdir(parents=True, exist_ok=True)
    return Trainer(
        model, targets, section, seed=1, train_clips=train_clips, valid_clips=valid_clips,
        work=work, identity="of this test", watch=watch,
    )  # fmt: skip


def run_stage(
    stage: Any,
    config: Config,
    path: Path,
    report: Callable[[str], None] = lambda message: None,
    **inputs: StageFolder,
) -> StageFolder:
    """Run a whole stage in `path` to its manifest, as the local runner does."""
    context = StageContext(config, path.parent, inputs, report)
    folder = StageFolder(path, stage.name, "1" * 64)
    execute(stage, context, folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    std: float = 0.05,
    groups: tuple[str, ...] = GROUPS,
    section: LoraSection = LORA,
) -> Path:
    """An adapter folder whose sides that start at zero are noise, as after training."""
    checkpoint = Checkpoint.open(base)
    model = checkpoint.load_lm()
    targets = target_modules(model, groups, embeddings=section.embeddings)
    add_adapters(model, section, targets, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=std, generator=generator)
    config = lora_config(section, targets).to_dict()
    write_adapter(folder, adapter_state(model), config, checkpoint.digest("moshi"))
    return folder


def changed_adapter(
    adapter: Path,
    folder: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    config: dict[str, Any] | None = None,
    names_base: bool = True,
) -> Path:
    """A copy of `adapter` with `change(state)` applied to its tensors, `config` to its config."""
    folder.mkdir()
    path = adapter / "adapter_model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(state)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() if names_base else {"format": "pt"}
    save_file(state, folder / path.name, metadata=metadata)
    value = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(value | (config or {})))
    return folder


def fused(base: Path, folder: Path, steps: int = 8) -> Path:
    """The same checkpoint with `in_proj_weight` and `out_proj.weight`, as Kyutai's files are."""
    shutil.copytree(base, folder)
    state = load_file(base / "model.safetensors")
    merged = {key: value for key, value in state.items() if "_projs." not in key}
    for key in [key for key in state if key.endswith("_projs.0.weight")]:
        stem = key.removesuffix(".0.weight")
        parts = [state[f"{stem}.{i}.weight"] for i in range(steps) if f"{stem}.{i}.weight" in state]
        name = {"in_projs": "in_proj_weight", "out_projs": "out_proj.weight"}[stem.split(".")[-1]]
        merged[f"{stem.rsplit('.', 1)[0]}.{name}"] = torch.cat(parts)
    save_file(merged, folder / "model.safetensors")
    return folder


def assert_nothing_left(out: Path) -> None:
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
