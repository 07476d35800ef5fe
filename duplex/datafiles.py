"""Reads the YAML files that people write: personas, scenarios, evaluation prompts.

All faults of a folder are reported at once, each with its file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from duplex.base import Record
from duplex.characters import Domain, Persona, Scenario
from duplex.errors import DataFileError

RecordT = TypeVar("RecordT", bound=Record)

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
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataFileError(f"{path}: the file must exist, found nothing there.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataFileError(
            f"{path}: must be YAML in UTF-8: {' '.join(str(error).split())}"
        ) from None


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


def _load_folder(
    folder: Path, model: type[RecordT], kind: str, only: tuple[str, ...] | None
) -> list[RecordT]:
    if not folder.is_dir():
        raise DataFileError(f"the {kind} folder must exist, found nothing at {folder}.")
    faults: list[str] = []
    by_id: dict[str, tuple[Path, RecordT]] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            record: RecordT = validate(model, read_yaml(path), path)
        except DataFileError as error:
            faults.append(str(error))
            continue
        if record.id in by_id:
            faults.append(f"{path}: id {record.id} is taken by {by_id[record.id][0]}")
            continue
        by_id[record.id] = (path, record)
    for wanted in only or ():
        if wanted not in by_id and not faults:
            faults.append(f"{kind} {wanted} is asked for, but {folder} holds no such id")
    if not by_id and not faults:
        faults.append(f"{folder} must hold at least one {kind} as *.yaml, found none")
    if faults:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        raise DataFileError(f"{len(faults)} fault(s) in {folder}; nothing was written.\n{listing}")
    return [record for key, (_, record) in sorted(by_id.items()) if only is None or key in only]
