"""What the train stage may train on: checked before a model is loaded. Imports no torch."""

from __future__ import annotations

from typing import Any

from duplex.config import Config
from duplex.config_train import TrainSection
from duplex.datafiles import find_path
from duplex.errors import MissingInputError, RequestError
from duplex.files import known_sha256
from duplex.records import TensorClip
from duplex.splits import Split, member_of, overlaps
from duplex.store import StageFolder
from pipeline.engines.checkpoint import Checkpoint

# As in `training/adapter.py`, written out so that planning imports no torch.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


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


def start_files(section: TrainSection) -> dict[str, str]:
    """The files of `continue_from`, path -> sha256; none where it is not set.

    Raises:
        MissingInputError: a file is not there.
    """
    if section.continue_from is None:
        return {}
    folder = find_path(section.continue_from)
    paths = [folder / name for name in ADAPTER_FILES]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        inner = folder / "adapter"
        hint = f" Give {inner}." if (inner / ADAPTER_FILES[0]).is_file() else ""
        raise MissingInputError(
            f"train.continue_from: must be an adapter folder with {' and '.join(ADAPTER_FILES)}; "
            f"{folder} has no {' and no '.join(missing)}.{hint}"
        )
    return {str(path): known_sha256(path) for path in paths}


def keyed_section(config: Config) -> dict[str, Any]:
    """The train section as it enters keys: what is outside counts by its digests, not its place."""
    section = config.keyed("train")
    return section | {
        "base_data": {**section["base_data"], "folders": []},
        "continue_from": section["continue_from"] and "by its files",
    }


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

    for one, other in ((own, base), (base, own), (base, base)):
        shared = contents(one, "train") & contents(other, "valid")
        if shared:
            raise RequestError(
                "training and validation must share nothing, base data included; found "
                f"{len(shared)} text(s) on both sides, first {min(shared)[:12]}…. Leave that "
                "folder out of train.base_data.folders, or make its tensors from other dialogues."
            )
