"""Commands that deal in files: `duplex personas`, `push|pull`, some of `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duplex.cli_options import RUNS, AsJson, Overrides, RunsRoot

PersonaId = Annotated[str, typer.Argument(metavar="ID", help="As in angry-marcus.")]
Kind = Annotated[str, typer.Option("--type", help="One of the domain's types.")]
DomainFile = Annotated[
    str | None, typer.Option("--domain", help="The domain's file; the coffee shop's if not given.")
]
Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where to write; the domain's own if not given.")
]

personas = typer.Typer(no_args_is_help=True, help="Write, draft and review persona files.")


@personas.command(name="new")
def personas_new(
    persona_id: PersonaId, kind: Kind, domain: DomainFile = None, folder: Folder = None
) -> None:
    """Write a skeleton with comments, for a person to fill in.

    Example: duplex personas new angry-ruth --type angry
    """
    from pipeline import personas_command

    personas_command.new(persona_id, kind, domain, folder)


@personas.command(name="check")
def personas_check(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER|FILE]...", help="data/personas if not given."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Its file; the one the files name if not given.")
    ] = None,
    scenarios: Annotated[
        Path | None,
        typer.Option("--scenarios", help="Their folder; the one beside if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Review personas and scenarios; exit 1 on a fault, warnings are for a person to judge.

    Example: duplex personas check data/vet-reception/personas
    """
    from pipeline import personas_command

    personas_command.check(paths or [], domain, scenarios, as_json=as_json)


@personas.command(name="draft")
def personas_draft(
    persona_id: PersonaId,
    about: Annotated[str, typer.Option("--about", help="Who it should be, in a few words.")],
    kind: Kind,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Its dialogues section names the model, URL and key."),
    ] = None,
    domain: DomainFile = None,
    folder: Folder = None,
    runs: Annotated[
        Path, typer.Option("--runs", help="The config's run there has the budget and the log.")
    ] = Path("runs"),
    again: Annotated[
        bool, typer.Option("--again", help="Pay for another reply to the same words.")
    ] = False,
) -> None:
    """Have a language model write ID.draft.yaml, which no run takes before you rename it.

    Example: duplex personas draft angry-ruth --type angry --about "a tax clerk, twice overcharged"
    """
    from pipeline import personas_command

    personas_command.draft(persona_id, about, kind, config, domain, folder, runs=runs, again=again)


def convert_adapter(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An adapter folder, either form.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new or empty.")],
    form: Annotated[str, typer.Option("--to", help="moshi or peft.")],
    base: Annotated[
        str | None,
        typer.Option(help="pocket, a checkpoint folder or a hub name: what it was trained on."),
    ] = None,
    runs: RunsRoot = RUNS,
    as_json: AsJson = False,
) -> None:
    """Turn an adapter into moshi's own LoRA format, or back; the round trip keeps every bit.

    Example: duplex convert adapter my-adapter/ moshi-adapter/ --to moshi --base pocket
    """
    from pipeline import convert as conversions

    conversions.adapter(source, out, form, base, runs=runs, as_json=as_json)


def convert_failures(
    source: Annotated[
        Path, typer.Argument(metavar="FAILURES", help="failures.jsonl, `better` filled in.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: new.jsonl.")],
    persona_folders: Annotated[
        list[Path] | None,
        typer.Option("--personas", help="Folder of persona files: names, pauses; repeatable."),
    ] = None,
    skip_refused: Annotated[
        bool, typer.Option("--skip-refused", help="Write the others when some are refused.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a report's failures that you have mended into dialogues to train on.

    Example: duplex convert failures evaluation/failures.jsonl mended.jsonl
    """
    from pipeline import convert as conversions

    conversions.failures(
        source, out, persona_folders or [], skip_refused=skip_refused, as_json=as_json
    )


hub = typer.Typer()


def convert_checkpoint(
    base: Annotated[str, typer.Argument(help="A checkpoint folder or hub name with dep_q 16.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    dep_q: Annotated[int, typer.Option("--dep-q", help="8, the agent's codebooks.")] = 8,
    runs: RunsRoot = RUNS,
    as_json: AsJson = False,
) -> None:
    """Cut PersonaPlex's sixteen depth steps to the agent's eight, as servers and moshi take them.

    Example: duplex convert checkpoint nvidia/personaplex-7b-v1 personaplex-dep8/
    """
    from pipeline import checkpoints

    checkpoints.cut(base, out, dep_q, runs, as_json=as_json)


@hub.command()
def push(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository.")],
    what: Annotated[str, typer.Option("--what", help="data or adapter.")] = "data",
    public: Annotated[bool, typer.Option("--public", help="For everybody to read.")] = False,
    view: Annotated[
        bool, typer.Option(help="data: also as parquet files for `datasets`; doubles the audio.")
    ] = True,
    consent: Annotated[
        str | None,
        typer.Option(help="On what terms recorded voices are given; quoted in the card."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, sizes and card; send nothing.")
    ] = False,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Push a run's data or adapter to the Hugging Face hub: private unless told otherwise.

    Say it again after a failure: what is there is not sent again. The token is HF_TOKEN.

    Example: duplex push configs/pocket.yaml --to you/pocket-data --dry-run
    """
    from pipeline import hub as hub_commands

    hub_commands.push(
        config, to, what, public=public, view=view, consent=consent, dry_run=dry_run,
        runs=runs, overrides=overrides or [], as_json=as_json,
    )  # fmt: skip


@hub.command()
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository.")],
    target: Annotated[
        Path, typer.Argument(metavar="CONFIG|OUT", help="Whose run, or a new folder: an adapter.")
    ],
    what: Annotated[
        str | None, typer.Option("--what", help="data or adapter; data for a config.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A commit, branch or tag.")] = None,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Pull a pushed data set into a config's run, or an adapter into a folder, and verify it.

    Example: duplex pull you/pocket-data configs/pocket.yaml
    """
    from pipeline import hub as hub_commands

    hub_commands.pull(
        repo, target, what,
        revision=revision, runs=runs, overrides=overrides or [], as_json=as_json,
    )  # fmt: skip
