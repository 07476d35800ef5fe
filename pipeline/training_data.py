"""What the train stage may train on: checked before a model is loaded. Imports no torch."""

from __future__ import annotations

from typing import Any

from duplex.config import Config
from duplex.datafiles import find_path
from duplex.errors import MissingInputError, RequestError
from duplex.records import TensorClip
from duplex.splits import Split, member_of, overlaps
from duplex.store import StageFolder
from pipeline.engines.checkpoint import Checkpoint


def base_folders(config: Config) -> list[StageFolder]:
    """The tensors stages that are mixed in, in the order of their digests.

    Raises:
        MissingInputError: a folder that is no complete tensors stage.
        CorruptFileError: its manifest cannot be read.
    """
    found = []
    for name in config.train.base_data.folders:
        folder = StageFolder(find_path(name), "tensors", "")
        if folder.manifest() is None:
            raise MissingInputError(
                "train.base_data.folders must be finished tensors stages "
                f"(runs/<config>/05-tensors-<key> with manifest.json), found none at {folder.path}."
            )
        found.append(folder)
    return sorted(found, key=lambda folder: folder.digest)


def keyed_section(config: Config) -> dict[str, Any]:
    """The train section as it enters keys: folders stand in there by digest, not by place."""
    section = config.keyed("train")
    return section | {"base_data": {**section["base_data"], "folders": []}}


def check_origin(records: list[TensorClip], checkpoint: Checkpoint) -> None:
    """
    Raises:
        RequestError: a clip was made with another codec or tokenizer than this model's.
    """
    for role in ("codec", "tokenizer"):
        expected = checkpoint.digest(role)
        found = [(record.id, getattr(record, f"{role}_digest")) for record in records]
        foreign = [(name, digest) for name, digest in found if digest != expected]
        if foreign:
            raise RequestError(
                f"clips must be made with the {role} of the model that is trained, "
                f"{expected[:12]}…; found {len(foreign)} of {len(records)} made with another "
                f"(first {foreign[0][0]}: {foreign[0][1][:12]}…). "
                "Make the tensors again with this model.base, or train the model they belong to."
            )


def check_split(records: list[TensorClip]) -> None:
    """
    Raises:
        RequestError: a conversation, a text or a tensor on both sides, so that validation would
            measure what was trained on; for a split by persona a persona or a voice too.
    """
    for by in ("conversation", "persona"):
        chosen = [r for r in records if by == "conversation" or r.split_by == "persona"]
        split: dict[str, Split] = {record.id: record.split for record in chosen}
        faults = overlaps(map(member_of, chosen), split, by)
        if faults:
            raise RequestError(
                f"training and validation must share nothing: {'; '.join(faults)}. Make the "
                "tensors again, or import them again: imports split by what is in them."
            )


def check_base_split(own: list[TensorClip], base: list[TensorClip]) -> None:
    """
    Raises:
        RequestError: base data that trains on what is validated on, or the other way round.
    """

    def contents(records: list[TensorClip], split: str) -> set[str]:
        return {member_of(record).text for record in records if record.split == split}

    for one, other in ((own, base), (base, own)):
        shared = contents(one, "train") & contents(other, "valid")
        if shared:
            raise RequestError(
                "training and validation must share nothing, base data included; found "
                f"{len(shared)} text(s) on both sides, first {min(shared)[:12]}…. Leave that "
                "folder out of train.base_data.folders, or make its tensors from other dialogues."
            )
