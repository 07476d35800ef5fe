"""What a tensor `[17, T]` holds, measured: phases, text shares, turns, activity. Pure.

With a TensorClip record the phases and turns are the record's; those of a bare file are
found (`duplex/phases.py`) or inferred from activity. `duplex/findings.py` judges what is
measured here.

A frame of a side is *active* when at least `ACTIVE_CODES` of its 8 codes differ from the
codec's steady silence: encoded silence wavers in a few codebooks, speech differs in nearly
all. Where the silence is one constant column (turns encoded one by one), one code is enough.

Shapes: T frames. Cost: linear in T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from duplex.metrics import Segment, segments
from duplex.phases import (
    MIN_PROMPT_FRAMES,
    Frame0,
    Known,
    PromptFacts,
    Source,
    Steady,
    describe_prompt,
    find_prompt,
    frame_0_of,
    is_one_span,
    is_word,
    prompt_spans,
    steady_of,
)
from duplex.records import TensorClip
from duplex.streams import AGENT_ROWS, TEXT_EPAD, TEXT_PAD, TEXT_ROW, USER_ROWS, ZERO_TOKEN

ACTIVE_CODES = 7
JOIN_FRAMES = 6  # a silence of half a second inside a turn is a pause
MIN_ACTIVE_FRAMES = 3
TEXT_LEAD_FRAMES = 6  # text may stand so far before an inferred turn and belong to it
WINDOWS = (0.3, 0.4)  # shares of a turn's frames in which the seeds' test 1 wants its tokens


@dataclass(frozen=True)
class Phase:
    """Frames [start, end) and what stands in their text row, in frames."""

    label: str
    start: int
    end: int
    words: int
    pad: int
    epad: int
    zero: int

    @property
    def num_frames(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class TurnText:
    """A turn; for the agent's, its tokens and how many stand in its first 30 % and 40 %.

    `within` is None where the turn's end is not known; `full` says that the tokens fill the
    first 30 % to the last frame and stop there, as they do where the rest was cut.
    """

    role: str
    start: int
    end: int
    tokens: int = 0
    within: tuple[int, int] | None = None
    full: bool = False


@dataclass(frozen=True)
class Measures:
    """All that the judgement needs. Active: bool [T] of a side, not written to JSON."""

    num_frames: int
    phases: tuple[Phase, ...]
    phases_from: Source
    prompt: PromptFacts | None
    turns: tuple[TurnText, ...]
    turns_from: str
    steady: Steady
    frame_0: Frame0
    frame_0_from: Source
    text_tokens: int
    dropped_tokens: int | None
    late_tokens: int | None
    onset_shares: tuple[float, float] | None
    agent_active_share: float
    user_active_share: float
    constant_silence: bool
    largest_text: int
    largest_audio: int
    agent_differs: np.ndarray  # int64 [T]: codes of 8 that are not silence
    user_differs: np.ndarray

    @property
    def dialogue(self) -> Phase | None:
        return self.phases[-1] if self.phases and self.phases[-1].label == "dialogue" else None


def measure(codes: np.ndarray, known: Known) -> Measures:
    """Measure a tensor of the right shape: int64 [17, T], T >= 1."""
    clip = known.clip
    num_frames = codes.shape[1]
    found = find_prompt(codes, known)
    steady = steady_of(codes, known, found)
    prompt = describe_prompt(codes, found, steady, known)
    by_record = clip is not None and (prompt is None or not is_one_span(clip))
    if clip and by_record:
        spans = [(span.label, span.start, min(span.end, num_frames)) for span in clip.prompt]
    else:
        spans = prompt_spans(prompt)
    start = spans[-1][2] if spans else 0
    if start < num_frames:
        spans.append(("dialogue", start, num_frames))
    phases = tuple(_phase(codes[TEXT_ROW], *span) for span in spans if span[1] < span[2])
    differs = [_differs(codes[rows], steady.silence) for rows in (AGENT_ROWS, USER_ROWS)]
    constant = _constant_silence(differs, start) if steady.silence else False
    active = [_active(count, steady, constant, start) for count in differs]
    turns, turns_from = _turns(codes[TEXT_ROW], start, clip, active, steady)
    within = [turn for turn in turns if turn.within is not None and turn.tokens]
    placed = sum(turn.tokens for turn in within)
    shares = [
        sum(turn.within[i] for turn in within if turn.within) / max(placed, 1) for i in (0, 1)
    ]
    frame_0, frame_0_from = frame_0_of(prompt, clip)
    length = max(num_frames - start, 1)
    return Measures(
        num_frames=num_frames,
        phases=phases,
        phases_from="record" if by_record else "codes",
        prompt=prompt,
        turns=tuple(turns),
        turns_from=turns_from,
        steady=steady,
        frame_0=frame_0,
        frame_0_from=frame_0_from,
        text_tokens=int(is_word(codes[TEXT_ROW, start:]).sum()),
        dropped_tokens=clip.dropped_tokens if clip else None,
        late_tokens=clip.late_tokens if clip else None,
        onset_shares=(shares[0], shares[1]) if placed else None,
        agent_active_share=float(active[0].sum() / length),
        user_active_share=float(active[1].sum() / length),
        constant_silence=constant,
        largest_text=int(codes[TEXT_ROW].max()),
        largest_audio=int(codes[1:].max()),
        agent_differs=differs[0],
        user_differs=differs[1],
    )


# -- activity and turns


def _phase(text: np.ndarray, label: str, start: int, end: int) -> Phase:
    part = text[start:end]
    pad, epad, zero = (int((part == t).sum()) for t in (TEXT_PAD, TEXT_EPAD, ZERO_TOKEN))
    return Phase(label, start, end, int(is_word(part).sum()), pad, epad, zero)


def _differs(rows: np.ndarray, silence: tuple[int, ...] | None) -> np.ndarray:
    """int64 [T]: how many of 8 codes are not silence; not the frame before's when unknown."""
    if silence is not None:
        return (rows != np.asarray(silence)[:, None]).sum(axis=0)
    previous = np.concatenate([rows[:, :1], rows[:, :-1]], axis=1)
    return (rows != previous).sum(axis=0)


def _constant_silence(differs: Sequence[np.ndarray], start: int) -> bool:
    """Whether the agent's quiet frames are all the one column of silence."""
    quiet = differs[0][start:][differs[0][start:] < ACTIVE_CODES]
    return len(quiet) >= MIN_PROMPT_FRAMES and float((quiet == 0).mean()) >= 0.9


def _active(differs: np.ndarray, steady: Steady, constant: bool, start: int) -> np.ndarray:
    active = differs >= (1 if constant else ACTIVE_CODES if steady.silence else 1)
    active[:start] = False
    for gap in segments(~active):
        if gap.start > start and gap.end < len(active) and gap.end - gap.start <= JOIN_FRAMES:
            active[gap.start : gap.end] = True
    for burst in segments(active):
        if burst.end - burst.start < MIN_ACTIVE_FRAMES:
            active[burst.start : burst.end] = False
    return active


def _turns(
    text: np.ndarray,
    start: int,
    clip: TensorClip | None,
    active: Sequence[np.ndarray],
    steady: Steady,
) -> tuple[list[TurnText], str]:
    """Turns of both sides by start, the agent's with their text."""
    frames = start + np.flatnonzero(is_word(text[start:]))  # of the tokens
    if clip and clip.turns:
        spans = [(turn.label, Segment(turn.start, turn.end)) for turn in clip.turns]
        spans = [
            (role, span) for role, span in spans if start <= span.start < span.end <= len(text)
        ]
        agent = sorted({span for role, span in spans if role == "agent"})
        others = [TurnText(role, *span) for role, span in spans if role != "agent"]
        placed = _place(text, frames, agent, lead=0)
        return sorted(placed + others, key=lambda turn: turn.start), "record"
    if steady.silence is not None and active[0].any():
        agent = segments(active[0])
        others = [TurnText("user", *span) for span in segments(active[1])]
        placed = _place(text, frames, agent, lead=TEXT_LEAD_FRAMES)
        return sorted(placed + others, key=lambda turn: turn.start), "inferred from the codes"
    bounds = [f for before, f in pairwise([-99, *frames.tolist()]) if f - before > 2 * JOIN_FRAMES]
    pairs = pairwise([*bounds, len(text)])
    turns = [TurnText("agent", a, b, int(((frames >= a) & (frames < b)).sum())) for a, b in pairs]
    return turns, "inferred from the text row; ends unknown" if turns else "unknown"


def _place(
    text: np.ndarray, frames: np.ndarray, agent: Sequence[Segment], lead: int
) -> list[TurnText]:
    """Each token belongs to the last turn that began by its frame, or `lead` frames after it."""
    placed = []
    limits = [turn.start - lead for turn in agent[1:]] + [len(text)]
    first = -1
    for turn, limit in zip(agent, limits, strict=False):  # no turn has no limit
        own = frames[(frames > first) & (frames < limit)]
        first = limit - 1
        begin = min(turn.start, int(own[0])) if lead and len(own) else turn.start
        windows = [max(1, int((turn.end - begin) * share)) for share in WINDOWS]
        inside = [int((own < begin + window).sum()) for window in windows]
        full = windows[0] > 1 and len(own) == inside[0] == windows[0]
        placed.append(TurnText("agent", begin, turn.end, len(own), (inside[0], inside[1]), full))
    return placed
