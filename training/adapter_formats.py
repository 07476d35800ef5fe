"""Adapters between PEFT's layout and moshi's own, both ways, bit for bit.

    PEFT (`training/adapter.py`)                moshi
    adapter_model.safetensors                   lora.safetensors
      base_model.model.<module>.lora_A.weight     <module>.lora_A.weight
    adapter_config.json                         config.json: the base's, with lora: true,
      r, lora_alpha, use_rslora                   lora_rank, lora_scaling

What moshi's loader demands (0.2.13, `models/loaders.py:get_lora_moshi`): it puts an adapter on
every Linear layer of the model, on the meta device, and fills them with `strict=False`. A layer
that the file leaves out stays on the meta device, and the load ends in `Cannot copy out of meta
tensor`. So layers without an adapter get one of zeros, in the same rank; going back, pairs that
are zero on both sides are dropped. It has one scaling for all, which says rsLoRA too. It has no
adapters on embeddings: those are refused.

PEFT's config and the base's digest travel in the header of lora.safetensors, which moshi's loader
does not read; with them the way back gives the same two files. A file without them (from
moshi-finetune) becomes a plain LoRA config of rank and scaling.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from duplex.errors import MergeError, MissingInputError
from duplex.files import new_folder, write_json
from pipeline.engines.checkpoint import Checkpoint
from training.adapter import BASE_KEY, CONFIG, WEIGHTS, Adapter, write_adapter, write_state
from training.lora import KEY_PREFIX
from training.mergeplan import check_fit, shapes_of

MOSHI_WEIGHTS, MOSHI_CONFIG = "lora.safetensors", "config.json"
PEFT_KEY = "peft_config"
MAX_RANK = 1 << 16
_KEY = re.compile(r"(.+)\.(lora_[AB])\.weight")
_FUSED = re.compile(r"(.+)\.(in_proj|out_proj)")  # older files: the Linears of all depth steps


@dataclass(frozen=True)
class Converted:
    """adapted: modules with an adapter; filled: modules that got one of zeros for moshi;
    base_sha256: what the written file says that it was trained on."""

    adapted: int
    filled: int
    base_sha256: str | None


def to_moshi(adapter: Path, base: Checkpoint, out: Path) -> Converted:
    """Write moshi's form of a PEFT adapter folder into the new folder `out`.

    Args:
        base: what it was trained on; its config.json is part of the form.

    Raises:
        MissingInputError, MergeError: no plain LoRA adapter, one of another base, one that does
            not fit it, or one on embeddings.
        RequestError: `out` is taken.
    """
    lora = Adapter.open(adapter)
    if lora.embeddings:
        raise MergeError(
            f"{adapter}: moshi's form has adapters on Linear layers only, found "
            f"{len(lora.embeddings)} on embeddings (first {min(lora.embeddings)}). Merge it "
            "(`duplex merge`): moshi loads the merged checkpoint."
        )
    check_fit(base, lora)
    # moshi's loader puts adapters on Linear layers, all of them.
    linears = shapes_of(base, base.config, (nn.Linear,))
    state: dict[str, torch.Tensor] = {}
    with safe_open(lora.path, "pt") as file:
        names = sorted(file.keys())
        dtype = file.get_tensor(names[0]).dtype
        for name in names:
            state[name.removeprefix(KEY_PREFIX)] = file.get_tensor(name)
        metadata = dict(file.metadata() or {})
    missing = [name for name in linears if name not in lora.shapes]
    for name in missing:
        rows, columns = linears[name]
        state[f"{name}.lora_A.weight"] = torch.zeros(lora.rank, columns, dtype=dtype)
        state[f"{name}.lora_B.weight"] = torch.zeros(rows, lora.rank, dtype=dtype)
    peft_config = json.loads((adapter / CONFIG).read_text())
    metadata = {"format": "pt", PEFT_KEY: json.dumps(peft_config, sort_keys=True)} | (
        {BASE_KEY: metadata[BASE_KEY]} if BASE_KEY in metadata else {}
    )
    config = dict(base.config) | {
        "lora": True,
        "lora_rank": lora.rank,
        "lora_scaling": lora.scale,
        "lora_name": MOSHI_WEIGHTS,
    }
    with new_folder(out) as folder:
        write_state(folder / MOSHI_WEIGHTS, state, metadata)
        write_json(folder / MOSHI_CONFIG, config)
    return Converted(len(lora.shapes), len(missing), lora.base_sha256)


def to_peft(source: Path, out: Path, base: Checkpoint | None = None) -> Converted:
    """Write PEFT's form of a folder with lora.safetensors and config.json into `out`.

    Args:
        base: what it was trained on, where it is known: checked if the file names it, else
            written into the result, so that merging and going on can check.

    Raises:
        MissingInputError: a file is not there.
        MergeError: it cannot be read, holds no adapter, or does not fit `base`.
        RequestError: `out` is taken.
    """
    state, metadata, rank, scaling = _read_moshi(source)
    kept, dropped = _without_zeros(state)
    if not kept:
        raise MergeError(f"{source}: an adapter must not be zero throughout, found one that is.")
    base_sha256 = metadata.get(BASE_KEY) or (base.digest("moshi") if base is not None else None)
    config = _peft_config(metadata, kept, rank, scaling, source)
    with new_folder(out) as folder:
        named = {KEY_PREFIX + key: tensor for key, tensor in kept.items()}
        write_adapter(folder, named, config, base_sha256)
        lora = Adapter.open(folder)
        if base is not None:
            check_fit(base, lora)
    return Converted(len(lora.shapes), dropped, base_sha256)


def attach_base(adapter: Path, base: Checkpoint, out: Path) -> Converted:
    """Copy a PEFT adapter folder that names no base, naming `base`, once it fits.

    Raises:
        MissingInputError, MergeError, RequestError: as `to_peft`.
    """
    lora = Adapter.open(adapter)
    digest = base.digest("moshi")
    check_fit(base, lora)
    with safe_open(lora.path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with new_folder(out) as folder:
        write_adapter(folder, state, json.loads((adapter / CONFIG).read_text()), digest)
    return Converted(len(lora.shapes), 0, digest)


def is_peft(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file()


def _read_moshi(
    source: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, str], int, float]:
    """Tensors by the split names, header, rank and scaling of moshi's form."""
    for name in (MOSHI_WEIGHTS, MOSHI_CONFIG):
        if not (source / name).is_file():
            raise MissingInputError(
                f"{source}: must be a folder with {MOSHI_WEIGHTS} and {MOSHI_CONFIG}, "
                + (f"has no {name}" if source.is_dir() else "found no folder there")
            )
    try:
        config = json.loads((source / MOSHI_CONFIG).read_text())
        # What moshi's loader takes where they are left out.
        rank, scaling = config.get("lora_rank", 128), config.get("lora_scaling", 2.0)
        if type(rank) is not int or not 1 <= rank <= MAX_RANK or type(scaling) not in (int, float):
            raise ValueError(f"lora_rank must be 1 to {MAX_RANK} and lora_scaling a number, found "
                             f"{rank!r:.40} and {scaling!r:.40}")  # fmt: skip
        scaling = float(scaling)
        with safe_open(source / MOSHI_WEIGHTS, "pt") as file:
            raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, AttributeError, ArithmeticError,
            RecursionError) as error:  # fmt: skip
        raise MergeError(f"{source}: must hold moshi's form of an adapter: {error}") from None
    foreign = [key for key in raw if _KEY.fullmatch(key) is None]
    if foreign or not config.get("lora", False):
        found = f"the key {foreign[0]}" if foreign else f"no `lora: true` in {MOSHI_CONFIG}"
        raise MergeError(
            f"{source}: keys must read <module>.lora_A.weight or lora_B, and config.json must say "
            f"lora: true; found {found}."
        )
    flat = [key for key, tensor in raw.items() if tensor.dim() != 2]
    if flat:
        raise MergeError(
            f"{source}: {flat[0]} must be a matrix, found the shape {list(raw[flat[0]].shape)}"
        )
    state = {}
    for key, tensor in raw.items():
        state.update(_split(key, tensor, raw, rank, source))
    return state, metadata, rank, scaling


def _split(
    key: str, tensor: torch.Tensor, raw: dict[str, torch.Tensor], rank: int, source: Path
) -> dict[str, torch.Tensor]:
    """One tensor by the model's own names: a fused one is cut as moshi's load hook cuts it."""
    match = _KEY.fullmatch(key)
    assert match is not None
    fused = _FUSED.fullmatch(match[1])
    if fused is None:
        return {key: tensor}
    rows = raw.get(f"{match[1]}.lora_A.weight", tensor).shape[0]
    count = rows // rank
    if rows != count * rank or tensor.shape[0] % max(count, 1):
        raise MergeError(
            f"{source}: {match[1]}.lora_A must have a multiple of lora_rank {rank} rows, found "
            f"{rows}"
        )
    parts = tensor.view(count, -1, *tensor.shape[1:]).unbind()
    return {f"{match[1]}s.{i}.{match[2]}.weight": part for i, part in enumerate(parts)}


def _without_zeros(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """The state without pairs that are zero on both sides, and the number of those."""
    alive = {key.rpartition(".lora_")[0] for key, tensor in state.items() if tensor.any()}
    kept = {k: v.contiguous() for k, v in state.items() if k.rpartition(".lora_")[0] in alive}
    return kept, len({key.rpartition(".lora_")[0] for key in state}) - len(alive)


def _peft_config(
    metadata: dict[str, str],
    kept: dict[str, torch.Tensor],
    rank: int,
    scaling: float,
    source: Path,
) -> dict[str, Any]:
    """The config that came with the file, if it still says the same; else a plain one."""
    from peft import LoraConfig

    modules = sorted({key.rpartition(".lora_")[0] for key in kept})
    if PEFT_KEY not in metadata:
        return LoraConfig(
            r=rank,
            lora_alpha=scaling * rank,  # pyright: ignore[reportArgumentType]
            target_modules=modules,
        ).to_dict()
    try:
        config = json.loads(metadata[PEFT_KEY])
        if not isinstance(config, dict):
            raise ValueError(f"found a {type(config).__name__}")
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        same = (config["r"], config["lora_alpha"] / root) == (rank, scaling)
    except (ValueError, KeyError, TypeError) as error:
        raise MergeError(f"{source}: its {PEFT_KEY} must be PEFT's config: {error}") from None
    if not same:
        raise MergeError(
            f"{source}: lora_rank and lora_scaling in {MOSHI_CONFIG} must be those of the header "
            f"of {MOSHI_WEIGHTS}, found rank {rank} and scaling {scaling:g} against rank "
            f"{config['r']} and alpha {config['lora_alpha']}. Take the config.json that was "
            "written with it."
        )
    return config
