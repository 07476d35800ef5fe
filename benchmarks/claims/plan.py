"""configs/results/NAME.yaml: a claim as a grid of arms and seeds. Pure, but for reading files.

    title        of the page
    claim        what is claimed, and by whom
    question     what is measured
    set          overrides that hold for all arms, section.key: value
    arms         name -> overrides of that arm; `base` is the model without an adapter
    reference    the arm that all others are held against
    key          the measure that answers the question
    least        the smallest difference of it that matters: under it the outcome is `none`
    measures     all that are shown
    decides      arms that answer the question; all but the reference and `base` if not given
    knob         what one would turn on a 7B, for the list of what to try
    against      what becomes of the claim: by the deciding arms one is `better` than the
                 reference, none is and some are `worse`, or `none` of it can be told
    seven_b      what it means for a 7B run, by the same. In both `{arm}` is the arm that says it
                 most clearly, `{by}` its difference from the reference
    why          what was looked at to explain the result
    not_said     what the page cannot tell

`common.yaml` holds what all claims share: the config, seeds, and overrides that fix the budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from duplex.datafiles import CHECKOUT, read_yaml, validate
from duplex.errors import RequestError
from pipeline.evaluation.likelihood import LIKELIHOODS
from pipeline.evaluation.measures import MEASURES

FOLDER = CHECKOUT / "configs" / "results"
COMMON = "common"
BASE = "base"
KNOWN = {measure.key: measure for measure in (*MEASURES, *LIKELIHOODS)}
Overrides = dict[str, Any]


def pocket_base() -> dict[str, Any]:
    """The base that claims are measured with, by what data/pocket holds: the digest of its weights
    and how many steps of training they took."""
    config = json.loads((CHECKOUT / "data" / "pocket" / "base.json").read_text())
    return {"weights": config["weights"], "steps": config["steps"]}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Common(_Model):
    config: str
    seeds: tuple[int, ...] = Field(min_length=1)
    set: Overrides = {}


Outcome = Literal["better", "worse", "none"]


class ByOutcome(_Model):
    better: str
    worse: str
    none: str


class Claim(_Model):
    title: str
    claim: str
    question: str
    set: Overrides = {}
    arms: dict[str, Overrides] = Field(min_length=2)
    reference: str
    key: str
    least: float = Field(ge=0, description="in the unit of the key measure; shares in 0 to 1")
    measures: tuple[str, ...] = Field(min_length=1)
    curves: bool = Field(default=False, description="losses of training, by step and by epoch")
    expected: dict[str, tuple[float, ...]] = Field(
        default={}, description="curve -> its losses as the seeds expected them"
    )
    survival: bool = Field(
        default=False, description="what rounding leaves of the update, by dtype"
    )
    groups: bool = Field(default=False, description="also by who was trained on")
    decides: tuple[str, ...] = ()
    knob: str = ""
    against: ByOutcome
    seven_b: ByOutcome
    why: str = Field(default="", description="what was looked at to explain it")
    not_said: str

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        if self.reference not in self.arms:
            raise ValueError(f"reference must be one of the arms, found {self.reference}")
        unknown = [key for key in (self.key, *self.measures) if key not in KNOWN]
        if unknown:
            raise ValueError(f"measures must be known ones, found {', '.join(unknown)}")
        if self.key not in self.measures:
            raise ValueError(f"key must be one of the measures, found {self.key}")
        if not set(self.decides) <= set(self.arms) - {self.reference}:
            raise ValueError(f"decides must be arms besides the reference, found {self.decides}")
        if self.arms.get(BASE):
            raise ValueError("base is the model without an adapter: it takes no overrides")
        return self

    @property
    def deciding_arms(self) -> tuple[str, ...]:
        return self.decides or tuple(arm for arm in self.arms if arm not in (self.reference, BASE))


class Cell(_Model):
    """An arm with a seed: the overrides that its run takes, in order."""

    arm: str
    seed: int
    overrides: tuple[str, ...]


def claim_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != COMMON)


def load_claim(name: str) -> Claim:
    """
    Raises:
        RequestError: no such claim.
        DataFileError: its file breaks the schema.
    """
    if name not in claim_names():
        raise RequestError(f"a claim must be one of {', '.join(claim_names())}; found {name}")
    path = FOLDER / f"{name}.yaml"
    return validate(Claim, read_yaml(path), path)


def load_common() -> Common:
    path = FOLDER / f"{COMMON}.yaml"
    return validate(Common, read_yaml(path), path)


def cells_of(claim: Claim, common: Common) -> list[Cell]:
    """Seed by seed, so that an unfinished grid has whole seeds. A later override wins."""
    return [
        Cell(
            arm=arm,
            seed=seed,
            overrides=tuple(
                f"{key}={as_yaml(value)}"
                for key, value in _merged(
                    common.set,
                    claim.set,
                    overrides,
                    {"seed": seed, "evaluate.seed": seed},
                ).items()
            ),
        )
        for seed in common.seeds
        for arm, overrides in claim.arms.items()
    ]


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        found |= part
    return found


def as_yaml(value: Any) -> str:
    """On one line, as `--set` takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).split("\n...")[0].strip()
