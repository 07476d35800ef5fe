"""What a judge is asked: criteria with their scales, and the three grades. Read from YAML.

A score means something only beside the rubric that it was given by, so each result carries the
rubric's version and the digest of its content (a comment in the YAML changes nothing).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from duplex.base import Frozen, Slug, Text, canonical_json
from duplex.datafiles import find_path, read_yaml, validate
from pipeline.serving.grades import GRADES, GradeName

RUBRIC = "data/judge/rubric.yaml"
LEAST, MOST = 0, 5


class Criterion(Frozen):
    """scale: what 0 and 5 mean, and steps between them where that helps."""

    id: Slug
    title: Text
    question: Text
    scale: dict[Annotated[int, Field(ge=LEAST, le=MOST)], Text]

    @field_validator("scale")
    @classmethod
    def _has_ends(cls, scale: dict[int, str]) -> dict[int, str]:
        if not {LEAST, MOST} <= scale.keys():
            raise ValueError(f"must say what {LEAST} and {MOST} mean, found {sorted(scale)}")
        return dict(sorted(scale.items()))


class Rubric(Frozen):
    version: int = Field(ge=1)
    criteria: tuple[Criterion, ...] = Field(min_length=1)
    grades: dict[GradeName, Text]

    @field_validator("criteria")
    @classmethod
    def _different(cls, criteria: tuple[Criterion, ...]) -> tuple[Criterion, ...]:
        ids = [criterion.id for criterion in criteria]
        if len(set(ids)) < len(ids) or "grade" in ids or "preference" in ids:
            raise ValueError(
                f"ids must differ from each other, from grade and from preference; found {ids}"
            )
        return criteria

    @field_validator("grades")
    @classmethod
    def _complete(cls, grades: dict[GradeName, str]) -> dict[GradeName, str]:
        if set(grades) != set(GRADES):
            raise ValueError(f"must be {', '.join(GRADES)}, found {', '.join(grades) or 'none'}")
        return {name: grades[name] for name in GRADES}

    @property
    def digest(self) -> str:
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


def load_rubric(path: Path | None = None) -> Rubric:
    """
    Raises:
        DataFileError: no such file, or it breaks the schema.
    """
    path = path or find_path(RUBRIC)
    return validate(Rubric, read_yaml(path), path)
