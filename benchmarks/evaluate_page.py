"""docs/results/evaluate.md, of what `benchmarks.evaluate` measured."""

from __future__ import annotations

from statistics import median
from typing import Any


def describe(result: dict[str, Any]) -> str:
    parts = [
        ["# Evaluation: what it costs, and how often it is wrong", ""],
        [f"`python -m benchmarks.evaluate --write`: {result['model']}, {result['machine']}.", ""],
        _speed(result["speed"]),
        _false(result["false"]),
        _power(result["power"]),
        _page(result["page"]),
    ]
    return "\n".join(line for part in parts for line in part)


def _speed(speed: dict[str, Any]) -> list[str]:
    rounds = speed["rounds"]
    info, first = rounds[0]["info"], rounds[0]
    alone, together = (speed["ratios"][way] for way in ("alone", "together"))
    cpu = speed["cpu_ratios"]
    lines = [
        "## Speed",
        "",
        f"{speed['conversations']} different conversations of {speed['seconds']:g} s, greedy: all "
        f"in batches ({info['processes']} processes of {info['slots']} slots; loading the model "
        "and the first one's repeat are counted), and over WebSockets in lock-step, one process, "
        f"its start not counted: {first['alone']['held']} of them one at a time, and "
        f"{first['together']['held']} of them {info['slots']} at a time. One after the other in "
        "each round, other ones in each, those that say most first.",
        "",
        "| round | load before | batch, conversations a minute | sockets, one at a time | batch is "
        "| sockets, many at once | batch is |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for number, one in enumerate(rounds):
        lines.append(
            f"| {number + 1} | {one['load_before']} | {one['batch']['a_minute']:.1f} "
            f"| {one['alone']['a_minute']:.1f} | {alone[number]:.1f} times as fast "
            f"| {one['together']['a_minute']:.1f} | {together[number]:.1f} times |"
        )
    lines += [
        "",
        f"**Batch over sockets**: {median(alone):.1f} times as fast as one at a time (median of "
        f"{len(alone)} rounds), {median(together):.1f} times as fast as many at once.",
        "",
        "In CPU time, which others on the machine do not take away: "
        f"{median(one['batch']['cpu_s_each'] for one in rounds):.2f} s a conversation in batches, "
        f"{median(one['alone']['cpu_s_each'] for one in rounds):.2f} s one at a time, "
        f"{median(one['together']['cpu_s_each'] for one in rounds):.2f} s many at once: "
        f"{median(cpu['alone']):.1f} and {median(cpu['together']):.1f} times as much as in "
        "batches. The batch has a process on each core besides.",
        "",
    ]
    for way, name in (("alone", "one at a time"), ("together", "many at once")):
        equal = speed["equal"][way]
        lines.append(
            f"Of {equal['held']} held {name} and in batches ({equal['with_words']} with words) "
            f"{equal['texts']} have the same transcript, words at the same frames, and "
            f"{equal['audio']} the same audio to the bit; samples differ by at most "
            f"{equal['steps']} of 32 768 steps."
        )
        lines.append("")
    said = ", ".join("yes" if one["repeats"] else "no" for one in rounds)
    lines += [
        f"{first['words']:.1f} words a conversation. The first repeats to the bit: {said}.",
        "",
    ]
    return lines


def _false(false: dict[str, Any]) -> list[str]:
    dealt = false["dealt"]
    lines = [
        "## Equal models",
        "",
        f"The same checkpoint against itself with another seed, {false['pairs']} pairs of seeds "
        f"none of which is used twice, {false['items']} items of 20 s, configs/pocket.yaml's "
        f"sampling; {false['words']:.1f} words a conversation. A cell is a measure in a pair, "
        "where it has a p.",
        "",
        f"**False verdicts**: before correction {_cells(false)}; after Holm's "
        f"{false['after_holm']}. Of the cells with the six items that a p of .05 takes at least: "
        f"{_cells(false['able'])}. In {false['unlike']} cells the two differ at all. Where few "
        "items differ few p are possible: a share under 5 % is to be expected. Cells of one "
        "pair hang together, so the bounds are rough.",
        "",
        f"**Dealt anew**: {_cells(dealt)}; after Holm's {dealt['after_holm']} in {dealt['pairs']} "
        "pairs. These are the same conversations with each item's seeds shuffled by themselves. "
        "Each item draws by a seed of its own, so the two columns should agree. (While all items "
        "drew by the same one, frame by frame, they were not independent as the test takes them to "
        "be: 5 of 20 cells of the turns answered had p ≤ .05, and 2 of 100 dealt anew.)",
        "",
        "| measure | cells | p ≤ .05 | after Holm | items that count, median | dealt anew |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, row in sorted(false["measures"].items(), key=lambda item: (-item[1]["hits"], item[0])):
        lines.append(
            f"| {key} | {row['cells']} | {row['hits']} | {row['after_holm']} "
            f"| {row['median_items']:g} | {row['dealt']['hits']} of {row['dealt']['cells']} |"
        )
    return [*lines, ""]


def _cells(row: dict[str, Any]) -> str:
    return (
        f"{row['hits']} of {row['cells']}, {100 * row['share']:.1f} % "
        f"({100 * row['low']:.1f} to {100 * row['high']:.1f} %)"
    )


def _power(power: dict[str, Any]) -> list[str]:
    one, four = power["by_trials"]["1"], power["by_trials"]["4"]
    lines = [
        "## How many items find a difference",
        "",
        "Made-up rates, .35 for one model and .65 for the other: the share of "
        f"{power['draws']} evaluations with a verdict, for the measure alone, and beside "
        f"{power['measures'] - 1} that do not differ (Holm's correction then takes p ≤ .05 / "
        f"{power['measures']}). An item counts once, as a greeting does, or four times, as turns.",
        "",
        "| items | once, alone | once, among all | four times, alone | four times, among all |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for number in sorted(one, key=int):
        cells = (one[number]["alone"], one[number]["among"],
                 four[number]["alone"], four[number]["among"])  # fmt: skip
        lines.append(f"| {number} | " + " | ".join(f"{100 * cell:.0f} %" for cell in cells) + " |")
    return [*lines, ""]


def _page(page: dict[str, Any]) -> list[str]:
    return [
        "## The page",
        "",
        f"report.html of {page['conversations']} conversations of {page['seconds']:g} s: "
        f"**{page['bytes'] / 1e6:.1f} MB**, made in {page['made_s']:g} s. Drawings take "
        f"{page['drawing_bytes'] / 1e6:.1f} MB; {page['players']} conversations, those with the "
        f"most faults first, have a player ({page['audio_bytes'] / 1e6:.1f} MB), the others their "
        "WAV file beside the page.",
        "",
    ]
