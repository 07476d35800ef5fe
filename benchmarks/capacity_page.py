"""The page of `benchmarks/capacity.py`. Pure: figures in, Markdown out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.pods.gpus import holds

FAR_OFF = 2.0  # a factor between model and measurement that is pointed at


def page(found: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "# Capacity",
            "",
            "Written by `python -m benchmarks.capacity --write` from `docs/results/*.json`; the "
            "model stands in `benchmarks/capacity.py`. **measured**: timed on "
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores that others used too, "
            "and multiplied. **computed**: from the model's sizes and a data sheet; nobody has "
            "run it.",
            "",
            f"A dialogue is as long as those that were measured, {60 * found['minutes_each']:.0f} "
            f"s, and a clip of {found['frames_each']:.0f} frames. Written by the scripted "
            "writer, spoken by espeak, encoded by the pocket codec. A dialogue of twice the length "
            "takes twice the time of speech, tensors and training.",
            "",
            *_data_stages(found),
            *_bottlenecks(found),
            *_training(found),
            *_check(found),
            *_unknown(found),
        ]
    )


def _data_stages(found: Mapping[str, Any]) -> list[str]:
    head = " | ".join(f"{n:,}" for n in found["scales"])
    rules = " | ".join("---:" for _ in found["scales"])
    lines = [
        "## Data, measured",
        "",
        f"Time on one core, and with {found['workers']} workers (`--runner ray`, "
        "[runners.md](runners.md)) for the stages that are spread: "
        f"{' and '.join(found['spread'])}. Storage of finished stages.",
        "",
        f"| stage | ms a dialogue | {head} | storage, {head} | from |",
        f"| --- | ---: | {rules} | {rules} | --- |",
    ]
    for cost in found["stages"]:
        times = [_time(cost.seconds(n)) for n in found["scales"]]
        if cost.stage in found["spread"]:
            times = [
                f"{one} ({_time(cost.seconds(n, found['workers']))})"
                for one, n in zip(times, found["scales"], strict=True)
            ]
        sizes = [_size(cost.gigabytes(n)) for n in found["scales"]]
        cells = [cost.stage, f"{1000 * cost.each_s:.1f}", *times, *sizes, cost.source]
        lines.append(f"| {' | '.join(cells)} |")
    totals = [_size(sum(c.gigabytes(n) for c in found["stages"])) for n in found["scales"]]
    blank = ["", *("" for _ in found["scales"])]
    lines += [f"| all | {' | '.join([*blank, *totals, ''])} |", ""]
    lines += [
        "`personas` and `voices` grow with personas, not with dialogues. `ledgers` is what the "
        "driver does for a record of dialogues, speech and tensors, fsync included, whoever makes "
        "it. Near-duplicates are looked for in `dialogues`.",
        "",
    ]
    return lines


def _bottlenecks(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Bottlenecks", ""]
    for n in found["scales"]:
        alone = max(found["stages"], key=lambda cost: cost.seconds(n))
        many = max(found["stages"], key=lambda cost: cost.seconds(n, found["workers"]))
        total = sum(cost.seconds(n) for cost in found["stages"])
        spread = sum(cost.seconds(n, found["workers"]) for cost in found["stages"])
        quickest = min(row["hours"][found["scales"].index(n)] for row in found["gpus"])
        train = 3600 * quickest
        lines.append(
            f"- **{n:,}**: data {_time(total)} on one core, most of it {alone.stage} "
            f"({_time(alone.seconds(n))}); {_time(spread)} with {found['workers']} workers, most "
            f"of it {many.stage} ({_time(many.seconds(n, found['workers']))}). Training on the "
            f"quickest GPU of the list {_time(train)} (computed): the bottleneck is "
            f"{'training' if train > spread else many.stage}."
        )
    return [*lines, ""]


def _training(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Training a 7B model, computed",
        "",
        f"LoRA in bfloat16, {found['passes']} passes. Speed: moshi-finetune's published one on an "
        "H100, by the peaks of the chips (`data/gpu_speed.yaml`); our own forward has not been "
        "timed on them. Memory: all layers checkpointed, one clip at a time. Prices from "
        "`data/gpus.yaml`; the disk's price is not in it.",
        "",
        "| GPU | USD/h, as of | memory needed | "
        + " | ".join(f"{n:,}" for n in found["scales"])
        + " |",
        "| --- | ---: | ---: | " + " | ".join("---:" for _ in found["scales"]) + " |",
    ]
    for row in found["gpus"]:
        fits = "" if holds(row["memory_gb"], row["need_gb"]) else ": does not fit"
        cells = [
            row["name"],
            f"{row['usd_per_hour']:.2f}, {row['as_of'] or 'undated'}",
            f"{row['need_gb']:.1f} of {row['memory_gb']} GB{fits}",
            *(
                f"{_time(3600 * hours)}, {usd:,.2f} USD"
                for hours, usd in zip(row["hours"], row["usd"], strict=True)
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Memory is `training/estimate.py`'s, without CUDA's context. A merge at 7B size, with "
        f"random weights on this CPU: {found['merge_s']:.0f} s, {found['merge_gb']:.1f} GB "
        "written (measured, merge.json). Serving and evaluating do not grow with dialogues.",
        "",
    ]


def _check(found: Mapping[str, Any]) -> list[str]:
    demo = found["demo_set"]
    lines = [
        "## The model against the demo",
        "",
        f"`make demo`, {demo['dialogues']} dialogues, {demo['minutes']:g} minutes "
        "([results.md](results.md)): measured on another day, and no input of the model.",
        "",
        "| stage | model, s | demo, s | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in found["demo"]:
        far = not 1 / FAR_OFF <= row["ratio"] <= FAR_OFF
        mark = f" (off by more than {FAR_OFF:g})" if far else ""
        lines.append(
            f"| {row['stage']} | {row['model_s']:.1f} | {row['demo_s']:.1f} "
            f"| {row['ratio']:.2f}{mark} |"
        )
    return [*lines, ""]


def _unknown(found: Mapping[str, Any]) -> list[str]:
    return [
        "## Not in it",
        "",
        "- Dialogues by a language model: `duplex doctor CONFIG` prints tokens and, with your "
        "provider's prices, dollars. Neural voices, and Kyutai's codec at full size, have not been "
        "timed here; both are slower than what stands above.",
        "- A store of objects or a network file system: each blob is written, and read once by the "
        "next stage.",
        f"- Memory of the driver: it holds all lines of a stage's records at its end, which are "
        f"{_size(found['line_bytes'] * found['scales'][-1] / 1e9)} for {found['scales'][-1]:,} "
        "dialogues (measured on the small run, multiplied), and some more for what is around them.",
        "",
    ]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"


def _size(gigabytes: float) -> str:
    if gigabytes < 1:
        return f"{1000 * gigabytes:.1f} MB"
    return f"{gigabytes:,.1f} GB" if gigabytes < 1000 else f"{gigabytes / 1000:,.1f} TB"
