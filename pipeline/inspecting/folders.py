"""Many tensors at once: a tensors stage folder with its records, or any folder of `.pt`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duplex.errors import CorruptFileError, RequestError
from duplex.files import sha256_file
from duplex.findings import FINDINGS, Finding, finding
from duplex.frames import frames_to_seconds
from duplex.judgement import (
    Inspection,
    Profile,
    by_severity,
    inspect_codes,
    loudness_findings,
)
from duplex.phases import Known
from duplex.records import Speech, TensorClip
from duplex.splits import Split, member_of, overlaps
from duplex.store import LEDGER, MANIFEST, REJECTED, StageFolder, folders_of
from pipeline.engines.tensor_file import NotCodesError, read_codes
from pipeline.inspecting.known import audio_of, find_checkpoint, loudness_lufs, speeches_of
from pipeline.sidecar import record_beside

TENSORS_NUMBER = 5
Speeches = dict[str, tuple[Speech, StageFolder]]
Track = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Stage:
    """A tensors stage folder and what lies around it."""

    folder: StageFolder
    clips: tuple[TensorClip, ...]  # by id
    speeches: Speeches

    @classmethod
    def of(cls, path: Path) -> Stage | None:
        """The stage whose folder `path` is; None when it is another kind of folder.

        Raises:
            CorruptFileError: its manifest or records are damaged.
            RequestError: it is another stage's folder.
        """
        if not (path / MANIFEST).is_file():
            return None
        folder = StageFolder(path, "tensors", "")
        try:
            folder.manifest()
        except CorruptFileError:
            if "-tensors-" not in path.name:
                raise RequestError(
                    f"{path}: must be the folder of a tensors stage, or of .pt files; its "
                    "manifest is not that of a tensors stage"
                ) from None
            raise
        clips = tuple(r for r in folder.records() if isinstance(r, TensorClip))
        return cls(folder, clips, speeches_of(path.parent))

    @classmethod
    def around(cls, file: Path) -> Stage | None:
        """The stage that a single file is a blob of."""
        inside = file.parent.name == "blobs" and (file.parent.parent / MANIFEST).is_file()
        return cls.of(file.parent.parent) if inside else None

    def clip_of(self, file: Path) -> TensorClip | None:
        return next((clip for clip in self.clips if clip.tensor == file.stem), None)

    def known(self, asked: Known | None) -> Known:
        """What was asked for, else the checkpoint that made the clips, if it can be found."""
        found = asked
        if found is None and self.clips:
            found = find_checkpoint(self.folder.path.parent, self.clips[0])
        return found or Known()


@dataclass(frozen=True)
class FolderReport:
    """A folder looked at; `files` without their per-frame arrays."""

    path: str
    kind: str
    files: tuple[Inspection, ...]
    findings: tuple[Finding, ...]
    splits: dict[str, int]

    @property
    def harm(self) -> bool:
        own = any(found.severity == "harm" for found in self.findings)
        return own or any(file.harm for file in self.files)

    def summary(self) -> dict[str, Any]:
        measured = [file.measures for file in self.files if file.measures]
        codes = Counter(code for file in self.files for code in {f.code for f in file.findings})
        frames = sum(m.num_frames for m in measured)
        return {
            "files": len(self.files),
            "files_with_harm": sum(file.harm for file in self.files),
            "frames": frames,
            "seconds": frames_to_seconds(frames),
            "text_tokens": sum(m.text_tokens for m in measured),
            "dropped_tokens": sum(m.dropped_tokens or 0 for m in measured),
            "late_tokens": sum(m.late_tokens or 0 for m in measured),
            "splits": self.splits,
            "profiles": dict(Counter(file.profile.name for file in self.files).most_common()),
            "findings": [
                {"code": code, "severity": FINDINGS[code].severity, "files": count}
                for code, count in sorted(
                    codes.items(),
                    key=lambda item: (
                        ["harm", "warn", "note"].index(FINDINGS[item[0]].severity),
                        -item[1],
                        item[0],
                    ),
                )
            ],
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": self.path,
            "kind": self.kind,
            "harm": self.harm,
            "summary": self.summary(),
            "findings": [asdict(found) for found in self.findings],
            "files": [file.to_json() for file in self.files],
        }


def inspect_file(
    path: Path, known: Known, *, name: str, speeches: Speeches, audio: bool = True
) -> Inspection:
    """Read, measure and judge one file; what is no tensor of codes becomes a finding.

    A record beside it (`duplex convert tensors` writes one) is taken where nothing else is known.
    """
    beside = record_beside(path) if known.clip is None else None
    known = replace(known, clip=beside) if beside else known
    try:
        codes, dtype = read_codes(path)
    except NotCodesError as error:
        record_id = known.clip.id if known.clip else None
        guess = Profile("unknown", ())
        found = (error.finding,)
        return Inspection(name, "", None, guess, found, record_id=record_id, file=path.name)
    inspection = inspect_codes(codes, known, name=name, dtype=dtype)
    inspection = replace(inspection, file=path.name)
    if beside and sha256_file(path) != beside.tensor:
        fault = finding("record-mismatch", f"a record of another content beside {path.name}")
        inspection = replace(inspection, findings=by_severity([*inspection.findings, fault]))
    wav = audio_of(path, known.clip, speeches) if audio else None
    if wav is None or inspection.measures is None:
        return inspection
    try:
        lufs = loudness_lufs(wav)
    except ValueError as error:
        return replace(inspection, findings=(*inspection.findings, finding("loudness", str(error))))
    found = by_severity([*inspection.findings, *loudness_findings(lufs)])
    return replace(inspection, loudness_lufs=lufs, findings=found)


def inspect_folder(path: Path, asked: Known | None, *, audio: bool, track: Track) -> FolderReport:
    """All tensors of a folder, one level deep; of a run folder, its newest tensors stage.

    Raises:
        RequestError: no tensor there.
        CorruptFileError: a stage folder whose manifest or records are damaged.
    """
    stage, several = Stage.of(path), None
    if stage is None and (path / LEDGER).is_file():
        raise RequestError(
            f"{path}: must be a finished stage, found one without {MANIFEST}: its {REJECTED} says "
            f"what was refused. Mend that and run again, or inspect {path / 'blobs'} as bare files."
        )
    if stage is None:
        newest = [f for f in folders_of(path, TENSORS_NUMBER, "tensors") if f.manifest()]
        if len(newest) > 1:
            several = finding("several-stages", f"{len(newest)}, taken: {newest[0].path.name}")
        if newest:
            path, stage = newest[0].path, Stage.of(newest[0].path)
    if stage is not None:
        report = _inspect_stage(stage, asked, audio=audio, track=track)
        return replace(report, findings=(*report.findings, *([several] if several else [])))
    paths = sorted(p for pattern in ("*.pt", "*/*.pt") for p in path.glob(pattern) if p.is_file())
    if not paths:
        raise RequestError(
            f"{path}: must hold .pt files, here or one folder down, or be a tensors stage's "
            "folder; found none"
        )
    known = asked or Known()
    files = [
        _light(inspect_file(f, known, name=str(f.relative_to(path)), speeches={}, audio=audio))
        for f in track(paths, len(paths))
    ]
    return FolderReport(str(path), "files", tuple(files), tuple(duplicates(files)), {})


def _inspect_stage(stage: Stage, asked: Known | None, *, audio: bool, track: Track) -> FolderReport:
    known = stage.known(asked)
    files = []
    for clip in track(stage.clips, len(stage.clips)):
        file = stage.folder.path / "blobs" / f"{clip.tensor}.pt"
        if not file.is_file() or sha256_file(file) != clip.tensor:
            what = "another content" if file.is_file() else "no file"
            fault = finding("record-mismatch", f"{what} under blobs/{file.name[:12]}….pt")
            guess = Profile("unknown", ())
            files.append(Inspection(clip.id, "", None, guess, (fault,), record_id=clip.id))
            continue
        of_clip = replace(known, clip=clip)
        looked = inspect_file(file, of_clip, name=clip.id, speeches=stage.speeches, audio=audio)
        files.append(_light(looked))
    speeches = {name: speech for name, (speech, _) in stage.speeches.items()}
    findings = [*duplicates(files), *split_findings(stage.clips, speeches)]
    return FolderReport(
        str(stage.folder.path),
        "tensors stage",
        tuple(sorted(files, key=lambda file: file.name)),
        by_severity(findings),
        dict(Counter(clip.split for clip in stage.clips)),
    )


def duplicates(files: Iterable[Inspection]) -> Iterator[Finding]:
    """Files with the same codes, whatever else differs in them."""
    first: dict[str, str] = {}
    for file in files:
        if file.codes_digest in first:
            yield finding("duplicate", f"{file.name} equal to {first[file.codes_digest]}")
        elif file.codes_digest:
            first[file.codes_digest] = file.name


def _light(inspection: Inspection) -> Inspection:
    """Without per-frame arrays: of ten thousand files only the figures are kept."""
    m = inspection.measures
    none = np.zeros(0, dtype=np.int64)
    light = m and replace(m, agent_differs=none, user_differs=none)
    return replace(inspection, measures=light)


# -- the split


def split_findings(clips: Sequence[TensorClip], speeches: dict[str, Speech]) -> Iterator[Finding]:
    """What stands on both sides of the split.

    A record says by what its split was made. Where it does not, a split without a persona on
    both sides is taken as one by persona, which holds voices apart too.
    """
    split: dict[str, Split] = {clip.id: clip.split for clip in clips}
    if clips and len(set(split.values())) == 1:
        yield finding("one-sided", f"only {clips[0].split}")
    members = [member_of(clip) for clip in clips]
    shared = _on_both_sides(clips, lambda clip: {clip.persona_id})
    if shared:
        found = f"{len(shared)} on both sides, first {min(shared)}"
        yield finding("personas-on-both-sides", found)
    said = {clip.split_by for clip in clips}
    by_conversation = said == {"conversation"} or ("persona" not in said and shared)
    for fault in overlaps(members, split, "conversation" if by_conversation else "persona"):
        yield finding("split-overlap", fault)
    for code, kind, values in (
        ("shared-user-voice", "user voices", lambda turn: turn.role == "user" and turn.voice_id),
        (
            "shared-sentence",
            "sentences",
            lambda turn: turn.kind == "turn" and " ".join(turn.text.casefold().split()),
        ),
    ):
        both = _on_both_sides(
            clips,
            lambda clip, values=values: {
                value
                for turn in (speeches[clip.speech_id].turns if clip.speech_id in speeches else ())
                if (value := values(turn))
            },
        )
        if both:
            yield finding(code, f"{len(both)} {kind} on both sides, first {min(both)[:60]!r}")


def _on_both_sides(
    clips: Sequence[TensorClip], values: Callable[[TensorClip], set[str]]
) -> set[str]:
    sides: dict[str, set[str]] = {"train": set(), "valid": set()}
    for clip in clips:
        sides[clip.split] |= values(clip)
    return sides["train"] & sides["valid"]
