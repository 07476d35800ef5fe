"""Reads the YAML files that people write: personas, scenarios, evaluation prompts.

All faults of a folder are reported at once, each with its file.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.errors import DataFileError
from duplex.files import parse_yaml

RecordT = TypeVar("RecordT", bound=Record)

DRAFT_SUFFIX = ".draft.yaml"  # written by a model, read by nobody yet
PLACEHOLDER = "FILL IN"  # what `duplex personas new` leaves for a person to write

CHECKOUT = Path(__file__).resolve().parent.parent


def find_path(path: str) -> Path:
    """A path of a config: as seen from the working directory, else from the checkout."""
    here = Path(path).expanduser()
    if here.is_absolute() or here.exists():
        return here
    shipped = CHECKOUT / path
    return shipped if shipped.exists() else here


def load_personas(folder: Path, only: tuple[str, ...] | None = None) -> list[Persona]:
    """Personas of a folder, sorted by id; those named in `only`, if given.

    Raises:
        DataFileError: no folder, a file that breaks the schema, an id found twice.
    """
    return _load_folder(folder, Persona, "persona", only)


def load_scenarios(folder: Path, only: tuple[str, ...] | None = None) -> list[Scenario]:
    """Scenarios of a folder, sorted by id; raises as `load_personas` does."""
    return _load_folder(folder, Scenario, "scenario", only)


def load_domain(path: Path) -> Domain:
    """The domain of a file.

    Raises:
        DataFileError: no such file, or it breaks the schema.
    """
    return validate(Domain, read_yaml(path), path)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, or a DataFileError that names it."""
    try:
        return copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataFileError(f"{path}: the file must exist, found nothing there.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataFileError(
            f"{path}: must be YAML in UTF-8: {' '.join(str(error).split())}"
        ) from None


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Any:
    """Once for each content: planning reads all files of data/ again for each stage."""
    return parse_yaml(text)


def describe_faults(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in fault['loc']) or 'the file'}: "
        f"{fault['msg'].removeprefix('Value error, ')}"
        for fault in error.errors()
    )


def validate(model: type[BaseModel], value: Any, path: Path) -> Any:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise DataFileError(f"{path}: {describe_faults(error)}") from None


# -- checked together


@dataclass(frozen=True)
class World:
    """A domain with its personas and scenarios, each by the file that it is from."""

    domain: Domain
    personas: dict[Path, Persona]
    scenarios: dict[Path, Scenario]


def load_world(
    domain: Path,
    personas: Path,
    scenarios: Path,
    *,
    only: tuple[str, ...] | None = None,
    only_scenarios: tuple[str, ...] | None = None,
) -> World:
    """A domain's file and the two folders that belong to it, checked together.

    Raises:
        DataFileError: with every fault of all files.
    """
    faults: list[str] = []
    place: Domain | None = None
    try:
        place = load_domain(domain)
    except DataFileError as error:
        faults.append(str(error))
    chosen, bad = _read_folder(personas, Persona, "persona", only)
    situations, worse = _read_folder(scenarios, Scenario, "scenario", only_scenarios)
    faults += bad + worse
    if place is not None:
        faults += domain_faults(place, chosen, situations)
    if faults:
        raise DataFileError(_listing(f"{personas}, {scenarios} and {domain}", faults))
    assert place is not None
    return World(place, chosen, situations)


def domain_faults(
    domain: Domain, personas: Mapping[Path, Persona], scenarios: Mapping[Path, Scenario]
) -> list[str]:
    """What in personas and scenarios does not fit their domain, a line each with its file."""
    faults = []
    records: list[tuple[Path, Persona | Scenario]] = [*personas.items(), *scenarios.items()]
    for path, record in records:
        if record.domain != domain.id:
            faults.append(f"{path}: domain must be {domain.id}, found {record.domain}")
        elif isinstance(record, Persona):
            if record.type not in domain.types:
                faults.append(_not_of(path, "type", record.type, domain.types, domain.id))
            if record.language != domain.language:
                faults.append(
                    f"{path}: language must be that of {domain.id}, {domain.language}; "
                    f"found {record.language}"
                )
        elif record.kind not in domain.kinds:
            faults.append(_not_of(path, "kind", record.kind, domain.kinds, domain.id))
    return faults


def _not_of(path: Path, key: str, found: str, known: Iterable[str], domain: str) -> str:
    near = difflib.get_close_matches(found, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{path}: {key} must be one of {', '.join(known)} ({domain}), found {found}{hint}"


# -- one folder


def is_draft(path: Path) -> bool:
    """Whether nobody has read the file yet: it ends in `.draft.yaml`, and no run takes it."""
    return path.name.endswith(DRAFT_SUFFIX)


def read_record(path: Path, model: type[RecordT]) -> RecordT:
    """The persona or scenario of a file.

    Raises:
        DataFileError: places left to fill in, the schema broken, or an id that is not the file's.
    """
    value = read_yaml(path)
    unfilled = sorted(_unfilled(value))
    if unfilled:
        raise DataFileError(
            f"{path}: each {PLACEHOLDER} must be filled in, found {', '.join(unfilled)}"
        )
    record: RecordT = validate(model, value, path)
    expected = path.name.removesuffix(DRAFT_SUFFIX).removesuffix(".yaml")
    if record.id != expected:
        raise DataFileError(f"{path}: id must be the file's name, {expected}; found {record.id}")
    return record


def _unfilled(value: Any, where: str = "") -> Iterator[str]:
    """Where in a file a placeholder is left."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _unfilled(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _unfilled(inner, f"{where}.{index}")
    elif isinstance(value, str) and PLACEHOLDER in value:
        yield where


def _read_folder(
    folder: Path, model: type[RecordT], kind: str, only: tuple[str, ...] | None
) -> tuple[dict[Path, RecordT], list[str]]:
    """Records sorted by id, and the folder's faults."""
    if not folder.is_dir():
        return {}, [f"the {kind} folder must exist, found nothing at {folder}."]
    faults: list[str] = []
    found: dict[Path, RecordT] = {}
    files = sorted(folder.glob("*.yaml"))
    for path in files:
        if is_draft(path):
            continue
        try:
            found[path] = read_record(path, model)
        except DataFileError as error:
            faults.append(str(error))
    ids = {record.id for record in found.values()}
    for wanted in sorted(set(only or ()) - ids) if not faults else ():
        draft = folder / f"{wanted}{DRAFT_SUFFIX}"
        hint = f"; {draft} is a draft: read it, then rename it" if draft.exists() else ""
        faults.append(f"{kind} {wanted} is asked for, but {folder} holds no such id{hint}")
    if not found and not faults:
        faults.append(f"{folder} must hold at least one {kind} as *.yaml, found none")
    by_id = sorted(found.items(), key=lambda item: item[1].id)
    return {path: record for path, record in by_id if only is None or record.id in only}, faults


def _load_folder(
    folder: Path, model: type[RecordT], kind: str, only: tuple[str, ...] | None
) -> list[RecordT]:
    found, faults = _read_folder(folder, model, kind, only)
    if faults:
        raise DataFileError(_listing(str(folder), faults))
    return list(found.values())


def _listing(where: str, faults: list[str]) -> str:
    lines = "\n".join(f"  - {fault}" for fault in faults)
    return f"{len(faults)} fault(s) in {where}; nothing was written.\n{lines}"
