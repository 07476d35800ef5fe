"""Recordings of conversations as speech records: stereo, left the model's side, right the user's.

    PATH.jsonl   a moshi-finetune set: lines of {"path", "duration"}
    PATH/        every .wav and .flac in the folder
    PATH.wav     one recording

Beside NAME.wav, NAME.json may hold its words with times, in moshi-finetune's form; without it,
voice activity finds the turns and a recogniser their words. `persona_id`, `system_prompt` and
`first_speaker` come from the index, or from lines of {"path", …} in `metadata.jsonl`.

Each recording is read block by block, four times (levels, voice activity, digest, copy), so
that an hour costs no more memory than a minute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.base import Role
from duplex.errors import DuplexError, RecordError, RequestError
from duplex.records import Speech, SpokenTurn, Word
from pipeline.engines.recogniser import RECOGNISER_RATE, Recogniser, make_recogniser
from pipeline.engines.sound_file import LEAK_CORRELATION, SoundFile, faults_of
from pipeline.engines.vad import VAD_RATE, VadSettings, VoiceActivity, spans_of
from pipeline.engines.vad import revision as vad_revision
from pipeline.imported import Blob, Imported, json_values, read_json, read_text, slug
from pipeline.recorded_turns import (
    ROLES,
    Span,
    both_sides_note,
    recogniser_windows,
    speaker_runs,
    spoken_turn,
    transcript_notes,
    turns_of_words,
    words_by_role,
)

SUFFIXES = (".wav", ".flac")
METADATA = "metadata.jsonl"
DEFAULT_PROMPT = "You enjoy having a good conversation."
CONTEXT_S = 0.15  # of silence that a recogniser hears around a turn
NOTED_CLIPPED = 1e-4
WAV_HEADER_BYTES = 44


@dataclass(frozen=True)
class RecordingOptions:
    """What the recordings do not say of themselves. `persona` None: each is its own."""

    persona: str | None = None
    prompt: str = DEFAULT_PROMPT
    recogniser: str = "faster-whisper"
    recogniser_model: str | None = None
    language: str = "en"


@dataclass
class Tools:
    """Models, each loaded when the first recording needs it."""

    options: RecordingOptions
    _vad: VoiceActivity | None = None
    _recogniser: Recogniser | None = None

    def speech(self, sound: SoundFile) -> dict[Role, list[Span]]:
        """Spans of speech on each side's channel."""
        self._vad = self._vad or VoiceActivity()
        probabilities = self._vad.probabilities(sound.blocks(VAD_RATE))
        return {
            role: spans_of(probabilities[side], sound.duration_s, VadSettings())
            for side, role in enumerate(ROLES)
        }

    @property
    def recogniser(self) -> Recogniser:
        if self._recogniser is None:
            options = self.options
            self._recogniser = make_recogniser(
                options.recogniser, options.recogniser_model, options.language
            )
        return self._recogniser

    def provenance(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"voice_activity": vad_revision()}
        if self._recogniser:
            revision = self._recogniser.revision()
            facts["recogniser"] = {"revision": revision, "language": self.options.language}
        return facts


@dataclass
class Found:
    """A recording to read. `folder` is where it and its transcript must lie."""

    folder: Path
    name: str
    facts: dict[str, Any] = field(default_factory=dict)


def read_recordings(
    path: Path, options: RecordingOptions, report: Callable[[str], None] = lambda line: None
) -> Imported:
    """Speech records of the recordings at `path`, and what was refused.

    Raises:
        RequestError: an option is wrong, nothing at `path` is a recording, or a package or
            model that it takes is missing.
    """
    if not options.prompt.strip():
        raise RequestError("--prompt must hold text, found none")
    imported, tools = Imported(), Tools(options)
    found = list(find_recordings(path))
    for number, recording in enumerate(found, start=1):
        report(f"{recording.name} ({number} of {len(found)})")
        try:
            _read_recording(recording, tools, imported)
        except RequestError:
            raise
        except (DuplexError, ValidationError, LookupError, TypeError, ValueError, OSError) as error:
            imported.refused.append((recording.name, str(error) or type(error).__name__))
    imported.refuse_doubles()
    imported.provenance = tools.provenance()
    return imported


def find_recordings(path: Path) -> Iterator[Found]:
    """
    Raises:
        RequestError: a folder without recordings, or an index that is none.
    """
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if not names:
            raise RequestError(
                f"{path}: must hold recordings ({', '.join(SUFFIXES)}), found none. Of a "
                "moshi-finetune set, give the .jsonl"
            )
        facts = _metadata(path)
        yield from (Found(path, name, facts.pop(name, {})) for name in names)
        yield from (Found(path, name, rest) for name, rest in facts.items())
    elif path.suffix.lower() in SUFFIXES:
        yield Found(path.parent, path.name, _metadata(path.parent).get(path.name, {}))
    else:
        for index, entry in enumerate(json_values(path)):
            yield Found(path.parent, str(entry.get("path", f"record {index}")), entry)


def _metadata(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / METADATA
    if not path.exists():
        return {}
    facts = {}
    for entry in json_values(path):
        if not isinstance(entry.get("path"), str):
            raise RequestError(f"{path}: each line must hold a path, found {entry!r:.80}")
        facts[entry["path"]] = entry
    return facts


def _read_recording(found: Found, tools: Tools, imported: Imported) -> None:
    folder = found.folder.resolve()
    path = (folder / found.name).resolve()
    transcript_path = (folder / found.name).with_suffix(".json").resolve()
    if not all(p.is_relative_to(folder) for p in (path, transcript_path)):
        raise RecordError("the path must lie in the set's own folder")
    persona, prompt, first_speaker = _facts(found, tools.options)
    sound = SoundFile.open(path)
    notes = _look(sound)
    voices: dict[Role, str] = {"agent": voice_id(persona), "user": "recorded.user"}
    if transcript_path.exists():
        words = words_by_role(_transcript(transcript_path), sound.duration_s)
        if not words["agent"]:
            raise RecordError("there must be words of the model's side (SPEAKER_MAIN), found none")
        speech = tools.speech(sound)
        notes += transcript_notes(words, speech)
        turns = turns_of_words(words, voices)
        first = turns[0].role
        if not words["user"] and speech["user"] and speech["user"][0][0] < turns[0].start_s:
            first = "user"
    else:
        speech = tools.speech(sound)
        turns, unread = _recognised(sound, speech, tools, voices)
        if not any(turn.role == "agent" for turn in turns):
            raise RecordError(
                "there must be words of the model's side, the left channel, found "
                f"{len(speech['agent'])} spans of speech and no word in them"
            )
        notes += unread
        first = turns[0].role
    notes += both_sides_note(speech)
    if first_speaker and first_speaker != first:
        notes.append(f"first_speaker is given as {first_speaker}, but the {first} is heard first")
    digest, num_samples = _digest(sound)
    name = slug(path.stem)
    imported.records.append(
        Speech(
            id=name,
            dialogue_id=name,
            persona_id=persona,
            scenario_id="import",
            system_prompt=prompt,
            first_speaker=first_speaker or first,
            audio=digest,
            num_samples=num_samples,
            turns=tuple(turns),
        )
    )
    imported.blobs.append(Blob(digest, ".wav", sound.wav_chunks))
    imported.notes += [f"{found.name}: {note}" for note in notes]


def _facts(found: Found, options: RecordingOptions) -> tuple[str, str, Role | None]:
    """Persona, prompt and first speaker: the index first, then the options, then defaults."""
    values = {}
    for key in ("persona_id", "system_prompt", "first_speaker"):
        value = found.facts.get(key)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise RecordError(f"{key} must be text, found {value!r:.60}")
        values[key] = value
    first = values["first_speaker"]
    if first not in (None, *ROLES):
        raise RecordError(f"first_speaker must be agent or user, found {first!r:.60}")
    persona = slug(values["persona_id"] or options.persona or Path(found.name).stem)
    return persona, values["system_prompt"] or options.prompt, first


def voice_id(persona: str) -> str:
    """`recorded.<persona>`, so that no voice is on both sides of a split; cut by its hash."""
    if len(persona) > 80:
        persona = f"{persona[:70]}-{hashlib.sha256(persona.encode()).hexdigest()[:8]}"
    return f"recorded.{persona}"


def _look(sound: SoundFile) -> list[str]:
    look = sound.look()
    fault = faults_of(look)
    if fault:
        raise RecordError(fault)
    notes = []
    if look.correlation > LEAK_CORRELATION:
        notes.append(
            f"each channel hears much of the other (correlation {look.correlation:.2f}): the model "
            "would learn to speak both sides"
        )
    if max(look.clipped) > NOTED_CLIPPED:
        notes.append(f"{max(look.clipped):.2%} of a channel's samples are clipped")
    return notes


def _transcript(path: Path) -> Any:
    try:
        return read_json(read_text(path))
    except ValueError as error:
        raise RecordError(f"{path.name}: must be JSON in UTF-8: {error}") from None


def _recognised(
    sound: SoundFile, speech: dict[Role, list[Span]], tools: Tools, voices: dict[Role, str]
) -> tuple[list[SpokenTurn], list[str]]:
    """Turns where speech is heard, with the recogniser's words, and notes of those without."""
    turns, unread = [], dict.fromkeys(ROLES, 0)
    for role, first, end in speaker_runs(speech):
        spans = speech[role][first:end]
        words = _words_of_turn(sound, ROLES.index(role), spans, tools)
        if words:
            span = (spans[0][0], spans[-1][1])
            turns.append(spoken_turn(role, words, voices[role], span))
        else:
            unread[role] += 1
    notes = [
        f"{count} turns of the {role} left out: speech is heard, and no word of it recognised"
        for role, count in unread.items()
        if count
    ]
    if not speech["user"]:
        notes.append("no speech is heard on the user's side")
    return turns, notes


def _words_of_turn(sound: SoundFile, side: int, spans: list[Span], tools: Tools) -> list[Word]:
    turn_start_s, turn_end_s = spans[0][0], spans[-1][1]
    words: list[Word] = []
    for start_s, end_s in recogniser_windows(spans, VadSettings().max_speech_s):
        # At a turn's edges its side is silent for longer than this; within, no context is added.
        from_s = max(start_s - CONTEXT_S, 0.0) if start_s == turn_start_s else start_s
        to_s = end_s + CONTEXT_S if end_s == turn_end_s else end_s
        samples = sound.mono(side, RECOGNISER_RATE, from_s, to_s)
        for word in tools.recogniser.transcribe(samples, tools.options.language):
            begin_s = min(max(from_s + word.start_s, start_s), end_s)
            stop_s = min(max(from_s + word.end_s, begin_s), end_s)
            words.append(Word(text=word.text, start_s=round(begin_s, 3), end_s=round(stop_s, 3)))
    return words


def _digest(sound: SoundFile) -> tuple[str, int]:
    """sha256 and samples of the recording as the pipeline will hold it."""
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in sound.wav_chunks():
        digest.update(chunk)
        num_bytes += len(chunk)
    if sound.fits:
        return digest.hexdigest(), sound.num_frames
    return digest.hexdigest(), (num_bytes - WAV_HEADER_BYTES) // 4
