"""`duplex import`: dialogues, recordings or tensors from outside, as a stage's finished work.

    dialogues   .json (a list) or .jsonl; the predecessor's records or our own
    speech      a moshi-finetune set: .jsonl of {"path", "duration"}, stereo WAV (left = model)
                and beside each WAV a .json of {"alignments": [[word, [start, end], speaker]]}
    tensors     a folder of bare `[17, T]` .pt files; a TensorClip record beside one, as
                `duplex convert` writes it, is taken over

The folder gets a key of its content, a manifest like any other, and a pointer in
`<run>/imports/`, which `duplex run` follows instead of working the stage off.
Everything is read with `weights_only=True` or as JSON: files from outside are hostile.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from duplex.config import Config
from duplex.datafiles import describe_faults
from duplex.errors import DuplexError, RecordError, RequestError, StageFailedError
from duplex.files import write_json
from duplex.frames import SAMPLE_RATE
from duplex.lock import RunLock
from duplex.records import (
    Dialogue,
    FrameSpan,
    GapRange,
    Record,
    Speech,
    SpokenTurn,
    TensorClip,
    Turn,
    Word,
    canonical_json,
    record_line,
)
from duplex.stage import StageContext
from duplex.store import FolderBlobs, StageFolder
from duplex.streams import TEXT_PAD, TEXT_ROW, USER_ROWS, ZERO_TOKEN, check_codes
from pipeline.converters.sidecar import check_record, record_beside
from pipeline.run import IMPORTS_FOLDER, run_folder_of, stage_named
from pipeline.runners.local import describe_environment

IMPORTABLE = ("dialogues", "speech", "tensors")
MAX_TURN_PAUSE_S = 1.0  # a longer pause between a speaker's words ends the turn


@dataclass
class Imported:
    """What came in: records with the blobs that they need, and what was refused and why."""

    records: list[Record] = field(default_factory=list)
    blobs: list[tuple[bytes, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def import_stage(
    config: Config, runs_root: Path, stage_name: str, path: Path
) -> tuple[Path, Imported]:
    """Bring `path` in as the output of a stage; returns the stage folder and what came in.

    Raises:
        RequestError: nothing at `path` can be imported; nothing was written.
        StageFailedError: more was refused than the stage's max_reject_rate allows.
    """
    readers: dict[str, Callable[[Path, Config, Path], Imported]] = {
        "dialogues": read_dialogues,
        "speech": read_speech,
        "tensors": read_tensors,
    }
    if stage_name not in IMPORTABLE:
        raise RequestError(f"--stage must be one of {', '.join(IMPORTABLE)}; found {stage_name}")
    if not path.exists():
        raise RequestError(f"{path}: must exist, found nothing there")
    imported = readers[stage_name](path, config, runs_root)
    total = len(imported.records) + len(imported.refused)
    reasons = "\n".join(f"  - {name}: {why}" for name, why in imported.refused[:10])
    if not imported.records:
        raise RequestError(
            f"{path}: holds no record that can be imported; nothing was written.\n{reasons}"
        )
    stage = stage_named(stage_name)
    limit = config.section(stage_name).runtime.max_reject_rate
    if len(imported.refused) > limit * total:
        raise StageFailedError(
            f"{path}: at most {limit:.0%} of the records may be refused, found "
            f"{len(imported.refused)} of {total}; nothing was written.\n{reasons}"
        )
    lines = sorted(record_line(record) for record in imported.records)
    key = hashlib.sha256(canonical_json([stage_name, "import", lines]).encode()).hexdigest()
    run_folder = run_folder_of(config, runs_root)
    with RunLock(run_folder):
        folder = StageFolder.of(run_folder, stage.number, stage.name, key)
        folder.path.mkdir(parents=True, exist_ok=True)
        sink = FolderBlobs(folder)
        for content, suffix in imported.blobs:
            sink.put(content, suffix)
        for name, why in imported.refused:
            folder.reject_task(name, key, RecordError(why))
        counts = {"records": len(lines), "rejected": len(imported.refused)}
        provenance = describe_environment(StageContext(config, runs_root))
        provenance |= {"imported_from": path.name, "notes": imported.notes}
        folder.complete(lines, files=[], counts=counts, provenance=provenance)
        pointer = {"folder": folder.path.name, "key": key}
        write_json(run_folder / IMPORTS_FOLDER / f"{stage_name}.json", pointer)
    return folder.path, imported


def forget_import(config: Config, runs_root: Path, stage_name: str) -> bool:
    """Let the stage do its own work again; the imported folder stays until `duplex clean`."""
    if stage_name not in IMPORTABLE:
        raise RequestError(f"--stage must be one of {', '.join(IMPORTABLE)}; found {stage_name}")
    run_folder = run_folder_of(config, runs_root)
    pointer = run_folder / IMPORTS_FOLDER / f"{stage_name}.json"
    if not pointer.exists():
        return False
    with RunLock(run_folder):
        pointer.unlink()
    return True


# -- dialogues


def read_dialogues(path: Path, config: Config, runs_root: Path) -> Imported:
    imported = Imported()
    for index, value in enumerate(_json_values(path)):
        name = str(value.get("conversation_id") or value.get("id") or f"record {index}")
        try:
            imported.records.append(_dialogue(value, index))
        except (ValidationError, KeyError, TypeError, ValueError) as error:
            why = _describe_fault(error)
            imported.refused.append((name, why))
    _refuse_doubles(imported)
    return imported


def _describe_fault(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_faults(error)
    if isinstance(error, KeyError):
        return f"{error.args[0]} must be given, found nothing"
    return str(error) or type(error).__name__


def _json_values(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        values = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: must be JSON or JSON lines in UTF-8: {error}") from None
    if isinstance(values, dict):
        values = next((v for v in values.values() if isinstance(v, list)), [values])
    if not isinstance(values, list):
        raise RequestError(f"{path}: must hold a list of records, found {values!r:.80}")
    for value in values:
        if not isinstance(value, dict):
            raise RequestError(f"{path}: each record must be an object, found {value!r:.80}")
        yield value


def _dialogue(value: dict[str, Any], index: int) -> Dialogue:
    if "first_speaker" in value:
        return Dialogue.model_validate({k: v for k, v in value.items() if k != "record"})
    turns = tuple(Turn(role=turn["role"], text=turn["text"]) for turn in value["turns"])
    if not turns:
        raise ValueError("turns must not be empty")
    return Dialogue(
        id=slug(str(value.get("conversation_id", f"dialogue-{index:05d}"))),
        persona_id=slug(str(value["persona_id"])),
        persona_name=str(value.get("persona_name", value["persona_id"])),
        scenario_id=slug(str(value.get("scenario", "unknown"))),
        system_prompt=value["system_prompt"],
        mood=str(value.get("mood", "")),
        first_speaker=turns[0].role,
        gap_after_user=GapRange(low=2, high=8),
        gap_other=GapRange(low=4, high=12),
        turns=turns,
        writer="import",
    )


def slug(name: str) -> str:
    """A name as a record id: lower case, everything else a hyphen."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-._")[:96] or "unnamed"


# -- speech


def read_speech(path: Path, config: Config, runs_root: Path) -> Imported:
    imported = Imported()
    for index, entry in enumerate(_json_values(path)):
        name = str(entry.get("path", f"record {index}"))
        try:
            _read_recording(path.parent, entry, imported)
        except (DuplexError, ValidationError, LookupError, TypeError, ValueError, OSError) as error:
            imported.refused.append((name, str(error) or type(error).__name__))
    _refuse_doubles(imported)
    return imported


def _read_recording(folder: Path, entry: dict[str, Any], imported: Imported) -> None:
    from pipeline.tensors import read_stereo

    audio_path = (folder / entry["path"]).resolve()
    if not audio_path.is_relative_to(folder.resolve()):
        raise RecordError("the path must lie in the set's own folder")
    content = audio_path.read_bytes()
    num_samples = read_stereo(content).shape[1]
    words = json.loads(audio_path.with_suffix(".json").read_text(encoding="utf-8"))["alignments"]
    name = slug(audio_path.stem)
    turns = tuple(_turns_of_words(words, num_samples / SAMPLE_RATE))
    if not any(turn.role == "agent" for turn in turns):
        raise RecordError("there must be words of the model's side (SPEAKER_MAIN), found none")
    imported.records.append(
        Speech(
            id=name,
            dialogue_id=name,
            persona_id=slug(str(entry.get("persona_id", name))),
            scenario_id="import",
            system_prompt=str(entry.get("system_prompt", "You enjoy having a good conversation.")),
            first_speaker=turns[0].role,
            audio=hashlib.sha256(content).hexdigest(),
            num_samples=num_samples,
            turns=turns,
        )
    )
    imported.blobs.append((content, ".wav"))


def _turns_of_words(words: list[Any], duration_s: float) -> Iterator[SpokenTurn]:
    """Runs of one speaker's words, split at pauses; words past the audio are an error."""
    run: list[Word] = []
    role = ""
    ordered = sorted(words, key=lambda word: float(word[1][0]))
    for text, (start_s, end_s), speaker in ordered:
        if not 0 <= float(start_s) <= float(end_s) <= duration_s + 0.1:
            raise RecordError(f"word {text!r} must lie within the audio, found {start_s}-{end_s} s")
        word_role = "agent" if speaker == "SPEAKER_MAIN" else "user"
        if run and (word_role != role or float(start_s) - run[-1].end_s > MAX_TURN_PAUSE_S):
            yield _spoken(role, run)
            run = []
        role = word_role
        run.append(Word(text=str(text), start_s=float(start_s), end_s=float(end_s)))
    if run:
        yield _spoken(role, run)


def _spoken(role: Any, words: list[Word]) -> SpokenTurn:
    return SpokenTurn(
        role=role,
        text=" ".join(word.text for word in words),
        voice_id="recorded",
        start_s=words[0].start_s,
        end_s=max(words[-1].end_s, words[0].start_s + 0.01),
        words=tuple(words),
    )


# -- tensors


def read_tensors(path: Path, config: Config, runs_root: Path) -> Imported:
    from pipeline.engines.checkpoint import resolve_checkpoint

    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    checkpoint = resolve_checkpoint(config.model, runs_root)
    digests = checkpoint.digest("codec"), checkpoint.digest("tokenizer")
    imported = Imported()
    imported.notes.append(
        "a bare .pt does not say which codec and tokenizer made it: taken as those of model.base"
    )
    for file in files:
        try:
            _read_tensor(file, checkpoint.config, digests, imported)
        except (DuplexError, ValidationError) as error:
            imported.refused.append((file.name, str(error)))
    _refuse_doubles(imported)
    return imported


def _read_tensor(
    file: Path, model: dict[str, Any], digests: tuple[str, str], imported: Imported
) -> None:
    import torch

    try:
        content = file.read_bytes()
        tensor = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises many kinds on a hostile file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecordError(f"must be a tensor saved by torch.save: {reason[:200]}") from None
    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    if not dense or tensor.is_floating_point() or tensor.is_complex():
        raise RecordError(f"must hold one integer tensor, found {type(tensor).__name__}")
    codes = tensor.to(torch.int64).numpy().copy()
    silent = 0
    if codes.ndim == 2 and codes.shape[0] > TEXT_ROW:
        silent = int((codes[TEXT_ROW] == ZERO_TOKEN).sum())
        codes[TEXT_ROW][codes[TEXT_ROW] == ZERO_TOKEN] = TEXT_PAD
    faults = check_codes(codes, card=model["card"], text_card=model["text_card"])
    if faults:
        raise RecordError("; ".join(faults))
    if silent:
        imported.notes.append(f"{file.name}: {silent} text frames of -1 became PAD")
    clip = record_beside(file)
    if clip is not None:
        check_record(clip, content, codes.shape[1], *digests)
    prompt_frames = leading_constant_frames(codes[USER_ROWS])
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(codes), buffer)
    name = slug(file.stem)
    imported.blobs.append((buffer.getvalue(), ".pt"))
    if clip is not None:
        tensor_digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        own = {"id": name, "tensor": tensor_digest, "padding": "pad", "voice_sample": None}
        imported.records.append(clip.model_copy(update=own))
        return
    imported.records.append(
        TensorClip(
            id=name,
            speech_id=name,
            persona_id=name,
            tensor=hashlib.sha256(buffer.getvalue()).hexdigest(),
            num_frames=codes.shape[1],
            prompt=(FrameSpan(label="prompt", start=0, end=prompt_frames),)
            if prompt_frames
            else (),
            turns=(),
            text_tokens=int((codes[TEXT_ROW, prompt_frames:] != TEXT_PAD).sum()),
            dropped_tokens=0,
            alignment="import",
            split="valid" if _held_out(name, imported) else "train",
            codec_digest=digests[0],
            tokenizer_digest=digests[1],
        )
    )


def leading_constant_frames(user_rows: np.ndarray) -> int:
    """How many first frames repeat the first one: the prompt, whose user rows hold the sine.

    Fewer than eight frames are no prompt: a dialogue may begin with silence.
    """
    same = (user_rows == user_rows[:, :1]).all(axis=0)
    count = len(same) if same.all() else int(np.argmin(same))
    return count if 8 <= count < len(same) else 0


def _held_out(name: str, imported: Imported) -> bool:
    """A tenth by hash, and the second file at the latest, so that validation is never empty."""
    by_hash = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0
    return by_hash or len(imported.records) == 1


def _refuse_doubles(imported: Imported) -> None:
    seen: set[str] = set()
    for record in list(imported.records):
        if record.id in seen:
            imported.records.remove(record)
            imported.refused.append((record.id, "each record needs an id of its own, found twice"))
        seen.add(record.id)
