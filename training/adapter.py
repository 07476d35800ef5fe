"""An adapter on disk, in PEFT's own layout, and what is checked before it is trusted.

    adapter_model.safetensors   base_model.model.<module>.lora_A.weight [rank, in], lora_B
                                [out, rank]; of an embedding of n ids lora_embedding_A [rank, n],
                                lora_embedding_B [dim, rank]; the header names the base's sha256
    adapter_config.json         PEFT's LoraConfig: rank, alpha, targets; no machine path

Only plain LoRA can be read: whatever would change the formula W + scale · B A (DoRA, per-layer
ranks, biases, changed base weights) is refused, not ignored.

An embedding's weight is [n, dim] and its delta scale · (B A)^T, the same as scale · A^T B^T. So
`Adapter` gives B^T as its side A, A^T as its side B, and whoever reads it needs one formula.
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
from torch import nn

from duplex.config_train import LoraSection
from duplex.errors import MergeError, MissingInputError, RequestError
from duplex.files import atomic_path, sha256_file, write_atomic
from training.lora import KEY_PREFIX, adapter_parameters, file_key
from training.tensorfile import TensorSpec, write_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_KEY = "base_sha256"
_PARAMETER = re.compile(
    rf"{re.escape(KEY_PREFIX)}(.+)\.(?:(lora_[AB])\.weight|(lora_embedding_[AB]))"
)
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
    """A plain LoRA adapter. `shapes`: module -> (shape of A, shape of B), embeddings as above.

    scale: alpha / rank, or alpha / sqrt(rank) with `rslora`.
    embeddings: those of its modules that are embeddings.
    targets: `target_modules` of its config, names or suffixes of names. PEFT takes a pattern too;
        from a file that is a stranger's it is refused.
    base_sha256: of the weights it was trained on, where it says so.
    """

    path: Path
    sha256: str
    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]
    base_sha256: str | None
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    embeddings: frozenset[str] = frozenset()

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """
        Raises:
            MissingInputError: a file is not there.
            MergeError: it cannot be read, or is no plain LoRA adapter.
        """
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise MissingInputError(
                    f"{folder}: must be an adapter folder with {name}, {adapter_hint(folder)}"
                )
        path = folder / WEIGHTS
        try:
            config = json.loads((folder / CONFIG).read_text())
            rank, alpha = config["r"], config["lora_alpha"]
            if type(rank) is not int or type(alpha) not in (int, float):
                raise ValueError(f"r and lora_alpha must be numbers, found {rank!r:.40} and "
                                 f"{alpha!r:.40}")  # fmt: skip
            alpha = float(alpha)
            targets = config["target_modules"]
            if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
                raise ValueError(f"target_modules must be a list of names, found {targets!r:.80}")
            targets = tuple(sorted(targets))
            with safe_open(path, "pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, ArithmeticError,
                RecursionError) as error:  # fmt: skip
            raise MergeError(
                f"{folder}: must hold a LoRA adapter as PEFT writes it, cannot be read as one: "
                f"{type(error).__name__}: {error}"
            ) from None
        faults = _config_faults(config)
        shapes, embeddings, key_faults = _pair_up(found)
        if rank < 1 or not (math.isfinite(alpha) and alpha != 0):
            faults.append(f"r must be at least 1 and lora_alpha not 0, found {rank} and {alpha}")
        foreign = [m for m, (a, _) in shapes.items() if a[0] != rank]
        if foreign:
            faults.append(f"each A must have r = {rank} rows, found another number in {foreign[0]}")
        if faults or key_faults:
            listing = "\n".join(f"  - {fault}" for fault in [*faults, *key_faults][:20])
            raise MergeError(f"{folder}: must be a plain LoRA adapter.\n{listing}")
        rslora, base = bool(config.get("use_rslora")), metadata.get(BASE_KEY)
        digest = sha256_file(path)
        return cls(path, digest, rank, alpha, rslora, targets, base, shapes, embeddings)

    def expects(self, module: str) -> bool:
        """Whether its config says that `module` is adapted (PEFT's rule: a whole name or the
        end of one)."""
        return any(_answers(entry, module) for entry in self.targets)

    def targets_outside(self, modules: Iterable[str]) -> list[str]:
        """Entries of its config's targets that none of `modules` answers to."""
        known = list(modules)
        return [e for e in self.targets if not any(_answers(e, module) for module in known)]

    def sides(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] in float32; of an embedding A [rank, dim], B [n, rank]."""
        with safe_open(self.path, "pt") as file:
            if module in self.embeddings:
                a, b = (f"{KEY_PREFIX}{module}.lora_embedding_{side}" for side in "AB")
                return file.get_tensor(b).float().T, file.get_tensor(a).float().T
            a, b = (f"{KEY_PREFIX}{module}.lora_{side}.weight" for side in "AB")
            return file.get_tensor(a).float(), file.get_tensor(b).float()

    def delta(self, module: str) -> torch.Tensor:
        """scale · B A in float32: [out, in], the weight's shape."""
        a, b = self.sides(module)
        return self.scale * (b @ a)


def adapter_hint(folder: Path) -> str:
    """What was found where an adapter in PEFT's form should be, and what to do."""
    if not folder.is_dir():
        return "found no folder there."
    if (folder / "adapter" / WEIGHTS).is_file():
        return f"found a train stage: give {folder / 'adapter'}."
    if (folder / "lora.safetensors").is_file():
        return "found moshi's form: `duplex convert adapter FOLDER OUT --to peft` first."
    return "found none."


def _answers(entry: str, module: str) -> bool:
    return module == entry or module.endswith(f".{entry}")


def write_adapter(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], base_sha256: str | None
) -> None:
    """Write an adapter folder that `PeftModel.from_pretrained` reads.

    Args:
        state: as `training.lora.adapter_state` gives it.
        config: `LoraConfig.to_dict()`; sets are sorted, so that the bytes repeat.
        base_sha256: None where it is not known.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | ({BASE_KEY: base_sha256} if base_sha256 else {})
    write_state(folder / WEIGHTS, state, metadata)
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    plain["base_model_name_or_path"] = None  # a path would be this machine's
    plain.pop("peft_version", None)  # stands in the manifest's provenance
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    write_atomic(folder / CONFIG, text.encode())


def write_state(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file whose bytes repeat: the library's writer puts metadata in any order."""
    specs = [TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in state.items()]
    with atomic_path(path) as temporary:
        write_tensors(temporary, specs, lambda spec: state[spec.name], metadata)


def load_adapter_weights(
    model: nn.Module, folder: Path, section: LoraSection, base_sha256: str
) -> Adapter:
    """Make the weights of an adapter folder the start of a model's adapters, in place.

    Args:
        model: with adapters already put on (`training.lora.add_adapters`).
        section: what this run's adapters are; dropout may differ from the folder's.
        base_sha256: of the weights that this run trains on.

    Raises:
        MissingInputError, MergeError: as `Adapter.open`.
        RequestError: names each difference between that adapter and this run's.
    """
    found = Adapter.open(folder)
    state = {file_key(name): p for name, p in adapter_parameters(model).items()}
    with safe_open(found.path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        faults = _differences(found, section, base_sha256)
        faults += _key_differences(shapes, {key: tuple(p.shape) for key, p in state.items()})
        if faults:
            listing = "\n".join(f"  - {fault}" for fault in faults)
            raise RequestError(
                f"train.continue_from: an adapter must be trained on as it was made; {folder} "
                f"differs from this run.\n{listing}\nSet this run as the adapter is, or leave "
                "train.continue_from out; a merged checkpoint as model.base takes any new adapter."
            )
        loaded = {key: file.get_tensor(key) for key in state}
    broken = [key for key, tensor in loaded.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise RequestError(f"{found.path}: A and B must be finite, found otherwise in {broken[0]}")
    with torch.no_grad():
        for key, parameter in state.items():
            parameter.copy_(loaded[key])
    return found


def _differences(found: Adapter, section: LoraSection, base_sha256: str) -> list[str]:
    faults = [
        f"{name} is {there} there and {here} here"
        for name, there, here in (
            ("rank", found.rank, section.rank),
            ("alpha", found.alpha, section.alpha),
            ("rslora", found.rslora, section.rslora),
        )
        if there != here
    ]
    if found.base_sha256 is None:
        faults.append(
            "its file does not name the base that it was trained on; "
            "`duplex convert adapter IN OUT --to peft --base MODEL` writes one that does"
        )
    elif found.base_sha256 != base_sha256:
        faults.append(
            f"it was trained on the base {found.base_sha256[:12]}…, this one is {base_sha256[:12]}…"
        )
    return faults


def _key_differences(
    there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]
) -> list[str]:
    """Modules that only one of the two adapts; shapes where the names agree."""
    faults = []
    for where, keys in (("only there", there.keys() - here), ("only here", here.keys() - there)):
        modules = sorted({m[1] for key in keys if (m := _PARAMETER.fullmatch(key))})
        if modules:
            more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
            faults.append(f"{where} adapted: {', '.join(modules[:3])}{more}")
    shapes = [key for key in there.keys() & here.keys() if there[key] != here[key]]
    if shapes and not faults:
        key = min(shapes)
        faults.append(f"{key} is {list(there[key])} there and {list(here[key])} here")
    return faults


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
) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], frozenset[str], list[str]]:
    """Shapes of A and B by module, which of them are embeddings, and what does not fit."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    embeddings: set[str] = set()
    faults = []
    for key, shape in found.items():
        match = _PARAMETER.fullmatch(key)
        if match is None:
            faults.append(
                f"keys must read {KEY_PREFIX}<module>.lora_A.weight or lora_B, or "
                f"<module>.lora_embedding_A or lora_embedding_B, found {key}"
            )
            continue
        if len(shape) != 2:
            faults.append(f"{key}: must be a matrix, found the shape {list(shape)}")
            continue
        if match[3]:
            embeddings.add(match[1])
        side = match[2] or ("lora_B" if match[3].endswith("A") else "lora_A")  # transposed
        if side in sides.setdefault(match[1], {}):
            faults.append(f"{match[1]} must have one adapter, found those of a Linear and of an "
                          "embedding")  # fmt: skip
        sides[match[1]][side] = shape if match[2] else shape[::-1]
    for module, pair in sides.items():
        missing = {"lora_A", "lora_B"} - set(pair)
        if missing:
            faults.append(f"{module} must have lora_A and lora_B, has no {missing.pop()}")
    if not found:
        faults.append("it must hold at least one adapted module, found none")
    whole = {m: (p["lora_A"], p["lora_B"]) for m, p in sides.items() if len(p) == 2}
    return whole, frozenset(embeddings), faults
