"""Tensors from outside: a folder of bare `[17, T]` .pt files, as `duplex import` takes them.

A TensorClip record beside one (`duplex convert tensors`) is checked against it and taken over.

Read with `weights_only=True`: files from outside are hostile.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from duplex.config import Config
from duplex.errors import DuplexError, RecordError
from duplex.records import FrameSpan, TensorClip
from duplex.splits import Member, assign_splits
from duplex.streams import TEXT_PAD, TEXT_ROW, USER_ROWS, ZERO_TOKEN, check_codes
from pipeline.engines.tensor_file import read_codes
from pipeline.imported import Imported, slug
from pipeline.sidecar import check_record, record_beside

VALID_FRACTION = 0.1
SPLIT_SEED = 42


def read_tensors(path: Path, config: Config, runs_root: Path) -> Imported:
    from pipeline.engines.checkpoint import resolve_checkpoint

    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    checkpoint = resolve_checkpoint(config.model, runs_root)
    digests = checkpoint.digest("codec"), checkpoint.digest("tokenizer")
    imported = Imported()
    for file in files:
        try:
            _read_tensor(file, checkpoint.config, digests, imported)
        except (DuplexError, ValidationError, OSError) as error:
            imported.refused.append((file.name, str(error)))
    imported.refuse_doubles()
    bare = sum(isinstance(clip, TensorClip) and not clip.split_by for clip in imported.records)
    if bare:
        imported.notes.insert(
            0, f"{bare} files without a record do not say which codec and tokenizer made them: "
            "taken as those of model.base",
        )  # fmt: skip
    _split(imported)
    return imported


def _split(imported: Imported) -> None:
    """Give the bare files their sides: equal dialogues on one, a tenth of them held out."""
    bare = [clip for clip in imported.records if isinstance(clip, TensorClip) and not clip.split_by]
    members = [Member(clip.id, clip.id, clip.id, clip.text_digest or clip.id) for clip in bare]
    split = assign_splits(members, "conversation", VALID_FRACTION, SPLIT_SEED)
    for index, record in enumerate(imported.records):
        if isinstance(record, TensorClip) and record.id in split:
            own = {"split": split[record.id], "split_by": "conversation"}
            imported.records[index] = record.model_copy(update=own)


def _read_tensor(
    file: Path, model: dict[str, Any], digests: tuple[str, str], imported: Imported
) -> None:
    import torch

    codes, _ = read_codes(file)
    codes = codes.copy()
    silent = 0
    if codes.ndim == 2 and codes.shape[0] > TEXT_ROW:
        silent = int((codes[TEXT_ROW] == ZERO_TOKEN).sum())
        codes[TEXT_ROW][codes[TEXT_ROW] == ZERO_TOKEN] = TEXT_PAD
    faults = check_codes(codes, card=model["card"], text_card=model["text_card"])
    if faults:
        raise RecordError("; ".join(faults))
    if silent:
        imported.notes.append(
            f"{file.name}: {silent} text frames of -1 became PAD; where the predecessor made it, "
            "`duplex convert tensors` mends its prompt too"
        )
    clip = record_beside(file)
    if clip is not None:
        check_record(clip, file.read_bytes(), codes.shape[1], *digests)
    prompt_frames = leading_constant_frames(codes[USER_ROWS])
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(codes), buffer)
    name = slug(file.stem)
    tensor_digest = imported.add_bytes(buffer.getvalue(), ".pt")
    if clip is not None:
        own = {"id": name, "tensor": tensor_digest, "padding": "pad", "voice_sample": None}
        imported.records.append(clip.model_copy(update=own))
        return
    imported.records.append(
        TensorClip(
            id=name,
            speech_id=name,
            persona_id=name,
            tensor=tensor_digest,
            num_frames=codes.shape[1],
            prompt=(FrameSpan(label="prompt", start=0, end=prompt_frames),)
            if prompt_frames
            else (),
            turns=(),
            text_tokens=int((codes[TEXT_ROW, prompt_frames:] != TEXT_PAD).sum()),
            alignment="import",
            text_digest=hashlib.sha256(codes[:, prompt_frames:].tobytes()).hexdigest(),
            split="train",  # until all are there: see `_split`
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
