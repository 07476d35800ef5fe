"""From a judge's answers to judge.json: scores by model, verdicts, preferences. Pure.

A silent agent is not put to the judge: nothing can be quoted. Its grade is poor, by the rubric's
own words, and it has no scores. In a pair, a silent side or two equal sides leave nothing to
prefer: the first is left out, the second is a tie.

Verdicts are `duplex.verdict.compare` over items, all measures and all pairs of models as one
family: an item's value is the mean over its seeds that both models were judged on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from duplex.base import rounded
from duplex.errors import DataFileError
from duplex.metrics import proportion_interval
from duplex.verdict import Better, Pair, compare
from pipeline.engines.writers import Fault
from pipeline.evaluation.judge import Conversation, Preference, Question, Scores
from pipeline.evaluation.judge import absolute as ask_absolute
from pipeline.evaluation.judge import pairwise as ask_pairwise
from pipeline.evaluation.rubric import MOST, Rubric
from pipeline.serving.grades import GRADES

Key = tuple[str, int, str]  # item, seed, model
Measures = dict[str, tuple[Sequence[Pair], Better]]  # "measure model" -> a pair for each item
_GRADE_VALUES = {"poor": 0, "good": 1, "perfect": 2}


@dataclass(frozen=True)
class Match:
    """Two models' conversations on one item and seed."""

    first: Conversation
    other: Conversation

    @property
    def left_out(self) -> str:
        """Why the judge is not asked; empty where it is."""
        if not (self.first.said and self.other.said):
            return "silent"
        return "identical" if self.first.lines == self.other.lines else ""


def by_key(conversations: Iterable[Conversation]) -> dict[Key, Conversation]:
    """
    Raises:
        DataFileError: one is there twice.
    """
    found: dict[Key, Conversation] = {}
    for one in conversations:
        key = (one.item, one.seed, one.model)
        if key in found:
            raise DataFileError(
                f"each item, seed and model must be in report.json once, found {one.item}, seed "
                f"{one.seed}, {one.model} again. Evaluate again to get a whole report."
            )
        found[key] = one
    return found


def matches(conversations: Mapping[Key, Conversation], models: Sequence[str]) -> list[Match]:
    """The first model against each other one, where both have the item and seed.

    Raises:
        DataFileError: the two were given different prompts.
    """
    found = []
    for other in models[1:]:
        for (item, seed, model), first in conversations.items():
            second = conversations.get((item, seed, other))
            if model != models[0] or second is None:
                continue
            if first.prompt != second.prompt:
                raise DataFileError(
                    f"{item}: both models must have had the same prompt to be compared, found two "
                    f"for {model} and {other}. Evaluate both with one items file."
                )
            found.append(Match(first, second))
    return found


def questions(
    conversations: Mapping[Key, Conversation], pairs: Sequence[Match], rubric: Rubric, model: str
) -> list[Question]:
    """All that the judge is asked, once for each; `answers` of `judgement` are in this order."""
    found = [ask_absolute(one, rubric, model) for one in conversations.values() if one.said]
    for pair in pairs:
        if not pair.left_out:
            found += ask_pairwise(pair.first, pair.other, rubric, model)
    return found


def judgement(
    conversations: Mapping[Key, Conversation],
    pairs: Sequence[Match],
    rubric: Rubric,
    models: Sequence[str],
    answers: Sequence[tuple[Any, int]],
) -> dict[str, Any]:
    """The content of judge.json, less protocol and cost.

    Args:
        pairs: those that were asked about, too; empty where none were.
        answers: for each of `questions`, the answer or Fault, and the number of replies it took.
    """
    waiting = iter(answers)
    found: dict[Key, tuple[Any, int]] = {
        key: next(waiting) if one.said else (None, 0) for key, one in conversations.items()
    }
    preferences = [
        (pair, None if pair.left_out else (next(waiting)[0], next(waiting)[0])) for pair in pairs
    ]
    assert next(waiting, None) is None, "one answer for each question"
    measures = _absolute_measures(found, rubric, models)
    if pairs:
        measures |= _preference_measures(preferences)
    titles = {c.id: c.title for c in rubric.criteria} | {
        "grade": "Grade (poor 0, good 1, perfect 2)",
        "preference": "Preferred in pairs",
    }
    units = {"grade": f"0 to {max(_GRADE_VALUES.values())}", "preference": "share of pairs"}
    verdicts = compare(measures)
    return {
        "counts": dict(sorted(Counter(_status(answer) for answer, _ in found.values()).items())),
        "replies_beyond_the_first": sum(max(0, replies - 1) for _, replies in answers),
        "summary": [_summary(found, rubric, label) for label in models],
        "verdict": [
            {
                "key": measure,
                "label": titles[measure],
                "unit": units.get(measure, f"0 to {MOST}"),
                "from": models[0],
                "to": other,
                **_rounded(asdict(verdict)),
            }
            for (measure, _, other), verdict in (
                (key.partition(" "), verdict) for key, verdict in verdicts.items()
            )
        ],
        "conversations": [_shown(key, answer) for key, (answer, _) in found.items()],
        "pairwise": pairwise_summary(preferences) if pairs else None,
    }


def _status(answer: Any) -> str:
    if answer is None:
        return "silent"
    if isinstance(answer, Fault):
        return answer.code if answer.code in ("unverified", "refused") else "unreadable"
    return "judged"


def _shown(key: Key, answer: Any) -> dict[str, Any]:
    item, seed, model = key
    row: dict[str, Any] = {"item": item, "seed": seed, "model": model, "status": _status(answer)}
    if isinstance(answer, Scores):
        row["scores"] = {
            name: {"score": score, "evidence": evidence}
            for name, (score, evidence) in answer.scores.items()
        }
        row["grade"], row["grade_evidence"] = answer.grade
    elif answer is None:
        row["grade"] = "poor"
    return row


def _values(answer: Any, rubric: Rubric) -> dict[str, float]:
    """What a conversation's answer counts for, by criterion; nothing where it was rejected."""
    if answer is None:
        return {"grade": _GRADE_VALUES["poor"]}
    if not isinstance(answer, Scores):
        return {}
    scores = {c.id: float(answer.scores[c.id][0]) for c in rubric.criteria}
    return scores | {"grade": _GRADE_VALUES[answer.grade[0]]}


def _absolute_measures(
    found: Mapping[Key, tuple[Any, int]], rubric: Rubric, models: Sequence[str]
) -> Measures:
    items = dict.fromkeys(item for item, _, _ in found)
    values = {key: _values(answer, rubric) for key, (answer, _) in found.items()}
    measures: Measures = {}
    for other in models[1:]:
        for measure in [*(c.id for c in rubric.criteria), "grade"]:
            pairs = []
            for item in items:
                both = [
                    (values[key][measure], values[item, key[1], other][measure])
                    for key in values
                    if key[0] == item and key[2] == models[0] and measure in values[key]
                    and measure in values.get((item, key[1], other), {})
                ]  # fmt: skip
                pairs.append(
                    Pair(sum(a for a, _ in both), len(both), sum(b for _, b in both), len(both))
                )
            measures[f"{measure} {other}"] = (pairs, "high")
    return measures


# -- preferences


def preferred(answers: tuple[Any, Any]) -> str | None:
    """`first`, `other` or `tie`, from both orders; None where either was rejected.

    In the first order the first model is A, in the second it is B.
    """
    one, two = answers
    if not (isinstance(one, Preference) and isinstance(two, Preference)):
        return None
    named = {"A": "first", "B": "other", "tie": "tie"}[one.better]
    swapped = {"A": "other", "B": "first", "tie": "tie"}[two.better]
    return named if named == swapped else "tie"


def is_positional(answers: tuple[Any, Any]) -> bool:
    """Whether the same place was preferred in both orders."""
    one, two = answers
    both = isinstance(one, Preference) and isinstance(two, Preference)
    return both and one.better == two.better != "tie"


def _preference_measures(
    preferences: Sequence[tuple[Match, tuple[Any, Any] | None]],
) -> Measures:
    found: dict[str, dict[str, list[float]]] = {}
    for pair, answers in preferences:
        word = "tie" if pair.left_out == "identical" else preferred(answers) if answers else None
        by_item = found.setdefault(f"preference {pair.other.model}", {})
        won = by_item.setdefault(pair.first.item, [])
        if word is not None:
            won.append({"first": 0.0, "tie": 0.5, "other": 1.0}[word])
    return {
        key: ([Pair(len(won) - sum(won), len(won), sum(won), len(won))
               for won in by_item.values()], "high")
        for key, by_item in found.items()
    }  # fmt: skip


def pairwise_summary(
    preferences: Sequence[tuple[Match, tuple[Any, Any] | None]],
) -> dict[str, Any]:
    """Counts, the position bias with its exact bounds, and a row for each pair."""
    asked = [answers for _, answers in preferences if answers is not None]
    verified = [answers for answers in asked if preferred(answers) is not None]
    positional = sum(map(is_positional, verified))
    chosen = [answer.better for answers in verified for answer in answers]
    return {
        "pairs": len(preferences),
        "left_out": dict(Counter(pair.left_out for pair, _ in preferences if pair.left_out)),
        "verified": len(verified),
        "rejected": len(asked) - len(verified),
        "orders_agree": sum(
            one.better == {"A": "B", "B": "A", "tie": "tie"}[two.better] for one, two in verified
        ),
        "position_bias": _rate(positional, len(verified)),
        "first_place_chosen": _rate(chosen.count("A"), len(chosen) - chosen.count("tie")),
        "rows": [
            {
                "item": pair.first.item,
                "seed": pair.first.seed,
                "first": pair.first.model,
                "other": pair.other.model,
                "left_out": pair.left_out,
                "preferred": preferred(answers) if answers else None,
                "answers": [
                    asdict(one) if isinstance(one, Preference) else {"status": _status(one)}
                    for one in answers or ()
                ],
            }
            for pair, answers in preferences
        ],
    }


# -- by model


def _summary(found: Mapping[Key, tuple[Any, int]], rubric: Rubric, label: str) -> dict[str, Any]:
    """Means of the scores, and the share of each grade with its exact bounds."""
    own = [answer for (_, _, model), (answer, _) in found.items() if model == label]
    values = [_values(answer, rubric) for answer in own]
    grades = [_shown(("", 0, ""), answer).get("grade") for answer in own]
    scores = {}
    for criterion in rubric.criteria:
        given = [each[criterion.id] for each in values if criterion.id in each]
        mean = round(math.fsum(given) / len(given), 6) if given else None
        scores[criterion.id] = {"mean": mean, "n": len(given)}
    graded = sum(grade is not None for grade in grades)
    return {
        "model": label,
        "scores": scores,
        "grades": {name: _rate(grades.count(name), graded) for name in GRADES},
    }


def _rate(hits: int, trials: int) -> dict[str, Any]:
    low, high = proportion_interval(hits, trials) if trials else (None, None)
    share = hits / trials if trials else None
    return _rounded({"value": share, "hits": hits, "n": trials, "low": low, "high": high})


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return rounded(row)
