"""The checks of the guards as a table: what `metrics.jsonl` holds of them, for a page. Pure."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from training.budget import GROUPS

COLUMNS = (
    "step", "score", "prompt margin, nats a word token", "text tokens/s (held out)",
    "silent (held out)", "repeated", "loss / gradient, %", "found",
)  # fmt: skip


def checks_table(log: Sequence[dict[str, Any]]) -> str:
    """HTML; nothing where no check was made.

    Args:
        log: lines of metrics.jsonl.
    """
    lines = [line for line in log if line["kind"] == "guards"]
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in check_cells(line)) + "</tr>"
        for line in lines
    )
    said = "".join(
        f"<p><b>{html.escape(str(run['clip']))}</b>: {html.escape(run.get('said') or '(nothing)')}"
        for run in (lines[-1].get("free") or {}).get("runs", [])
    )
    heard = (
        f"<h2>Said freely at the last check, step {lines[-1]['step']}</h2>{said}" if said else ""
    )
    return (
        "<h2>Checks of the guards</h2><div style='overflow-x:auto'>"
        f"<table class='checks'><tr>{head}</tr>{rows}</table></div>{heard}"
    )


def check_cells(line: dict[str, Any]) -> list[str]:
    """What `COLUMNS` names of one check; empty where it was not measured."""
    margin = (line.get("margin") or {}).get("words")
    free = line.get("free") or {}
    found, usual, budget = free.get("summary"), free.get("reference"), line.get("budget")
    shares = ""
    if budget:
        shares = ", ".join(
            f"{group} {100 * budget['loss_shares'][group]:.0f} / "
            f"{100 * budget['gradient_shares'][group]:.0f}"
            for group in GROUPS
        )
    warnings = [line["reason"]] if line.get("collapse") and line.get("reason") else []
    warnings += (budget or {}).get("warnings", [])
    return [
        str(line["step"]),
        _number(line.get("score")),
        f"{margin['mean']:+.3f} [{_bound(margin['low'])}, {_bound(margin['high'])}]"
        if margin
        else "",
        _against(found, usual, "tokens_per_s"),
        _against(found, usual, "silent_share"),
        _number((found or {}).get("repeated_share")),
        shares,
        "; ".join(warnings),
    ]


def _against(found: Any, usual: Any, name: str) -> str:
    if not found or found[name] is None:
        return ""
    return f"{found[name]:.2f} ({_number((usual or {}).get(name))})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bound(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"
