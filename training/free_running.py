"""The model speaks freely while it trains, with its unmerged adapters.

Each chosen clip is a row of one batch: its prompt is forced in frame by frame, then its user's
codes go on being fed while text and agent's codes are the model's own, sampled. Positions are
those of `pipeline/serving/conversation.py`: at call s the generator reads position s and
predicts p = s + 1; a row of delay d holds frame p - d there; frame 0 is never seen, so training
frame i is frame i + 1 here. All rows start at call 0 and their prompts end where they end, so
no slot waits for another.

**PEFT's layers stay where they are.** moshi's attention asks its first projection for device
and dtype when streaming starts, knows plain Linear and its own LoRALinear, and raises
`Unknown type` for PEFT's. `streamable` shows it a plain layer for the moment in which it asks;
what runs are the very layers that train, in any dtype, quantised or not.

**Nothing is left behind**: training modes, the generators of random numbers, streaming flags,
context lengths, `.grad`. A run with these checks has the same losses as one without.

Cost: (longest prompt + free frames) steps of the temporal transformer and free frames of the
depth transformer. The ring of keys and values is cut to that length for the time: at a batch
of four, 400 frames instead of 3 000 are 0.8 GB instead of 6.3 on a 7B model (computed).
Legend: B clips, K = 17 rows, T frames, F free frames, N calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from duplex.config import SamplingSection
from duplex.errors import RequestError
from duplex.streams import CODEBOOKS, DELAYS, NUM_ROWS, TEXT_ROW, USER_ROWS
from training.batches import Clip


@dataclass(frozen=True)
class FreeRun:
    """What the model said after a clip's prompt: text int64 [F], codes int64 [8, F]."""

    clip: Clip
    text: np.ndarray
    codes: np.ndarray


def run_freely(
    lm: Any, clips: Sequence[Clip], free_frames: int, sampling: SamplingSection, seed: int
) -> list[FreeRun]:
    """Let `lm` speak after each clip's prompt, for `free_frames` or to the clip's end.

    Args:
        lm: an `LMModel`, with PEFT's adapters or without, in any mode.
        seed: of the sampling: the same model, clips and seed say the same.

    Raises:
        RequestError: no clip, no frame, or a model whose layout is not Moshi's.
    """
    if not clips or free_frames < 1:
        raise RequestError(
            f"a free run must have clips and frames, found {len(clips)} and {free_frames}"
        )
    if tuple(lm.delays) != DELAYS or lm.dep_q not in (CODEBOOKS, 2 * CODEBOOKS):
        raise RequestError(
            f"a free run needs Moshi's layout, dep_q 8 or 16 and delays {list(DELAYS)}; found "
            f"dep_q {lm.dep_q} and delays {list(lm.delays)}. Set train.guards.free_seconds to 0."
        )
    frames = [min(free_frames, clip.num_frames - clip.prompt_frames) for clip in clips]
    num_calls = max(clip.prompt_frames + free for clip, free in zip(clips, frames, strict=True))
    # Call s yields frame s, and training frame i is frame i + 1: one call more than frames.
    said = _generate(lm, clips, num_calls + 1, sampling, seed)  # [B, 9, N]
    return [
        FreeRun(clip, spoken[TEXT_ROW], spoken[1 : 1 + CODEBOOKS])
        for clip, free, row in zip(clips, frames, said, strict=True)
        for spoken in [row[:, clip.prompt_frames + 1 : clip.prompt_frames + 1 + free]]
    ]


def _generate(
    lm: Any, clips: Sequence[Clip], num_calls: int, sampling: SamplingSection, seed: int
) -> np.ndarray:
    """int64 [B, 9, N]: what each call yields, -2 where nothing was generated yet."""
    from moshi.models.lm import LMGen

    device = lm.device
    forced = _Forced(clips, num_calls, device)
    with untouched(lm), streamable(lm, num_calls), torch.no_grad():
        lm.eval()
        torch.manual_seed(seed)
        generator = LMGen(
            lm,
            temp=sampling.audio_temperature,
            temp_text=sampling.text_temperature,
            top_k=sampling.audio_topk,
            top_k_text=sampling.text_topk,
            on_text_hook=forced.text,
            on_audio_hook=forced.audio,
        )
        outputs = []
        nothing = torch.full((len(clips), 1 + CODEBOOKS, 1), -2, device=device)
        given = torch.zeros((len(clips), lm.dep_q, 1), dtype=torch.long, device=device)
        all_forced = min(clip.prompt_frames for clip in clips)
        with generator.streaming(len(clips)):
            for call in range(num_calls):
                forced.position = call + 1
                # Up to position P the prompt overwrites all that the depth transformer would
                # say (but for what position 1 never reads), so it need not run.
                spared = given.clone() if call + 1 <= all_forced else None
                user = forced.codes[:, USER_ROWS, call : call + 1]
                # With dep_q 16 the model predicts the user too, and the hook overwrites that.
                out = generator.step(user if lm.dep_q == CODEBOOKS else user[:, :0], spared)
                outputs.append(nothing if out is None else out[:, : 1 + CODEBOOKS])
    return torch.cat(outputs, dim=2).cpu().numpy()


class _Forced:
    """Overwrites what was predicted: within a prompt all of it, after that the user alone.

    codes: int64 [B, 17, N + 1], frame 0 in front; position: what the call in progress predicts.
    """

    def __init__(self, clips: Sequence[Clip], num_calls: int, device: torch.device):
        codes = np.empty((len(clips), NUM_ROWS, num_calls + 1), dtype=np.int64)
        for row, clip in enumerate(clips):
            # Past its end a clip's last frame is repeated: those calls are other rows'.
            places = np.clip(np.arange(-1, num_calls), 0, clip.num_frames - 1)
            codes[row] = clip.codes[:, places]
        self.codes = torch.from_numpy(codes).to(device)
        self.ends = torch.tensor([clip.prompt_frames for clip in clips], device=device)  # [B]
        self.position = 0

    def text(self, text: torch.Tensor) -> None:  # [B]
        here = self.codes[:, TEXT_ROW, self.position]
        text.copy_(torch.where(self.position <= self.ends, here, text))

    def audio(self, audio: torch.Tensor) -> None:  # [B, 8 or 16]
        for book in range(audio.shape[1]):
            frame = self.position - DELAYS[1 + book]
            if frame < 1:
                continue
            here = self.codes[:, 1 + book, frame]
            is_forced = frame <= self.ends if book < CODEBOOKS else torch.ones_like(here).bool()
            audio[:, book] = torch.where(is_forced, here, audio[:, book])


_FLAGS = ("training", "_streaming_state", "_streaming_detached")


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Whatever happens inside: modes, streaming and random generators come back.

    Streaming too, since a start that fails half-way (no memory for a ring) is not undone by moshi.
    """
    from moshi.utils.compile import no_compile

    kept = [
        (part, {flag: part.__dict__[flag] for flag in _FLAGS if flag in part.__dict__})
        for part in module.modules()
    ]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), no_compile():
        try:
            yield
        finally:
            for part, flags in kept:
                part.__dict__.update(flags)


@contextmanager
def streamable(lm: Any, num_frames: int) -> Iterator[None]:
    """A model whose layers PEFT has wrapped can stream in here, with these very layers.

    Args:
        num_frames: longest stream; the temporal transformer's ring of keys and values is made
            for so many, where its context is longer.
    """
    from moshi.modules.transformer import StreamingMultiheadAttention

    device, dtype = lm.device, lm.dtype
    plain = nn.Linear(1, 1, bias=False, device=device, dtype=dtype)
    temporal = set(lm.transformer.modules())
    with ExitStack() as stack:
        for module in lm.modules():
            if isinstance(module, StreamingMultiheadAttention):
                frames = num_frames if module in temporal else None
                stack.enter_context(_starts_with(module, plain, frames))
        yield


@contextmanager
def _starts_with(attention: Any, plain: nn.Linear, num_frames: int | None) -> Iterator[None]:
    """`attention` takes dtype and device from `plain` when its streaming starts."""
    original = attention._init_streaming_state  # bound to the class's function

    def start(batch_size: int) -> Any:
        layers, context = attention.in_projs, attention.context
        first = layers[0]
        layers[0] = plain
        if num_frames is not None and context is not None:
            attention.context = min(context, num_frames)
        try:
            return original(batch_size)
        finally:
            layers[0], attention.context = first, context

    attention.__dict__["_init_streaming_state"] = start
    try:
        yield
    finally:
        del attention.__dict__["_init_streaming_state"]
