"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Runtime(Section):
    """How a stage runs. Never part of a key: it changes no result."""

    max_reject_rate: Probability = Field(
        default=0.05, description="share of the tasks that may be rejected before the stage fails"
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="processes, where a stage can use several; None: one for each core",
    )


class StageSection(Section):
    """Base of the sections that a stage owns."""

    runtime: Runtime = Runtime()
