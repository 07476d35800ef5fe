"""docs/results/claims/NAME.md, of NAME.json and the claim's file: no number is typed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims.plan import Claim, Outcome
from benchmarks.claims.plots import CURVES
from benchmarks.claims.tables import (
    DISAGREE,
    GROUPS,
    TOO_FEW,
    UNMEASURED,
    VERDICTS,
    beside,
    decided,
    key_measure,
)

BESIDE: dict[Outcome, str] = {
    "better": "Its price",
    "worse": "To the others' credit",
    "none": "Other rows that differ",
}


def describe(name: str, claim: Claim, result: Mapping[str, Any], today: Mapping[str, Any]) -> str:
    """The page. today: of which base data/pocket is (`plan.pocket_base`)."""
    measures = result["measures"]
    lines = [
        f"# {claim.title}",
        "",
        *_of_another_base(name, result, today),
        f"**Claim.** {claim.claim}",
        "",
        f"**Question.** {claim.question}",
        "",
        f"**Result.** {sentence(claim, measures)}",
        "",
        f"**Against the claim.** {against(claim, measures)}",
        "",
        f"**For a 7B run.** {advice(claim, measures)}",
        "",
        *([f"**Why.** {claim.why}", ""] if claim.why else []),
        f"**What this does not say.** {claim.not_said}",
        "",
        f"![measures by arm]({name}.svg)",
        "",
        f"Differences from `{claim.reference}`, the mean over items, with its 95 % interval; dots: "
        "the same of each seed. Filled: a verdict.",
        "",
        *_protocol(name, claim, result),
        *_arms(claim, result),
    ]
    if claim.curves:
        lines += _curves(name, claim, result)
    for one in measures:
        lines += _table(one, claim.reference)
    return "\n".join(lines)


def _of_another_base(name: str, result: Mapping[str, Any], today: Mapping[str, Any]) -> list[str]:
    if is_of(result, today):
        return []
    return [
        f"> Measured with an earlier pocket base ({said_of(result['base'])}), not with the one "
        f"that lies in data/pocket now ({said_of(today)}). `python -m benchmarks.claims {name}` "
        "measures it again.",
        "",
    ]


def is_of(result: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a claim was measured with this base."""
    return result["base"]["weights"] == base["weights"]


def said_of(base: Mapping[str, Any]) -> str:
    return f"{base['steps']} steps, sha256 {base['weights'][:12]}…"


def sentence(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """What the key measure shows, arm by arm, and how many of the others show something."""
    others = other_comparisons(claim, measures)
    different = sum(row["word"] in VERDICTS for _, row in others)
    apart = sum(row["word"] in (DISAGREE, UNMEASURED) for _, row in others)
    shaky = f"; {apart} would, but for a seed" if apart else ""
    return (
        f"{key_result(claim, measures)}. Of {len(others)} other comparisons below {different} show "
        f"a difference{shaky}."
    )


def against(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """What becomes of the claim."""
    found, row = decided(claim, measures)
    return _filled(getattr(claim.against, found), claim, measures, row)


def advice(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """What it means for a 7B run, with what speaks against it."""
    text, listed = meaning(claim, measures), beside(claim, measures)
    if not listed:
        return text
    return f"{text} {BESIDE[decided(claim, measures)[0]]}: {listing(listed)}."


def meaning(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """What it means for a 7B run, in the claim's words."""
    found, row = decided(claim, measures)
    return _filled(getattr(claim.seven_b, found), claim, measures, row)


def listing(rows: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> str:
    return "; ".join(f"{one['label']} `{row['arm']}` {change(one, row)}" for one, row in rows)


def _filled(
    text: str, claim: Claim, measures: Sequence[Mapping[str, Any]], row: Mapping[str, Any]
) -> str:
    one = key_measure(claim, measures)
    by = shown(one, row["difference"], "+") if row.get("difference") is not None else "–"
    return text.replace("{arm}", f"`{row['arm']}`").replace("{by}", by)


def key_result(claim: Claim, measures: Sequence[Mapping[str, Any]]) -> str:
    """The key measure's values and verdicts, arm by arm."""
    one = key_measure(claim, measures)
    rows = {row["arm"]: row for row in one["rows"]}
    reference = rows.pop(claim.reference)
    parts = [
        f"`{arm}` {shown(one, row['value'])} ({change(one, row)})" for arm, row in rows.items()
    ]
    values = "; ".join([f"`{claim.reference}` {shown(one, reference['value'])}", *parts])
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
    return f"{row['word']}, {shown(one, row['difference'], '+')}"


def _protocol(name: str, claim: Claim, result: Mapping[str, Any]) -> list[str]:
    key = key_measure(claim, result["measures"])
    shared = ", ".join(f"`{key}: {value}`" for key, value in result["set"].items())
    seeds = ", ".join(map(str, result["seeds"]))
    return [
        "## Protocol",
        "",
        f"`python -m benchmarks.claims {name}`: the config of `make demo` ({result['config']}) "
        f"with {shared}. Each arm is run from the dialogues to the merged model with the seeds "
        f"{seeds}, which change dialogues, speech, training and sampling. Of an arm's validations "
        "the adapter is kept whose loss of words and semantic codes is lowest on held-out clips. "
        f"Every model holds {result['items']} conversations a seed, each of up to "
        f"{result['seconds']:g} s, and is scored teacher-forced. The pocket base: "
        f"{said_of(result['base'])}. {'; '.join(result['measured'])}.",
        "",
        "A difference is the mean over items, each pooled over the seeds, with the 95 % interval "
        "of a bootstrap over items, not corrected; p by sign changes "
        "([evaluation](../../evaluation.md)), corrected (Holm) among the deciding arms "
        f"({', '.join(f'`{arm}`' for arm in claim.deciding_arms)}) in {key['label']}, the key "
        "measure, and among all other rows. A verdict takes p ≤ .05 and all seeds "
        f"pointing one way; where they do not, it says `{DISAGREE}`. `{TOO_FEW}` differ where no p "
        "could pass. `all` pools what the seeds counted: talkative items weigh more in it than in "
        "the difference. Differences of shares are in percentage points (pp).",
        "",
        *_held_out(result),
    ]


def _held_out(result: Mapping[str, Any]) -> list[str]:
    """Who the held-out clips are of, by seed."""
    found = result["held_out"]
    if not found:
        return []
    listed = "; ".join(f"seed {seed}: {', '.join(names)}" for seed, names in found.items())
    return [
        f"Held-out clips are of {listed}. Clips of a seed share a trained model, and those of one "
        "persona its voice and facts: what is said of them is said of these clips, not of new "
        "personas or of training again.",
        "",
    ]


def _arms(claim: Claim, result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| arm | differs by | clips trained on, by seed | minutes | steps | epochs | training, s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm in result["arms"]:
        overrides = ", ".join(f"{key}: {value}" for key, value in arm["overrides"].items())
        trained = bool(arm["clips"])
        cells = [
            f"`{arm['arm']}`",
            overrides or ("no adapter" if not trained else "nothing"),
            " · ".join(map(str, arm["clips"])) if trained else "",
            f"{arm['minutes']:.1f}" if trained else "",
            str(arm["steps"]) if trained else "",
            f"{arm['epochs']:.3g}" if trained else "",
            f"{arm['train_s']:.0f}" if trained else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seconds = (
        "Seconds are the median of the seeds, by the clock of a machine that others used too: they "
        "tell arms apart only where they differ by far."
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
        if one := arm.get("rounding"):
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
        "Means over the seeds, of held-out clips, after so many epochs: `total` weighs the terms "
        "as the arm does, so arms differ in it by the weight alone; the others are plain nats, "
        "with the prompt's frames where an arm puts loss on them.",
        "",
    ]
    for key, title in CURVES.items():
        by_arm = {
            arm: {round(step / result["steps_per_epoch"]): value for step, value in points}
            for arm, curves in result["curves"].items()
            if (points := curves.get(key, {}).get("valid"))
        }
        epochs = sorted({epoch for found in by_arm.values() for epoch in found})
        expected = dict(enumerate(claim.expected.get(key, ()), 1))
        lines += [
            f"| {title}, after epoch | {' | '.join(map(str, epochs))} |",
            f"| --- | {' | '.join('---:' for _ in epochs)} |",
        ]
        for arm in claim.arms:
            if arm in by_arm:
                cells = [f"{by_arm[arm][e]:.2f}" if e in by_arm[arm] else "" for e in epochs]
                lines.append(f"| `{arm}` | {' | '.join(cells)} |")
        if expected:
            cells = [f"{expected[e]:g}" if e in expected else "" for e in epochs]
            lines.append(f"| expected by the documents | {' | '.join(cells)} |")
        lines.append("")
    return lines


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
            " · ".join(shown(one, value) for value in row["by_seed"]),
            shown(one, row["value"]),
            f"{row['trials']:g}",
        ]
        if row["arm"] == reference:
            cells += ["", "", "", "", "reference"]
        elif row["word"] == "not measured":
            cells += ["", "", "0", "", "not measured"]
        else:
            bounds = (
                f"{shown(one, row['low'], '+')} to {shown(one, row['high'], '+')}"
                if row["low"] is not None
                else ""
            )
            cells += [
                shown(one, row["difference"], "+"),
                bounds,
                str(row["n"]),
                "< .001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.3f}",
                f"**{row['word']}**" if row["word"] in VERDICTS else row["word"],
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def shown(one: Mapping[str, Any], value: float | None, sign: str = "") -> str:
    """A value of a measure, in its unit."""
    if value is None:
        return "–"
    if one["kind"] == "rate":
        return f"{100 * value:{sign}.1f} {'pp' if sign else '%'}"
    return f"{value:{sign}.3g}" if abs(value) < 1000 else f"{value:{sign}.0f}"
