"""What a free run says about itself, and whether the model has collapsed. Pure.

Teacher-forced likelihood shows neither of the two ways in which tuned full-duplex models fail:
a model of 98.8 % text accuracy was silent when it spoke freely (moshi-finetune), and one that
is fed its own words can loop. So each run is measured and compared with the same frames of the
held-out dialogue, its reference: what is normal depends on language, tokenizer and data.

A *word token* is a text token that is neither PAD (3), EPAD (0) nor -1.
Legend: T frames of 80 ms; codes of the agent [8, T], the first row semantic.

Source of repeated n-grams: Welleck et al. 2020 (seq-rep-4), as in `duplex/metrics.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from duplex.frames import FRAME_S
from duplex.streams import TEXT_EPAD, TEXT_PAD

REPEAT_ORDER = 4
LOOP_PERIOD = 8  # tokens of the longest phrase that `loop_tokens` looks for

# A reference of fewer word tokens says nothing about a silence: a "yes" may well be left out.
MIN_REFERENCE_TOKENS = 4
# Sampled speech varies by a factor of two or so around its data; a tenth is not terse, it is
# silent. A judgement, and wide of the mark on purpose: a collapse is a matter of all or nothing.
SILENCE_RATIO = 0.1
# Text without speech: nearly all frames hold the codec's silence to the letter. The reference
# must not, so that data whose agent hardly speaks are not taken for a collapse.
SILENT_SHARE, SILENT_REFERENCE = 0.98, 0.9
# Under 16 tokens there are too few 4-grams for a share. Half of them repeated: on average each
# phrase comes twice. Above the reference too: some data do repeat themselves.
MIN_REPEAT_TOKENS = 16
REPEATED_SHARE, REPEATED_OVER_REFERENCE = 0.5, 0.25


@dataclass(frozen=True)
class SpeechMeasures:
    """Of one run, or of its reference.

    tokens_per_s: word tokens a second; padding_share: frames without one.
    silent_share: frames whose 8 codes are the codec's silence; None where that is not known.
    commonest_code_share: frames that hold the commonest semantic code.
    repeated_share: 1 - different 4-grams / 4-grams of word tokens; None under 4.
    loop_tokens: longest run of word tokens that each equal the one p before, p at most 8.
    first_word_frames: frames from where an answer is due to the first word token, negative if
        the agent began before; None: it said nothing.
    """

    num_frames: int
    text_tokens: int
    tokens_per_s: float
    padding_share: float
    silent_share: float | None
    commonest_code_share: float
    repeated_share: float | None
    loop_tokens: int
    first_word_frames: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_speech(
    text: np.ndarray,
    codes: np.ndarray,
    *,
    due_frame: int = 0,
    silence: np.ndarray | None = None,
) -> SpeechMeasures:
    """
    Args:
        text: int [T], T > 0.
        codes: int [8, T], the agent's.
        due_frame: where an answer is due: the end of the user's first turn, or 0 if the agent
            speaks first.
        silence: int [8], what the codec makes of silence.

    Raises:
        ValueError: no frame, or shapes that don't fit.
    """
    if text.ndim != 1 or codes.ndim != 2 or codes.shape[1] != len(text) or len(text) == 0:
        raise ValueError(
            f"text must be [T] and codes [8, T] with T > 0, found {text.shape} and {codes.shape}"
        )
    said = is_word(text)
    words = text[said].tolist()
    counts = np.unique(codes[0], return_counts=True)[1]
    silent = None if silence is None else float((codes == silence[:, None]).all(axis=0).mean())
    return SpeechMeasures(
        num_frames=len(text),
        text_tokens=len(words),
        tokens_per_s=len(words) / (len(text) * FRAME_S),
        padding_share=float(1 - said.mean()),
        silent_share=silent,
        commonest_code_share=float(counts.max() / len(text)),
        repeated_share=repeated_share(words),
        loop_tokens=longest_loop(words),
        first_word_frames=int(np.flatnonzero(said)[0]) - due_frame if words else None,
    )


def is_word(text: np.ndarray) -> np.ndarray:
    """bool [T]: where a text row holds a word token."""
    return (text >= 0) & (text != TEXT_PAD) & (text != TEXT_EPAD)


def repeated_share(tokens: Sequence[int], order: int = REPEAT_ORDER) -> float | None:
    """1 - different n-grams / n-grams; None when there are fewer than `order` tokens."""
    grams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def longest_loop(tokens: Sequence[int], longest_period: int = LOOP_PERIOD) -> int:
    """Length of the longest run in which each token equals the one `p` before it, over all p up
    to `longest_period`. `a b a b a` has 3; 0 when nothing comes back."""
    longest = 0
    for period in range(1, longest_period + 1):
        run = 0
        for place in range(period, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            longest = max(longest, run)
    return longest


@dataclass(frozen=True)
class Verdict:
    """collapse: None, "silence" or "repetition"; reason: why, with the numbers."""

    collapse: str | None
    reason: str


def judge(runs: Sequence[SpeechMeasures], references: Sequence[SpeechMeasures]) -> Verdict:
    """Whether free runs have collapsed, against the held-out dialogue in the same frames.

    silence     in the runs whose reference speaks (at least 4 word tokens): together under a
                tenth of the reference's tokens, or more than half of the runs without one; or
                text without speech: 98 % silent frames on average, the reference under 90 %
    repetition  in more than half of the runs of at least 16 tokens, half of the 4-grams or more
                are repeats, and .25 more than in the reference

    Args:
        runs, references: of the same clips in the same order.
    """
    pairs = list(zip(runs, references, strict=True))
    spoken = [(run, ref) for run, ref in pairs if ref.text_tokens >= MIN_REFERENCE_TOKENS]
    if spoken:
        said = sum(run.text_tokens for run, _ in spoken)
        due = sum(ref.text_tokens for _, ref in spoken)
        mute = sum(run.text_tokens == 0 for run, _ in spoken)
        if said < SILENCE_RATIO * due or 2 * mute > len(spoken):
            return Verdict(
                "silence",
                f"{said} text tokens said freely where the held-out dialogue has {due}; "
                f"{mute} of {len(spoken)} runs without a word",
            )
        heard = [
            (run.silent_share, ref.silent_share)
            for run, ref in spoken
            if run.silent_share is not None and ref.silent_share is not None
        ]
        if heard:
            silent, expected = (float(np.mean(shares)) for shares in zip(*heard, strict=True))
            if silent >= SILENT_SHARE and expected < SILENT_REFERENCE:
                return Verdict(
                    "silence",
                    f"text without speech: {silent:.0%} of the agent's frames are silence, "
                    f"{expected:.0%} in the held-out dialogue",
                )
    enough = [
        (run, ref)
        for run, ref in pairs
        if run.text_tokens >= MIN_REPEAT_TOKENS and run.repeated_share is not None
    ]
    looping = [run for run, ref in enough if _repeats(run, ref)]
    if 2 * len(looping) > len(enough):
        worst = max(looping, key=lambda run: run.repeated_share or 0)
        return Verdict(
            "repetition",
            f"{len(looping)} of {len(enough)} runs repeat themselves; the worst repeats "
            f"{worst.repeated_share:.0%} of its 4-grams, {worst.loop_tokens} tokens in a loop",
        )
    return Verdict(None, "speaks")


def _repeats(run: SpeechMeasures, reference: SpeechMeasures) -> bool:
    share = run.repeated_share or 0.0
    usual = reference.repeated_share or 0.0
    return share >= REPEATED_SHARE and share >= usual + REPEATED_OVER_REFERENCE
