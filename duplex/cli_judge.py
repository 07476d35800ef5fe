"""The command about what other models think: `duplex judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duplex.cli_options import AsJson

judging = typer.Typer()


@judging.command()
def judge(
    folder: Annotated[
        Path, typer.Argument(metavar="REPORT_FOLDER", help="With the report.json of `evaluate`.")
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Its dialogues section names model, URL, key and prices."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the model is served, as in …/v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Its name there.")] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="NAME", help="The variable that holds the key: OPENAI_API_KEY."
        ),
    ] = None,
    price_in: Annotated[
        float | None, typer.Option("--price-in", min=0, help="Dollars per million tokens.")
    ] = None,
    price_out: Annotated[
        float | None, typer.Option("--price-out", min=0, help="Dollars per million tokens.")
    ] = None,
    budget_usd: Annotated[
        float | None, typer.Option("--budget-usd", min=0, help="Hard stop; needs the prices.")
    ] = None,
    rubric: Annotated[
        Path | None, typer.Option("--rubric", help="data/judge/rubric.yaml if not given.")
    ] = None,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="Ask which of two models was better, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Have a language model score an evaluation's conversations by a rubric, with quotes.

    What was answered is kept in REPORT_FOLDER/judge: a second call costs nothing.

    Example: duplex judge evaluation --endpoint http://127.0.0.1:11434/v1 --model gpt-oss:20b
    """
    from pipeline import judge_command

    options = judge_command.JudgeOptions(
        config=config, endpoint=endpoint, model=model, api_key_env=api_key_env,
        price_in=price_in, price_out=price_out, budget_usd=budget_usd, rubric=rubric,
        pairwise=pairwise,
    )  # fmt: skip
    judge_command.run(folder, options, as_json=as_json)
