"""Recordings of speakers -> samples to clone a voice from: read, judged, cut. Each or a reason.

A folder holds a file for each speaker, or a folder of files, of which the best is taken. Beside
them `voices.yaml` says what no file can: who may use it (licence, consent), gender, age,
language, and what is said.

Taken is the stretch of `LEAST_S` to `MOST_S` with the most speech in it, by voice activity, at
-24 LUFS, mono, 24 kHz. Refused are stretches that are clipped, noisy, or of a telephone's
bandwidth, also when they were resampled since. Two speakers in one file are not told apart.

Cost: 3 s of CPU time for a minute of sound, most of it voice activity. Files come from anybody:
`read_mono` bounds what is read of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from duplex.base import Frozen, Language, Text
from duplex.config_data import VoicesSection
from duplex.datafiles import read_yaml, validate
from duplex.errors import DataFileError, MissingInputError, RecordError, RequestError
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from pipeline.engines.sound_file import FULL_SCALE
from pipeline.engines.vad import VAD_RATE, VadSettings, VoiceActivity, speech_spans
from pipeline.engines.voice_choice import Age, Gender, Offer
from pipeline.engines.voice_sound import (
    MOST_S,
    bandwidth,
    best_stretch,
    gender_of_pitch,
    read_mono,
    signal_to_noise,
)
from pipeline.engines.voicesample import voice_sample

SIDECAR = "voices.yaml"
ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
MAX_FILES, MAX_FILES_OF_ONE = 2000, 20
MIN_SNR_DB = 15.0
MAX_CLIPPED = 0.001  # share of the stretch's samples at full scale
MIN_BANDWIDTH_HZ = 4_200.0  # telephones pass 300 to 3 400 Hz, their files 4 000


class SpeakerFacts(Frozen):
    """What `voices.yaml` says of a speaker. `transcript` is a text, or one for each file."""

    gender: Gender | None = None
    age: Age | None = None
    language: Language | None = None
    licence: Text | None = None
    consent: Text | None = None
    transcript: Text | dict[str, Text] | None = None


class Sidecar(Frozen):
    """`voices.yaml`. What stands at the top holds for all speakers that do not say otherwise."""

    licence: Text | None = None
    consent: Text | None = None
    language: Language | None = None
    speakers: dict[str, SpeakerFacts] = Field(default={})


@dataclass(frozen=True)
class Clip:
    """A recording that a voice may be taken from. `content`: its file, or the bytes of one."""

    speaker: str
    source: str
    content: Path | bytes = field(repr=False)
    licence: str
    consent: str
    language: str
    gender: Gender | None = None
    age: Age | None = None
    transcript: str | None = None

    @property
    def offer(self) -> Offer:
        return Offer(self.speaker, self.language, self.gender, self.age)


@dataclass(frozen=True)
class Sample:
    """The stretch of a clip that was taken. samples: float32 [S] at 24 kHz, -24 LUFS."""

    clip: Clip
    samples: np.ndarray = field(repr=False)
    start_s: float
    end_s: float
    snr_db: float
    bandwidth_hz: float
    whole: bool  # nothing that is said in the clip lies outside


# -- what there is


def clips_of_folder(folder: Path, section: VoicesSection) -> list[Clip]:
    """The clips of a folder, by speaker and file name. Reads no sound.

    Raises:
        DataFileError: no folder, no recordings, too many, or a voices.yaml that is wrong.
        RequestError: a speaker without licence or consent.
    """
    files = recording_files(folder)
    path = folder / SIDECAR
    facts: Sidecar = validate(Sidecar, read_yaml(path) or {}, path) if path.exists() else Sidecar()
    unknown = sorted(set(facts.speakers) - set(files))
    if unknown:
        raise DataFileError(
            f"{path}: each speaker must have a recording, found none of {unknown[0]}; there are "
            f"{', '.join(sorted(files)[:8])}"
        )
    clips = []
    for speaker, paths in files.items():
        own = facts.speakers.get(speaker, SpeakerFacts())
        licence = own.licence or facts.licence or section.licence
        consent = own.consent or facts.consent or section.consent
        require_rights(f"{folder / speaker}", licence, consent)
        assert licence and consent
        for file in paths:
            said = own.transcript
            clips.append(
                Clip(
                    speaker=speaker,
                    source=str(file.relative_to(folder)),
                    content=file,
                    licence=licence,
                    consent=consent,
                    language=own.language or facts.language or section.language,
                    gender=own.gender,
                    age=own.age,
                    transcript=said.get(file.name) if isinstance(said, Mapping) else said,
                )
            )
    return clips


def recording_files(folder: Path) -> dict[str, list[Path]]:
    """Speaker -> files. What a link points to, or a name begins with a dot, is not looked at.

    Raises:
        DataFileError: no folder, none in it, or more than `MAX_FILES`.
    """
    if not folder.is_dir():
        raise DataFileError(f"voices.recordings must be a folder, found none at {folder}")
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name.startswith("."):
            continue
        if entry.is_dir():
            own = [file for file in sorted(entry.iterdir()) if _is_recording(file)]
            if own:
                found.setdefault(entry.name, []).extend(own[:MAX_FILES_OF_ONE])
        elif _is_recording(entry):
            found.setdefault(entry.stem, []).append(entry)
    if not found or len(found) > MAX_FILES:
        raise DataFileError(
            f"{folder}: must hold recordings ({', '.join(ENDINGS)}) of 1 to {MAX_FILES} speakers, "
            f"found {len(found)}"
        )
    return found


def _is_recording(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and path.is_file() and not path.is_symlink()


def require_rights(whose: str, licence: str | None, consent: str | None) -> None:
    """
    Raises:
        RequestError: a voice whose use nobody has allowed.
    """
    missing = [name for name, v in (("licence", licence), ("consent", consent)) if not v]
    if missing:
        raise RequestError(
            f"{whose}: a recorded voice must have {' and '.join(missing)}, found none. Write in "
            f"{SIDECAR} beside the recordings, or in voices.{missing[0]}, under which licence and "
            "on what consent of the speaker it is used; without them it may not be cloned"
        )


# -- one clip


def take_sample(clip: Clip, vad: VoiceActivity, *, guess_gender: bool = False) -> Sample:
    """
    Raises:
        RecordError: why no voice can be taken from it.
    """
    import soxr

    samples, rate = read_mono(clip.content)
    heard = soxr.resample(samples, rate, VAD_RATE, quality="HQ").astype(np.float32)
    spans = speech_spans(heard, vad, VadSettings(max_speech_s=MOST_S - 0.5))
    start_s, end_s = best_stretch(spans)
    part = samples[round(start_s * rate) : round(end_s * rate)]
    clipped = float(np.mean(np.abs(part) >= FULL_SCALE))
    if clipped > MAX_CLIPPED:
        raise RecordError(
            f"at most {MAX_CLIPPED:.1%} of its samples may be at full scale, found {clipped:.1%}: "
            "it is clipped. Record again at a lower level"
        )
    snr_db = signal_to_noise(samples, rate, spans)
    if snr_db < MIN_SNR_DB:
        raise RecordError(
            f"speech must stand {MIN_SNR_DB:g} dB above the noise, found {snr_db:.0f}: record in a "
            "quieter place, nearer to the microphone"
        )
    top_hz = bandwidth(part, rate)
    if top_hz < MIN_BANDWIDTH_HZ:
        raise RecordError(
            f"the voice must reach above {MIN_BANDWIDTH_HZ / 1000:g} kHz, found nothing above "
            f"{top_hz / 1000:.1f} kHz: a telephone's sound, whatever rate the file has now"
        )
    if clip.gender is None and guess_gender:
        clip = replace(clip, gender=gender_of_pitch(heard, spans))
    ready = soxr.resample(part, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)
    ready = np.pad(ready, (0, -len(ready) % FRAME_SAMPLES))
    return Sample(
        clip=clip,
        samples=voice_sample(ready, MOST_S + 1),
        start_s=round(start_s, 2),
        end_s=round(end_s, 2),
        snr_db=round(snr_db, 1),
        bandwidth_hz=round(top_hz),
        whole=spans[0][0] >= start_s - 0.01 and spans[-1][1] <= end_s + 0.01,
    )


# -- what is said


def transcript_of(sample: Sample, section: VoicesSection) -> str | None:
    """The given text where the stretch holds all of it, else what a recogniser hears; None where
    there is none for the language.

    Raises:
        MissingInputError: the recogniser that was asked for is not here.
    """
    from pipeline.engines.recogniser import RECOGNISER_RATE, make_recogniser

    if sample.clip.transcript and sample.whole:
        return sample.clip.transcript
    if section.recogniser == "none":
        return None
    name = "faster-whisper" if section.recogniser == "auto" else section.recogniser
    try:
        recogniser = make_recogniser(name, None, sample.clip.language)
    except MissingInputError:
        if section.recogniser == "auto":
            return None
        raise
    import soxr

    heard = soxr.resample(sample.samples, SAMPLE_RATE, RECOGNISER_RATE, quality="HQ")
    words = recogniser.transcribe(heard.astype(np.float32), sample.clip.language)
    return " ".join(word.text for word in words) or None
