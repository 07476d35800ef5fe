"""Brings results home from a pod, piece by piece: what was fetched before a break is kept.

Every file is checked against its sha256 before it gets its name, and names come from our own list
(`names`). A stage folder's manifest comes last, so that a folder with a manifest is whole as far
as it goes: recordings, tensors and merged weights stay in the pod. A folder that was made here,
with another manifest, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from duplex.errors import CorruptFileError, PodError
from duplex.files import known_sha256, sha256_file, sync_file, sync_folder
from pipeline.pods.client import PodClient
from pipeline.pods.clock import Clock
from pipeline.pods.names import Offered

FOLDER = ".sync"
TRIES, WAIT_S = 6, 5.0


@dataclass
class Synced:
    """Names by what became of them. folders: those that hold something from the pod."""

    fetched: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    refused: int = 0
    num_bytes: int = 0

    @property
    def folders(self) -> set[str]:
        return {name.partition("/")[0] for name in (*self.fetched, *self.kept)}


def bring_home(
    client: PodClient,
    run_folder: Path,
    clock: Clock,
    report: Callable[[str], None],
    from_pod: Iterable[str] = (),
) -> Synced:
    """
    Args:
        from_pod: stage folders that earlier syncs made here, and that may be brought up to date.

    Raises:
        PodError: the pod does not answer; what came is kept for the next try.
        CorruptFileError: a file is not what the pod's list says, twice.
    """
    offers, refused = client.files()
    result = Synced(refused=refused)
    ours = set(from_pod)
    foreign = {offer.folder for offer in offers if _made_here(run_folder, offer, offers, ours)}
    for offer in offers:
        target = run_folder.joinpath(*offer.name.split("/"))
        if offer.folder in foreign:
            result.left_alone.append(offer.name)
        elif target.is_file() and known_sha256(target) == offer.sha256:
            result.kept.append(offer.name)
        else:
            report(f"fetching {offer.name} ({offer.num_bytes / 1e6:.1f} MB)")
            _fetch(client, offer, target, run_folder / FOLDER, clock)
            result.fetched.append(offer.name)
            result.num_bytes += offer.num_bytes
    return result


def _made_here(run_folder: Path, offer: Offered, offers: list[Offered], ours: set[str]) -> bool:
    """Whether the folder has work of this machine: its own manifest, or one under way."""
    folder = run_folder / offer.folder
    if offer.folder in ours or not folder.is_dir():
        return False
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return (folder / "ledger.jsonl").exists() or (folder / "work").exists()
    theirs = next((o.sha256 for o in offers if o.folder == offer.folder and o.is_manifest), None)
    return known_sha256(manifest) != theirs


def _fetch(client: PodClient, offer: Offered, target: Path, parts: Path, clock: Clock) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    part = parts / f"{offer.sha256}.part"
    for last in (False, True):
        _fill(client, offer, part, clock)
        found = sha256_file(part)
        if found == offer.sha256:
            break
        part.unlink()  # begun anew: an earlier break may have left wrong bytes
        if last:
            raise CorruptFileError(
                f"{offer.name}: must have sha256 {offer.sha256[:12]}… as the pod's list says, "
                f"found {found[:12]}… twice. Nothing was put in place; sync again, and look at "
                "`duplex pod status` if it stays so."
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    sync_file(part)
    part.replace(target)
    sync_folder(target.parent)


def _fill(client: PodClient, offer: Offered, part: Path, clock: Clock) -> None:
    """Append what is missing; a broken connection is taken up again."""
    part.touch()
    tries = 0
    while (have := part.stat().st_size) < offer.num_bytes:
        try:
            content = client.piece(offer, have)
            tries = 0
        except PodError:
            tries += 1
            if tries >= TRIES:
                raise
            clock.sleep(WAIT_S * tries)
            continue
        with part.open("ab") as file:
            file.write(content)
    if have > offer.num_bytes:
        with part.open("r+b") as file:
            file.truncate(offer.num_bytes)
