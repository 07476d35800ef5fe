"""From what a model says to turns, or to the reason why it cannot be used. Pure.

Repaired is what can be meant in one way only: a fence or text around the object, a trailing
comma, the domain's names for the roles, a place outside of its turn, a number out of range. What
json-repair makes of a damaged object counts only when all brackets were there and it has the
letters of the reply, all and no others: nothing is invented, and no word is lost.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from typing import Any, get_args

from duplex.base import Emotion, Role
from duplex.characters import GapRange, Persona
from duplex.records import Backchannel, Turn
from pipeline.engines.llm.exchanges import Reply
from pipeline.engines.writers import Fault

MAX_TURNS = 500
MAX_BACKCHANNEL_WORDS = 4
_FRAMES_PER_S = 12.5
_MAX_OVERLAP_FRAMES = 6  # half a second: more is not a slip but a cut

_FENCE = re.compile(r"^\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*$", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_REFUSAL = re.compile(
    r"^\W*(?:i(?:'|\N{RIGHT SINGLE QUOTATION MARK})?m sorry|i am sorry|sorry,|i apologi[sz]e|"
    r"i (?:can(?:'|\N{RIGHT SINGLE QUOTATION MARK})?t|cannot|can not|won't|am unable)|"
    r"i(?:'|\N{RIGHT SINGLE QUOTATION MARK})m (?:unable|not able)|"
    r"unfortunately,? i|as an ai)\b",
    re.IGNORECASE,
)


def fault_of(reply: Reply) -> Fault | None:
    """Why a reply cannot be used whatever its text says."""
    if reply.refusal:
        return Fault("refused", f"the model refused: {reply.refusal:.200}")
    if reply.finish == "content_filter":
        return Fault("refused", "the endpoint's content filter stopped the reply")
    if reply.finish == "length":
        return Fault("cut-short", "the reply was cut off at max_tokens: write shorter turns")
    if not reply.text.strip():
        return Fault("unreadable", f"the reply was empty (finish_reason {reply.finish})")
    return None


def read_object(text: str) -> dict[str, Any] | list[Any] | Fault:
    """The JSON object, or list, that a reply holds."""
    bare = _THOUGHT.sub("", text).strip()
    fenced = _FENCE.match(bare)
    bare = fenced[1].strip() if fenced else bare
    span = _span(bare)
    if span is None:
        if _REFUSAL.match(bare):
            return Fault("refused", f"the model refused: {bare:.200}")
        return Fault("unreadable", "there is no whole JSON object in it")
    try:
        value = json.loads(span, strict=False)
    except RecursionError:
        return Fault("unreadable", "its JSON is nested too deeply")
    except ValueError as error:
        value = _repaired(span)
        if value is None:
            return Fault("unreadable", f"its JSON is broken ({error})")
    if not isinstance(value, dict if span[0] == "{" else list):
        return Fault("unreadable", "there is no whole JSON object in it")
    return value


def _span(text: str) -> str | None:
    """From the first bracket to its last counterpart."""
    opening = "[" if text.startswith("[") else "{"
    start, end = text.find(opening), text.rfind("]" if opening == "[" else "}")
    return text[start : end + 1] if 0 <= start < end else None


def _repaired(span: str) -> Any:
    import json_repair

    if span.count("{") != span.count("}") or span.count("[") != span.count("]"):
        return None  # something is missing: what json-repair would close was perhaps longer
    try:
        value = json_repair.loads(span)
    except (RecursionError, ValueError):
        return None
    return value if _letters(span) == _letters(json.dumps(value, ensure_ascii=False)) else None


def _letters(text: str) -> str:
    """What a text says, without the signs that hold it together."""
    return "".join(sign for sign in text.lower() if sign.isalnum())


def read_turns(
    text: str, persona: Persona, role_names: Mapping[str, Role], seed: int
) -> tuple[Turn, ...] | Fault:
    """The turns of a reply. `role_names`: what each role may be called, in lower case."""
    value = read_object(text)
    if isinstance(value, Fault):
        return value
    lines = value.get("turns") if isinstance(value, dict) else value
    if not isinstance(lines, list) or not lines:
        return Fault("unreadable", 'the JSON object must hold "turns", a list of turns')
    if len(lines) > MAX_TURNS:
        return Fault("too-many-turns", f"there are {len(lines)} turns")
    turns: list[Turn] = []
    for number, line in enumerate(lines):
        if not isinstance(line, dict) or not isinstance(line.get("text"), str):
            return Fault("unreadable", f'turn {number} must be an object with "role" and "text"')
        name = str(line.get("role", "")).strip().lower()
        role = role_names.get(name)
        if role is None:
            said = f'turn {number} has the role {name!r:.40}, it must be "agent" or "user"'
            return Fault("unknown-role", said)
        spoken = _spoken(line["text"])
        if not spoken:
            return Fault("empty-turn", f"turn {number} has no text")
        before = turns[-1] if turns else None
        is_last = number == len(lines) - 1
        draw = random.Random(f"pauses/{seed}/{number}")
        turns.append(_turn(line, role, spoken, persona, before, is_last, draw))
    return tuple(turns)


def _spoken(text: str) -> str:
    """On one line, and without what no UTF-8 holds: JSON may carry half a character."""
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def _turn(
    line: dict[str, Any],
    role: Role,
    text: str,
    persona: Persona,
    before: Turn | None,
    is_last: bool,
    draw: random.Random,
) -> Turn:
    words = len(text.split())
    cut = _whole(line.get("cut_after_words"))
    # After its last word nobody cuts in on a turn, and before its first there is none.
    cut = cut if cut is not None and 1 <= cut < words and not is_last else None
    emotion = str(line.get("emotion", "")).strip().lower()
    intensity = _number(line.get("intensity"))
    gap = None
    if before is not None and before.cut_after_words is None:  # a cut has its own timing
        after_user = before.role == "user" and role == "agent"
        range_ = persona.gap_after_user if after_user else persona.gap_other
        gap = _gap(line, range_, draw)
    return Turn(
        role=role,
        text=text,
        gap_frames=gap,
        emotion=next((known for known in get_args(Emotion) if known == emotion), None),
        intensity=None if intensity is None else round(min(2.0, max(0.5, intensity)), 2),
        cut_after_words=cut,
        backchannels=_backchannels(line.get("backchannels"), cut or words),
    )


def _gap(line: dict[str, Any], range_: GapRange, draw: random.Random) -> int | None:
    """Frames, from a word for the pause or from a number; None leaves it to be drawn later."""
    match str(line.get("pause", "")).strip().lower():
        case "quick":
            return range_.low
        case "long":
            return range_.high
        case "overlap":
            return -draw.randint(1, 4)
        case "normal":
            return None
    frames = _number(line.get("gap_frames"))
    seconds = _number(line.get("gap_s"))
    if frames is None and seconds is not None:
        frames = seconds * _FRAMES_PER_S
    if frames is None:
        return None
    return round(min(range_.high, max(-_MAX_OVERLAP_FRAMES, frames)))


def _backchannels(value: Any, spoken_words: int) -> tuple[Backchannel, ...]:
    """Those that can be said where they stand; places past the end move to the last word."""
    found: dict[int, Backchannel] = {}
    for item in value if isinstance(value, list) else ():
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            continue
        text, place = _spoken(item["text"]), _whole(item.get("after_word"))
        if not 1 <= len(text.split()) <= MAX_BACKCHANNEL_WORDS or place is None:
            continue
        place = min(max(1, place), spoken_words)
        found.setdefault(place, Backchannel(text=text, after_word=place))
    return tuple(found[place] for place in sorted(found))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < 1e6 else None  # NaN and infinity too


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
