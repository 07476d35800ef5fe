"""Pocket weights as files: safetensors, matrices as float16, what counts bits as float32.

codec.safetensors   a `MimiModel`; its codebooks stay float32, as running sums over counts
codec.json          its configuration, as `moshi.models.loaders.get_mimi` takes it
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from duplex.errors import CorruptFileError, MissingInputError
from duplex.files import atomic_path, write_json
from training.checkpoint import save_tensors

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel

WEIGHTS, CONFIG = "codec.safetensors", "codec.json"
CODEBOOK_PARTS = ("._codebook.",)

# Of a codec's weights, those behind its codes.
DECODER, OUTPUT = ("decoder", "upsample"), ".output_proj."


def save_halved(
    tensors: dict[str, torch.Tensor], path: Path, keep: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Write float tensors as float16, those whose name holds one of `keep` as they are.

    Returns:
        What a reader gets, as float32.

    Raises:
        ValueError: a weight is beyond float16's 65 504.
    """
    halved = {
        name: tensor.detach().to(_stored(name, tensor, keep)).contiguous()
        for name, tensor in tensors.items()
    }
    if overflow := [n for n, t in halved.items() if t.is_floating_point() and t.isinf().any()]:
        raise ValueError(f"weights must be below 65504 for float16, found more in {overflow}")
    with atomic_path(path) as temporary:
        save_tensors(halved, temporary)
    return _widened(halved)


def _stored(name: str, tensor: torch.Tensor, keep: tuple[str, ...]) -> torch.dtype:
    kept = not tensor.is_floating_point() or any(part in name for part in keep)
    return tensor.dtype if kept else torch.float16


def _widened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def load_widened(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file of `save_halved`, floats as float32.

    Raises:
        MissingInputError, CorruptFileError: no such file; no safetensors.
    """
    if not path.is_file():
        raise MissingInputError(f"{path}: must be a weight file, found none; train it first")
    try:
        return _widened(load_file(path))
    except SafetensorError as error:
        raise CorruptFileError(f"{path}: must be safetensors, found: {error}") from None


def save_codec(mimi: MimiModel, config: dict[str, Any], folder: Path) -> None:
    """Write both files, each whole or not at all; the configuration last."""
    save_halved(mimi.state_dict(), folder / WEIGHTS, keep=CODEBOOK_PARTS)
    write_json(folder / CONFIG, config)


def load_codec(folder: Path) -> MimiModel:
    """The codec of a folder, float32 on the CPU, in eval mode.

    Raises:
        MissingInputError, CorruptFileError: a file is not there, or not what it should be.
    """
    from moshi.models.loaders import get_mimi

    tensors = load_widened(folder / WEIGHTS)
    if not (folder / CONFIG).is_file():
        raise MissingInputError(f"{folder / CONFIG}: must be the codec's configuration, not found")
    try:
        config = json.loads((folder / CONFIG).read_text())
        mimi = get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"])
        mimi.load_state_dict(tensors)
    except (ValueError, LookupError, TypeError, RuntimeError, AssertionError) as error:
        raise CorruptFileError(
            f"{folder / WEIGHTS}: must fit {CONFIG} beside it, found: {error}"
        ) from None
    return mimi.eval()


def codes_digest(mimi: Any) -> str:
    """sha256 of the weights that decide a sound's codes: the decoder may go on learning."""
    found = hashlib.sha256()
    for name, tensor in sorted(mimi.state_dict().items()):
        if not (name.startswith(DECODER) or OUTPUT in name):
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
