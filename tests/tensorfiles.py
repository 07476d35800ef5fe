"""Synthetic tensors `[17, T]` in the form of each profile, for the inspector's tests.

Speech is random codes that never equal silence; the clean forms have no findings of harm.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from duplex.alignment import TextTurn, align
from duplex.records import FrameSpan, TensorClip
from duplex.streams import (
    AGENT_ROWS,
    COFFEE_TEXT_FRAMES,
    KYUTAI_TOKENS,
    NUM_ROWS,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    ZERO_TOKEN,
    CodecTokens,
    build_prompt,
)

TAG = (501, 502, 503)  # <system>
CLOSING = (504, 502, 503)  # </system>
OTHER_CODEC = CodecTokens(
    silence=(11, 12, 13, 14, 15, 16, 17, 18), sine=(21, 22, 23, 24, 25, 26, 27, 28)
)
# (role, start, end, tokens), frames of the dialogue. Talk at 3 tokens in 10 frames or fewer.
TURNS = (
    ("user", 4, 40, 0),
    ("agent", 50, 110, 14),
    ("user", 120, 160, 0),
    ("agent", 170, 250, 20),
    ("user", 260, 290, 0),
)
NUM_DIALOGUE = 300


def decode(ids: Any) -> str:
    """A tokenizer that knows the tags; every other id is a word of its own."""
    names = {501: "<", 504: "</", 502: "system", 503: "> "}
    return "".join(names.get(token, f"w{token} ") for token in ids)


def prompt_tokens(words: int = 30, closing: tuple[int, ...] = TAG) -> tuple[int, ...]:
    return (*TAG, *range(1000, 1000 + words), *closing)


def speech(frames: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [8, frames] above all codes of silence and sine that the tests use."""
    return rng.integers(100, 240, (8, frames)) + 0


def dialogue(
    turns: Any = TURNS,
    frames: int = NUM_DIALOGUE,
    *,
    codec: CodecTokens = KYUTAI_TOKENS,
    wavering: bool = True,
    mode: Any = "onset",
    drop: bool = False,
    padding: int = TEXT_PAD,
    seed: int = 0,
) -> np.ndarray:
    """int64 [17, frames]. wavering: silence varies in two codebooks, as encoded silence does."""
    rng = np.random.default_rng(seed)
    codes = np.empty((NUM_ROWS, frames), dtype=np.int64)
    for rows in (AGENT_ROWS, USER_ROWS):
        codes[rows] = np.asarray(codec.silence)[:, None]
        if wavering:
            codes[rows.stop - 2 : rows.stop] = rng.integers(30, 90, (2, frames))
    placed = []
    for number, (role, start, end, tokens) in enumerate(turns):
        rows = AGENT_ROWS if role == "agent" else USER_ROWS
        codes[rows, start:end] = speech(end - start, rng)
        if role == "agent":
            ids = tuple(2000 + 100 * number + i for i in range(tokens))
            step = max(1, (end - start) // max(tokens, 1))
            words = tuple((i, start + i * step) for i in range(0, tokens, 2))
            placed.append(TextTurn(start, end, ids, words if mode == "word" else ()))
    codes[TEXT_ROW] = align(placed, frames, mode, drop=drop, padding=padding).row
    return codes


def workbench(codec: CodecTokens = KYUTAI_TOKENS, **changes: Any) -> np.ndarray:
    prompt = build_prompt(prompt_tokens(), codec).training_codes()
    return np.concatenate([prompt, dialogue(codec=codec, **changes)], axis=1)


def personaplex(codec: CodecTokens = KYUTAI_TOKENS, **changes: Any) -> np.ndarray:
    voice = speech(40, np.random.default_rng(5))
    prompt = build_prompt(prompt_tokens(), codec, voice=voice).training_codes()
    return np.concatenate([prompt, dialogue(codec=codec, mode="word", **changes)], axis=1)


def moshi(codec: CodecTokens = KYUTAI_TOKENS, **changes: Any) -> np.ndarray:
    return dialogue(codec=codec, mode="word", **changes)


COFFEE_TURNS = (
    ("agent", 0, 60, 30),  # more than 30 % of 60 frames
    ("user", 63, 120, 0),
    ("agent", 122, 200, 20),
    ("user", 203, 290, 0),
)


def coffee(words: int = 30, codec: CodecTokens = KYUTAI_TOKENS, **changes: Any) -> np.ndarray:
    """The predecessor's: `</system>`, frame 0 kept, -1 as padding, constant silence, drops."""
    prompt = build_prompt(
        prompt_tokens(words, CLOSING), codec, min_text_frames=COFFEE_TEXT_FRAMES
    ).codes
    fields = {"turns": COFFEE_TURNS, "wavering": False, "drop": True, "padding": ZERO_TOKEN}
    return np.concatenate([prompt, dialogue(codec=codec, **(fields | changes))], axis=1)


def record(codes: np.ndarray, prompt_frames: int | None = None, **changes: Any) -> TensorClip:
    """A record that describes `workbench()`, or what the test says differs."""
    text_frames = len(prompt_tokens())
    spans = [("silence", 0, 5), ("text", 5, 5 + text_frames)]
    spans.append(("silence", 5 + text_frames, 11 + text_frames))
    offset = 11 + text_frames if prompt_frames is None else prompt_frames
    fields: dict[str, Any] = {
        "id": "ann.rush-hour.00",
        "speech_id": "ann.rush-hour.00",
        "dialogue_id": "ann.rush-hour.00",
        "persona_id": "ann",
        "voices": ("ann",),
        "text_digest": "1" * 64,
        "tensor": "0" * 64,
        "num_frames": codes.shape[1],
        "prompt": tuple(FrameSpan(label=n, start=a, end=b) for n, a, b in spans),
        "turns": tuple(
            FrameSpan(label=role, start=offset + a, end=offset + b) for role, a, b, _ in TURNS
        ),
        "text_tokens": sum(tokens for *_, tokens in TURNS),
        "dropped_tokens": 0,
        "alignment": "onset",
        "split": "train",
        "codec_digest": "a" * 64,
        "tokenizer_digest": "b" * 64,
    }
    return TensorClip.model_validate(fields | changes)
