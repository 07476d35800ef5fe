"""docs/records.md and docs/config.md, made from the schema itself.

    python -m pipeline.schema_docs            exit 1 where a page is not what the schema says
    python -m pipeline.schema_docs --write

A meaning is a field's description; what a class's docstring says stands above its table. An empty
meaning is a field whose name says it.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from duplex.base import Record
from duplex.config import PROFILES, Config
from duplex.datafiles import CHECKOUT
from duplex.files import write_atomic
from duplex.records import RECORD_TYPES
from duplex.sections import Runtime, Section

# Types that a schema names once, as a reader calls them. Others of the schema's names are choices,
# which are written out.
WORDS = {
    "str": "text", "Text": "text", "int": "integer", "float": "number", "bool": "true or false",
    "Share": "number", "Probability": "number", "Intensity": "number", "Slug": "slug",
    "Name": "slug", "Sha256": "sha256", "Language": "language", "Any": "anything",
    "None": "null",
}  # fmt: skip
LIMITS = {"ge": "at least", "gt": "over", "le": "at most", "lt": "below"}
HEAD = (
    "<!-- Made by `python -m pipeline.schema_docs --write`: change the schema, not this page. -->"
)

RECORDS_INTRO = """# Records

What flows between the stages. Each line of a `parts/` file is one record as JSON, its type under
`record`; a field that is null is left out. Every record has an `id` that is unique within its
stage. Audio and tensors are not in it: a `sha256` names a blob in `blobs/`. A slug is lower-case
letters, digits, `_`, `.` and `-`, at most 96 of them; a language is ISO 639-1, as `en`. Unknown
keys are refused.

`agent` is what the model plays, `user` the person who talks to it. A frame is 80 ms. The schema is
[duplex/records.py](../duplex/records.py) and [duplex/characters.py](../duplex/characters.py)."""

CONFIG_INTRO = """# Configuration

A YAML file holds what differs from these defaults; only `name` must be given. An unknown key is
refused with the nearest known one, and all faults are reported at once. `--set section.key=value`
changes one for one run. `${NAME}` takes a value from the environment.

What is in a `runtime` section changes how a stage runs, never its result: it enters no key, and no
run folder holds it. Every other key is part of its stage's key, so another value is another folder.
The schema is [duplex/config.py](../duplex/config.py) with `config_data.py`, `config_train.py` and
`sections.py`."""


# -- pages


def records_page() -> str:
    """docs/records.md: each record type, and its parts behind the first record that has them."""
    told: set[type[BaseModel]] = set()
    blocks = [RECORDS_INTRO]
    for record in RECORD_TYPES.values():
        for model in with_parts(record):
            if model not in told:
                told.add(model)
                blocks.append(model_block(model, f"## {model.__name__}"))
    return page(blocks)


def config_page() -> str:
    """docs/config.md: the top level, then each section under the path that a YAML gives it."""
    blocks = [CONFIG_INTRO, model_block(Config, "## Top level"), profiles_block()]
    blocks.append(model_block(Runtime, "## `runtime` of every stage"))
    for path, section in sections(Config):
        if section is not Runtime:
            blocks.append(model_block(section, f"{'#' * (2 + path.count('.'))} `{path}`"))
    return page(blocks)


PAGES = {"docs/records.md": records_page, "docs/config.md": config_page}


def page(blocks: list[str]) -> str:
    return "\n\n".join([HEAD, *blocks]) + "\n"


def profiles_block() -> str:
    lines = [
        "## Profiles",
        "",
        "`profile` sets a group of defaults; a key that the YAML names wins over it.",
        "",
        "| profile | sets |",
        "| --- | --- |",
    ]
    for name, values in PROFILES.items():
        shown = ", ".join(f"`{key}: {as_yaml(value)}`" for key, value in flat(values))
        lines.append(f"| `{name}` | {shown or 'nothing: the defaults below'} |")
    return "\n".join(lines)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# -- one model


def model_block(model: type[BaseModel], heading: str) -> str:
    """Heading, the class's own docstring, and the table of its fields."""
    told = inspect.cleandoc(model.__dict__.get("__doc__") or "")
    shown = [
        (name, field)
        for name, field in model.model_fields.items()
        if not (issubclass(model, Runtime) and model is not Runtime and is_common(name))
        and not (issubclass(model, Record) and name == "id")
    ]
    rows = [
        f"| `{name}` | {type_of(model, name)} | {default_of(field)} | {meaning_of(field)} |"
        for name, field in sorted(shown, key=lambda item: is_section(item[1]))
    ]
    table = "\n".join(["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
    return "\n\n".join(part for part in (heading, told, table) if part)


def is_common(name: str) -> bool:
    return name in Runtime.model_fields


def is_section(field: FieldInfo) -> bool:
    """Whether it is a section of its own, with a table of its own below."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def type_of(model: type[BaseModel], name: str) -> str:
    """The type as the source writes it, in words, with its limits."""
    owner = next(c for c in model.__mro__ if name in inspect.get_annotations(c))
    names = vars(sys.modules[owner.__module__])
    text = in_words(ast.parse(inspect.get_annotations(owner)[name], mode="eval").body, names)
    limits = limits_of(model.model_fields[name], names)
    return f"{text}, {limits}" if limits else text


def in_words(node: ast.expr, names: dict[str, Any]) -> str:
    """An annotation -> words. Choices are written out, models are named with a link."""
    if isinstance(node, ast.BinOp):
        return f"{in_words(node.left, names)} or {in_words(node.right, names)}"
    if isinstance(node, ast.Constant):
        return "null" if node.value is None else f"`{node.value}`"
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        parts = [in_words(p, names) for p in inner if not is_ellipsis(p)]
        match ast.unparse(node.value):
            case "Literal":
                return " or ".join(parts)
            case "dict":
                return f"{parts[0]} → {parts[1]}"
            case "tuple" if any(map(is_ellipsis, inner)):
                return f"list of {parts[0]}"
            case "tuple":
                return f"[{', '.join(parts)}]"
        raise ValueError(f"a type that the pages have no words for: {ast.unparse(node)}")
    name = ast.unparse(node)
    if name in WORDS:
        return WORDS[name]
    meant = names[name]
    if isinstance(meant, type) and issubclass(meant, BaseModel):
        return "section" if issubclass(meant, Section) else f"[{name}](#{name.lower()})"
    return of_value(meant)


def is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def of_value(meant: Any) -> str:
    """A named type: the choices of a Literal; what is inside of an annotated one."""
    origin, inner = get_origin(meant), get_args(meant)
    if hasattr(meant, "__metadata__"):
        return of_value(inner[0])
    if origin is tuple:
        return f"list of {of_value(inner[0])}"
    if origin is dict:
        return f"{of_value(inner[0])} → {of_value(inner[1])}"
    if inner:
        return " or ".join(f"`{choice}`" for choice in inner)
    return WORDS[meant.__name__]


def limits_of(field: FieldInfo, names: dict[str, Any]) -> str:
    found = [
        f"{word} {getattr(rule, key):g}"
        for rule in field.metadata
        for key, word in LIMITS.items()
        if hasattr(rule, key)
    ]
    least = [rule.min_length for rule in field.metadata if getattr(rule, "min_length", None)]
    if least and get_origin(field.annotation) in (tuple, dict):
        found.append(f"at least {least[0]}")
    return ", ".join(found)


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if isinstance(value, BaseModel) else f"`{as_yaml(value)}`"


def as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, float | int):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return str(value) if value != "" else '""'


def meaning_of(field: FieldInfo) -> str:
    told = (field.description or "").replace("|", "\\|").replace("None:", "null:")
    if is_section(field):
        is_runtime = isinstance(field.annotation, type) and issubclass(field.annotation, Runtime)
        return told or ("how it runs" if is_runtime else "below")
    return told


# -- which models there are


def with_parts(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and the models in its fields, depth first."""
    yield model
    for field in model.model_fields.values():
        for part in models_in(field.annotation):
            yield from with_parts(part)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(path, section) of all that is in a section. One within a dictionary has `<key>` in it."""
    for name, field in model.model_fields.items():
        for part in models_in(field.annotation):
            path = f"{prefix}{name}" + (".<key>" if get_origin(field.annotation) is dict else "")
            yield path, part
            yield from sections(part, f"{path}.")


def main(arguments: list[str], root: Path = CHECKOUT) -> int:
    """Write the pages, or say which of them differ. The exit code."""
    if arguments not in ([], ["--write"]):
        print("usage: python -m pipeline.schema_docs [--write]", file=sys.stderr)
        return 2
    stale = [
        name
        for name, make in PAGES.items()
        if not (root / name).exists() or (root / name).read_text(encoding="utf-8") != make()
    ]
    for name in stale if arguments else ():
        write_atomic(root / name, PAGES[name]().encode())
        print(f"written: {name}")
    for name in () if arguments else stale:
        print(f"{name} must be what the schema says; python -m pipeline.schema_docs --write")
    return 0 if arguments or not stale else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
