"""Full-Duplex-Bench's folders: its samples as items to play, and what its scripts read.

In: `FOLDER/<dataset>/<id>/input.wav` with side files that say when the user's turn ends. Out:
`OUT/<dataset>/<id>/` with `output.wav`, `output.json`, copies of the side files, and last
`duplex.json`, whose digests say that the sample is done: a folder without it, or with a file that
is not the one it names, is done again.

The data comes from anybody. Datasets are those of a list, ids are plain names, links are not
followed, sizes are bounded; what is refused is named with its reason and the rest goes on. Side
files cost only the column that needs them. File names and forms: Full-Duplex-Bench's own, 1.0.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from pydantic import ValidationError

from duplex.base import Frozen
from duplex.duplex_bench import Sample, Span, Task, TimedWord, turn_start_s, words_from
from duplex.errors import MissingInputError, RecordError, RequestError
from duplex.files import sha256_bytes, sha256_file, write_atomic, write_json
from duplex.frames import SAMPLE_RATE
from pipeline.engines.voice_sound import LONGEST_READ_S, read_mono
from pipeline.imported import read_json, read_text

DATASETS: dict[str, Task] = {
    "candor_pause_handling": "pause_handling",
    "synthetic_pause_handling": "pause_handling",
    "icc_backchannel": "backchannel",
    "candor_turn_taking": "smooth_turn_taking",
    "synthetic_user_interruption": "user_interruption",
    "pause_handling": "pause_handling",
    "backchannel": "backchannel",
    "smooth_turn_taking": "smooth_turn_taking",
    "user_interruption": "user_interruption",
}
SIDE_FILES = ("turn_taking.json", "interrupt.json", "pause.json", "transcription.json")
NEEDED = {"smooth_turn_taking": "turn_taking.json", "user_interruption": "interrupt.json"}
REFERENCE_FILE = "icc_gt_distribution.json"
RECORD = "duplex.json"
BACKCHANNEL_RATE = 16_000  # what its backchannel script takes every file for
MAX_SIDE_BYTES = 4 << 20
MAX_SAMPLES = 10_000  # of a dataset
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class BenchItem:
    """A sample to play.

    side: its side files as they stand. user_start_s, user_end_s: what they say of the turn.
    missing: what is not there, and what that costs.
    """

    dataset: str
    id: str
    task: Task
    audio: Path
    side: dict[str, bytes] = field(default_factory=dict, repr=False)
    user_start_s: float | None = None
    user_end_s: float | None = None
    reference: tuple[float, ...] | None = None
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.id}"


class Outcome(Frozen):
    """`duplex.json`: one conversation. Times in s from the start of input.wav.

    words, speech: the agent's, all of them. user_speech: of input.wav, by voice activity.
    opening: what was said in the lead-in. files: name -> sha256.
    """

    protocol: str
    model: str | None
    input: str
    duration_s: float
    words: tuple[TimedWord, ...]
    speech: tuple[Span, ...]
    user_speech: tuple[Span, ...]
    opening: str
    prompt_proven: bool
    prompt_note: str
    frame_ms: float
    files: dict[str, str]


# -- in


def read_items(folder: Path) -> tuple[list[BenchItem], list[tuple[str, str]]]:
    """(items, what was left out and why), by dataset and id.

    Args:
        folder: holds datasets, or is one itself.

    Raises:
        MissingInputError: no folder, or no dataset in it.
    """
    if not folder.is_dir():
        raise MissingInputError(f"{folder} must be the benchmark's folder, found none there.")
    whole = folder.resolve()
    root = whole.parent if whole.name in DATASETS else whole
    names = [whole.name] if whole.name in DATASETS else sorted(p.name for p in whole.iterdir())
    items: list[BenchItem] = []
    left_out: list[tuple[str, str]] = []
    found = False
    for name in names:
        place = root / name
        if name not in DATASETS:
            if place.is_dir():
                left_out.append((name, f"must be one of {', '.join(DATASETS)}"))
        elif place.is_symlink() or not place.is_dir():
            left_out.append((name, "must be a folder, no link"))
        else:
            found = True
            _read_dataset(place, items, left_out)
    if not found:
        raise MissingInputError(
            f"{folder} must hold one of {', '.join(DATASETS)}, found none. "
            "Give the folder that holds them, or one of them."
        )
    return items, left_out


def _read_dataset(folder: Path, items: list[BenchItem], left_out: list[tuple[str, str]]) -> None:
    task = DATASETS[folder.name]
    missing: tuple[str, ...] = ()
    references: dict[str, tuple[float, ...]] = {}
    if task == "backchannel":
        references, missing = _read_references(folder)
    entries = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: _order(p.name))
    for entry in entries[MAX_SAMPLES:]:
        left_out.append((f"{folder.name}/{entry.name}", f"over {MAX_SAMPLES} samples"))
    for entry in entries[:MAX_SAMPLES]:
        try:
            items.append(_read_item(entry, task, references.get(entry.name), missing))
        except RecordError as error:
            left_out.append((f"{folder.name}/{entry.name}"[:120], str(error)))


def _order(name: str) -> tuple[int, int, str]:
    is_number = name.isascii() and name.isdigit() and len(name) < 19
    return (0, int(name), name) if is_number else (1, 0, name)


def _read_item(
    folder: Path, task: Task, reference: tuple[float, ...] | None, missing: tuple[str, ...]
) -> BenchItem:
    """
    Raises:
        RecordError: it cannot be played, or nothing of it could be scored.
    """
    if not _ID.fullmatch(folder.name):
        raise RecordError("its name must be letters, digits, dots and hyphens, at most 64")
    audio = folder / "input.wav"
    if folder.is_symlink() or audio.is_symlink():
        raise RecordError("must be no link")
    if not audio.is_file():
        raise RecordError("must hold input.wav, found none")
    side: dict[str, bytes] = {}
    read: dict[str, Any] = {}
    notes = list(missing)
    for name in SIDE_FILES:
        try:
            text = _read_side(folder / name)
            if text is not None:
                read[name] = _SIDE_READERS[name](read_json(text))
                side[name] = text.encode()
        except (OSError, ValueError, LookupError, TypeError) as error:
            notes.append(f"{name} cannot be used: {error}"[:200])
    needed = NEEDED.get(task)
    if needed and needed not in read:
        why = next((n for n in notes if n.startswith(needed)), f"{needed} is missing")
        if task == "user_interruption":
            raise RecordError(f"{why}; without it no word can be told to follow the interruption")
        notes += [] if why in notes else [why]
    if task == "backchannel" and reference is None and not missing:
        notes.append(f"{REFERENCE_FILE} has no entry for it: no JSD")
    start_s, end_s = read.get(needed or "", (None, None))
    return BenchItem(
        dataset=folder.parent.name, id=folder.name, task=task, audio=audio, side=side,
        user_start_s=start_s, user_end_s=end_s,
        reference=reference, missing=tuple(notes),
    )  # fmt: skip


def _read_side(path: Path) -> str | None:
    if path.is_symlink():
        raise ValueError("it must be no link")
    if not path.exists():
        return None
    if path.is_file() and path.stat().st_size > MAX_SIDE_BYTES:
        raise ValueError(f"it must have at most {MAX_SIDE_BYTES >> 20} MiB")
    return read_text(path)


def _read_references(folder: Path) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """Id -> how people's backchannels are spread, and what is missing."""
    for place in (folder / REFERENCE_FILE, folder.parent / REFERENCE_FILE):
        try:
            text = _read_side(place)
            if text is None:
                continue
            found = {}
            for name, values in dict(read_json(text)).items():
                bins = tuple(_number(value) for value in values)
                if not bins or min(bins) < 0 or not sum(bins):
                    raise ValueError(f"{name[:40]!r} must hold shares, not all zero")
                found[name] = bins
            return found, ()
        except (OSError, ValueError, TypeError) as error:
            return {}, (f"{REFERENCE_FILE} cannot be used: {error}: no JSD",)
    return {}, (f"{REFERENCE_FILE} is missing: no JSD",)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a time or share must be a number, found {value!r:.40}")
    return float(value)


def _bounds(entry: Any) -> Span:
    start_s, end_s = entry["timestamp"]
    span = Span(_number(start_s), _number(start_s if end_s is None else end_s))
    if not 0 <= span.start_s <= span.end_s:
        raise ValueError(f"a timestamp must be [start, end] from 0 on, found {list(span)}")
    return span


def _interruption(value: Any) -> tuple[float | None, float | None]:
    span = _bounds(value[0])
    return span.start_s, span.end_s


def _turn_end(value: Any) -> tuple[float | None, float | None]:
    """The gap that follows the turn begins where the turn ends; its own end is not used."""
    end_s = _number(value[0]["timestamp"][0])
    if end_s < 0:
        raise ValueError(f"the turn's end must be 0 or more, found {end_s}")
    return None, end_s


# The others are copied for its scripts. Of Candor, transcription.json holds both speakers, while
# input.wav holds one, so it cannot say when the user speaks.
_SIDE_READERS: dict[str, Callable[[Any], Any]] = {
    "turn_taking.json": _turn_end,
    "interrupt.json": _interruption,
    "pause.json": lambda value: value,
    "transcription.json": lambda value: value,
}


def read_audio(item: BenchItem) -> np.ndarray:
    """float32 [S] at 24 kHz, channels averaged.

    Raises:
        RecordError: not a recording, or one of three minutes or more.
    """
    samples, rate = read_mono(item.audio)
    if len(samples) >= LONGEST_READ_S * rate:
        raise RecordError(f"input.wav must be under {LONGEST_READ_S:g} s long")
    return soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)


# -- out


def sample_of(item: BenchItem, outcome: Outcome) -> Sample:
    """What the columns are computed from.

    The user's turn, where a side file does not bound it: turn taking begins where his speech
    before the end began, over silences of up to 1 s; else it is all of his speech.
    """
    spans = outcome.user_speech
    start_s, end_s = item.user_start_s, item.user_end_s
    if item.task == "smooth_turn_taking":
        start_s = None if end_s is None else turn_start_s(spans, end_s)
    elif item.task != "user_interruption" and spans:
        start_s, end_s = spans[0].start_s, spans[-1].end_s
    return Sample(
        task=item.task,
        words=outcome.words,
        speech=outcome.speech,
        duration_s=outcome.duration_s,
        user_start_s=start_s,
        user_end_s=end_s,
        reference=item.reference,
    )


def finished(out: Path, item: BenchItem, protocol: str) -> Outcome | None:
    """The outcome of a sample that is done by this protocol, on this audio, and whole."""
    folder = _folder_of(out, item)
    try:
        outcome = Outcome.model_validate_json(read_text(folder / RECORD))
        is_same = (outcome.protocol, outcome.input) == (protocol, sha256_file(item.audio))
        whole = set(outcome.files) == {"output.wav", "output.json", *item.side} and all(
            sha256_file(folder / name) == digest for name, digest in outcome.files.items()
        )
    except (OSError, ValueError, ValidationError):
        return None
    return outcome if is_same and whole else None


def write_outcome(out: Path, item: BenchItem, agent: np.ndarray, outcome: Outcome) -> Outcome:
    """Write a sample's folder, `duplex.json` last.

    Args:
        agent: float32 [S] at 24 kHz, as long as the input.

    Returns:
        `outcome` with the digests of what was written.
    """
    folder = _folder_of(out, item)
    contents = {
        "output.wav": _wav(agent, BACKCHANNEL_RATE if item.task == "backchannel" else SAMPLE_RATE),
        "output.json": transcript(item, outcome.words),
        **item.side,
    }
    (folder / RECORD).unlink(missing_ok=True)  # until all is written, nothing is done
    for name, content in contents.items():
        write_atomic(folder / name, content)
    digests = {name: sha256_bytes(content) for name, content in contents.items()}
    outcome = outcome.model_copy(update={"files": digests})
    write_json(folder / RECORD, outcome.model_dump(mode="json"))
    return outcome


def transcript(item: BenchItem, words: Sequence[TimedWord]) -> bytes:
    """`output.json`; of an interruption the words that begin after its end, as its script has."""
    if item.task == "user_interruption" and item.user_end_s is not None:
        words = words_from(words, item.user_end_s)
    chunks = [{"text": w.text, "timestamp": [w.start_s, w.end_s]} for w in words]
    value = {"text": " ".join(w.text for w in words), "chunks": chunks}
    return (json.dumps(value, indent=4, ensure_ascii=False) + "\n").encode()


def _folder_of(out: Path, item: BenchItem) -> Path:
    for place in (out / item.dataset, out / item.dataset / item.id):
        if place.is_symlink():
            raise RequestError(f"{place} must be a folder, found a link: give another --out.")
    return out / item.dataset / item.id


def _wav(samples: np.ndarray, rate: int) -> bytes:
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, SAMPLE_RATE, rate)
    content = io.BytesIO()
    soundfile.write(content, np.clip(samples, -1, 1), rate, format="WAV", subtype="PCM_16")
    return content.getvalue()
