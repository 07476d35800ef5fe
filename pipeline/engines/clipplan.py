"""What each clip is made from: its split, its batch, its voice sample. No files, no audio.

A clip's prompt must not give its own words away, so its voice sample comes from another
conversation of the same voice and of the same side of the split; from its own only where
there is no other. Ranks are hashes: one conversation more moves few samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from duplex.clips import text_digest, turn_frames
from duplex.config import TensorsSection
from duplex.errors import RecordError, RequestError, StageFailedError
from duplex.mixing import CHANNELS
from duplex.records import FrameSpan, Speech, SpokenTurn
from duplex.splits import Member, Split, assign_splits, overlaps
from duplex.stage import Task, record_seed
from duplex.streams import Prompt
from pipeline.engines.encoding import Recording
from pipeline.engines.voicesample import SHORTEST_S

GREETING_ID = "greeting"
LONGEST_NAME = 80


@dataclass(frozen=True)
class Excerpt:
    """One turn of a conversation, as the sample of a voice or as a greeting."""

    speech: Speech
    turn: int
    id: str
    kind: Literal["voice", "greeting"] = "voice"


def voice_of(speech: Speech) -> str | None:
    """The voice that the agent starts with; None where it says nothing."""
    return next((turn.voice_id for turn in speech.turns if turn.role == "agent"), None)


def choose_excerpts(
    speeches: Sequence[Speech], split: dict[str, Split], seed: int
) -> dict[str, Excerpt | None]:
    """The voice sample of each conversation by its id; None where the agent says nothing, which
    the conversation's own task refuses. The first of a voice's samples, `.0`, is the one that a
    server is given.

    Raises:
        RecordError: a voice without a turn that is long enough.
    """
    groups: dict[tuple[str, Split], list[Excerpt]] = {}
    chosen: dict[str, Excerpt | None] = {}
    for voice in sorted({voice for speech in speeches if (voice := voice_of(speech))}):
        ranked = _ranked(voice, speeches, split, seed)
        if not ranked:
            raise RecordError(
                f"voice {voice} must have a turn of at least {SHORTEST_S} s to be sampled from, "
                "found none. Set tensors.voice_prompt_s: 0, or give it more to say."
            )
        for excerpt in ranked:
            groups.setdefault((voice, split[excerpt.speech.id]), []).append(excerpt)
    for speech in speeches:
        voice = voice_of(speech)
        if voice is None:
            chosen[speech.id] = None
            continue
        same_side = groups.get((voice, split[speech.id]), [])
        others = [excerpt for excerpt in same_side if excerpt.speech.id != speech.id]
        if not (others or same_side):
            raise RecordError(
                f"{speech.id}: its voice {voice} must have a turn of at least "
                f"{SHORTEST_S} s on its side of the split, found none"
            )
        chosen[speech.id] = (others or same_side)[0]
    return chosen


def _ranked(
    voice: str, speeches: Sequence[Speech], split: dict[str, Split], seed: int
) -> list[Excerpt]:
    """Each conversation's longest turn of this voice, training before validation, by hash."""
    found = []
    for speech in speeches:
        lengths = [
            (turn.end_s - turn.start_s, -index)
            for index, turn in enumerate(speech.turns)
            if turn.kind == "turn" and turn.role == "agent" and turn.voice_id == voice
        ]
        length_s, index = max(lengths, default=(0.0, 0))
        if length_s >= SHORTEST_S and voice_of(speech) == voice:
            rank = record_seed(seed, "voice-sample", f"{voice}\x00{speech.id}")
            found.append((split[speech.id] == "valid", rank, speech.id, speech, -index))
    return [
        Excerpt(speech, index, f"voice.{_short(voice)}.{number}")
        for number, (_, _, _, speech, index) in enumerate(sorted(found, key=lambda row: row[:3]))
    ]


def _short(voice: str) -> str:
    """A voice's id as a part of another id, still its own when it must be cut."""
    if len(voice) <= LONGEST_NAME:
        return voice
    return f"{voice[: LONGEST_NAME - 9]}-{hashlib.sha256(voice.encode()).hexdigest()[:8]}"


def opening(speech: Speech) -> SpokenTurn | None:
    """The user's first turn where the conversation begins with it."""
    first = speech.turns[0] if speech.turns and speech.turns[0].kind == "turn" else None
    return first if first and first.role == "user" and speech.first_speaker == "user" else None


def greeting_excerpt(
    speeches: Sequence[Speech], split: dict[str, Split], seed: int
) -> Excerpt | None:
    """The greeting that a server is given: the first turn of a training conversation that the
    user opens; None where there is none."""
    opened = [speech for speech in speeches if opening(speech) and split[speech.id] == "train"]
    if not opened:
        return None
    speech = max(opened, key=lambda s: (record_seed(seed, "greeting", s.id), s.id))
    return Excerpt(speech, 0, GREETING_ID, "greeting")


def split_of(speeches: list[Speech], section: TensorsSection, seed: int) -> dict[str, Split]:
    """Split of each conversation by its id, checked.

    Raises:
        StageFailedError: a text, a voice or a conversation on both sides.
    """
    members = [
        Member(
            id=speech.id,
            persona=speech.persona_id,
            conversation=speech.dialogue_id,
            text=speech.text_digest or text_digest(speech.turns),
            voices=agent_voices(speech),
        )
        for speech in speeches
    ]
    split = assign_splits(members, section.split, section.valid_fraction, seed)
    faults = overlaps(members, split, section.split)
    if faults:
        raise StageFailedError(f"training and validation must share nothing: {'; '.join(faults)}")
    return split


def agent_voices(speech: Speech) -> tuple[str, ...]:
    return tuple(sorted({turn.voice_id for turn in speech.turns if turn.role == "agent"}))


def fixed_batches(speeches: list[Speech], size: int) -> dict[str, tuple[Speech, ...]]:
    """The batch of each conversation by its id: a persona's conversations by id, `size` at a
    time. Made from the full list, so that a batch is the same whatever is already done."""
    batches: dict[str, tuple[Speech, ...]] = {}
    of_persona: dict[str, list[Speech]] = {}
    for speech in sorted(speeches, key=lambda speech: speech.id):
        of_persona.setdefault(speech.persona_id, []).append(speech)
    for group in of_persona.values():
        for start in range(0, len(group), size):
            batch = tuple(group[start : start + size])
            batches |= dict.fromkeys((speech.id for speech in batch), batch)
    return batches


def dialogue_start(speech: Speech, *, greeting: bool) -> int:
    """The frame from which on a recording is dialogue: after the user's greeting, or 0.

    A backchannel within the greeting is lost with it: in a prompt the agent is silent.

    Raises:
        RecordError: the agent speaks over the greeting, or over its end.
    """
    first = opening(speech) if greeting else None
    if first is None:
        return 0
    _, end = turn_frames(first)
    within = [turn for turn in speech.turns[1:] if turn_frames(turn)[0] < end]
    if any(turn.kind == "turn" or turn_frames(turn)[1] > end for turn in within):
        raise RecordError(
            "a greeting in the prompt must be heard out, found another turn that starts before it "
            "ends. Set tensors.greeting: false, or give the dialogue's second turn a gap and its "
            "first no cut_after_words."
        )
    return end


def check_names(tasks: Sequence[Task], speeches: Sequence[Speech]) -> None:
    """
    Raises:
        RequestError: a conversation that is called as a voice sample or the greeting is.
    """
    taken = {task.id for task in tasks if isinstance(task.payload, Excerpt)}
    both = sorted(taken & {speech.id for speech in speeches})
    if both:
        raise RequestError(
            "a conversation's id must not be that of a voice sample or the greeting, found "
            f"{both[0]}. Rename the recording and import it again."
        )


def check_streams(speech: Speech, recording: Recording) -> None:
    """
    Raises:
        RecordError: the agent says nothing, or a side that speaks in the dialogue, after a
            greeting, has a channel of digital silence.
    """
    if not agent_voices(speech):
        raise RecordError("the agent must have a turn, found none: there is nothing to learn")
    peaks = recording.peaks()
    dialogue = [t for t in speech.turns if turn_frames(t)[0] >= recording.start_frame]
    for channel, role in enumerate(CHANNELS):
        if peaks[channel] == 0 and any(turn.role == role for turn in dialogue):
            raise RecordError(f"the {role}'s channel must hold its turns, found digital silence")


def prompt_spans(prompt: Prompt | None, layout: str) -> tuple[FrameSpan, ...]:
    if prompt is None:
        return ()
    spans = prompt.spans if layout == "coffee" else prompt.training_spans()
    return tuple(FrameSpan(label=label, start=start, end=end) for label, start, end in spans)
