"""How well emotions are read from words alone, on dialogues whose emotions are known.

    python -m benchmarks.emotion_words            # prints
    python -m benchmarks.emotion_words --write    # and writes docs/results/emotion_words.*

The 200 scripted dialogues of configs/pocket-full.yaml. The label of a turn is the mood in which its
speech is made (`pipeline/engines/scripted_performance.py`): an agent's follows from its persona and
the scene, a user's from what the line is for. Nobody chose the words of a line by its label, so
many turns name no emotion at all, and this measures what a text of this kind gives away, not only
what `emotion_of` misses.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from benchmarks.grounding import show_or_write
from duplex.base import Emotion
from duplex.emotion_words import emotion_of
from duplex.metrics import proportion_interval
from duplex.records import Dialogue

EMOTIONS: tuple[str, ...] = get_args(Emotion)
EXAMPLES = 8
SIDES = ("agent turns", "user turns", "agent, whole dialogues")


def main() -> None:
    show_or_write("emotion_words", __doc__ or "", measure, describe)


def measure(conversations: list[Dialogue]) -> dict[str, Any]:
    texts: dict[str, list[tuple[str, str]]] = {side: [] for side in SIDES}  # (label, text)
    for one in conversations:
        agent = []
        for turn in one.turns:
            if turn.emotion is None:
                continue
            texts[f"{turn.role} turns"].append((turn.emotion, turn.text))
            if turn.role == "agent":
                agent.append(turn)
        if agent:
            ((label, _),) = Counter(turn.emotion for turn in agent).most_common(1)
            texts[SIDES[2]].append((str(label), " ".join(turn.text for turn in agent)))
    wrong = [
        [label, found.emotion, text]
        for label, text in texts[SIDES[0]]
        if (found := emotion_of(text)).counts and found.emotion != label
    ]
    return {
        "dialogues": len(conversations),
        "sides": {side: judge(pairs) for side, pairs in texts.items()},
        "examples": wrong[:: max(1, len(wrong) // EXAMPLES)][:EXAMPLES],
    }


def judge(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """The table of labels and findings of (label, text), and what follows from it.

    named: texts with a hit. right_named: right ones among them. usual: right if each text were
    given the most frequent label. macro_f1: mean of F1 over the labels that occur.
    """
    found = [(label, emotion_of(text)) for label, text in pairs]
    table = Counter((label, one.emotion) for label, one in found)
    labels = Counter(label for label, _ in pairs)
    answers = Counter(one.emotion for _, one in found)
    scores = [2 * table[e, e] / (labels[e] + answers[e]) for e in labels]
    named = [(label, one) for label, one in found if one.counts]
    return {
        "table": {row: {column: table[row, column] for column in EMOTIONS} for row in EMOTIONS},
        "texts": len(pairs),
        "right": sum(table[e, e] for e in EMOTIONS),
        "usual": max(labels.values()),
        "named": len(named),
        "right_named": sum(label == one.emotion for label, one in named),
        "macro_f1": round(sum(scores) / len(scores), 4),
    }


def describe(result: dict[str, Any]) -> str:
    lines = [
        "# Emotions read from words",
        "",
        "`python -m benchmarks.emotion_words --write`: the turns of "
        f"{result['dialogues']} scripted dialogues (configs/pocket-full.yaml), each with the "
        "emotion that it is spoken in. "
        "`usual`: right if every text were given the most frequent emotion. `named`: texts that "
        "hold a word of an emotion; the others are called neutral.",
        "",
        "| texts | n | right | 95 % | usual | macro F1 | named | right of named |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for side, one in result["sides"].items():
        low, high = proportion_interval(one["right"], one["texts"])
        n, named = one["texts"], one["named"]
        lines.append(
            f"| {side} | {n} | {one['right'] / n:.1%} | {low:.1%} to {high:.1%} "
            f"| {one['usual'] / n:.1%} | {one['macro_f1']:.2f} | {named / n:.1%} "
            f"| {one['right_named'] / max(1, named):.1%} |"
        )
    agent = result["sides"][SIDES[0]]["table"]
    found = (f"{e} {agent[e][e]} of {sum(agent[e].values())}" for e in EMOTIONS)
    lines += ["", f"Found of the agent's turns: {', '.join(found)}."]
    for side, one in result["sides"].items():
        lines += [
            "",
            f"{side[0].upper()}{side[1:]}: rows are what is right, columns what was found.",
            "",
        ]
        lines += [f"| | {' | '.join(EMOTIONS)} |", f"| --- |{' ---: |' * len(EMOTIONS)}"]
        lines += [
            f"| {row} | {' | '.join(str(one['table'][row][column]) for column in EMOTIONS)} |"
            for row in EMOTIONS
        ]
    lines += ["", "Some agent turns that were read wrongly (right, found):", ""]
    lines += [f"- {label}, {found}: {text}" for label, found, text in result["examples"]]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
