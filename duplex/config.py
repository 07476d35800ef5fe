"""The one configuration schema: a section for each stage, and all defaults.

A YAML file holds only what differs from these defaults. Every fault of a file is reported
at once, an unknown key with the nearest known one. `${NAME}` takes a value from the
environment when the config is read; such a value is never written to a run folder, since
only sections *without* `runtime` enter keys and manifests, and secrets live in `runtime`.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from duplex.errors import ConfigError

Probability = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]

Device = Literal["auto", "cpu", "cuda"]
ProfileName = Literal["workbench"]

# A profile sets a group of defaults; a key that the YAML names wins over it.
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "workbench": {},
}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Runtime(Section):
    """How a stage runs. Never part of a key: it changes no result."""

    max_reject_rate: Probability = 0.05


class StageSection(Section):
    """Base of the sections that a stage owns."""

    runtime: Runtime = Runtime()


class ModelSection(Section):
    """The base model. `pocket` is a small one of our own, built here from a seed.

    `base` is `pocket`, a folder with `config.json`, or a Hugging Face repository `owner/name`.
    """

    base: str = "pocket"
    revision: str | None = None


class PersonasSection(StageSection):
    folder: str = "data/personas"
    scenarios: str = "data/scenarios"
    only: tuple[str, ...] | None = Field(default=None, description="persona ids; None: all")
    only_scenarios: tuple[str, ...] | None = Field(
        default=None, description="scenario ids; None: all"
    )


class DialoguesRuntime(Runtime):
    api_key: str | None = Field(default=None, repr=False, description="write ${OPENAI_API_KEY}")
    base_url: str | None = Field(default=None, description="where the model is served")
    timeout_s: float = Field(default=120, gt=0)


class DialoguesSection(StageSection):
    writer: Literal["scripted", "openai"] = "scripted"
    per_persona: int = Field(default=4, ge=1, le=1000)
    min_turns: int = Field(default=15, ge=2)
    max_turns: int = Field(default=25, ge=2)
    llm: str | None = Field(default=None, description="model name at the endpoint")
    temperature: float = Field(default=0.8, ge=0, le=2)
    runtime: DialoguesRuntime = DialoguesRuntime()

    @model_validator(mode="after")
    def _consistent(self) -> DialoguesSection:
        if self.min_turns > self.max_turns:
            raise ValueError(
                f"min_turns must not exceed max_turns, found {self.min_turns} > {self.max_turns}"
            )
        if self.writer == "openai" and not self.llm:
            raise ValueError("writer: openai needs llm, the model's name at the endpoint")
        return self


class VoicesSection(StageSection):
    engine: Literal["espeak"] = "espeak"
    user_voices: int = Field(
        default=4, ge=1, le=64, description="voices that share the user's side"
    )


class SpeechSection(StageSection):
    engine: Literal["espeak"] = "espeak"
    loudness_dbfs: float = Field(default=-24, ge=-60, le=0, description="RMS of each utterance")
    lead_in_s: float = Field(default=0.32, ge=0, le=30)
    tail_s: float = Field(default=0.48, ge=0, le=30)


class TensorsSection(StageSection):
    alignment: Literal["onset"] = "onset"
    onset_fraction: float = Field(default=0.3, gt=0, le=1)
    prompt: bool = True
    valid_fraction: Probability = Field(default=0.1, description="share of personas held out")
    max_frames: int = Field(default=3000, ge=50, le=3000)


class LoraSection(Section):
    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["attention", "mlp", "depth", "heads"], ...] = (
        "attention", "mlp", "depth", "heads",
    )  # fmt: skip


class LossSection(Section):
    """Weights of the cross-entropy terms; formulas in `training/loss.py`."""

    semantic_weight: float = Field(default=100.0, ge=0)
    acoustic_weight: float = Field(default=1.0, ge=0)
    text_padding_weight: float = Field(default=0.5, ge=0)


class TrainRuntime(Runtime):
    device: Device = "auto"
    checkpoint_every: int = Field(default=20, ge=1, description="steps between checkpoints")
    wandb: bool = False


class TrainSection(StageSection):
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    crop_frames: int = Field(default=1250, ge=16, le=3000, description="longest training clip")
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    validate_every: int = Field(default=20, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    runtime: TrainRuntime = TrainRuntime()


class MergeSection(StageSection):
    dtype: Literal["float32", "bfloat16"] = "float32"


class SamplingSection(Section):
    """Defaults of a conversation; its URL may name others."""

    text_temperature: float = Field(default=0.7, ge=0, le=5)
    audio_temperature: float = Field(default=0.8, ge=0, le=5)
    text_topk: int = Field(default=25, ge=1)
    audio_topk: int = Field(default=250, ge=1)


class ServeRuntime(Runtime):
    host: str = "127.0.0.1"
    port: int = Field(default=8998, ge=0, le=65535, description="0: any free port")
    device: Device = "auto"
    token: str | None = Field(default=None, repr=False, description="write ${DUPLEX_TOKEN}")
    start_timeout_s: float = Field(default=600, gt=0)


class ServeSection(StageSection):
    sampling: SamplingSection = SamplingSection()
    runtime: ServeRuntime = ServeRuntime()


class EvaluateRuntime(Runtime):
    device: Device = "auto"
    start_timeout_s: float = Field(default=600, gt=0)


class EvaluateSection(StageSection):
    items: str = "data/prompts/seeds.yaml"
    seconds: float = Field(default=24, gt=1, le=240, description="length of each conversation")
    answer_s: float = Field(default=2.4, ge=0, le=30, description="pause left after each user turn")
    seed: int = 0
    sampling: SamplingSection = SamplingSection()
    runtime: EvaluateRuntime = EvaluateRuntime()


class Config(Section):
    name: Name
    seed: int = Field(default=42, ge=0)
    profile: ProfileName = "workbench"
    model: ModelSection = ModelSection()
    personas: PersonasSection = PersonasSection()
    dialogues: DialoguesSection = DialoguesSection()
    voices: VoicesSection = VoicesSection()
    speech: SpeechSection = SpeechSection()
    tensors: TensorsSection = TensorsSection()
    train: TrainSection = TrainSection()
    merge: MergeSection = MergeSection()
    serve: ServeSection = ServeSection()
    evaluate: EvaluateSection = EvaluateSection()

    def section(self, stage: str) -> StageSection:
        return getattr(self, stage)

    def keyed(self, stage: str) -> dict[str, Any]:
        """The part of a stage's section that enters keys: everything but `runtime`."""
        return self.section(stage).model_dump(mode="json", exclude={"runtime"})


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config. `overrides` are `section.key=value` strings, values in YAML.

    Raises:
        ConfigError: with every fault found; nothing has been written.
    """
    source = str(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(source, _missing_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(source, [f"the file must be readable as UTF-8: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"the file must be YAML: {_one_line(error)}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError(source, [f"the file must hold a mapping, found {type(raw).__name__}"])
    faults: list[str] = []
    for override in overrides or []:
        _apply_override(raw, override, faults)
    raw = _expand_environment(raw, "", faults)
    _apply_profile(raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        faults += [_describe(fault) for fault in error.errors()]
        raise ConfigError(source, faults) from None
    if faults:
        raise ConfigError(source, faults)
    return config


def _missing_file(path: Path) -> list[str]:
    known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return [f"the file must exist, found nothing there{hint}"]


def _apply_override(raw: dict[str, Any], override: str, faults: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        faults.append(f"--set {override}: must read section.key=value")
        return
    *parents, leaf = key.strip().split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            faults.append(f"--set {override}: {parent} must be a section, found {child!r}")
            return
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        faults.append(f"--set {override}: the value must be YAML: {_one_line(error)}")


def _expand_environment(value: Any, where: str, faults: list[str]) -> Any:
    if isinstance(value, dict):
        return {
            k: _expand_environment(v, f"{where}.{k}".strip("."), faults) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_expand_environment(v, where, faults) for v in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value)
    if whole:
        # A secret that is not set is not an error until somebody needs it.
        return (
            os.environ.get(whole[1])
            if ".runtime." in f"{where}."
            else _required(whole[1], where, faults)
        )
    return re.sub(
        r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", lambda m: _required(m[1], where, faults) or "", value
    )


def _required(name: str, where: str, faults: list[str]) -> str | None:
    value = os.environ.get(name)
    if value is None:
        faults.append(f"{where}: needs the environment variable {name}, which is not set")
    return value


def _apply_profile(raw: dict[str, Any]) -> None:
    for section, defaults in PROFILES.get(str(raw.get("profile", "workbench")), {}).items():
        own = raw.get(section) or {}
        if isinstance(own, dict):
            raw[section] = _merged(defaults, own)


def _merged(defaults: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    result = dict(defaults)
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _describe(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    where = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _known_keys(path[:-1]), n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])}?" if near else "remove it"
        return f"{where}: unknown key; {hint}"
    if fault["type"] == "missing":
        return f"{where}: must be given, found nothing"
    message = fault["msg"].removeprefix("Value error, ")
    found = fault["input"]
    if isinstance(found, dict) or "token" in path[-1:] or "api_key" in path[-1:]:
        return f"{where}: {message}"
    return f"{where}: {message}, found {found!r}"


def _known_keys(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        model = next(
            (
                t
                for t in (field.annotation, *get_args(field.annotation))
                if hasattr(t, "model_fields")
            ),
            None,
        )
    return list(getattr(model, "model_fields", {}))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
