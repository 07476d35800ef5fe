"""`duplex.json`: what a repository of ours on the hub holds, file by file, with digests.

    README.md                  the card
    duplex.json                this index; written by the last commit, so a torn push has none
    records/<stage>.jsonl      a stage's records, as in its parts/
    work/<stage>.jsonl         which task made which records, so that another config may adopt them
    blobs/ab/<sha256>.wav|.pt  what the records name
    tensors/, speech/          the same for `datasets.load_dataset`; a pull leaves them out
    adapter_model.safetensors, adapter_config.json, metrics.jsonl     of an adapter

A pull asks for the names in the index alone, and each must be of one of these forms: a name is
never joined to a path before that.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from duplex.base import Frozen, Record, Sha256
from duplex.characters import Domain, Persona, Scenario
from duplex.datafiles import describe_faults
from duplex.errors import CorruptFileError
from duplex.records import Artifact, Dialogue, Speech, TensorClip, Voice, VoiceSample

INDEX, CARD = "duplex.json", "README.md"
MAX_INDEX_BYTES = 64 << 20
DATA_STAGES = ("personas", "dialogues", "voices", "speech", "tensors")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json", "metrics.jsonl")
_STAGES = "|".join((*DATA_STAGES, "train"))
BLOB = re.compile(r"blobs/([0-9a-f]{2})/(\1[0-9a-f]{62})\.(wav|flac|pt)")
RECORDS = re.compile(rf"records/(?:{_STAGES})\.jsonl")
WORK = re.compile(rf"work/(?:{_STAGES})\.jsonl")
VIEW = re.compile(r"(?:tensors|speech)/(?:train|validation)-\d{5}\.parquet")

StageName = Literal["personas", "dialogues", "voices", "speech", "tensors", "train"]
# What each stage's records may be: a record of another type is refused.
RECORD_TYPES: dict[str, tuple[type[Record], ...]] = {
    "personas": (Domain, Persona, Scenario),
    "dialogues": (Dialogue,),
    "voices": (Voice,),
    "speech": (Speech,),
    "tensors": (TensorClip, VoiceSample),
    "train": (Artifact,),
}


def is_ours(path: str) -> bool:
    """Whether a push may have written this file of a repository, and may remove it again."""
    return path in (INDEX, CARD, *ADAPTER_FILES) or any(
        form.fullmatch(path) for form in (BLOB, RECORDS, WORK, VIEW)
    )


class HubFile(Frozen):
    """A file that a pull needs. `path` is of a form above."""

    path: str
    sha256: Sha256
    bytes: int = Field(ge=0)

    @model_validator(mode="after")
    def _known_form(self) -> HubFile:
        if self.path in (INDEX, CARD) or VIEW.fullmatch(self.path) or not is_ours(self.path):
            raise ValueError(
                f"a file must have one of the names of a push, found {self.path!r:.80}"
            )
        if (match := BLOB.fullmatch(self.path)) and match[2] != self.sha256:
            raise ValueError(f"a blob is named by its sha256, found {self.path} for another")
        return self


class HubStage(Frozen):
    """A finished stage: what its manifest says, without what is about the machine."""

    stage: StageName
    key: Sha256
    digest: Sha256
    counts: dict[Annotated[str, StringConstraints(max_length=40)], int]
    files: tuple[HubFile, ...] = ()
    provenance: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _own_files(self) -> HubStage:
        if {file.path for file in self.files} - set(ADAPTER_FILES):
            raise ValueError(f"the files of a stage may be {', '.join(ADAPTER_FILES)}")
        return self


class HubIndex(Frozen):
    format: Literal[1]
    kind: Literal["data", "adapter"]
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
    base: Annotated[str, StringConstraints(max_length=200)]
    stages: tuple[HubStage, ...] = Field(min_length=1, max_length=len(RECORD_TYPES))
    files: tuple[HubFile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> HubIndex:
        names = [stage.stage for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("each stage is there once")
        allowed = {"train"} if self.kind == "adapter" else set(DATA_STAGES)
        if strange := set(names) - allowed:
            raise ValueError(f"{self.kind} has no stage {', '.join(sorted(strange))}")
        paths = [file.path for file in self.files]
        if len(set(paths)) < len(paths):
            raise ValueError("each file is listed once")
        missing = {f"records/{name}.jsonl" for name in names} - set(paths)
        if missing:
            raise ValueError(f"files must list {', '.join(sorted(missing))}")
        return self

    def to_bytes(self) -> bytes:
        value = self.model_dump(mode="json")
        return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_index(path: Path) -> HubIndex:
    """
    Raises:
        CorruptFileError: it is too long, no JSON, or breaks the schema.
    """
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CorruptFileError(f"{INDEX} must have at most {MAX_INDEX_BYTES >> 20} MiB")
    try:
        return HubIndex.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        faults = describe_faults(error)
        raise CorruptFileError(f"{INDEX} must be the index of a push: {faults:.600}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{INDEX} must be JSON in UTF-8: {error}") from None


def blobs_of(record: Record) -> tuple[str, ...]:
    """The sha256 of each blob that a record names: a voice may have a sample and a proof."""
    if isinstance(record, Speech | VoiceSample):
        return (record.audio,)
    if isinstance(record, TensorClip):
        return (record.tensor,)
    if isinstance(record, Voice):
        return tuple(sha256 for sha256 in (record.sample, record.proof) if sha256)
    return ()
