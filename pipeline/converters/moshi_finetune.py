"""A finished speech stage as a data set of moshi-finetune, which `duplex import` reads back.

    OUT/data.jsonl           {"path", "duration"} a line, and what only an import here reads
    OUT/data_stereo/ID.wav   24 kHz stereo, left = the model: the stage's own bytes
    OUT/data_stereo/ID.json  {"alignments": [[word, [start_s, end_s], speaker]]}, by start

Their loader takes the paths from the index's folder, searches the words by their start
(so they are sorted by it, both speakers together), keeps SPEAKER_MAIN and leaves out a word
that ends where it starts: such a word gets a millisecond here.
Source: moshi-finetune, `finetune/data/dataset.py` and `interleaver.py`.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from duplex.alignment import written_words
from duplex.errors import DuplexError, RecordError
from duplex.files import new_folder, write_atomic
from duplex.frames import SAMPLE_RATE
from duplex.records import Speech
from pipeline.converters.common import ConversionReport, records_of, stage_folders, track

INDEX = "data.jsonl"
AUDIO_FOLDER = "data_stereo"
SPEAKERS = {"agent": "SPEAKER_MAIN", "user": "SPEAKER_USER"}
SHORTEST_WORD_S = 0.001
AUDIO_SLACK_S = 0.1  # what the import allows a word to end after the audio


def convert_speech(
    source: Path,
    out: Path,
    *,
    skip_refused: bool,
    runs: Path,
    overrides: list[str] | None = None,
) -> ConversionReport:
    """Write the recordings of a speech stage, named by a config or its folder, into `out`.

    Raises:
        RequestError: the request is wrong; `out` is taken.
        StageFailedError: a recording has no word times; nothing was written.
        CorruptFileError: the stage folder is damaged.
    """
    folder = stage_folders(source, ("speech",), runs, overrides)["speech"]
    outcome = ConversionReport()
    lengthened = 0
    with new_folder(out) as target:
        (target / AUDIO_FOLDER).mkdir()
        lines = []
        for speech in track("convert", [r for r in records_of(folder) if isinstance(r, Speech)]):
            try:
                alignments, count = alignments_of(speech)
                recording = folder.blob_path(speech.audio, ".wav")
            except DuplexError as error:
                outcome.refused.append((speech.id, str(error)))
                continue
            shutil.copyfile(recording, target / AUDIO_FOLDER / f"{speech.id}.wav")
            words = json.dumps({"alignments": alignments}, ensure_ascii=False)
            write_atomic(target / AUDIO_FOLDER / f"{speech.id}.json", words.encode())
            lines.append(json.dumps(index_entry(speech), ensure_ascii=False))
            lengthened += count
            outcome.written += 1
        outcome.check(source, skip_refused=skip_refused)
        write_atomic(target / INDEX, "".join(f"{line}\n" for line in lines).encode())
    if lengthened:
        outcome.notes.append(
            f"{lengthened} words that ended where they start got {SHORTEST_WORD_S * 1000:g} ms: "
            "moshi-finetune leaves out words without a length"
        )
    return outcome


def index_entry(speech: Speech) -> dict[str, Any]:
    return {
        "path": f"{AUDIO_FOLDER}/{speech.id}.wav",
        "duration": speech.num_samples / SAMPLE_RATE,
        "persona_id": speech.persona_id,
        "system_prompt": speech.system_prompt,
    }


def alignments_of(speech: Speech) -> tuple[list[Any], int]:
    """Its words by start, and how many of them had no length.

    Raises:
        RecordError: a turn without word times, or a word outside of the audio.
    """
    duration_s = speech.num_samples / SAMPLE_RATE
    alignments, without_length = [], 0
    for turn in speech.turns:
        if not turn.words:
            raise RecordError(
                f"each turn must have word times, found none for {turn.text[:40]!r}: "
                "moshi-finetune trains on words at their times"
            )
        timed = [(word.text, word.start_s, word.end_s) for word in turn.words]
        with suppress(ValueError):  # the words spell something else: they stay as they are
            timed = written_words(turn.text, timed)
        for text, start_s, end_s in timed:
            if end_s == start_s:
                end_s, without_length = start_s + SHORTEST_WORD_S, without_length + 1
            if not start_s < end_s <= duration_s + AUDIO_SLACK_S:
                raise RecordError(
                    f"a word must end after it starts and within the audio of {duration_s:g} s, "
                    f"found {text!r} at {start_s:g}-{end_s:g} s"
                )
            alignments.append([text, [start_s, end_s], SPEAKERS[turn.role]])
    return sorted(alignments, key=lambda entry: entry[1][0]), without_length
