"""Training clips: read and checked once, cut, padded into batches; `training/sampler.py` says
which clips make a batch.

A clip is cut at its end, from frame 0 on, so that its prompt is always there. Prompt frames
carry no loss, unless `train.loss.prompt` says so. Nor does a code whose delayed place lies
beyond the clip: without that the loss of a padded batch would not be that of its clips one by
one.

Clips are kept as int16: an hour of dialogue is 45 000 frames, 1.5 MB.
Legend: B clips, K = 17 rows, T frames.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from duplex.errors import CorruptFileError, RequestError
from duplex.records import TensorClip
from duplex.store import StageFolder
from duplex.streams import DELAYS, NUM_ROWS, ZERO_TOKEN, check_codes
from training.loss import MASK_ROWS, MASK_ROWS_WITH_USER


@dataclass(frozen=True)
class Clip:
    """A training example. codes: int16 [17, T], undelayed; frames before `prompt_frames` are
    its prompt, frames before `loss_from` carry no loss. turns: (role, start, end) in frames;
    empty where nobody knows. persona_id: whose prompt it is; None where nobody knows."""

    id: str
    codes: np.ndarray
    prompt_frames: int
    loss_from: int
    turns: tuple[tuple[str, int, int], ...] = ()
    persona_id: str | None = None

    @property
    def num_frames(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True)
class Batch:
    """codes: int64 [B, 17, T], -1 after a clip's end; loss_mask: bool [B, 9, T],
    or [B, 17, T] with the user's streams; num_frames: frames without the padding."""

    codes: torch.Tensor
    loss_mask: torch.Tensor
    num_frames: int

    def to(self, device: torch.device) -> Batch:
        return Batch(self.codes.to(device), self.loss_mask.to(device), self.num_frames)


def read_clips(
    folder: StageFolder,
    records: Iterable[TensorClip],
    *,
    crop_frames: int,
    card: int,
    text_card: int,
    loss_on_prompt: bool = False,
) -> list[Clip]:
    """All clips of `records`, each checked against its digest, its record and the vocabulary.

    Raises:
        CorruptFileError: a file that is gone, damaged or holds something else; names it.
        RequestError: clips of which `crop_frames` leaves the prompt alone.
    """
    clips = [
        _read_clip(folder, record, crop_frames, card, text_card, loss_on_prompt)
        for record in records
    ]
    hidden = [clip for clip in clips if clip.prompt_frames >= clip.num_frames]
    if hidden:
        longest = max(clip.prompt_frames for clip in hidden)
        raise RequestError(
            f"a training clip must have frames after its prompt, found none in {len(hidden)} of "
            f"{len(clips)} (first {hidden[0].id}) when cut to {crop_frames} frames. "
            f"Raise train.crop_frames well above {longest}, the longest such prompt."
        )
    return clips


def _read_clip(
    folder: StageFolder,
    record: TensorClip,
    crop_frames: int,
    card: int,
    text_card: int,
    loss_on_prompt: bool,
) -> Clip:
    content = folder.read_blob(record.tensor, ".pt")
    name = f"{folder.path / 'blobs' / record.tensor}.pt (clip {record.id})"
    try:
        tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, EOFError,
            LookupError, AttributeError) as error:  # fmt: skip
        raise CorruptFileError(
            f"{name}: must be a tensor file, cannot be read as one: "
            f"{(str(error) or type(error).__name__).splitlines()[0][:200]}. "
            "Remove the tensors stage folder and run again."
        ) from None
    faults = _describe_faults(tensor, record, card, text_card)
    if faults:
        raise CorruptFileError(
            f"{name}: {'; '.join(faults)}. Remove the tensors stage folder and run again."
        )
    dtype = np.int16 if max(card, text_card) <= np.iinfo(np.int16).max else np.int64
    codes = np.ascontiguousarray(tensor.numpy()[:, :crop_frames].astype(dtype))
    prompt_frames = max((span.end for span in record.prompt), default=0)
    turns = tuple((turn.label, turn.start, turn.end) for turn in record.turns)
    return Clip(
        record.id,
        codes,
        prompt_frames,
        0 if loss_on_prompt else prompt_frames,
        turns,
        record.persona_id,
    )


def _describe_faults(tensor: object, record: TensorClip, card: int, text_card: int) -> list[str]:
    if not isinstance(tensor, torch.Tensor):
        return [f"it must hold one bare tensor, found {type(tensor).__name__}"]
    if tensor.dtype not in (torch.int64, torch.int16):
        return [f"its dtype must be int64 or int16, found {tensor.dtype}"]
    if tensor.layout != torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        return [f"it must be a dense tensor with data, found a {tensor.layout} one on the "
                f"{tensor.device.type} device"]  # fmt: skip
    # Before its values: a small file may claim any number of frames.
    if tensor.dim() == 2 and tensor.shape[1] not in (0, record.num_frames):
        return [f"its record says {record.num_frames} frames, found {tensor.shape[1]}"]
    zero_text = record.padding == "zero"
    return check_codes(tensor.numpy(), card=card, text_card=text_card, zero_text=zero_text)


def make_batch(clips: Sequence[Clip], user_streams: bool = False) -> Batch:
    """Clips side by side, padded with -1 (no input, no loss) at the right.

    Args:
        user_streams: the user's codes carry loss too.
    """
    rows = MASK_ROWS_WITH_USER if user_streams else MASK_ROWS
    longest = max(clip.num_frames for clip in clips)
    codes = torch.full((len(clips), NUM_ROWS, longest), ZERO_TOKEN, dtype=torch.int64)
    loss_mask = torch.zeros((len(clips), rows, longest), dtype=torch.bool)
    for row, clip in enumerate(clips):
        codes[row, :, : clip.num_frames] = torch.from_numpy(clip.codes.astype(np.int64))
        for stream in range(rows):
            # The code of frame t stands at place t + delay, which must lie within the clip.
            loss_mask[row, stream, clip.loss_from : clip.num_frames - DELAYS[stream]] = True
    return Batch(codes, loss_mask, sum(clip.num_frames for clip in clips))
