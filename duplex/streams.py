"""The 17 rows that Moshi reads, and the prompt that training and serving share.

Row 0 is text, rows 1-8 the agent's Mimi codebooks, rows 9-16 the user's. Files hold
*undelayed* codes; `LMModel.forward` applies the delays. Shapes: K = 17 rows, T frames.

The prompt, in frames (PersonaPlex, as its inference code steps):

    [voice sample] · silence 6 · `<system> TEXT <system>` one token a frame · silence 6 · [greeting]

User rows carry the codec's 440 Hz sine up to the greeting, which is what the other side says
first; agent rows carry silence but for the voice sample. One builder serves training and server.

**Frame 0.** The streaming model never sees what is passed at its first call: position 0
holds initial tokens in every row. The server passes prompt frame 0 there; a training
tensor starts with prompt frame 1. Training frame i is server call i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_ROWS = 17
TEXT_ROW = 0
AGENT_ROWS = slice(1, 9)
USER_ROWS = slice(9, 17)
CODEBOOKS = 8
TEXT_EPAD = 0  # end of padding: a word starts in the next frame
TEXT_PAD = 3
ZERO_TOKEN = -1  # no input, no loss
UNGENERATED = -2
PROMPT_SILENCE_FRAMES = 6
SYSTEM_TAG = "<system>"
# The predecessor's prompt: another closing tag, at least 25 text frames,
# and frame 0 kept in the file.
COFFEE_CLOSING_TAG = "</system>"
COFFEE_TEXT_FRAMES = 25

DELAYS = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)


@dataclass(frozen=True)
class CodecTokens:
    """What the codec in use makes of silence and of the sine, in its steady state: [8] each."""

    silence: tuple[int, ...]
    sine: tuple[int, ...]


# What Kyutai's own weights give, as PersonaPlex publishes it.
KYUTAI_TOKENS = CodecTokens(
    silence=(948, 243, 1178, 546, 1736, 1030, 1978, 2008),
    sine=(430, 1268, 381, 1611, 1095, 1495, 56, 472),
)
KYUTAI_CARD = 2_048
KYUTAI_TEXT_CARD = 32_000


@dataclass(frozen=True)
class Prompt:
    """A prompt as the server passes it, frame 0 included.

    codes: int64 [17, P]; spans: (label, start, end) of each phase, in frames of `codes`.
    """

    codes: np.ndarray
    spans: tuple[tuple[str, int, int], ...]
    tokens: tuple[int, ...]

    @property
    def num_frames(self) -> int:
        return self.codes.shape[1]

    def training_codes(self) -> np.ndarray:
        """int64 [17, P - 1]: the prompt as a training tensor starts, without frame 0."""
        return self.codes[:, 1:]

    def training_spans(self) -> tuple[tuple[str, int, int], ...]:
        return tuple((label, max(start - 1, 0), end - 1) for label, start, end in self.spans)


def system_text(text: str) -> str:
    """The text between its tags. The closing tag is `<system>` again, not `</system>`."""
    return f"{SYSTEM_TAG} {text.strip()} {SYSTEM_TAG}"


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids of a system text between its tags; none for an empty one.

    Args:
        tokenizer: a SentencePieceProcessor.
    """
    return list(tokenizer.encode(system_text(text))) if text.strip() else []


def coffee_text(text: str) -> str:
    """The text between the predecessor's tags."""
    return f"{SYSTEM_TAG} {text.strip()} {COFFEE_CLOSING_TAG}"


def build_prompt(
    tokens: Sequence[int],
    codec: CodecTokens,
    *,
    voice: np.ndarray | None = None,
    greeting: np.ndarray | None = None,
    min_text_frames: int = 0,
) -> Prompt:
    """Lay a tokenized system text out in frames.

    Args:
        tokens: ids of `system_text(...)`; empty for a conversation without a system text.
        voice: int64 [8, V], the agent's voice sample as the codec encodes it by itself.
        greeting: int64 [8, G], what the other side says first, encoded by itself.
        min_text_frames: the text phase is padded to so many frames with PAD.

    Raises:
        ValueError: voice or greeting of another shape.
    """
    quiet, sine = (np.asarray(row, dtype=np.int64)[:, None] for row in (codec.silence, codec.sine))
    text = np.full(max(len(tokens), min_text_frames), TEXT_PAD, dtype=np.int64)
    text[: len(tokens)] = tokens
    silence = np.full(PROMPT_SILENCE_FRAMES, TEXT_PAD, dtype=np.int64)
    # Of each phase: label, text row, agent's codes, user's codes; [8, 1] stands for all frames.
    phases = [("silence", silence, quiet, sine), ("text", text, quiet, sine),
              ("silence", silence, quiet, sine)]  # fmt: skip
    if voice is not None:
        phases.insert(0, ("voice", _padding_for("voice", voice), voice, sine))
    if greeting is not None:
        phases.append(("greeting", _padding_for("greeting", greeting), quiet, greeting))
    blocks, spans, start = [], [], 0
    for label, text_row, agent, user in phases:
        block = np.empty((NUM_ROWS, len(text_row)), dtype=np.int64)
        block[TEXT_ROW], block[AGENT_ROWS], block[USER_ROWS] = text_row, agent, user
        blocks.append(block)
        spans.append((label, start, start + len(text_row)))
        start += len(text_row)
    return Prompt(np.concatenate(blocks, axis=1), tuple(spans), tuple(tokens))


def bare_prompt(codec: CodecTokens) -> Prompt:
    """What a conversation without any prompt starts with: one frame, which is never seen.

    A tensor without a prompt starts with the first frame of its dialogue, so the server must
    pass something before that.
    """
    prompt = build_prompt((), codec)
    return Prompt(prompt.codes[:, :1], (), ())


def _padding_for(name: str, codes: np.ndarray) -> np.ndarray:
    if codes.ndim != 2 or codes.shape[0] != CODEBOOKS or codes.shape[1] == 0:
        raise ValueError(f"{name} must be codes [{CODEBOOKS}, frames], found {list(codes.shape)}")
    return np.full(codes.shape[1], TEXT_PAD, dtype=np.int64)


def apply_delays(codes: np.ndarray, audio_initial: int, text_initial: int) -> np.ndarray:
    """What the model reads at each call when it is given `codes`: int64 [17, T + 1].

    Position 0 holds initial tokens; row k of position p >= 1 holds `codes[k, p - 1 - delay]`,
    or the initial token where that frame is before the start. Equal to the input of
    `LMModel.forward_text` in `LMModel.forward`, which the contract test checks.
    """
    num_rows, num_frames = codes.shape
    delayed = np.full((num_rows, num_frames + 1), audio_initial, dtype=np.int64)
    delayed[TEXT_ROW] = text_initial
    for row, delay in enumerate(DELAYS[:num_rows]):
        delayed[row, 1 + delay :] = codes[row, : num_frames - delay]
    return delayed


def check_codes(
    codes: np.ndarray, *, card: int, text_card: int, zero_text: bool = False
) -> list[str]:
    """What is wrong with a training tensor; an empty list when nothing is.

    Args:
        codes: int64 [17, T].
        card: codes of a codebook, 0 to card - 1 allowed.
        text_card: ids of the tokenizer, 0 to text_card - 1 allowed.
        zero_text: -1 is allowed in the text row, as in the predecessor's files.
    """
    faults = []
    if codes.ndim != 2 or codes.shape[0] != NUM_ROWS:
        return [f"the shape must be [{NUM_ROWS}, T], found {list(codes.shape)}"]
    if codes.shape[1] == 0:
        return ["there must be at least one frame, found none"]
    text, audio = codes[TEXT_ROW], codes[1:]
    for name, rows, limit in (("text", text[None], text_card), ("audio", audio, card)):
        bad = (rows < (ZERO_TOKEN if zero_text and name == "text" else 0)) | (rows >= limit)
        if bad.any():
            row, frame = np.argwhere(bad)[0]
            found = int(rows[row, frame])
            row_name = "0" if name == "text" else str(row + 1)
            faults.append(
                f"{name} codes must be in [0, {limit}), found {found} in row {row_name}, "
                f"frame {frame}"
            )
    return faults
