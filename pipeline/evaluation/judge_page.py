"""judge.json as a page. All that a model wrote is escaped."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.report import TEMPLATES, environment


def page(found: dict[str, Any]) -> str:
    """HTML in the report's style. `found`: the content of judge.json."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment().get_template("judge.html.j2").render(style=style, judge=found)
