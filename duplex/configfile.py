"""A YAML file -> `duplex.config.Config`, with every fault of the file reported at once.

An unknown key is named with the nearest known one. `${NAME}` takes a value from the
environment when the config is read; such a value is never written to a run folder.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from duplex.config import PROFILES, Config
from duplex.errors import ConfigError


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML config. `overrides` are `section.key=value` strings, values in YAML.

    Raises:
        ConfigError: with every fault found; nothing has been written.
    """
    source = str(path)
    try:
        raw = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(source, _missing_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(source, [f"the file must be readable as UTF-8: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [f"the file must be YAML: {_one_line(error)}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError(source, [f"the file must hold a mapping, found {type(raw).__name__}"])
    return _built(source, raw, overrides or [])


def section_of(stage: str, overrides: Sequence[str]) -> Any:
    """A stage's section without a file: the defaults, and `stage.key=value` strings.

    Raises:
        ConfigError: with every fault found, also a key of another section.
    """
    strange = [one for one in overrides if not one.startswith(f"{stage}.")]
    if strange:
        faults = [f"--set {one}: must be a key of {stage}, as in {stage}.…=…" for one in strange]
        raise ConfigError("the command line", faults)
    return _built("the command line", {"name": stage}, overrides).section(stage)


def _built(source: str, raw: dict[str, Any], overrides: Sequence[str]) -> Config:
    faults: list[str] = []
    for override in overrides:
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads a bare `no` as false. As a key it is a name: Norwegian, in `engines`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        node.value = [(_as_name(key), value) for key, value in node.value]
        return super().construct_mapping(node, deep)


def _as_name(key: yaml.Node) -> yaml.Node:
    if key.tag != "tag:yaml.org,2002:bool" or not isinstance(key, yaml.ScalarNode):
        return key
    return yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


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
        node[leaf] = _read_yaml(text)
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
            if section == "train" and own.get("steps") and "epochs" not in own:
                raw[section].pop("epochs", None)  # the profile's; the file says steps


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
