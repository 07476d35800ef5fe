"""judge.json as a section of HTML, and as a page of its own. All that a model wrote is escaped."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.evaluation.report import TEMPLATES, show


def section(found: dict[str, Any]) -> Markup:
    """A `<section>` for a page with the report's style. `found`: the content of judge.json."""
    return Markup(_environment().get_template("judge_section.html.j2").render(judge=found))


def page(found: dict[str, Any]) -> str:
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    template = _environment().get_template("judge.html.j2")
    return template.render(style=style, models=found["models"], section=section(found))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["show"] = show
    return environment
