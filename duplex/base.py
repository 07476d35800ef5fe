"""What all records are made of: frozen models, canonical JSON, and the names of their parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Role = Literal["agent", "user"]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,95}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}$")]  # ISO 639-1: en

# The five emotions that speech is given, and how strongly: 1 is plain, 2 twice as much.
Emotion = Literal["happy", "sad", "angry", "excited", "neutral"]
Intensity = Annotated[float, Field(ge=0.5, le=2.0)]
Share = Annotated[float, Field(ge=0, le=1)]


def canonical_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def rounded(values: Mapping[str, Any], digits: int = 6) -> dict[str, Any]:
    """The floats among the values rounded, so that JSON repeats on machines that round otherwise
    in the last bit."""
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in values.items()}


class Frozen(BaseModel):
    """Base of the parts of records that have no id of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Frozen):
    """Base of all records: frozen, no unknown keys."""

    id: Slug

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, UTF-8 kept."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()
