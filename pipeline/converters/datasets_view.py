"""Finished stages as a folder that `datasets.load_dataset` opens, offline, without code of ours.

    OUT/README.md                        the card, whose head names the files of each split
    OUT/tensors/train-00000.parquet      codes as lists [17][T], spans, persona: the default
    OUT/tensors/validation-00000.parquet
    OUT/speech/…                         WAV bytes, words, turns, system prompt

A tensors row and a speech row belong together by `speech_id`; a recording has the split of its
clips, and `train` where there are no tensors. Audio is stored with `Audio(decode=False)`, so
that a row gives the WAV's own bytes: decoding in `datasets` 5 needs torchcodec and FFmpeg.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duplex.errors import RequestError
from duplex.files import new_folder, write_atomic
from duplex.frames import SAMPLE_RATE
from duplex.records import Speech, TensorClip, Voice
from duplex.store import StageFolder, folders_of
from duplex.streams import NUM_ROWS
from pipeline.converters.card import Section, dataset_card
from pipeline.converters.common import ConversionReport, records_of, stage_folders, track
from pipeline.engines.tensor_file import read_codes
from pipeline.run import stage_named

SPLITS = {"train": "train", "valid": "validation"}
SHARD_BYTES = 256 << 20
GROUP_BYTES = 16 << 20


def convert_datasets(
    source: Path, out: Path, *, runs: Path, overrides: list[str] | None = None
) -> ConversionReport:
    """Write the tensors and the speech that `source` (a config or a stage folder) holds.

    Raises:
        RequestError: the request is wrong; `out` is taken.
        CorruptFileError: a stage folder or a blob in it is damaged; nothing was written.
    """
    folders = stage_folders(source, ("tensors", "speech"), runs, overrides)
    outcome = ConversionReport()
    clips = [r for r in _records(folders, "tensors") if isinstance(r, TensorClip)]
    speeches = [r for r in _records(folders, "speech") if isinstance(r, Speech)]
    if not clips and not speeches:
        raise RequestError(f"{source} must hold clips or recordings, found none")
    splits = {clip.speech_id: clip.split for clip in clips}
    known = [speech for speech in speeches if not clips or speech.id in splits]
    if len(known) < len(speeches):
        outcome.notes.append(
            f"{len(speeches) - len(known)} recordings without a clip are left out: they have no "
            "split"
        )
    sections = []
    with new_folder(out) as target:
        if clips:
            rows = _tensor_rows(folders["tensors"], clips)
            counts = _write(target / "tensors", tensor_features(), rows)
            sections.append(Section("tensors", counts))
        if known:
            rows = _speech_rows(folders["speech"], known, splits)
            counts = _write(target / "speech", speech_features(), rows)
            sections.append(Section("speech", counts))
        used = {turn.voice_id for speech in known for turn in speech.turns}
        used |= {voice for clip in clips for voice in clip.voices}
        where = next(iter(folders.values())).path
        card = dataset_card(sections, _voices(where.parent, used), clips, used, where.name)
        write_atomic(target / "README.md", card.encode())
    outcome.written = len(clips) + len(known)
    outcome.rows = [{"name": section.name, **section.counts} for section in sections]
    return outcome


def _records(folders: dict[str, StageFolder], stage: str) -> list[Any]:
    return records_of(folders[stage]) if stage in folders else []


def _voices(run_folder: Path, used: set[str]) -> list[Voice]:
    """The voices of the same run, for their licences: those in use, all where that is unknown."""
    found: dict[str, Voice] = {}
    for folder in folders_of(run_folder, stage_named("voices").number, "voices"):
        if folder.manifest() is not None:
            for record in records_of(folder):
                if isinstance(record, Voice) and (not used or record.id in used):
                    found.setdefault(record.id, record)
    return list(found.values())


# -- rows


def tensor_features() -> Any:
    from datasets import Features, List, Value

    span = {"label": Value("string"), "start": Value("int32"), "end": Value("int32")}
    text = ("id", "speech_id", "persona_id", "alignment", "padding", "layout")
    return Features(
        {name: Value("string") for name in text}
        | {"num_frames": Value("int32"), "dropped_tokens": Value("int32")}
        | {"codes": List(List(Value("int32")), length=NUM_ROWS)}
        | {"prompt": List(span), "turns": List(span)}
        | {"codec_digest": Value("string"), "tokenizer_digest": Value("string")}
    )


def speech_features() -> Any:
    from datasets import Audio, Features, List, Value

    word = {"text": Value("string"), "start_s": Value("float64"), "end_s": Value("float64")}
    turn = {
        "kind": Value("string"),
        "role": Value("string"),
        "text": Value("string"),
        "voice_id": Value("string"),
        "start_s": Value("float64"),
        "end_s": Value("float64"),
        "words": List(word),
        "emotion": Value("string"),
        "cut": Value("bool"),
    }
    text = ("id", "dialogue_id", "persona_id", "scenario_id", "system_prompt", "first_speaker")
    return Features(
        {"audio": Audio(sampling_rate=SAMPLE_RATE, decode=False)}
        | {name: Value("string") for name in text}
        | {"num_samples": Value("int64"), "turns": List(turn)}
    )


def _tensor_rows(
    folder: StageFolder, clips: list[TensorClip]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(split, bytes, row) of each clip."""
    columns = [name for name in tensor_features() if name != "codes"]
    for clip in track("tensors", clips):
        codes, _ = read_codes(folder.blob_path(clip.tensor, ".pt"))
        fields = clip.model_dump(mode="json", include=set(columns))
        yield SPLITS[clip.split], codes.size * 4, fields | {"codes": codes.tolist()}


def _speech_rows(
    folder: StageFolder, speeches: list[Speech], splits: dict[str, Any]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    columns = [name for name in speech_features() if name != "audio"]
    for speech in track("speech", speeches):
        content = folder.read_blob(speech.audio, ".wav")
        fields = speech.model_dump(mode="json", include=set(columns))
        audio = {"bytes": content, "path": f"{speech.id}.wav"}
        yield SPLITS[splits.get(speech.id, "train")], len(content), fields | {"audio": audio}


# -- files


def _write(folder: Path, features: Any, rows: Iterator[tuple[str, int, dict[str, Any]]]) -> Any:
    """Parquet shards of each split; returns the rows of each."""
    folder.mkdir()
    writers: dict[str, _Shards] = {}
    for split, num_bytes, row in rows:
        if split not in writers:
            writers[split] = _Shards(folder, split, features.arrow_schema)
        writers[split].add(row, num_bytes)
    return {split: writers[split].finish() for split in SPLITS.values() if split in writers}


class _Shards:
    """The parquet files of one split. Memory holds a row group at most."""

    def __init__(self, folder: Path, split: str, schema: Any):
        self._folder, self._split, self._schema = folder, split, schema
        self._writer: Any = None
        self._shards = self._shard_bytes = self._group_bytes = self._count = 0
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any], num_bytes: int) -> None:
        self._rows.append(row)
        self._count += 1
        self._group_bytes += num_bytes
        if self._group_bytes >= GROUP_BYTES:
            self._flush()

    def finish(self) -> int:
        self._flush()
        if self._writer is not None:
            self._writer.close()
        return self._count

    def _flush(self) -> None:
        from pyarrow import Table
        from pyarrow.parquet import ParquetWriter

        if not self._rows:
            return
        if self._writer is not None and self._shard_bytes >= SHARD_BYTES:
            self._writer.close()
            self._writer = None
        if self._writer is None:
            path = self._folder / f"{self._split}-{self._shards:05d}.parquet"
            self._writer, self._shard_bytes = ParquetWriter(path, self._schema), 0
            self._shards += 1
        self._writer.write_table(Table.from_pylist(self._rows, schema=self._schema))
        self._shard_bytes += self._group_bytes
        self._rows, self._group_bytes = [], 0
