"""A Moshi-like checkpoint on disk: where its files are, and strict loading through moshi.

A checkpoint folder holds `config.json` (the LM's arguments and the file names), the LM's
and the codec's safetensors, and the SentencePiece model. `config.json` holds plain names,
so a folder may be moved; `CheckpointInfo` gets their paths in full.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.base import canonical_json
from duplex.config import ModelSection
from duplex.datafiles import find_path
from duplex.errors import CorruptFileError, MissingInputError
from duplex.files import sha256_bytes, sha256_file
from pipeline.engines import pocket

if TYPE_CHECKING:
    import sentencepiece
    import torch
    from moshi.models.compression import MimiModel
    from moshi.models.lm import LMModel

MODELS_FOLDER = ".models"
_EDGE_BYTES = 1 << 20
# As in `moshi.models.loaders`, written out so that a look at the files imports no torch.
DEFAULT_NAMES = {
    "moshi": "model.safetensors",
    "mimi": "tokenizer-e351c8d8-checkpoint125.safetensors",
    "tokenizer": "tokenizer_spm_32k_3.model",
}
# What modules do to their new weights: draws, and the steps of `trunc_normal_`.
_STEPS_OF_DRAWS = frozenset(
    {"kaiming_uniform_", "normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_"}
)
NOT_OF_THE_LM = frozenset({"model_type", "version", "model_id", "lm_gen_config"})


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """
        Raises:
            MissingInputError: no such folder, or a file is missing.
            CorruptFileError: `config.json` is not JSON.
        """
        path = folder / "config.json"
        weights = folder / DEFAULT_NAMES["moshi"]
        if not path.is_file() and not weights.is_file():
            raise MissingInputError(
                f"{folder}: must be a checkpoint folder with config.json, found none. "
                "Give `pocket`, a folder that `duplex merge` wrote, or a hub name owner/name."
            )
        try:
            config = json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise CorruptFileError(f"{path}: must be JSON: {error}") from None
        if "dim" not in config:
            config = _complete(config, weights)
        checkpoint = cls(folder.resolve(), config)
        for file in checkpoint.files().values():
            if not file.is_file():
                raise MissingInputError(f"{folder}: its config.json names {file.name}, not found")
        return checkpoint

    def files(self) -> dict[str, Path]:
        """Paths by role: moshi, mimi, mimi_config (where there is one), tokenizer."""
        named = {
            role: self.config.get(f"{role}_name", name) for role, name in DEFAULT_NAMES.items()
        }
        if self.config.get("mimi_config_name"):
            named["mimi_config"] = self.config["mimi_config_name"]
        # Only the last part of a name counts: a checkpoint must not point outside its folder.
        return {role: self.folder / Path(name).name for role, name in named.items()}

    def info(self) -> Any:
        """moshi's own `CheckpointInfo` for this folder."""
        from moshi.models.loaders import CheckpointInfo

        files = self.files()
        config_path = self.folder / "config.json"
        if config_path.is_file() and "dim" in json.loads(config_path.read_text()):
            return CheckpointInfo.from_hf_repo(
                "local",
                moshi_weights=files["moshi"],
                mimi_weights=files["mimi"],
                tokenizer=files["tokenizer"],
                config_path=config_path,
                mimi_config_path=files.get("mimi_config"),
            )
        lm_config = {key: value for key, value in self.config.items() if key not in NOT_OF_THE_LM}
        return CheckpointInfo(
            files["moshi"], files["mimi"], files["tokenizer"], lm_config, self.config
        )

    def load_lm(self, device: str = "cpu", dtype: torch.dtype | None = None) -> LMModel:
        """The LM, every weight loaded strictly.

        Raises:
            CorruptFileError: the weights are damaged, or belong to another architecture.
        """
        import torch
        from safetensors import SafetensorError

        from training.failures import is_out_of_memory

        try:
            with _without_first_draw():
                return self.info().get_moshi(device=device, dtype=dtype or torch.float32)
        except (SafetensorError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CorruptFileError(
                f"{self.files()['moshi']}: must hold the weights that config.json describes; "
                f"moshi refused them: {_first_line(error)}"
            ) from error

    def empty_lm(self, changes: Mapping[str, Any] | None = None) -> LMModel:
        """The LM on the meta device: its layers and their shapes, no weight in memory.

        changes: arguments of the LM in place of those in config.json.
        """
        import torch

        # The library makes some layers on the default device.
        with torch.device("meta"), _without_first_draw():
            return self.info().get_moshi(
                device="meta", load_weight=False, lm_kwargs_overrides=dict(changes or {})
            )

    def load_mimi(self, device: str = "cpu") -> MimiModel:
        from safetensors import SafetensorError

        try:
            return self.info().get_mimi(device=device)
        except (SafetensorError, RuntimeError) as error:
            raise CorruptFileError(
                f"{self.files()['mimi']}: must hold the codec's weights; "
                f"moshi refused them: {_first_line(error)}"
            ) from error

    def load_tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        try:
            return self.info().get_text_tokenizer()
        except (OSError, RuntimeError) as error:
            raise CorruptFileError(
                f"{self.files()['tokenizer']}: must be a SentencePiece model: {_first_line(error)}"
            ) from error

    def digest(self, role: str) -> str:
        """sha256 of one of its files; `codec` covers weights and config."""
        files = self.files()
        if role != "codec":
            return sha256_file(files[role])
        parts = [sha256_file(files[name]) for name in ("mimi", "mimi_config") if name in files]
        return sha256_bytes(canonical_json(parts).encode())


def _without_first_draw() -> AbstractContextManager[object]:
    """Weights on the meta device are not drawn: those that are loaded replace them.

    There torch draws in Python, through its compiler, whose import takes 1.2 s.
    """
    from torch.overrides import TorchFunctionMode

    class WithoutFirstDraw(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") in _STEPS_OF_DRAWS:
                tensor = args[0] if args else kwargs["tensor"]
                if tensor.is_meta:
                    return tensor
            return func(*args, **kwargs)

    return WithoutFirstDraw()


def _complete(config: dict[str, Any], weights: Path) -> dict[str, Any]:
    """The 7B's arguments where a hub repository leaves them out, as PersonaPlex's does.

    `dep_q` is read from the weights: they hold one output layer for each depth step.
    """
    from moshi.models import loaders
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="np") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CorruptFileError(f"{weights}: must be safetensors: {_first_line(error)}") from None
    heads = sum(name.startswith("linears.") and name.endswith(".weight") for name in names)
    defaults = dict(loaders._lm_kwargs)
    return defaults | {"dep_q": heads} | config


def model_identity(model: ModelSection) -> str:
    """Which base model a key means. Imports no torch and downloads nothing.

    A local folder counts by config and by the size and edges of its weights: hashing 15 GB
    whenever a run is planned would cost half a minute.
    """
    if model.base == "pocket":
        return f"pocket:{pocket.recipe_digest()}"
    folder = find_path(model.base)
    if folder.is_dir():
        state = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.is_file():
                state.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    state.update(file.read(_EDGE_BYTES))
                    file.seek(max(0, path.stat().st_size - _EDGE_BYTES))
                    state.update(file.read(_EDGE_BYTES))
        return f"folder:{state.hexdigest()}"
    return f"hub:{model.base}@{model.revision or 'main'}"


def check_base(model: ModelSection) -> None:
    """
    Raises:
        MissingInputError: `base` can be neither `pocket`, a folder that is there, nor a hub name.
    """
    if model.base == "pocket" or find_path(model.base).is_dir():
        return
    if model.base.count("/") != 1 or model.base.startswith((".", "/", "~")):
        raise MissingInputError(
            "model.base must be `pocket`, a folder that exists or a hub name owner/name, "
            f"found {model.base}"
        )


def resolve_checkpoint(model: ModelSection, runs_root: Path) -> Checkpoint:
    """The base model's folder: built (pocket), found (a folder) or downloaded (a hub name).

    Raises:
        MissingInputError: it is nowhere, or the hub did not give it.
    """
    if model.base == "pocket":
        return Checkpoint.open(pocket.pocket_folder(runs_root / MODELS_FOLDER))
    folder = find_path(model.base)
    if folder.is_dir():
        return Checkpoint.open(folder)
    check_base(model)
    return Checkpoint.open(_download(model))


def _download(model: ModelSection) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model"]
    try:
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise MissingInputError(
            f"{model.base} must be on the Hugging Face hub and its licence accepted; "
            f"the download failed: {_first_line(error)}. Set HF_TOKEN, or give a local folder."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
