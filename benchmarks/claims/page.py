"""docs/results/claims/NAME.md, of NAME.json and the claim's file: no number is typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims.plan import BASE, Claim
from benchmarks.claims.plots import CURVES
from benchmarks.claims.tables import (
    DISAGREE,
    GROUPS,
    UNMEASURED,
    VERDICTS,
    deciding,
    key_measure,
    outcome,
)


def describe(name: str, claim: Claim, result: Mapping[str, Any]) -> str:
    measures = result["measures"]
    found = outcome(deciding(claim, measures))
    lines = [
        f"# {claim.title}",
        "",
        f"**Claim.** {claim.claim}",
        "",
        f"**Question.** {claim.question}",
        "",
        f"**Result.** {sentence(claim, measures)}",
        "",
        f"**For a 7B run.** {getattr(claim.seven_b, found)}",
        "",
        *([f"**Why.** {claim.why}", ""] if claim.why else []),
        f"**What this does not say.** {claim.not_said}",
        "",
        f"![measures by arm]({name}.svg)",
        "",
        f"Small dots: seeds; diamonds: all of them; the line: the reference, `{claim.reference}`.",
        "",
        *_protocol(name, claim, result),
        *_arms(claim, result),
    ]
    if claim.curves:
        lines += _curves(name, claim, result)
    for one in measures:
        lines += _table(one, claim.reference)
    return "\n".join(lines)


def sentence(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """What the key measure shows, arm by arm, and which of the others show something."""
    others = other_comparisons(claim, measures)
    different = [(other, row) for other, row in others if row["word"] in VERDICTS]
    named = [
        f"{other['label']} `{row['arm']}` {row['word']}"
        for other, row in different
        if not other["group"]
    ]
    within = len(different) - len(named)
    more = f"{'; and ' if named else ''}{within} within groups" if within else ""
    apart = sum(row["word"] in (DISAGREE, UNMEASURED) for _, row in others)
    shaky = f" {apart} would, but for a seed." if apart else ""
    listed = f": {'; '.join(named)}{more}" if different else ""
    return (
        f"{key_result(claim, measures)}. Of {len(others)} other comparisons on its page "
        f"{len(different)} show a difference{listed}.{shaky}"
    )


def key_result(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """The key measure's values and verdicts, arm by arm."""
    one = key_measure(claim, measures)
    rows = {row["arm"]: row for row in one["rows"]}
    reference = rows.pop(claim.reference)
    parts = [
        f"`{arm}` {_value(one, row['value'])} ({change(one, row)})" for arm, row in rows.items()
    ]
    values = "; ".join([f"`{claim.reference}` {_value(one, reference['value'])}", *parts])
    return f"{one['label']}: {values}"


def other_comparisons(
    claim: Claim, measures: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Measure and row of each arm against the reference, without those of the key measure."""
    one = key_measure(claim, measures)
    return [
        (other, row)
        for other in measures
        for row in other["rows"]
        if row["arm"] != claim.reference and other is not one
    ]


def change(one: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """The verdict of a row, and by how much where it says that there is a difference."""
    if row["word"] not in VERDICTS:
        return row["word"]
    return f"{row['word']}, {_value(one, row['difference'], '+')}"


def _protocol(name: str, claim: Claim, result: Mapping[str, Any]) -> list[str]:
    shared = ", ".join(f"`{key}: {value}`" for key, value in result["set"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    return [
        "## Protocol",
        "",
        f"`python -m benchmarks.claims {name}`: the config of `make demo` ({result['config']}) "
        f"with {shared}. Each arm is run from the dialogues to the merged model with the seeds "
        f"{seeds}, which change dialogues, speech, training and sampling. Every model holds "
        f"{result['items']} conversations a seed, each of up to {result['seconds']:g} s, and is "
        f"scored teacher-forced. {'; '.join(result['measured'])}.",
        "",
        "A difference is the mean over items, each pooled over the seeds, with the 95 % interval "
        "of a bootstrap over items; p by sign changes, corrected over the whole page (Holm; "
        "[evaluation](../../evaluation.md)). A verdict takes p ≤ .05 and all seeds pointing one "
        f"way; where they do not, it says `{DISAGREE}`. `all` pools what the seeds counted: "
        "talkative items weigh more in it than in the difference. Differences of shares are in "
        "percentage points (pp).",
        "",
    ]


def _arms(claim: Claim, result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| arm | differs by | clips trained on | minutes | training, s |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for arm in result["arms"]:
        overrides = ", ".join(f"{key}: {value}" for key, value in arm["overrides"].items())
        trained = arm["arm"] != BASE
        cells = [
            f"`{arm['arm']}`",
            overrides or ("no adapter" if not trained else "nothing"),
            f"{arm['clips']:.0f}" if trained else "",
            f"{arm['minutes']:.1f}" if trained else "",
            f"{arm['train_s']:.0f}" if trained else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = (
        "Seconds are by the clock, on a machine that others used too: they are no measurement."
    )
    return [*lines, "", seconds, "", *(_rounding(result) if claim.survival else [])]


def _rounding(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "## What rounding to bfloat16 takes",
        "",
        "Of the weights that adapters target, in a base that bfloat16 can hold: those that "
        "rounding lets change, the share of the update along its own direction that is left, and "
        "the size of the rounding error against the update's (`benchmarks/claims/rounding.py`). Of "
        "each arm's adapters, whatever it merges to; means over the seeds.",
        "",
        "| arm | weights changed | update left | rounding error | its own merge |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for arm in result["arms"]:
        if one := arm["rounding"]:
            lines.append(
                f"| `{arm['arm']}` | {100 * one['changed']:.1f} % | {100 * one['survived']:.1f} % "
                f"| {one['error']:.2f} | {arm['refused'] or 'kept'} |"
            )
    return [*lines, ""]


def _curves(name: str, claim: Claim, result: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Losses",
        "",
        f"![losses of held-out clips by epoch]({name}-curves.svg)",
        "",
        "Means over the seeds, of held-out clips, at the first and the last step: `total` weighs "
        "the terms as the arm does, so arms differ in it by the weight alone; the others are "
        "plain nats, with the prompt's frames where an arm puts loss on them.",
        "",
        f"| arm | {' | '.join(CURVES.values())} |",
        f"| --- | {' | '.join('---:' for _ in CURVES)} |",
    ]
    for arm in claim.arms:
        curves = result["curves"].get(arm, {})
        if not curves:
            continue
        cells = []
        for key in CURVES:
            points = curves.get(key, {}).get("valid", [])
            cells.append(f"{points[0][1]:.2f} → {points[-1][1]:.2f}" if points else "")
        lines.append(f"| `{arm}` | {' | '.join(cells)} |")
    if claim.expected:
        cells = [
            " → ".join(f"{value:g}" for value in claim.expected.get(key, ())) for key in CURVES
        ]
        lines.append(f"| the seeds expected, by epoch | {' | '.join(cells)} |")
    return [*lines, ""]


def _table(one: Mapping[str, Any], reference: str) -> list[str]:
    group = f", {GROUPS[one['group']]}" if one["group"] else ""
    better = {"high": "; more is better", "low": "; less is better"}.get(one["better"], "")
    unit = f"share of {one['unit']}" if one["kind"] == "rate" else one["unit"]
    lines = [
        f"## {one['label']}{group}",
        "",
        f"In {unit}{better}.",
        "",
        f"| arm | by seed | all | n | against `{reference}` | 95 % | items | p | verdict |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for row in one["rows"]:
        cells = [
            f"`{row['arm']}`",
            " · ".join(_value(one, value) for value in row["by_seed"]),
            _value(one, row["value"]),
            f"{row['trials']:g}",
        ]
        if row["arm"] == reference:
            cells += ["", "", "", "", "reference"]
        elif row["word"] == "not measured":
            cells += ["", "", "0", "", "not measured"]
        else:
            bounds = (
                f"{_value(one, row['low'], '+')} to {_value(one, row['high'], '+')}"
                if row["low"] is not None
                else ""
            )
            cells += [
                _value(one, row["difference"], "+"),
                bounds,
                str(row["n"]),
                f"{row['p_holm']:.3f}",
                f"**{row['word']}**" if row["word"] in VERDICTS else row["word"],
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _value(one: Mapping[str, Any], value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    if one["kind"] == "rate":
        return f"{100 * value:{sign}.1f} {'pp' if sign else '%'}"
    return f"{value:{sign}.3g}" if abs(value) < 1000 else f"{value:{sign}.0f}"
