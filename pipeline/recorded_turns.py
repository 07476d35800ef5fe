"""Turns of a recording: from words with times, or from spans of speech and a recogniser. Pure.

A turn is a run of one speaker. It ends at a pause of more than 1 s, and at a shorter one in
which the other side begins to speak. Speech over the other's speech ends nothing, so overlaps
and backchannels stay where they were.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from duplex.base import Role
from duplex.errors import RecordError
from duplex.records import SpokenTurn, Word

Span = tuple[float, float]  # start_s, end_s
ROLES: tuple[Role, Role] = ("agent", "user")  # left and right channel
MAX_TURN_PAUSE_S = 1.0
FLOOR_PAUSE_S = 0.2  # a shorter one is no pause that the other side could take up
FAR_FROM_SPEECH_S = 0.5
MAIN_SPEAKER = "SPEAKER_MAIN"  # moshi-finetune's name of the model's side
MAX_SHARED_SPEECH = 0.7
SLACK_S = 0.1  # word times may pass the audio's end by this much


def words_by_role(transcript: Any, duration_s: float) -> dict[Role, list[Word]]:
    """The words of each side of moshi-finetune's `{"alignments": [[word, [start, end], who]]}`.

    Raises:
        RecordError: another shape, or a word outside of the audio.
    """
    if not isinstance(transcript, dict) or not isinstance(transcript.get("alignments"), list):
        raise RecordError(
            'the transcript must be an object {"alignments": [[word, [start, end], speaker], …]}, '
            f"found {transcript!r:.60}"
        )
    words: dict[Role, list[Word]] = {"agent": [], "user": []}
    for index, item in enumerate(transcript["alignments"]):
        text, start_s, end_s, speaker = _alignment(item, index)
        if not 0 <= start_s <= end_s <= duration_s + SLACK_S:
            raise RecordError(f"word {text!r} must lie within the audio, found {start_s}-{end_s} s")
        if text.strip():
            role: Role = "agent" if speaker == MAIN_SPEAKER else "user"
            words[role].append(Word(text=text.strip(), start_s=start_s, end_s=end_s))
    for side in words.values():
        side.sort(key=lambda word: (word.start_s, word.end_s))
    return words


def _alignment(item: Any, index: int) -> tuple[str, float, float, str]:
    if isinstance(item, list) and len(item) == 3:
        text, times, speaker = item
        timed = isinstance(times, list) and len(times) == 2 and all(map(_is_number, times))
        if isinstance(text, str) and timed and isinstance(speaker, str):
            return text, float(times[0]), float(times[1]), speaker
    raise RecordError(
        f"alignment {index} must be [word, [start, end], speaker], found {item!r:.60}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def speaker_runs(spans: dict[Role, list[Span]]) -> list[tuple[Role, int, int]]:
    """Turns as (role, first, end) over each side's spans, `[first, end)`, by their start.

    Args:
        spans: of words or of speech, each side's by its start.
    """
    runs = []
    for role, other in (ROLES, ROLES[::-1]):
        mine, starts = spans[role], [start_s for start_s, _ in spans[other]]
        first, latest_s = 0, 0.0
        for index, (start_s, end_s) in enumerate(mine):
            if index > first and _ends_turn(latest_s, start_s, starts):
                runs.append((role, first, index))
                first = index
            latest_s = end_s if index == first else max(latest_s, end_s)
        if mine:
            runs.append((role, first, len(mine)))
    return sorted(runs, key=lambda run: (spans[run[0]][run[1]][0], run[0]))


def _ends_turn(end_s: float, next_s: float, other_starts: Sequence[float]) -> bool:
    if next_s - end_s > MAX_TURN_PAUSE_S:
        return True
    following = bisect_left(other_starts, end_s)
    taken = following < len(other_starts) and other_starts[following] < next_s
    return taken and next_s - end_s >= FLOOR_PAUSE_S


def turns_of_words(words: dict[Role, list[Word]], voices: dict[Role, str]) -> list[SpokenTurn]:
    """The turns of a transcript, by their start."""
    spans: dict[Role, list[Span]] = {
        role: [(word.start_s, word.end_s) for word in words[role]] for role in ROLES
    }
    return [
        spoken_turn(role, words[role][first:end], voices[role])
        for role, first, end in speaker_runs(spans)
    ]


def spoken_turn(
    role: Role, words: Sequence[Word], voice_id: str, span: Span | None = None
) -> SpokenTurn:
    """A turn of these words, which hold one at least; `span` where speech was heard."""
    start_s = span[0] if span else words[0].start_s
    end_s = span[1] if span else max(word.end_s for word in words)
    return SpokenTurn(
        role=role,
        text=" ".join(word.text for word in words),
        voice_id=voice_id,
        start_s=start_s,
        end_s=max(end_s, start_s + 0.01),
        words=tuple(words),
    )


def recogniser_windows(spans: Sequence[Span], longest_s: float) -> list[Span]:
    """A turn's speech in windows of at most `longest_s`, which end at its pauses.

    A single span that is longer stays whole.
    """
    windows: list[Span] = []
    for start_s, end_s in spans:
        if windows and end_s - windows[-1][0] <= longest_s:
            windows[-1] = (windows[-1][0], end_s)
        else:
            windows.append((start_s, end_s))
    return windows


def words_off_speech(words: Sequence[Word], spans: Sequence[Span]) -> list[Word]:
    """Words whose middle lies more than 0.5 s from any speech."""
    ends = [end_s for _, end_s in spans]
    found = []
    for word in words:
        middle_s = (word.start_s + word.end_s) / 2
        nearest = bisect_left(ends, middle_s - FAR_FROM_SPEECH_S)
        if nearest == len(spans) or spans[nearest][0] > middle_s + FAR_FROM_SPEECH_S:
            found.append(word)
    return found


def both_sides_note(spans: dict[Role, list[Span]]) -> list[str]:
    """A note when each side speaks nearly always while the other does, as no conversation is."""
    shared_s, first = 0.0, 0
    for start_s, end_s in spans["agent"]:
        while first < len(spans["user"]) and spans["user"][first][1] <= start_s:
            first += 1
        for other_start_s, other_end_s in spans["user"][first:]:
            if other_start_s >= end_s:
                break
            shared_s += min(end_s, other_end_s) - max(start_s, other_start_s)
    longest_s = max(sum(end_s - start_s for start_s, end_s in spans[role]) for role in ROLES)
    if longest_s and shared_s / longest_s > MAX_SHARED_SPEECH:
        return [
            f"both channels speak at once for {shared_s / longest_s:.0%} of the time: does each "
            "hold both speakers?"
        ]
    return []


def transcript_notes(words: dict[Role, list[Word]], spans: dict[Role, list[Span]]) -> list[str]:
    """What is odd about a transcript beside the speech that is heard; it is used all the same."""
    notes = []
    for role, other in (ROLES, ROLES[::-1]):
        off = words_off_speech(words[role], spans[role])
        if not off:
            continue
        note = (
            f"{len(off)} of the {role}'s {len(words[role])} words lie over {FAR_FROM_SPEECH_S} s "
            f"from any speech on its channel, first {off[0].text!r} at {off[0].start_s:.1f} s"
        )
        elsewhere = len(off) - len(words_off_speech(off, spans[other]))
        if elsewhere * 2 > len(words[role]):
            note += "; the other channel has speech there: are the sides swapped?"
        notes.append(note)
    if not words["user"] and spans["user"]:
        notes.append("the transcript has no words of the user's side, which is heard to speak")
    return notes
