"""The predecessor's tensors and the current contract, one made from the other. Pure.

    coffee    silence 6 · `<system> TEXT </system>`, at least 25 frames · silence 6 · dialogue;
              frame 0 is in the file, and -1 stands in each dialogue frame without text
    current   silence 5 · `<system> TEXT <system>` · silence 6 · dialogue; frame 0 is left out
              (`duplex/streams.py`), and PAD stands in each frame without text

Only the prompt's layout, its closing tag and the dialogue's padding differ, so all codes of
the dialogue and all of its tokens stay as they are, frame by frame. What a file does not hold
cannot come back: tokens that the predecessor dropped stay dropped, and `missing_tokens`
counts them where the dialogue's own text is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from duplex.streams import (
    AGENT_ROWS,
    COFFEE_CLOSING_TAG,
    COFFEE_TEXT_FRAMES,
    NUM_ROWS,
    PROMPT_SILENCE_FRAMES,
    SYSTEM_TAG,
    TEXT_EPAD,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    ZERO_TOKEN,
    CodecTokens,
    build_prompt,
)

Span = tuple[str, int, int]


@dataclass(frozen=True)
class TextCoder:
    """The model's tokenizer, as two functions. `decode` raises ValueError on a foreign id."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class PromptParts:
    """What a tensor's prompt holds: text ids with their tags, the codec's two constants, what
    fills the text row beside the text (PAD or -1), and how many frames it all takes."""

    tokens: tuple[int, ...]
    codec: CodecTokens
    fill: int
    num_frames: int


@dataclass(frozen=True)
class Conversion:
    """codes: int64 [17, T]; prompt: spans in frames of `codes`; tokens: the prompt's, retagged."""

    codes: np.ndarray
    prompt: tuple[Span, ...]
    tokens: tuple[int, ...]


def to_current(codes: np.ndarray, coder: TextCoder) -> Conversion:
    """A tensor of the predecessor in the current layout.

    Args:
        codes: int64 [17, T], ids within the model's vocabulary.

    Raises:
        ValueError: the tensor is not of that form; says where it differs.
    """
    parts = read_prompt(codes, coffee=True)
    tokens = retag(parts.tokens, coder, COFFEE_CLOSING_TAG, SYSTEM_TAG)
    dialogue = codes[:, parts.num_frames :].copy()
    row = dialogue[TEXT_ROW]
    padded = np.flatnonzero(row == TEXT_PAD)
    if len(padded):
        raise ValueError(
            "the predecessor's dialogue must hold -1 where nothing is said, found PAD in frame "
            f"{parts.num_frames + padded[0]}: another program made this file"
        )
    row[row == ZERO_TOKEN] = TEXT_PAD
    prompt = build_prompt(tokens, parts.codec)
    joined = np.concatenate([prompt.training_codes(), dialogue], axis=1)
    return Conversion(joined, prompt.training_spans(), tokens)


def to_coffee(
    codes: np.ndarray, coder: TextCoder, *, fill: int = TEXT_PAD, has_epad: bool = True
) -> Conversion:
    """A tensor of the current layout in the predecessor's form.

    Args:
        codes: int64 [17, T], ids within the model's vocabulary.
        fill: what stands beside the prompt's text, PAD or -1.
        has_epad: id 0 in the dialogue means EPAD; False when it is known to be the
            tokenizer's `<unk>`, which has the same id and stays.

    Raises:
        ValueError: the tensor is not of the current form, or holds what the predecessor's
            form has no place for: EPAD, a voice sample.
    """
    parts = read_prompt(codes, coffee=False)
    tokens = retag(parts.tokens, coder, SYSTEM_TAG, COFFEE_CLOSING_TAG)
    dialogue = codes[:, parts.num_frames :].copy()
    row = dialogue[TEXT_ROW]
    epad = np.flatnonzero(row == TEXT_EPAD)
    if has_epad and len(epad):
        raise ValueError(
            f"the predecessor's form has no EPAD, found {len(epad)}, the first in frame "
            f"{parts.num_frames + epad[0]}. Make the clip again with tensors.alignment: onset"
        )
    row[row == TEXT_PAD] = ZERO_TOKEN
    prompt = build_prompt(tokens, parts.codec, min_text_frames=COFFEE_TEXT_FRAMES)
    head = prompt.codes.copy()
    head[TEXT_ROW][head[TEXT_ROW] == TEXT_PAD] = fill
    return Conversion(np.concatenate([head, dialogue], axis=1), prompt.spans, tokens)


def read_prompt(codes: np.ndarray, *, coffee: bool) -> PromptParts:
    """The prompt that a tensor of one of the two forms starts with.

    Raises:
        ValueError: it does not start with one; says what differs.
    """
    if codes.ndim != 2 or codes.shape[0] != NUM_ROWS or codes.shape[1] == 0:
        raise ValueError(f"the shape must be [{NUM_ROWS}, T], found {list(codes.shape)}")
    text = codes[TEXT_ROW]
    fill = int(text[0])
    if fill != TEXT_PAD and not (coffee and fill == ZERO_TOKEN):
        raise ValueError(f"a prompt must start with padding in the text row, found id {fill}")
    lead = PROMPT_SILENCE_FRAMES if coffee else PROMPT_SILENCE_FRAMES - 1
    written = text != fill
    start = int(np.argmax(written)) if written.any() else len(text)
    if start != lead:
        raise ValueError(_describe_start(start, lead, len(text), coffee))
    rest = written[start:]
    count = len(rest) if rest.all() else int(np.argmin(rest))
    after = start + max(count, COFFEE_TEXT_FRAMES if coffee else 0)
    end = after + PROMPT_SILENCE_FRAMES
    if end >= len(text):
        raise ValueError(f"a dialogue must follow the prompt's {end} frames, found {len(text)}")
    if written[start + count : end].any():
        frame = start + count + int(np.argmax(written[start + count : end]))
        raise ValueError(
            f"the prompt's text must be one run of tokens and padding up to frame {end}, "
            f"found id {int(text[frame])} in frame {frame}"
        )
    constants = []
    for name, rows in (("agent", AGENT_ROWS), ("user", USER_ROWS)):
        same = (codes[rows, :end] == codes[rows, :1]).all(axis=0)
        if not same.all():
            raise ValueError(
                f"the prompt's {name} rows must repeat one frame up to frame {end}, found another "
                f"in frame {int(np.argmin(same))}: a voice sample, or not this prompt layout"
            )
        constants.append(tuple(int(code) for code in codes[rows, 0]))
    tokens = tuple(int(token) for token in text[start : start + count])
    return PromptParts(tokens, CodecTokens(*constants), fill, end)


def _describe_start(start: int, lead: int, num_frames: int, coffee: bool) -> str:
    form = "the predecessor's form" if coffee else "the current form"
    if start == num_frames:
        return f"a tensor in {form} must start with a prompt, found no text at all"
    hint = ""
    if coffee and start == PROMPT_SILENCE_FRAMES - 1:
        hint = ": this may be in the current form already"
    elif not coffee and start == PROMPT_SILENCE_FRAMES:
        hint = ": this may be in the predecessor's form already"
    elif not coffee and start > PROMPT_SILENCE_FRAMES:
        hint = ": a voice sample, or no prompt, for which the predecessor's form has no place"
    else:
        hint = ": no prompt, or one of another layout"
    return (
        f"a tensor in {form} must have {lead} frames before the prompt's text, found {start}{hint}"
    )


def retag(
    tokens: Sequence[int], coder: TextCoder, closing: str, new_closing: str
) -> tuple[int, ...]:
    """Ids of `<system> TEXT closing` -> those of `<system> TEXT new_closing`.

    Raises:
        ValueError: the ids are not that text in this tokenizer, or the tokenizer joins tag
            and text, so that the tag cannot be replaced by itself.
    """
    tokens = tuple(tokens)
    first, last, new = (
        tuple(coder.encode(tag)) for tag in (SYSTEM_TAG, closing, new_closing)
    )  # fmt: skip
    tagged = len(tokens) >= len(first) + len(last)
    if not tagged or tokens[: len(first)] != first or tokens[-len(last) :] != last:
        raise ValueError(
            f"the prompt must read `{SYSTEM_TAG} TEXT {closing}` in the model's tokenizer, found "
            f"{_ending(coder.decode(list(tokens)))}: another layout, or another tokenizer's file"
        )
    result = tokens[: -len(last)] + new
    text = coder.decode(list(tokens))
    if tuple(coder.encode(text)) == tokens:
        wanted = tuple(coder.encode(text.removesuffix(closing) + new_closing))
        if wanted != result:
            raise ValueError(
                "the tokenizer must keep tag and text apart, found that it joins them in "
                f"{_ending(text)}: the tag cannot be replaced"
            )
    return result


def _ending(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:40]} … {text[-40:]}")


def missing_tokens(text_row: np.ndarray, turns: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens of each agent turn a dialogue's text row does not hold.

    The predecessor wrote a turn's tokens in one run from its onset and cut the run, so each
    run must be the start of its turn.

    Args:
        text_row: int64 [T], the dialogue alone, PAD or -1 where nothing is said.
        turns: all tokens of each agent turn, in order; turns without a token are passed over.

    Raises:
        ValueError: the row holds other turns than these.
    """
    runs = [text_row[start:end].tolist() for start, end in _runs(text_row)]
    filled = [index for index, turn in enumerate(turns) if len(turn)]
    if len(runs) != len(filled):
        raise ValueError(
            f"there must be a run of text for each of {len(filled)} agent turns, found {len(runs)}"
        )
    missing = [0] * len(turns)
    for run, index in zip(runs, filled, strict=True):
        turn = list(turns[index])
        if turn[: len(run)] != run:
            raise ValueError(
                f"the tensor must hold the dialogue's own text, found another in agent turn "
                f"{index + 1}"
            )
        missing[index] = len(turn) - len(run)
    return missing


def turn_spans(codes: np.ndarray, start: int, silence: Sequence[int]) -> tuple[Span, ...]:
    """Turns as the predecessor's codes show them: spans (role, start, end) in frames of `codes`.

    An agent turn starts with its run of text and ends with the last frame before the next run
    in which the agent's rows are not constant silence; what the user's rows hold between two
    runs counts as one turn.

    Args:
        codes: int64 [17, T] in either form; start: the first frame of the dialogue.
        silence: the codec's silence, [8].
    """
    constant = np.asarray(silence)[:, None]
    speaks = {role: (codes[rows] != constant).any(axis=0)
              for role, rows in (("agent", AGENT_ROWS), ("user", USER_ROWS))}  # fmt: skip
    runs = [(start + begin, start + end) for begin, end in _runs(codes[TEXT_ROW, start:])]
    bounds = [start, *(begin for begin, _ in runs), codes.shape[1]]
    ends = [start, *(end for _, end in runs)]
    spans: list[Span] = []
    for index, (begin, stop) in enumerate(pairwise(bounds)):
        if index:
            last = np.flatnonzero(speaks["agent"][begin:stop])
            end = begin + int(last[-1]) + 1 if len(last) else ends[index]
            spans.append(("agent", begin, max(end, ends[index])))
        heard = np.flatnonzero(speaks["user"][begin:stop])
        if len(heard):
            spans.append(("user", begin + int(heard[0]), begin + int(heard[-1]) + 1))
    return tuple(sorted(spans, key=lambda span: span[1]))


def _runs(text_row: np.ndarray) -> list[tuple[int, int]]:
    """Stretches [start, end) of a text row that hold neither PAD nor -1."""
    written = (text_row != TEXT_PAD) & (text_row != ZERO_TOKEN)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], written, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
