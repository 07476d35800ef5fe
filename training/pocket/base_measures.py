"""What a free run of the pocket base shows, from its text row and its speech. Pure.

Frames of 80 ms, counted from the first frame behind the prompt. A *word token* is a text token
that is neither PAD nor EPAD. A question's *window* goes from the middle of the user's turn to the
start of the user's next one (or the end), its *answer* is the text of the word tokens in there.

    answered      a word token stands in the window behind the question's end, less `EARLY_FRAMES`
    fact right    the answer holds the fact's words, word for word, whatever the case, and not
                  within a longer value of the same kind ("seven" in "half past seven")
    refused       the answer holds one of the grammar's refusals; right where the prompt lacks
                  the fact
    premature     more than `BACKCHANNEL_WORDS` word tokens begin between the question's start, plus
                  `START_FRAMES`, and its end, less `EARLY_FRAMES`; what the agent was saying when
                  the user began, and says on without a gap of `GAP_FRAMES`, does not count
    yields        of two runs that are equal up to the frame in which the user cuts in: without the
                  cut the agent speaks on for `GOES_ON_FRAMES` at least; with it, it is silent
                  within `YIELD_FRAMES`, for `SILENT_FRAMES`
    collapsed     no word token in the whole run, or none in the windows of its last two questions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from duplex.metrics import says_any, segments, words_of
from duplex.streams import TEXT_EPAD, TEXT_PAD

EARLY_FRAMES = 2
START_FRAMES = 3
BACKCHANNEL_WORDS = 2
GAP_FRAMES = 6
GOES_ON_FRAMES = 14
YIELD_FRAMES = 10
SILENT_FRAMES = 4

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Question:
    """Frames [start, end) of the user's speech; what an answer must say, None where the prompt
    lacks it; other values that such an answer could have; whether that value is one that no
    prompt of training held, whether the prompt is worded as none was, and the question."""

    start: int
    end: int
    topic: str
    says: str | None
    others: tuple[str, ...] = ()
    value_held: bool = False
    prompt_held: bool = False
    asked_held: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of a question. right: None where nothing was said."""

    question: Question
    text: str
    answered: bool
    right: bool | None
    premature: bool


def word_tokens(text: np.ndarray) -> np.ndarray:
    """bool [T]: which tokens of a text row are of words."""
    return (text != TEXT_PAD) & (text != TEXT_EPAD) & (text >= 0)


def judge(
    questions: Sequence[Question], text: np.ndarray, decode: Decode, refusals: Sequence[str]
) -> list[Answer]:
    """What became of each question of a run. text: int [T]."""
    ends = [*(q.start for q in questions[1:]), len(text)]
    return [_judge(q, end, text, decode, refusals) for q, end in zip(questions, ends, strict=True)]


def _judge(
    question: Question, end: int, text: np.ndarray, decode: Decode, refusals: Sequence[str]
) -> Answer:
    said = word_tokens(text)
    first = (question.start + question.end) // 2
    answer = decode([int(token) for token in text[first:end][said[first:end]]])
    answered = bool(said[max(0, question.end - EARLY_FRAMES) : end].any())
    right = None
    if answered:
        if question.says is None:
            right = says_any(answer, refusals)
        else:
            right = says_value(answer, question.says, question.others)
    return Answer(question, answer, answered, right, _is_premature(question, said))


def says_value(text: str, value: str, others: Sequence[str]) -> bool:
    """Whether `text` says `value`, and says it outside of any longer one of `others`."""
    rest = f" {' '.join(words_of(text))} "
    for other in sorted((" ".join(words_of(o)) for o in others), key=len, reverse=True):
        if len(other) > len(" ".join(words_of(value))):
            rest = rest.replace(f" {other} ", " | ")
    return says_any(rest, [value])


def _is_premature(question: Question, said: np.ndarray) -> bool:
    first, last = question.start + START_FRAMES, question.end - EARLY_FRAMES
    while first < last and said[max(0, first - GAP_FRAMES) : first].any():
        first += 1  # what was under way when the user began
    return int(said[first:last].sum()) > BACKCHANNEL_WORDS


def yields(alone: np.ndarray, cut_in: np.ndarray, cut: int) -> bool | None:
    """Whether the agent stops for a user who cuts in; None where it would have stopped anyway.

    Args:
        alone, cut_in: bool [T], in which frames the agent speaks without and with the cut.
        cut: the frame from which on the user speaks.
    """
    if not alone[cut : cut + GOES_ON_FRAMES].all():
        return None
    after = cut_in[cut : cut + YIELD_FRAMES + SILENT_FRAMES]
    return any(run.end - run.start >= SILENT_FRAMES for run in segments(~after))


def place_to_cut(speaking: np.ndarray, from_frame: int, to_frame: int, into: int) -> int | None:
    """A frame in which the agent has spoken for `into` frames and goes on; None: there is none."""
    for run in segments(speaking):
        cut = run.start + into
        if run.start >= from_frame and cut + GOES_ON_FRAMES <= min(run.end, to_frame):
            return cut
    return None


def collapsed(questions: Sequence[Question], text: np.ndarray) -> bool:
    """Whether a run is silent: all of it, or from its last but one question on."""
    said = word_tokens(text)
    last = questions[-2].start if len(questions) > 1 else 0
    return not said.any() or not said[last:].any()


def spoken_turns(text: np.ndarray, speaking: np.ndarray) -> list[tuple[int, int, list[int]]]:
    """(start, end, word tokens) of each stretch of the agent's talk, text and sound together.

    A stretch is a run of frames with word tokens or speech, gaps of up to `GAP_FRAMES` included.
    """
    said = word_tokens(text)
    active = said | speaking
    for gap in segments(~active):
        if gap.start > 0 and gap.end < len(active) and gap.end - gap.start <= GAP_FRAMES:
            active[gap.start : gap.end] = True
    return [
        (run.start, run.end, [int(t) for t in text[run.start : run.end][said[run.start : run.end]]])
        for run in segments(active)
    ]
