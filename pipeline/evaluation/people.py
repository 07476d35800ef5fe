"""Grades that people gave on the server's page, beside ours.

The page writes a line whenever somebody grades, so a conversation may have several: its last one
counts. Lines that are no grade are counted and passed over; half a line, as a kill leaves it, is
none.

Our own grade of such a conversation is that of `scoring.grade_of`, by the same rules, over what the
line holds: the prompt, the turns of the user's that the server heard, and the model's words in the
turn in whose window each begins. Nobody asked prepared questions there, so that what was due is
not known, and no reply can be wrong by that. A last turn without time for an answer is left out.
Without the prompt or the user's words (no `--listen`, or a line of before they were kept) there is
no grade of ours: an echo or an invented name could not be told from a right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duplex.agreement import agreement
from duplex.base import rounded
from duplex.errors import MissingInputError
from duplex.files import read_lines
from duplex.metrics import proportion_interval
from pipeline.evaluation.items import PlaceWords, UserTurn
from pipeline.evaluation.scoring import Exchange, exchange_of, grade_of
from pipeline.serving.grades import GRADES, Grade, GradedWords, GradeName

ANSWER_S = 2.4  # as `evaluate.answer_s`: a turn that ends later than that before the end
FEW = 20  # conversations; that many that agree in all leave 83 to 100 % (exact bounds)


class KeptGrade(Grade):
    """A line of the file: what the page sent, and whom the server was serving."""

    model_digest: str = ""
    label: str = ""
    at: int = 0


@dataclass(frozen=True)
class People:
    """grades: one for each conversation, in the order of their last lines. replaced: lines that a
    later one of their conversation replaced; unreadable: lines that are no grade."""

    grades: tuple[KeptGrade, ...]
    replaced: int = 0
    unreadable: int = 0


def read_people(path: Path) -> People:
    """
    Raises:
        MissingInputError: no such file.
    """
    if not path.is_file():
        raise MissingInputError(
            f"{path} must hold people's grades, found nothing there. The server writes them where "
            "`duplex serve --grades` says, or to grades.jsonl of the run folder."
        )
    last: dict[Any, KeptGrade] = {}
    replaced = unreadable = 0
    for number, line in enumerate(read_lines(path)):
        try:
            grade = KeptGrade.model_validate(line)
        except ValidationError:
            unreadable += 1
            continue
        # A page of before conversations had names: each grade is one of its own.
        key = (grade.model_digest, grade.label, grade.conversation or number)
        replaced += last.pop(key, None) is not None
        last[key] = grade
    return People(tuple(last.values()), replaced, unreadable)


def by_model(grades: Sequence[KeptGrade]) -> list[dict[str, Any]]:
    """A row for each model: how often each grade was given, with exact 95 % bounds."""
    rows = []
    for label, digest in dict.fromkeys((grade.label, grade.model_digest) for grade in grades):
        own = [g.grade for g in grades if (g.label, g.model_digest) == (label, digest)]
        counts = {}
        for name in GRADES:
            hits = own.count(name)
            low, high = proportion_interval(hits, len(own))
            counts[name] = {"hits": hits, "value": round(hits / len(own), 6),
                            "low": round(low, 6), "high": round(high, 6)}  # fmt: skip
        rows.append({"label": label, "model_digest": digest, "n": len(own), "grades": counts})
    return rows


# -- our grade of the same


def our_grade(kept: KeptGrade, words: PlaceWords) -> GradeName | None:
    """By the rules of `scoring`; None where the line holds too little to grade."""
    exchanges = exchanges_of(kept, words)
    if exchanges and kept.echoes:  # as the server heard it, over its own windows
        return "poor"
    return grade_of(exchanges, {})


def exchanges_of(kept: KeptGrade, words: PlaceWords) -> tuple[Exchange, ...]:
    """Each turn that was heard with the words of its window; none without prompt or turns."""
    turns = sorted((turn for turn in kept.heard if turn.text.strip()), key=lambda t: t.start_s)
    if kept.text_prompt is None or not turns:
        return ()
    windows: list[list[str]] = [[] for _ in range(len(turns) + 1)]
    for line in kept.words:
        for at_s, word in _timed(line):
            windows[sum(turn.start_s <= at_s for turn in turns)].append(word)
    replies = [" ".join(window) for window in windows[1:]]
    last = turns[-1]
    if not replies[-1] and kept.seconds - max(last.start_s, last.end_s) < ANSWER_S:
        turns.pop()
    given, found = [kept.text_prompt], []
    for turn, reply in zip(turns, replies, strict=False):
        given.append(turn.text)
        found.append(exchange_of(UserTurn(say=turn.text), reply, tuple(given), words))
    return tuple(found)


def _timed(line: GradedWords) -> list[tuple[float, str]]:
    """(where it begins, word); the line's own start where the page did not say."""
    words = line.text.split()
    starts = line.at_s if len(line.at_s) == len(words) else (line.start_s,) * len(words)
    return list(zip(starts, words, strict=True))


# -- beside each other


def beside_ours(
    grades: Iterable[KeptGrade], ours: Callable[[KeptGrade], str | None]
) -> dict[str, Any]:
    """How far our grades agree with people's: `duplex.agreement.Agreement` as a row.

    Args:
        ours: our grade of the conversation that was graded; None where it can't be told. Those are
            counted as `without_ours`, and in no other number.
    """
    pairs, without = [], 0
    for grade in grades:
        own = ours(grade)
        if own is None:
            without += 1
        else:
            pairs.append((own, grade.grade))
    found = asdict(agreement(pairs, GRADES))
    row = rounded(found)
    return row | {"without_ours": without, "few": found["n"] < FEW}


def people_data(path: Path, words: PlaceWords) -> dict[str, Any]:
    """What a report shows of a grades.jsonl; raises as `read_people`.

    Args:
        words: of the place that the conversations are about, for our grades.
    """
    people = read_people(path)
    return {
        "conversations": len(people.grades),
        "replaced": people.replaced,
        "unreadable": people.unreadable,
        "models": by_model(people.grades),
        "agreement": beside_ours(people.grades, lambda kept: our_grade(kept, words)),
    }


def told(data: Mapping[str, Any]) -> list[str]:
    """What `people_data` says, in sentences: the agreement, and what it does not rest on."""
    found, lines = data["agreement"], []
    n = found["n"]
    if n:
        kappa = "is not defined: one grade throughout"
        if found["kappa"] is not None:
            kappa = f"{found['kappa']:.2f}"
        if found["kappa_low"] is not None:
            kappa += f" ({found['kappa_low']:.2f} to {found['kappa_high']:.2f})"
        lines.append(
            f"The same grade in {round(n * found['raw'])} of {n} conversations "
            f"({100 * found['raw_low']:.0f} to {100 * found['raw_high']:.0f} %); "
            f"kappa, weighted, {kappa}."
        )
    if found["few"]:
        lines.append(
            f"{n} conversations with both grades are too few to say how far they agree: from "
            f"{FEW} on, full agreement shows as more than 83 %."
        )
    if found["without_ours"]:
        lines.append(
            f"{found['without_ours']} have no grade of ours: the file must hold the prompt and "
            "what the user said, which the server hears with --listen."
        )
    if data["replaced"] or data["unreadable"]:
        lines.append(
            f"{data['replaced']} lines were replaced by a later grade of their conversation, "
            f"{data['unreadable']} are no grade."
        )
    return lines
