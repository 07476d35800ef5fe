"""The TensorClip record beside a `.pt`: `<stem>.json`, as `duplex convert tensors` writes it."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from duplex.errors import RecordError
from duplex.files import sha256_bytes
from duplex.records import TensorClip

MAX_RECORD_BYTES = 1 << 24


def record_beside(file: Path) -> TensorClip | None:
    """The record beside a tensor, unchecked; None where there is none of ours."""
    path = file.with_suffix(".json")
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        return TensorClip.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def check_record(
    clip: TensorClip, content: bytes, num_frames: int, codec_digest: str, tokenizer_digest: str
) -> None:
    """
    Raises:
        RecordError: the record is of another file, or of another model's codec or tokenizer.
    """
    spans = (*clip.prompt, *clip.turns)
    inside = all(span.start <= span.end <= num_frames for span in spans)
    if clip.tensor != sha256_bytes(content) or clip.num_frames != num_frames or not inside:
        raise RecordError(
            f"the .json beside it must be its record (sha256 {clip.tensor[:12]}…, "
            f"{clip.num_frames} frames), found sha256 {sha256_bytes(content)[:12]}…, {num_frames} "
            "frames: one of the two was changed. Convert again, or remove the .json"
        )
    if (clip.codec_digest, clip.tokenizer_digest) != (codec_digest, tokenizer_digest):
        raise RecordError(
            "its record must name the codec and tokenizer of model.base, found others: it was made "
            "for another model"
        )
