"""Where a tensor's prompt is and what it holds, from the codes alone. Pure.

The prompt is the leading run of frames whose user rows repeat one column (the sine) and that
holds one run of text over a constant agent. Where no codec is at hand its steady silence and
sine are Kyutai's, if the file holds those, or are read off the prompt itself.

Shapes: T frames. Cost: linear in T, but for the commonest column: T log T.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from duplex.frames import LM_CONTEXT_FRAMES
from duplex.metrics import segments
from duplex.records import TensorClip
from duplex.streams import (
    AGENT_ROWS,
    COFFEE_CLOSING_TAG,
    COFFEE_TEXT_FRAMES,
    KYUTAI_TOKENS,
    PROMPT_SILENCE_FRAMES,
    SYSTEM_TAG,
    TEXT_EPAD,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    CodecTokens,
)

MIN_PROMPT_FRAMES = 8  # a dialogue, too, may begin with a few frames of one column
MIN_STEADY_FRAMES = 3
# Codes of 8 in which a steady column may differ and still be the same codec's: some codebooks
# waver between near-equal codes, and the number of threads decides. Another codec differs in all.
NEAR_TIES = 3

Source = Literal["record", "codes", "unknown"]
Frame0 = Literal["kept", "dropped", "unknown"]
Closing = Literal["<system>", "</system>", "none", "differs", "no text"]


@dataclass(frozen=True)
class Known:
    """What is known of a tensor besides its codes; everything is optional.

    decode: the tokenizer, ids -> text. vocabulary: its size. digests: the model's.
    """

    clip: TensorClip | None = None
    tokens: CodecTokens | None = None
    tokens_from: str = "the checkpoint's codec"
    card: int | None = None
    text_card: int | None = None
    vocabulary: int | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    codec_digest: str | None = None
    tokenizer_digest: str | None = None
    context: int = LM_CONTEXT_FRAMES


@dataclass(frozen=True)
class Steady:
    """Columns of the codec's silence and sine, [8] each, and where they are from."""

    silence: tuple[int, ...] | None
    sine: tuple[int, ...] | None
    source: str
    expected: CodecTokens | None = None  # what the prompt's rows are held against


@dataclass(frozen=True)
class PromptFacts:
    """What the codes say of the prompt, all in frames of the file.

    text: (start, end) of the run of tokens; silence: frames before and after the text phase.
    foreign_frames: frames whose rows are not what the server feeds; None when not known.
    tied_frames: frames that differ from it in no more than `NEAR_TIES` codes of a side.
    """

    end: int
    tokens: tuple[int, ...] = ()
    text: tuple[int, int] = (0, 0)
    silence: tuple[int, int] = (0, 0)
    voice: int = 0
    padded: bool = False
    closing: Closing = "no text"
    opened: bool | None = None
    decoded: str | None = None
    foreign_frames: int | None = None
    tied_frames: int | None = None


def is_word(text: np.ndarray) -> np.ndarray:
    """Which text ids are tokens of words: neither PAD, EPAD nor negative. bool [T]."""
    return (text >= 0) & (text != TEXT_PAD) & (text != TEXT_EPAD)


def find_prompt(codes: np.ndarray, known: Known) -> PromptFacts | None:
    """The prompt as the codes show it, or None. The greeting looks like a user turn and is not
    part of it."""
    text, agent, user = codes[TEXT_ROW], codes[AGENT_ROWS], codes[USER_ROWS]
    same = (user == user[:, :1]).all(axis=0)
    end = len(same) if same.all() else int(np.argmin(same))
    if end < MIN_PROMPT_FRAMES:
        return None
    runs = segments(is_word(text[:end]))
    if not runs:
        sine = known.tokens.sine if known.tokens else KYUTAI_TOKENS.sine
        if tuple(user[:, 0]) != sine:
            return None
        return PromptFacts(end, silence=(end, 0))
    run = runs[0]
    quiet = _commonest_column(agent[:, run.start : run.end])
    still = (agent == np.asarray(quiet)[:, None]).all(axis=0)
    if still[run.start : run.end].mean() < 0.9:
        return None  # the agent speaks: a first turn, not a prompt
    before = run.start
    while before > 0 and still[before - 1] and run.start - before < PROMPT_SILENCE_FRAMES:
        before -= 1
    text_end = run.end
    if len(runs) == 1 and end - run.start == COFFEE_TEXT_FRAMES + PROMPT_SILENCE_FRAMES:
        text_end = max(run.end, run.start + COFFEE_TEXT_FRAMES)
    # A voice sample ends in what is not silence; without one, all that is before is silence.
    voice = before if before > 0 and not still[:before].all() else 0
    return PromptFacts(
        end=end,
        tokens=tuple(int(token) for token in text[run.start : run.end]),
        text=(run.start, text_end),
        silence=(run.start - voice, end - text_end),
        voice=voice,
        padded=text_end > run.end,
    )


def describe_prompt(
    codes: np.ndarray, found: PromptFacts | None, steady: Steady, known: Known
) -> PromptFacts | None:
    if found is None:
        return None
    changes: dict[str, Any] = {}
    if found.tokens:
        changes["closing"] = "<system>" if _repeats_its_start(found.tokens) else "differs"
        if known.decode:
            text = known.decode(found.tokens).strip()
            changes |= {"decoded": text, "opened": text.startswith(SYSTEM_TAG)}
            changes["closing"] = _closing(text)
    if steady.expected:
        part = slice(found.voice, found.end)
        columns = ((AGENT_ROWS, steady.expected.silence), (USER_ROWS, steady.expected.sine))
        other = [(codes[rows, part] != np.asarray(c)[:, None]).sum(axis=0) for rows, c in columns]
        most = np.maximum(*other)  # codes of 8 that differ, on the worse side
        changes["foreign_frames"] = int((most > NEAR_TIES).sum())
        changes["tied_frames"] = int(((most > 0) & (most <= NEAR_TIES)).sum())
    return replace(found, **changes)


def _closing(text: str) -> Closing:
    if len(text) > len(SYSTEM_TAG) and text.endswith(SYSTEM_TAG):
        return "<system>"
    # A tokenizer that never saw a slash gives its sign for the unknown in its place.
    if text.endswith(COFFEE_CLOSING_TAG) or re.search(r"<\s*⁇\s*system>$", text):
        return "</system>"
    return "none"


def _repeats_its_start(tokens: tuple[int, ...]) -> bool:
    """Whether the last ids are the first ones again, as those of a tag at both ends are."""
    return any(tokens[:n] == tokens[-n:] for n in range(1, min(9, len(tokens) // 2) + 1))


def prompt_spans(prompt: PromptFacts | None) -> list[tuple[str, int, int]]:
    if prompt is None:
        return []
    start, end = prompt.text
    spans = [("voice", 0, prompt.voice), ("silence", prompt.voice, start)]
    spans += [("text", start, end), ("silence", end, prompt.end)]
    return [span for span in spans if span[1] < span[2]]


def is_one_span(clip: TensorClip) -> bool:
    """An imported clip knows where its prompt ends, not its phases."""
    return [span.label for span in clip.prompt] == ["prompt"] or (
        not clip.prompt and clip.alignment == "import"
    )


def frame_0_of(prompt: PromptFacts | None, clip: TensorClip | None) -> tuple[Frame0, Source]:
    if prompt and not prompt.voice and (prompt.tokens or prompt.silence[0]):
        whole = PROMPT_SILENCE_FRAMES if prompt.tokens else 2 * PROMPT_SILENCE_FRAMES
        if prompt.silence[0] == whole:
            return "kept", "codes"
        if prompt.silence[0] == whole - 1:
            return "dropped", "codes"
    if clip and clip.alignment != "import":
        return ("kept" if clip.layout == "coffee" else "dropped"), "record"
    return "unknown", "unknown"


# -- the codec's steady state


def steady_of(codes: np.ndarray, known: Known, prompt: PromptFacts | None) -> Steady:
    """Silence and sine: the model's, else Kyutai's where the file holds them, else inferred.

    Where there is a prompt its own column is the silence, since that is what the rest of the
    file has; the model's is what the prompt is held against.
    """
    agent, user = codes[AGENT_ROWS], codes[USER_ROWS]
    own = prompt and prompt.tokens and _commonest_column(agent[:, slice(*prompt.text)])
    if known.tokens:
        source = known.tokens_from
        if own and _distance(own, known.tokens.silence) > NEAR_TIES:
            source = f"inferred from the prompt, which does not hold those of {source}"
        return Steady(own or known.tokens.silence, known.tokens.sine, source, known.tokens)
    quiet = (agent == np.asarray(KYUTAI_TOKENS.silence)[:, None]).all(axis=0).sum()
    tone = (user == np.asarray(KYUTAI_TOKENS.sine)[:, None]).all(axis=0).sum()
    if max(quiet, tone) >= MIN_STEADY_FRAMES:
        kyutai = KYUTAI_TOKENS
        return Steady(kyutai.silence, kyutai.sine, "Kyutai's published constants", kyutai)
    if own:
        return Steady(own, tuple(map(int, user[:, 0])), "inferred from the prompt")
    column = _commonest_column(agent)
    share = (agent == np.asarray(column)[:, None]).all(axis=0).mean()
    if share >= 0.05 and share * codes.shape[1] >= MIN_STEADY_FRAMES:
        return Steady(column, None, "inferred: the agent's commonest column")
    return Steady(None, None, "unknown")


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _commonest_column(rows: np.ndarray) -> tuple[int, ...]:
    columns, counts = np.unique(rows, axis=1, return_counts=True)
    return tuple(int(code) for code in columns[:, int(counts.argmax())])
