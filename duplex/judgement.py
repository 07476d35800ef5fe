"""What is wrong with a tensor, and which profile it looks like. Pure.

`inspect_codes` measures (`duplex/inspection.py`) and judges by the kinds of
`duplex/findings.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from duplex.findings import SEVERITIES, Finding, finding
from duplex.frames import frames_to_seconds
from duplex.inspection import Measures, measure
from duplex.phases import Frame0, Known
from duplex.streams import (
    CODEBOOKS,
    KYUTAI_CARD,
    KYUTAI_TEXT_CARD,
    NUM_ROWS,
    PROMPT_SILENCE_FRAMES,
    TEXT_ROW,
    ZERO_TOKEN,
)

ProfileGuess = Literal["workbench", "personaplex", "moshi", "coffee-compat", "unknown"]


@dataclass(frozen=True)
class Profile:
    """Which profile's files look like this, and what speaks for it."""

    name: ProfileGuess
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """A tensor looked at. `measures` is None where it is not codes of the right shape."""

    name: str
    dtype: str
    measures: Measures | None
    profile: Profile
    findings: tuple[Finding, ...]
    loudness_lufs: Mapping[str, float | None] | None = None
    record_id: str | None = None
    file: str = ""
    codes_digest: str | None = None  # sha256 of the codes as int64, whatever file holds them

    @property
    def harm(self) -> bool:
        return any(found.severity == "harm" for found in self.findings)

    def to_json(self) -> dict[str, Any]:
        """All of it but the per-frame arrays, as plain JSON values."""
        value = asdict(self)
        if value["measures"] is not None:
            for name in ("agent_differs", "user_differs"):
                del value["measures"][name]
            value["measures"]["seconds"] = frames_to_seconds(value["measures"]["num_frames"])
        return value | {"harm": self.harm}


def inspect_codes(
    codes: np.ndarray, known: Known, *, name: str = "tensor", dtype: str = "int64"
) -> Inspection:
    """Measure and judge.

    Args:
        codes: integers of any shape; int64 [17, T] when all is well.
        dtype: the type in the file, which the caller may have widened.
    """
    record_id = known.clip.id if known.clip else None
    unknown = Profile("unknown", ())
    if codes.ndim != 2 or codes.shape[0] != NUM_ROWS or codes.shape[1] == 0:
        fault = finding("shape", f"{list(codes.shape)}{_other_layout(codes)}")
        return Inspection(name, dtype, None, unknown, (fault,), record_id=record_id)
    measures = measure(codes, known)
    return Inspection(
        name,
        dtype,
        measures,
        guess_profile(measures),
        by_severity(judge(codes, measures, known, dtype)),
        record_id=record_id,
        codes_digest=hashlib.sha256(codes.astype(np.int64).tobytes()).hexdigest(),
    )


def by_severity(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda found: SEVERITIES.index(found.severity)))


def _other_layout(codes: np.ndarray) -> str:
    if codes.ndim == 2 and codes.shape[0] == 1 + CODEBOOKS:
        return " (text and one side: a stream, not a conversation)"
    if codes.ndim == 2 and codes.shape[1] == NUM_ROWS:
        return " (it is transposed)"
    if codes.ndim == 3 and codes.shape[0] == 1 and codes.shape[1] == NUM_ROWS:
        return " (it has a batch dimension)"
    return ""


# -- the judgement


def judge(codes: np.ndarray, m: Measures, known: Known, dtype: str) -> Iterator[Finding]:
    """The findings of codes [17, T]."""
    if dtype not in ("int64", "int16"):
        yield finding("dtype", dtype)
    yield from _ranges(codes, known)
    yield from _record(codes, m, known)
    yield from _digests(codes, known)
    yield from _prompt(m, known)
    yield from _frame_0(m, known)
    yield from _text(codes, m, known)
    yield from _sides(m, known)


def _ranges(codes: np.ndarray, known: Known) -> Iterator[Finding]:
    card = known.card or KYUTAI_CARD
    text_card = known.text_card or KYUTAI_TEXT_CARD
    limits = (("text", codes[:1], text_card, ZERO_TOKEN), ("audio", codes[1:], card, 0))
    for side, rows, limit, least in limits:
        bad = (rows < least) | (rows >= limit)
        if bad.any():
            row, frame = np.argwhere(bad)[0]
            what = f"{int(rows[row, frame])} in row {row + (side == 'audio')}, frame {frame}"
            count = int(bad.sum())
            yield finding(
                "out-of-range", f"{count} {side} codes outside [0, {limit}), first {what}"
            )


def _record(codes: np.ndarray, m: Measures, known: Known) -> Iterator[Finding]:
    clip = known.clip
    if clip is None:
        return
    faults = []
    if clip.num_frames != m.num_frames:
        faults.append(f"{clip.num_frames} frames in the record, {m.num_frames} in the file")
    ends = [span.end for span in (*clip.prompt, *clip.turns)]
    if max(ends, default=0) > m.num_frames:
        faults.append(f"a span that ends at frame {max(ends)} of {m.num_frames}")
    standing = clip.text_tokens - (clip.dropped_tokens or 0)
    # An imported file's count covers EPAD: it was taken before anyone knew the tokenizer.
    if clip.alignment != "import" and standing != m.text_tokens:
        faults.append(f"{standing} tokens by the record, {m.text_tokens} in the dialogue")
    text = [span for span in clip.prompt if span.label == "text"]
    if text and text[0].end <= m.num_frames:
        start = text[0].start
        at = m.prompt.text[0] if m.prompt and m.prompt.tokens else None
        if at != start and text[0].end > start:
            faults.append(f"the system text at frame {at}, by the record at {start}")
    if faults:
        yield finding("record-mismatch", "; ".join(faults))


def _digests(codes: np.ndarray, known: Known) -> Iterator[Finding]:
    clip = known.clip
    pairs = (
        ("foreign-tokenizer", known.tokenizer_digest, clip.tokenizer_digest if clip else None),
        ("foreign-codec", known.codec_digest, clip.codec_digest if clip else None),
    )
    for code, ours, theirs in pairs:
        if ours and theirs and ours != theirs:
            yield finding(code, f"{theirs[:12]}… in the record, {ours[:12]}… of the model")
    if known.vocabulary:
        text = codes[TEXT_ROW]
        beyond = text[text >= known.vocabulary]
        if len(beyond):
            count = f"{len(beyond)} ids at or above {known.vocabulary}"
            yield finding("foreign-tokenizer", f"{count}, the largest {int(beyond.max())}")


def _prompt(m: Measures, known: Known) -> Iterator[Finding]:
    dialogue = m.dialogue
    frames = dialogue.start if dialogue else m.num_frames
    if dialogue is None:
        yield finding("no-dialogue", f"{m.num_frames} frames of prompt and nothing after them")
    if m.num_frames > known.context:
        found = f"{m.num_frames} frames, {frames} of them prompt, for {known.context}"
        yield finding("too-long", found)
    if frames > known.context // 2:
        yield finding("long-prompt", f"{frames} of {known.context} frames")
    prompt = m.prompt
    if prompt is None:
        if dialogue is not None and dialogue.start == 0:
            yield finding("no-prompt", "dialogue from frame 0 on")
        return
    if prompt.closing == "</system>":
        yield finding("closing-tag", f"`</system>` after {len(prompt.tokens)} tokens")
    elif prompt.closing == "none" or prompt.opened is False:
        yield finding("no-tags", repr((prompt.decoded or "")[:60]))
    elif prompt.closing == "differs":
        yield finding("closing-tag", "last ids that do not repeat the first, as the same tag would")
    elif prompt.tokens and prompt.decoded is None:
        yield finding("tags-unread", "the same ids at both ends of the system text")
    if prompt.foreign_frames:
        yield finding(
            "prompt-rows", f"other codes in {prompt.foreign_frames} of {prompt.end} frames"
        )
    elif prompt.tied_frames:
        yield finding("prompt-ties", f"a few other codes in {prompt.tied_frames} frames")
    if prompt.tokens:
        before, after = prompt.silence
        least = PROMPT_SILENCE_FRAMES - (0 if prompt.voice else 1)
        if not least <= before <= PROMPT_SILENCE_FRAMES or after != PROMPT_SILENCE_FRAMES:
            yield finding("prompt-silence", f"{before} before and {after} after")


def _frame_0(m: Measures, known: Known) -> Iterator[Finding]:
    clip = known.clip
    if m.frame_0_from != "codes":
        return
    wanted: Frame0 = "kept" if clip and clip.layout == "coffee" else "dropped"
    if clip and clip.alignment != "import" and m.frame_0 != wanted:
        yield finding("frame-0-mismatch", f"it {m.frame_0}, layout {clip.layout}")
        return
    if m.frame_0 == "kept":
        yield finding("frame-0-kept", "the first prompt frame in the file")


def _text(codes: np.ndarray, m: Measures, known: Known) -> Iterator[Finding]:
    zero = int((codes[TEXT_ROW] == ZERO_TOKEN).sum())
    if zero:
        yield finding("zero-text", f"-1 in {zero} of {m.num_frames} text frames")
    if m.dropped_tokens:
        share = m.dropped_tokens / max(m.dropped_tokens + m.text_tokens, 1)
        yield finding("dropped-tokens", f"{m.dropped_tokens} dropped ({share:.0%})")
    full = sum(turn.full for turn in m.turns)
    # Elsewhere what does not fit goes on after the window.
    may_have_lost = zero or (known.clip is not None and known.clip.dropped_tokens is None)
    if not m.dropped_tokens and may_have_lost and full:
        yield finding("window-full", f"{full} such turn(s), turns {m.turns_from}")
    if m.late_tokens:
        yield finding("late-tokens", f"{m.late_tokens} of {m.text_tokens} later than that")
    clip = known.clip
    if clip and clip.alignment == "onset" and m.onset_shares and m.onset_shares[1] < 0.7:
        yield finding("late-text", f"{m.onset_shares[1]:.0%}")
    bare = [turn for turn in m.turns if turn.role == "agent" and not turn.tokens]
    if bare and m.text_tokens and m.turns_from == "record":
        yield finding("turn-without-text", f"{len(bare)} without, first at frame {bare[0].start}")


def _sides(m: Measures, known: Known) -> Iterator[Finding]:
    if m.dialogue is None:
        return
    silent = []
    if not m.text_tokens:
        silent.append("no words in the text row")
    if m.agent_active_share < 0.02:
        silent.append(f"sound in {m.agent_active_share:.0%} of the agent's frames")
    if silent:
        yield finding("silent-agent", " and ".join(silent))
    if m.user_active_share < 0.01:
        yield finding("user-silent", f"sound in {m.user_active_share:.0%} of the user's frames")
    if m.constant_silence:
        yield finding("constant-silence", "one constant column wherever the agent is silent")


def loudness_findings(lufs: Mapping[str, float | None]) -> Iterator[Finding]:
    """Of integrated loudness per channel; None is a channel without sound."""
    for channel, level in lufs.items():
        if level is None and channel == "agent":
            yield finding("silent-agent", "no sound in the agent's channel of the recording")
        elif level is None:
            yield finding("loudness", f"no sound in the channel of the {channel}")
        elif abs(level + 24) > 6:
            yield finding("loudness", f"{level:.1f} LUFS for the {channel}")


# -- the profile


def guess_profile(m: Measures) -> Profile:
    """The profile whose files look like this one.

    The predecessor's marks are -1 as padding, `</system>`, frame 0 kept, a text phase padded
    to 25 frames and constant silence; two of them are enough. Otherwise EPAD says that words
    stand at their times, and a prompt tells PersonaPlex's form from Moshi's.
    """
    dialogue = m.dialogue
    prompt = m.prompt
    zero = sum(phase.zero for phase in m.phases)
    epad = dialogue.epad if dialogue else 0
    coffee = []
    if zero:
        coffee.append(f"-1 as padding in {zero} frames")
    if prompt and prompt.closing == "</system>":
        coffee.append("`</system>` closes the system text")
    elif prompt and prompt.closing == "differs":
        coffee.append("the system text does not close with its opening ids")
    if prompt and prompt.padded:
        coffee.append("a text phase padded to 25 frames")
    if m.frame_0 == "kept":
        coffee.append("frame 0 of the prompt kept")
    if m.constant_silence:
        coffee.append("silence is one constant column")
    if len(coffee) >= 2 and (zero or prompt) and not epad:
        return Profile("coffee-compat", tuple(coffee))
    has_prompt = bool(dialogue and dialogue.start) or prompt is not None
    evidence = [*coffee, "a prompt" if has_prompt else "no prompt"]
    if m.text_tokens:
        evidence.append(f"{epad} EPAD before words" if epad else "no EPAD")
    voice = any(phase.label == "voice" for phase in m.phases)
    if voice:
        evidence.append("a voice sample in the prompt")
    clean = not coffee or coffee == ["silence is one constant column"]
    if epad and not zero:
        return Profile("personaplex" if has_prompt else "moshi", tuple(evidence))
    if has_prompt and m.text_tokens and clean and not epad:
        if m.frame_0 == "dropped":
            evidence.append("frame 0 of the prompt dropped")
        return Profile("workbench", tuple(evidence))
    return Profile("unknown", tuple(evidence))
