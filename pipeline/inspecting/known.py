"""What is known of tensors besides their codes: a checkpoint, a tokenizer, recordings.

A checkpoint that nobody named is used only when its codec and tokenizer have the digests of
the record: then it is the one that made the tensor.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duplex.config import ModelSection
from duplex.errors import CorruptFileError, DuplexError, MissingInputError, RequestError
from duplex.files import sha256_file
from duplex.phases import Known
from duplex.records import Speech, TensorClip
from duplex.store import MANIFEST, StageFolder, folders_of
from pipeline.engines.checkpoint import MODELS_FOLDER, Checkpoint, resolve_checkpoint

MAX_AUDIO_SAMPLES = 2 * 48_000 * 3600 * 2  # two hours of stereo
MAX_TOKENIZER_BYTES = 64 << 20
SPEECH_NUMBER = 4


def known_of_checkpoint(checkpoint: Checkpoint, source: str) -> Known:
    """Codec tokens are measured, which takes seconds."""
    from pipeline.engines.codec import measure_tokens

    known = known_of_tokenizer(checkpoint.files()["tokenizer"])
    return replace(
        known,
        tokens=measure_tokens(checkpoint.load_mimi()),
        tokens_from=source,
        card=checkpoint.config["card"],
        text_card=checkpoint.config["text_card"],
        codec_digest=checkpoint.digest("codec"),
        context=checkpoint.config.get("context", Known().context),
    )


def known_of_tokenizer(path: Path) -> Known:
    """
    Raises:
        RequestError: it is no SentencePiece model.
    """
    import sentencepiece

    if not path.is_file() or path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise MissingInputError(f"{path}: must be a SentencePiece model, found none there")
    processor: Any = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
        size = processor.vocab_size()
    except (RuntimeError, OSError, TypeError) as error:
        raise RequestError(f"{path}: must be a SentencePiece model: {str(error)[:200]}") from None

    def decode(ids: Sequence[int]) -> str:
        return processor.decode([token for token in ids if 0 <= token < size])

    return Known(vocabulary=size, decode=decode, tokenizer_digest=sha256_file(path))


def requested(model: Path | None, tokenizer: Path | None) -> Known | None:
    """What the command line names; None when it names nothing.

    Raises:
        RequestError: both, or something that is not what it should be.
    """
    if model and tokenizer:
        raise RequestError("give --model or --tokenizer: a checkpoint has a tokenizer of its own")
    if tokenizer:
        return known_of_tokenizer(tokenizer)
    if model is None:
        return None
    if str(model) != "pocket" and not model.is_dir():
        raise MissingInputError(
            f"--model must be `pocket` or a checkpoint folder, found nothing at {model}"
        )
    checkpoint = resolve_checkpoint(ModelSection(base=str(model)), Path("runs"))
    return known_of_checkpoint(checkpoint, f"the codec of {model.name}")


def find_checkpoint(run_folder: Path, clip: TensorClip) -> Known | None:
    """The checkpoint that made a clip, if it is in the run or beside it."""
    candidates = sorted(run_folder.glob("07-merge-*/checkpoint"))
    candidates += sorted((run_folder.parent / MODELS_FOLDER).glob("*"))
    wanted = clip.tokenizer_digest, clip.codec_digest
    for folder in candidates:
        try:
            checkpoint = Checkpoint.open(folder)
            if (checkpoint.digest("tokenizer"), checkpoint.digest("codec")) == wanted:
                return known_of_checkpoint(checkpoint, f"the codec of {folder.name}, by its digest")
        except (DuplexError, OSError, KeyError):
            continue  # not a whole checkpoint: nothing was promised of it
    return None


# -- recordings


def speeches_of(run_folder: Path) -> dict[str, tuple[Speech, StageFolder]]:
    """Spoken conversations of a run by id, the newest folder's first."""
    found: dict[str, tuple[Speech, StageFolder]] = {}
    for folder in folders_of(run_folder, SPEECH_NUMBER, "speech"):
        if not (folder.path / MANIFEST).exists():
            continue
        try:
            for record in folder.records():
                if isinstance(record, Speech):
                    found.setdefault(record.id, (record, folder))
        except CorruptFileError:
            continue  # `duplex run` says so; here it only means that no audio is at hand
    return found


def audio_of(
    path: Path, clip: TensorClip | None, speeches: dict[str, tuple[Speech, StageFolder]]
) -> bytes | None:
    """The recording of a tensor: beside it under its name, or of its conversation in the run."""
    beside = path.with_suffix(".wav")
    if beside.is_file():
        limit = 8 * MAX_AUDIO_SAMPLES
        return beside.read_bytes() if beside.stat().st_size <= limit else None
    if clip and clip.speech_id in speeches:
        speech, folder = speeches[clip.speech_id]
        try:
            return folder.read_blob(speech.audio, ".wav")
        except CorruptFileError:
            return None
    return None


def loudness_lufs(wav: bytes) -> dict[str, float | None]:
    """Integrated loudness (ITU-R BS.1770) of each channel; None for one without sound.

    Raises:
        ValueError: it cannot be read, is too long, or is shorter than 0.4 s.
    """
    import pyloudnorm
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(wav))
        if info.frames * info.channels > MAX_AUDIO_SAMPLES or info.channels > 2:
            raise ValueError(f"{info.channels} channels, {info.frames} samples")
        samples, rate = soundfile.read(io.BytesIO(wav), dtype="float64", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"a recording that cannot be read: {str(error)[:120]}") from None
    names = ("agent", "user") if samples.shape[1] == 2 else ("mono",)
    meter = pyloudnorm.Meter(rate)
    levels = {name: float(meter.integrated_loudness(samples[:, i])) for i, name in enumerate(names)}
    return {
        name: round(level, 2) if math.isfinite(level) else None for name, level in levels.items()
    }
