"""Stage 5: spoken conversations -> training tensors `[17, T]`.

A conversation's two channels are encoded whole, as one batch of two, by the codec of the
base model; silence is kept as encoded silence. The text row holds the agent's words by
onset alignment, and the tensor starts with the prompt as the server will feed it, less
frame 0 (see `duplex/streams.py`).

Personas are held out whole: a validation clip's persona is never seen in training.
"""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np

from duplex.alignment import TextTurn, align
from duplex.config import Config
from duplex.errors import RecordError
from duplex.frames import SAMPLE_RATE, frame_at, frames_covering_samples, frames_covering_seconds
from duplex.records import FrameSpan, Record, Speech, TensorClip
from duplex.stage import BlobSink, MapStage, StageContext, Task
from duplex.streams import (
    AGENT_ROWS,
    NUM_ROWS,
    TEXT_ROW,
    USER_ROWS,
    Prompt,
    build_prompt,
    check_codes,
    system_text,
)
from pipeline.engines.checkpoint import model_identity, resolve_checkpoint


class TensorsStage(MapStage):
    name = "tensors"
    number = 5
    reads = ("speech",)
    set_only = frozenset({"valid_fraction"})  # a clip's split is among its task's sources

    def __init__(self) -> None:
        self._context: StageContext | None = None
        self._loaded: dict[str, Any] = {}

    def engine(self, config: Config) -> str:
        return model_identity(config.model)

    def tasks(self, context: StageContext) -> list[Task]:
        speeches: list[Speech] = list(context.records("speech", Speech))
        personas = {speech.persona_id for speech in speeches}
        held_out = hold_out(personas, context.config.tensors.valid_fraction, context.config.seed)
        tasks = []
        for speech in speeches:
            split = "valid" if speech.persona_id in held_out else "train"
            tasks.append(Task(speech.id, (speech.digest, split), (speech, split)))
        return tasks

    def setup(self, context: StageContext) -> None:
        from pipeline.engines.codec import measure_tokens

        checkpoint = resolve_checkpoint(context.config.model, context.runs_root)
        mimi = checkpoint.load_mimi()
        self._context = context
        self._loaded = {
            "mimi": mimi,
            "tokenizer": checkpoint.load_tokenizer(),
            "tokens": measure_tokens(mimi),
            "card": checkpoint.config["card"],
            "text_card": checkpoint.config["text_card"],
            "codec_digest": checkpoint.digest("codec"),
            "tokenizer_digest": checkpoint.digest("tokenizer"),
        }

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        import torch

        from pipeline.engines.codec import encode

        assert self._context is not None, "setup comes first"
        section = self._context.config.tensors
        speech, split = task.payload
        tokenizer = self._loaded["tokenizer"]
        prompt = None
        if section.prompt:
            prompt = build_prompt(
                tokenizer.encode(system_text(speech.system_prompt)), self._loaded["tokens"]
            )
        channels = read_stereo(self._context.inputs["speech"].read_blob(speech.audio, ".wav"))
        prompt_frames = prompt.training_codes().shape[1] if prompt else 0
        num_frames = prompt_frames + frames_covering_samples(channels.shape[1])
        if num_frames > section.max_frames:
            raise RecordError(
                f"{speech.id}: a clip must have at most {section.max_frames} frames, found "
                f"{num_frames} ({prompt_frames} of them prompt). Shorten dialogues.max_turns or "
                "raise tensors.max_frames, up to the model's context."
            )
        audio = encode(self._loaded["mimi"], channels)
        turns = text_turns(speech, audio.shape[2], tokenizer)
        text = align(turns, audio.shape[2], onset_fraction=section.onset_fraction)
        codes = assemble(prompt, text.row, audio)
        card, text_card = self._loaded["card"], self._loaded["text_card"]
        faults = check_codes(codes, card=card, text_card=text_card)
        if faults:
            raise RecordError(f"{speech.id}: {'; '.join(faults)}")
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(codes), buffer)
        return [
            TensorClip(
                id=speech.id,
                speech_id=speech.id,
                persona_id=speech.persona_id,
                tensor=blobs.put(buffer.getvalue(), ".pt"),
                num_frames=codes.shape[1],
                prompt=_prompt_spans(prompt),
                turns=_turn_spans(speech, prompt_frames, codes.shape[1]),
                text_tokens=sum(len(turn.tokens) for turn in turns),
                dropped_tokens=text.dropped,
                alignment=section.alignment,
                split=split,
                codec_digest=self._loaded["codec_digest"],
                tokenizer_digest=self._loaded["tokenizer_digest"],
            )
        ]

    def close(self) -> None:
        self._loaded = {}


def hold_out(personas: set[str], fraction: float, seed: int) -> set[str]:
    """The personas kept for validation: at least one when `fraction` > 0 and there are two.

    Ranked by a hash of their own, so that a persona more or less moves few others.
    """
    if fraction <= 0 or len(personas) < 2:
        return set()
    ranked = sorted(
        personas, key=lambda persona: hashlib.sha256(f"{seed}:{persona}".encode()).hexdigest()
    )
    count = min(max(1, round(fraction * len(ranked))), len(ranked) - 1)
    return set(ranked[:count])


def read_stereo(wav: bytes) -> np.ndarray:
    """float32 [2, S] of a 24 kHz stereo WAV, row 0 agent.

    Raises:
        RecordError: it is not one.
    """
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise RecordError(f"the audio must be a WAV file, cannot be read: {error}") from None
    if rate != SAMPLE_RATE or samples.shape[1] != 2:
        raise RecordError(
            f"the audio must be stereo at {SAMPLE_RATE} Hz (left agent, right user), found "
            f"{samples.shape[1]} channel(s) at {rate} Hz"
        )
    if not len(samples) or not np.isfinite(samples).all():
        raise RecordError("the audio must hold finite samples, found none or NaN")
    return np.ascontiguousarray(samples.T)


def text_turns(speech: Speech, num_frames: int, tokenizer: Any) -> list[TextTurn]:
    """The agent's turns on the frame grid, tokenized."""
    turns = []
    for turn in speech.turns:
        if turn.role != "agent":
            continue
        start = min(frame_at(turn.start_s), num_frames - 1)
        end = min(max(frames_covering_seconds(turn.end_s), start + 1), num_frames)
        turns.append(TextTurn(start, end, tuple(tokenizer.encode(turn.text))))
    return turns


def assemble(prompt: Prompt | None, text_row: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """int64 [17, P - 1 + T]: the prompt less its frame 0, then text row and audio codes.

    Args:
        audio: int64 [2, 8, T], agent first.
    """
    dialogue = np.empty((NUM_ROWS, audio.shape[2]), dtype=np.int64)
    dialogue[TEXT_ROW] = text_row
    dialogue[AGENT_ROWS], dialogue[USER_ROWS] = audio
    if prompt is None:
        return dialogue
    return np.concatenate([prompt.training_codes(), dialogue], axis=1)


def _prompt_spans(prompt: Prompt | None) -> tuple[FrameSpan, ...]:
    spans = prompt.training_spans() if prompt else ()
    return tuple(FrameSpan(label=label, start=start, end=end) for label, start, end in spans)


def _turn_spans(speech: Speech, offset: int, num_frames: int) -> tuple[FrameSpan, ...]:
    return tuple(
        FrameSpan(
            label=turn.role,
            start=min(offset + frame_at(turn.start_s), num_frames),
            end=min(offset + frames_covering_seconds(turn.end_s), num_frames),
        )
        for turn in speech.turns
    )


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("tensors")
