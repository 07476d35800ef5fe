"""Speakers for all voices that are needed, from a folder or a `datasets` set.

Of a folder each speaker's files are all heard, `MAX_FILES_OF_ONE` at most, and the best is taken.
Of a set speakers are looked at one after the other until every voice has one, each with `TRIES`
clips at most; one of the hub is streamed: no more of it is fetched than is looked at.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duplex.base import canonical_json
from duplex.config_data import VoiceDataset, VoicesSection
from duplex.datafiles import find_path
from duplex.errors import RecordError, RequestError, TransientError
from duplex.files import known_sha256
from pipeline.engines.voice_choice import (
    HOW_TO_ADD,
    Age,
    Gender,
    Offer,
    Want,
    match,
    shortage,
)
from pipeline.engines.voice_recordings import (
    SIDECAR,
    Clip,
    Sample,
    clips_of_folder,
    recording_files,
    require_rights,
    take_sample,
)

TRIES = 5  # clips of a speaker of a set: it may have thousands of them
GENDERS: dict[str, Gender] = {"female": "female", "f": "female", "male": "male", "m": "male"}
YOUNG_BELOW, OLD_FROM = 30, 60  # years
SAID_REASONS = 8


@dataclass(frozen=True)
class Casting:
    """Who was found for each want, by its id, and why others were not taken: (source, reason)."""

    samples: dict[str, Sample]
    refused: tuple[tuple[str, str], ...]


def source_digest(section: VoicesSection) -> str:
    """Digest of everything that decides which recordings there are. Reads files, no sound."""
    dataset = section.dataset.model_dump(mode="json") if section.dataset else None
    rights = [section.licence, section.consent, section.language, section.guess_gender]
    material = [dataset, source_files(section), rights]
    return hashlib.sha256(canonical_json(material).encode()).hexdigest()


def source_files(section: VoicesSection) -> dict[str, str]:
    """Recordings with their voices.yaml, or a data set's local folder: path within it -> sha256.

    The path is half of what is known: a speaker's name is that of the folder. Empty for a set of
    the hub, and where nothing is cloned.

    Raises:
        DataFileError: no folder, or no recordings in it.
    """
    if section.dataset is not None:
        folder = Path(section.dataset.name)
        found = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        files = [path for path in found if not _hidden(path.relative_to(folder))]
    elif section.recordings is not None:
        folder = find_path(section.recordings)
        files = [file for own in recording_files(folder).values() for file in own]
        files += [path for path in (folder / SIDECAR,) if path.exists()]
    else:
        return {}
    return {path.relative_to(folder).as_posix(): known_sha256(path) for path in sorted(files)}


def _hidden(path: Path) -> bool:
    """A cache or a version control's own; `datasets` leaves such out as well."""
    return any(part.startswith(".") for part in path.parts)


def clips_of(section: VoicesSection) -> Iterator[Clip]:
    if section.dataset is not None:
        return clips_of_dataset(section.dataset, section)
    assert section.recordings is not None
    return iter(clips_of_folder(find_path(section.recordings), section))


def cast(
    wants: Sequence[Want],
    clips: Iterable[Clip],
    vad: Any,
    *,
    guess_gender: bool = False,
    thorough: bool = True,
) -> Casting:
    """A speaker for each want.

    Args:
        thorough: look at every clip and keep each speaker's best; else take each speaker's first
            that is fit of `TRIES`, and stop when every want has one: the rest may be long.

    Raises:
        RequestError: too few; names what is missing, and the first recordings that were refused.
    """
    taken: dict[str, Sample] = {}
    tries: Counter[str] = Counter()
    refused: list[tuple[str, str]] = []
    for clip in clips:
        if not thorough and (tries[clip.speaker] == TRIES or clip.speaker in taken):
            continue
        tries[clip.speaker] += 1
        try:
            sample = take_sample(clip, vad, guess_gender=guess_gender)
        except RecordError as error:
            refused.append((clip.source, str(error)))
            continue
        if clip.speaker not in taken or _better(sample, taken[clip.speaker]):
            taken[clip.speaker] = sample
        if not thorough and len(match(wants, _offers(taken))) == len(wants):
            break
    offers = _offers(taken)
    chosen = match(wants, offers)
    if fault := shortage(wants, chosen):
        unknown = sum(offer.gender is None for offer in offers)
        reasons = "; ".join(f"{source}: {why}" for source, why in refused[:SAID_REASONS])
        raise RequestError(
            f"the recordings must have a speaker for each voice: {fault}; {len(taken)} speakers "
            f"are fit, {unknown} of them of unknown gender, {len(refused)} recordings were "
            f"refused{': ' + reasons if reasons else ''}. {HOW_TO_ADD}; say each speaker's gender "
            "in voices.yaml or the set's column, or allow voices.guess_gender."
        )
    return Casting({want: taken[name] for want, name in chosen.items()}, tuple(refused))


def _offers(taken: dict[str, Sample]) -> list[Offer]:
    return [taken[name].clip.offer for name in sorted(taken)]


def _better(one: Sample, other: Sample) -> bool:
    """Longer wins, then cleaner; so that the order of the files does not matter."""
    return (len(one.samples), one.snr_db) > (len(other.samples), other.snr_db)


# -- data sets


def clips_of_dataset(dataset: VoiceDataset, section: VoicesSection) -> Iterator[Clip]:
    """Rows as clips, in the set's order, `max_rows` at most. Sound stays as the set has it:
    decoding by `datasets` would need FFmpeg.

    Raises:
        RequestError: no such set, split or column; no licence or consent.
        TransientError: the hub does not answer.
    """
    licence = section.licence or _licence_of_card(dataset)
    require_rights(f"voices.dataset {dataset.name}", licence, section.consent)
    assert licence and section.consent
    for number, row in enumerate(_rows(dataset)):
        if number == dataset.max_rows:
            return
        sound = row[dataset.audio] or {}
        content = sound.get("bytes")
        if content is None and sound.get("path") and Path(dataset.name).is_dir():
            content = _within(Path(dataset.name), sound["path"])
        if content is None:
            continue
        yield Clip(
            speaker=str(row[dataset.speaker]),
            source=f"{dataset.name} {dataset.split} row {number} speaker {row[dataset.speaker]}",
            content=content,
            licence=licence,
            consent=section.consent,
            language=section.language,
            gender=GENDERS.get(str(_column(row, dataset.gender)).strip().lower()),
            age=_age(_column(row, dataset.age)),
            transcript=str(_column(row, dataset.transcript) or "").strip() or None,
        )


def _rows(dataset: VoiceDataset) -> Iterator[dict[str, Any]]:
    from datasets import Audio, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(
            dataset.name, dataset.config, split=dataset.split, revision=dataset.revision,
            streaming=True,
        )  # fmt: skip
        wanted = [dataset.audio, dataset.speaker, dataset.transcript, dataset.gender, dataset.age]
        have = rows.column_names or list(next(iter(rows.take(1)), {}))
        missing = [name for name in wanted if name and name not in have]
        if missing:
            raise RequestError(
                f"voices.dataset {dataset.name} must have the column {missing[0]}, found "
                f"{', '.join(map(str, have))}. Name its columns: voices.dataset: {{audio: …, "
                "speaker: …, gender: …}"
            )
        rows = rows.cast_column(dataset.audio, Audio(decode=False))
        yield from rows
    except RequestError:
        raise
    except (ConnectionError, TimeoutError) as error:
        raise TransientError(f"{dataset.name} must be reachable: {error}") from error
    except (DatasetsError, ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"voices.dataset {dataset.name} must be a set on the hub or a folder of one, with the "
            f"split {dataset.split}: {reason}"
        ) from error


def _licence_of_card(dataset: VoiceDataset) -> str | None:
    """What the set's card says, of the hub or in the folder; None where it says nothing."""
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(dataset.name)
    try:
        card = DatasetCard.load(folder / "README.md" if folder.is_dir() else dataset.name)
    except (OSError, ValueError, HfHubHTTPError):
        return None
    found = card.data.to_dict().get("license")
    found = ", ".join(map(str, found)) if isinstance(found, list) else found
    return None if not found or found == "unknown" else str(found)


def _within(folder: Path, name: str) -> Path | None:
    """A file of the set that lies in the set's own folder."""
    path = Path(name) if Path(name).is_absolute() else folder / name
    inside = path.resolve().is_relative_to(folder.resolve())
    return path if inside and path.is_file() else None


def _column(row: dict[str, Any], name: str | None) -> Any:
    return row[name] if name else None


def _age(value: Any) -> Age | None:
    """young, adult, old, or years; anything else is unknown."""
    text = str(value).strip().lower()
    words: dict[str, Age] = {"young": "young", "adult": "adult", "old": "old"}
    if text in words:
        return words[text]
    try:
        years = float(text)
    except ValueError:
        return None
    if not 0 < years < 130:
        return None
    if years < YOUNG_BELOW:
        return "young"
    return "old" if years >= OLD_FROM else "adult"
