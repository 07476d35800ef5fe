"""The pocket base as files: int8 weights with a scale for each row, and what they go with.

    base.safetensors   matrices as int8 [rows, columns] and `<name>:scale` float16 [rows]; the rest
                       as float32. A weight is its int8 value times its row's scale
    base.json          the `LMModel`'s configuration, and what the base was trained with
    tokenizer.model    SentencePiece

A weight takes a byte so; what rounding costs stands in BASE.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from duplex.errors import CorruptFileError, MissingInputError, WorkError
from duplex.files import atomic_path, sha256_bytes, sha256_file, write_atomic, write_json
from pipeline.engines.pocket import POCKET
from training.checkpoint import save_tensors

WEIGHTS, CONFIG, TOKENIZER = "base.safetensors", "base.json", "tokenizer.model"
REQUIRED = {"lm", "steps", "seed", "codec", "utterances"}  # what base.json must say
SCALE = ":scale"
SMALLEST = 1 << 12  # a matrix of fewer weights stays as it is
MOST = 127


def packed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """int8 with row scales for the matrices of a state dict, float32 for the rest."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        weight = tensor.detach().float().cpu()
        if weight.dim() != 2 or weight.numel() < SMALLEST:
            found[name] = weight.contiguous()
            continue
        scale = (weight.abs().amax(1) / MOST).clamp(min=2.0**-14).half()
        rounded = (weight / scale.float()[:, None]).round().clamp(-MOST, MOST)
        found[name] = rounded.to(torch.int8).contiguous()
        found[name + SCALE] = scale
    return found


def unpacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weights of what `packed` gave.

    Raises:
        ValueError: int8 without a scale, or a scale without int8.
    """
    whole = {name for name, tensor in tensors.items() if tensor.dtype == torch.int8}
    scaled = {name.removesuffix(SCALE) for name in tensors if name.endswith(SCALE)}
    if odd := sorted(whole ^ scaled):
        raise ValueError(f"int8 weights and scales must come in pairs, found {odd[:3]} alone")
    return {
        name: tensor.float() * tensors[name + SCALE].float()[:, None]
        if name in whole
        else tensor.float()
        for name, tensor in tensors.items()
        if not name.endswith(SCALE)
    }


def save_base(
    folder: Path, lm: Any, lm_config: dict[str, Any], facts: dict[str, Any], tokenizer: bytes
) -> None:
    """Write all files, each whole or not at all; the configuration last, with digests of the
    others, so that what a kill left half exchanged is found out.

    Args:
        facts: what else base.json is to say: seed, steps, and `codec`, the digest of what decides
            the codes that the base was trained on.

    Raises:
        WorkError: a weight is not finite; nothing is written.
    """
    state = lm.state_dict()
    if bad := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise WorkError(f"the base's weights must be finite, found others in {', '.join(bad[:3])}")
    with atomic_path(folder / WEIGHTS) as temporary:
        save_tensors(packed(state), temporary)
    write_atomic(folder / TOKENIZER, tokenizer)
    digests = {"weights": sha256_file(folder / WEIGHTS), "tokenizer": sha256_bytes(tokenizer)}
    write_json(folder / CONFIG, {**facts, **digests, "lm": lm_config})


def load_base(folder: Path) -> Any:
    """The `LMModel` of a folder, float32 on the CPU, in eval mode.

    Raises:
        MissingInputError, CorruptFileError: a file is not there, or not what it should be.
    """
    from moshi.models.lm import LMModel

    config = base_config(folder)
    try:
        state = unpacked(load_file(folder / WEIGHTS))
        lm = LMModel(device="cpu", dtype=torch.float32, **config["lm"])
        lm.load_state_dict(state)
    except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
        raise CorruptFileError(
            f"{folder / WEIGHTS}: must hold the weights that {CONFIG} describes: {error}"
        ) from None
    return lm.eval()


def base_config(folder: Path) -> dict[str, Any]:
    """The content of base.json, once the files beside it are those that it was written with.

    Raises:
        MissingInputError, CorruptFileError
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = {
            "weights": sha256_file(folder / WEIGHTS),
            "tokenizer": sha256_file(folder / TOKENIZER),
        }
    except FileNotFoundError as error:
        raise MissingInputError(
            f"{error.filename}: must be there, found none. Train the base: "
            "python -m training.pocket base --work WORK"
        ) from None
    except ValueError as error:
        raise CorruptFileError(f"{folder / CONFIG}: must be JSON: {error}") from None
    if not isinstance(config, dict) or not config.keys() >= REQUIRED:
        raise CorruptFileError(f"{folder / CONFIG}: must name {', '.join(sorted(REQUIRED))}")
    for name, digest in found.items():
        if config.get(name) != digest:
            raise CorruptFileError(
                f"{folder}: base.json goes with {name} of sha256 {config.get(name)}, found "
                f"{digest}. Restore all files of one base, or train it anew."
            )
    return config


def load_tokenizer(folder: Path) -> Any:
    """The folder's SentencePieceProcessor."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=(folder / TOKENIZER).read_bytes())


def write_pocket_checkpoint(folder: Path, base: Path = POCKET, codec: Path | None = None) -> None:
    """A checkpoint folder in the layout of Kyutai's, weights in float32: any tool of this repo
    and moshi.server open it.

    Args:
        folder: empty.
        base: holds the three files of the base; codec: those of the codec on whose codes it was
            trained, `base` if not given.

    Raises:
        MissingInputError, CorruptFileError: a file is not there, or not what it should be.
    """
    from training.pocket import weights

    config = base_config(base)
    lm = load_base(base)
    mimi = weights.load_codec(codec or base)
    if weights.codes_digest(mimi) != config["codec"]:
        raise CorruptFileError(
            f"{codec or base}: the codec must be the one on whose codes the base in {base} was "
            "trained, and has other codes. Restore it, or train the base anew: "
            "python -m training.pocket base --work WORK"
        )
    mimi_config = json.loads(((codec or base) / weights.CONFIG).read_text())
    save_tensors(_plain(lm.state_dict()), folder / "model.safetensors")
    save_tensors(_plain(mimi.state_dict()), folder / "mimi.safetensors")
    write_json(folder / "mimi_config.json", mimi_config)
    write_atomic(folder / "tokenizer.model", (base / TOKENIZER).read_bytes())
    write_json(
        folder / "config.json",
        {
            **config["lm"],
            "model_type": "moshi",
            "moshi_name": "model.safetensors",
            "mimi_name": "mimi.safetensors",
            "mimi_config_name": "mimi_config.json",
            "tokenizer_name": "tokenizer.model",
            "model_id": {"sig": "pocket", "epoch": config["steps"]},
        },
    )


def _plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
