"""Full-Duplex-Bench's rows as a terminal table and as Markdown, the protocol beside each number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from duplex.frames import FRAME_S

LOCK_STEP, REAL_TIME = "lock-step", "real time"
PUBLISHED_DATASETS = {  # columns of the published table -> dataset, column
    "pause_synthetic": ("synthetic_pause_handling", "tor"),
    "pause_candor": ("candor_pause_handling", "tor"),
    "backchannel_tor": ("icc_backchannel", "tor"),
    "backchannel_frequency": ("icc_backchannel", "frequency"),
    "backchannel_jsd": ("icc_backchannel", "jsd"),
    "turn_tor": ("candor_turn_taking", "tor"),
    "turn_latency": ("candor_turn_taking", "latency_s"),
    "interruption_tor": ("synthetic_user_interruption", "tor"),
    "interruption_latency": ("synthetic_user_interruption", "latency_s"),
}
# In that order. Sources: the PersonaPlex paper and its repository, a rerun by others, and the
# benchmark's own table (github.com/DanielLin94144/Full-Duplex-Bench).
PUBLISHED_ROWS: dict[str, tuple[float, ...]] = {
    "PersonaPlex, paper": (0.584, 0.662, 0.327, 0.025, 0.649, 0.992, 0.070, 1.0, 0.400),
    "PersonaPlex, released": (0.358, 0.431, 0.273, 0.042, 0.662, 0.908, 0.170, 0.950, 0.240),
    "PersonaPlex, rerun": (0.482, 0.444, 0.182, 0.046, 0.841, 0.958, 0.219, 0.940, 0.271),
    "Moshi, benchmark's own": (0.985, 0.980, 1.0, 0.001, 0.957, 0.941, 0.265, 1.0, 0.257),
}
OTHERS = "other protocols: recognised words, prompt, voice and lead-in not stated; no baseline"
BETTER = {"low": "↓", "high": "↑"}


def elsewhere(dataset: str, key: str) -> dict[str, float]:
    """What others published for this column of this dataset."""
    places = list(PUBLISHED_DATASETS.values())
    if (dataset, key) not in places:
        return {}
    place = places.index((dataset, key))
    return {source: values[place] for source, values in PUBLISHED_ROWS.items()}


def short_protocol(protocol: dict[str, Any], fingerprint: str) -> str:
    """One line: what a number hangs on. The whole prompt stands in the protocol itself."""
    prompt = protocol["text_prompt"]
    sampling = protocol["sampling"]
    return "; ".join(
        (
            fingerprint[:8],
            f"prompt {prompt[:24] + '…' if len(prompt) > 25 else prompt!r}" if prompt else "bare",
            f"voice {protocol['voice_prompt'] or 'none'}",
            f"lead-in {protocol['lead_in_s']:g} s",
            f"text {sampling['text_temperature']:g}/{sampling['text_topk']}, "
            f"audio {sampling['audio_temperature']:g}/{sampling['audio_topk']}, "
            f"seed {protocol['seed']}",
            protocol["pace"],
            protocol["words"],
        )
    )


def rows_for_print(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells: dataset, column, as published, corrected, elsewhere, protocol."""
    short = short_protocol(result["protocol"], result["fingerprint"])
    return [
        (
            row["dataset"],
            f"{row['label']} {BETTER[row['better']]}",
            _cell(row["published"], row),
            _cell(row["corrected"], row),
            "; ".join(f"{source} {value:g}" for source, value in row["elsewhere"].items()),
            short,
        )
        for row in result["rows"]
    ]


HEADS = ("dataset", "column", "as published", "corrected", "elsewhere (other protocols)")


def table_of(result: dict[str, Any]) -> Table:
    table = Table(box=None, title="Full-Duplex-Bench 1.0", title_justify="left")
    for name in (*HEADS, "protocol"):
        table.add_column(name, overflow="fold")
    for row in rows_for_print(result):
        table.add_row(*map(escape, row))
    return table


def markdown_of(result: dict[str, Any]) -> str:
    lines = ["# Full-Duplex-Bench 1.0", "", f"Server: {_plain(result['server'])}", ""]
    lines += _lines((*HEADS, "protocol"), rows_for_print(result))
    lines += ["", f"Elsewhere: {OTHERS}.", "", "## Protocol", ""]
    protocol = {"fingerprint": result["fingerprint"], **result["protocol"]}
    lines += _lines(("key", "value"), [(key, str(value)) for key, value in protocol.items()])
    if notes := notes_of(result):
        lines += ["", "## What is missing", "", *(f"- {_plain(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def notes_of(result: dict[str, Any]) -> list[str]:
    """What was left out, what is missing, prompts that nothing proves, samples that were played
    faster than the server answers; equal ones once."""
    notes: dict[str, list[str]] = {}
    for name, why in result["left_out"]:
        notes.setdefault(f"left out: {why}", []).append(name)
    for sample in result["samples"]:
        for what in sample["missing"]:
            notes.setdefault(what, []).append(sample["name"])
        if not sample["prompt_proven"]:
            notes.setdefault(f"prompt not proven: {sample['prompt_note']}", []).append(
                sample["name"]
            )
        if result["protocol"]["pace"] == REAL_TIME and sample["frame_ms"] > 1000 * FRAME_S:
            late = "the server is slower than real time: a frame takes over 80 ms"
            notes.setdefault(late, []).append(sample["name"])
    return [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if names[5:] else "")
        for what, names in notes.items()
    ]


def _cell(pooled: dict[str, Any], row: dict[str, Any]) -> str:
    if pooled["value"] is None:
        return "none, n = 0"
    bounds = "" if pooled["low"] is None else f" [{pooled['low']:.3f}, {pooled['high']:.3f}]"
    spread = ""
    if row["key"] == "latency_s":
        spread = f", p50 {pooled['p50']:.2f}, p95 {pooled['p95']:.2f}"
    unit = f" {row['unit']}" if row["kind"] == "mean" and row["unit"] else ""
    return f"{pooled['value']:.3f}{bounds}{unit}{spread}, n = {pooled['n']}"


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(map(_plain, cells)) + " |"
        for cells in (heads, ["---"] * len(heads), *rows)
    ]


def _plain(text: str) -> str:
    """Text of others (names, prompts) on one line of a table, without marks."""
    flat = " ".join(str(text).split())
    return flat.translate(str.maketrans({c: f"\\{c}" for c in "|<>[]`*_\\"}))
