"""Grades that people gave on the server's page, beside ours.

The page writes a line whenever somebody grades, so a conversation may have several: its last one
counts. Lines that are no grade are counted and passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.agreement import agreement
from duplex.errors import MissingInputError
from duplex.files import read_lines
from duplex.metrics import proportion_interval
from pipeline.evaluation.rubric import GRADES
from pipeline.serving.grades import Grade


class KeptGrade(Grade):
    """A line of the file: what the page sent, and whom the server was serving."""

    model_digest: str = ""
    label: str = ""
    at: int = 0


@dataclass(frozen=True)
class People:
    """grades: one for each conversation, in the order of their last lines. replaced: lines that a
    later one of their conversation replaced; unreadable: lines that are no grade."""

    grades: tuple[KeptGrade, ...]
    replaced: int = 0
    unreadable: int = 0


def read_people(path: Path) -> People:
    """
    Raises:
        MissingInputError: no such file.
    """
    if not path.is_file():
        raise MissingInputError(
            f"{path} must hold people's grades, found nothing there. The server writes them where "
            "`duplex serve --grades` says, or to grades.jsonl of the run folder."
        )
    last: dict[Any, KeptGrade] = {}
    replaced = unreadable = 0
    for number, line in enumerate(read_lines(path)):
        try:
            grade = KeptGrade.model_validate(line)
        except ValidationError:
            unreadable += 1
            continue
        # A page of before conversations had names: each grade is one of its own.
        key = (grade.model_digest, grade.label, grade.conversation or number)
        replaced += last.pop(key, None) is not None
        last[key] = grade
    return People(tuple(last.values()), replaced, unreadable)


def by_model(grades: Sequence[KeptGrade]) -> list[dict[str, Any]]:
    """A row for each model: how often each grade was given, with exact 95 % bounds."""
    rows = []
    for label, digest in dict.fromkeys((grade.label, grade.model_digest) for grade in grades):
        own = [g.grade for g in grades if (g.label, g.model_digest) == (label, digest)]
        counts = {}
        for name in GRADES:
            hits = own.count(name)
            low, high = proportion_interval(hits, len(own))
            counts[name] = {"hits": hits, "value": round(hits / len(own), 6),
                            "low": round(low, 6), "high": round(high, 6)}  # fmt: skip
        rows.append({"label": label, "model_digest": digest, "n": len(own), "grades": counts})
    return rows


def beside_ours(
    grades: Iterable[KeptGrade], ours: Callable[[KeptGrade], str | None]
) -> dict[str, Any]:
    """How far our grades agree with people's: `duplex.agreement.Agreement` as a row.

    Args:
        ours: our grade of the conversation that was graded; None where it can't be told. Those are
            counted as `without_ours`, and in no other number.
    """
    pairs, without = [], 0
    for grade in grades:
        own = ours(grade)
        if own is None:
            without += 1
        else:
            pairs.append((own, grade.grade))
    found = asdict(agreement(pairs, GRADES))
    row = {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}
    return row | {"without_ours": without}


def people_data(path: Path, ours: Callable[[KeptGrade], str | None]) -> dict[str, Any]:
    """What a report shows of a grades.jsonl; raises as `read_people`."""
    people = read_people(path)
    return {
        "conversations": len(people.grades),
        "replaced": people.replaced,
        "unreadable": people.unreadable,
        "models": by_model(people.grades),
        "agreement": beside_ours(people.grades, ours),
    }
