"""Which files of a run folder may be brought home. Pure; both ends of the wire hold to it.

The list is ours, on both sides: the agent offers nothing else, and the client takes nothing else,
whatever an agent says. What stays in the pod is large and can be made again: weights of a merge,
recordings, tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_EVERY = (r"manifest\.json", r"parts/part-[0-9]{5}\.jsonl", r"index\.html")
_BY_STAGE = {
    "personas": (),
    "dialogues": (),
    "voices": (),
    "speech": (),
    "tensors": (),
    "train": (
        r"(?:adapter|last)/adapter_(?:model\.safetensors|config\.json)",
        r"metrics\.jsonl",
        r"timing\.jsonl",
    ),
    "merge": (r"checkpoint/certificate\.json",),
    "serve": (),
    "evaluate": (r"report\.(?:html|json)", r"timings\.json"),
}
SUBFOLDERS = ("parts", "adapter", "last", "checkpoint")  # where the names of the list lie
_FOLDER = re.compile(rf"(?P<number>0[1-9])-(?P<stage>{'|'.join(_BY_STAGE)})-[0-9a-f]{{8}}")
_FILES = {stage: re.compile("|".join((*_EVERY, *own))) for stage, own in _BY_STAGE.items()}
_SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_BYTES = 8 << 30  # an adapter of rank 128 on all layers of a 7B model is far below


@dataclass(frozen=True)
class Offered:
    """One file that the agent has. name: `<stage folder>/<path>`, with slashes."""

    name: str
    num_bytes: int
    sha256: str

    @property
    def folder(self) -> str:
        return self.name.partition("/")[0]

    @property
    def is_manifest(self) -> bool:
        return self.name.endswith("/manifest.json")


def is_stage_folder(name: str) -> bool:
    return _FOLDER.fullmatch(name) is not None


def may_be_fetched(name: str) -> bool:
    """Whether `name` is on the list. No name on it can leave the run folder."""
    folder, _, rest = name.partition("/")
    found = _FOLDER.fullmatch(folder)
    return bool(found and _FILES[found["stage"]].fullmatch(rest))


def read_offers(value: object) -> tuple[list[Offered], int]:
    """What of an agent's answer may be taken, manifests behind the other files of their folder;
    and how many entries were refused.

    Args:
        value: parsed JSON of a stranger: `{"files": [{"name", "bytes", "sha256"}]}`.
    """
    entries = value.get("files") if isinstance(value, dict) else None
    if not isinstance(entries, list):
        return [], 1
    taken: dict[str, Offered] = {}
    refused = 0
    for entry in entries:
        offer = _read_offer(entry)
        if offer is None or offer.name in taken:
            refused += 1
        else:
            taken[offer.name] = offer
    return ordered(taken.values()), refused


def ordered(offers: Iterable[Offered]) -> list[Offered]:
    """A folder with a manifest counts as complete: the manifest comes last."""
    return sorted(offers, key=lambda offer: (offer.folder, offer.is_manifest, offer.name))


def _read_offer(entry: object) -> Offered | None:
    if not isinstance(entry, dict):
        return None
    name, size, sha256 = (entry.get(key) for key in ("name", "bytes", "sha256"))
    if not isinstance(name, str) or not may_be_fetched(name):
        return None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BYTES:
        return None
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        return None
    return Offered(name, size, sha256)
