"""An adapter on disk, in PEFT's own layout, and what is checked before it is trusted.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [rank, in], lora_B
                                [out, rank]; the header names the base's sha256
    adapter_config.json         PEFT's LoraConfig: rank, alpha, targets; no machine path

Only plain LoRA can be read: whatever would change the formula W + scale · B A (DoRA, per-layer
ranks, biases, changed base weights) is refused, not ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from duplex.errors import MergeError, MissingInputError
from duplex.files import atomic_path, sha256_file, write_atomic
from training.lora import KEY_PREFIX
from training.tensorfile import TensorSpec, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_KEY = "base_sha256"
_PARAMETER = re.compile(rf"{re.escape(KEY_PREFIX)}(.+)\.(lora_[AB])\.weight")
# Keys of an adapter config that leave the formula as it is; any other must be unset, so that
# what a later PEFT invents is refused until somebody has read it.
_NEUTRAL = frozenset(
    ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias", "init_lora_weights",
     "peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping",
     "base_model_name_or_path", "revision", "megatron_core", "qalora_group_size", "eva_config",
     "layers_pattern", "ensure_weight_tying")
)  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter. `shapes`: module -> (shape of A, shape of B).

    targets: `target_modules` of its config, names or suffixes of names; a string is a pattern.
    base_sha256: of the weights it was trained on, where it says so.
    """

    path: Path
    sha256: str
    rank: int
    scale: float
    targets: tuple[str, ...] | str
    base_sha256: str | None
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """
        Raises:
            MissingInputError: a file is not there.
            MergeError: it cannot be read, or is no plain LoRA adapter.
        """
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise MissingInputError(f"{folder}: must be an adapter folder with {name}.")
        path = folder / WEIGHTS
        try:
            config = json.loads((folder / CONFIG).read_text())
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            targets = config["target_modules"]
            targets = targets if isinstance(targets, str) else tuple(sorted(targets))
            with safe_open(path, "pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise MergeError(
                f"{folder}: must hold a LoRA adapter as PEFT writes it, cannot be read as one: "
                f"{type(error).__name__}: {error}"
            ) from None
        faults = _config_faults(config)
        shapes, key_faults = _pair_up(found)
        if faults or key_faults:
            listing = "\n".join(f"  - {fault}" for fault in [*faults, *key_faults][:20])
            raise MergeError(f"{folder}: must be a plain LoRA adapter.\n{listing}")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        base = metadata.get(BASE_KEY)
        return cls(path, sha256_file(path), rank, scale, targets, base, shapes)

    def expects(self, module: str) -> bool:
        """Whether its config says that `module` is adapted (PEFT's rule: a whole name or the
        end of one; a string is a pattern for whole names)."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, module) is not None
        return any(_answers(entry, module) for entry in self.targets)

    def targets_outside(self, modules: Iterable[str]) -> list[str]:
        """Entries of its config's targets that none of `modules` answers to."""
        if isinstance(self.targets, str):
            return [] if any(map(self.expects, modules)) else [self.targets]
        known = list(modules)
        return [e for e in self.targets if not any(_answers(e, module) for module in known)]

    def sides(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] in float32."""
        with safe_open(self.path, "pt") as file:
            return (
                file.get_tensor(f"{KEY_PREFIX}{module}.lora_A.weight").float(),
                file.get_tensor(f"{KEY_PREFIX}{module}.lora_B.weight").float(),
            )

    def delta(self, module: str) -> torch.Tensor:
        """scale · B A in float32: [out, in]."""
        a, b = self.sides(module)
        return self.scale * (b @ a)


def _answers(entry: str, module: str) -> bool:
    return module == entry or module.endswith(f".{entry}")


def write_adapter(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], base_sha256: str
) -> None:
    """Write an adapter folder that `PeftModel.from_pretrained` reads.

    Args:
        state: as `training.lora.adapter_state` gives it.
        config: `LoraConfig.to_dict()`; sets are sorted, so that the bytes repeat.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in state.items()]
    # The library's writer puts metadata in any order, and the bytes must repeat.
    metadata = {"format": "pt", BASE_KEY: base_sha256}
    with atomic_path(folder / WEIGHTS) as temporary:
        write_tensors(temporary, specs, lambda spec: state[spec.name], metadata)
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    plain["base_model_name_or_path"] = None  # a path would be this machine's
    plain.pop("peft_version", None)  # stands in the manifest's provenance
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    write_atomic(folder / CONFIG, text.encode())


def _config_faults(config: dict[str, Any]) -> list[str]:
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"peft_type must be LORA, found {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        faults.append(f"bias must be none, found {config['bias']}")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        faults.append(
            f"init_lora_weights {config['init_lora_weights']} changes the base's own weights; "
            "only true, false and gaussian can be merged"
        )
    faults += [
        f"{key} must be unset, found {value}"
        for key, value in config.items()
        if value and key not in _NEUTRAL
    ]
    return faults


def _pair_up(
    found: dict[str, tuple[int, ...]],
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], list[str]]:
    """Shapes of A and B by module, and what does not fit that form."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    faults = []
    for key, shape in found.items():
        match = _PARAMETER.fullmatch(key)
        if match is None:
            faults.append(
                f"keys must read {KEY_PREFIX}<module>.lora_A.weight or lora_B, found {key}"
            )
            continue
        sides.setdefault(match[1], {})[match[2]] = shape
    for module, pair in sides.items():
        missing = {"lora_A", "lora_B"} - set(pair)
        if missing:
            faults.append(f"{module} must have lora_A and lora_B, has no {missing.pop()}")
    if not found:
        faults.append("it must hold at least one adapted module, found none")
    whole = {m: (p["lora_A"], p["lora_B"]) for m, p in sides.items() if len(p) == 2}
    return whole, faults
