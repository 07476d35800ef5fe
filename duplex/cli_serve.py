"""The commands about served models: `duplex serve` and `duplex probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duplex.cli_options import RUNS, AsJson, Overrides, RunsRoot

serving = typer.Typer()


@serving.command()
def serve(
    target: Annotated[str, typer.Argument(metavar="CONFIG|CHECKPOINT")],
    host: Annotated[str | None, typer.Option(help="127.0.0.1 unless the config differs.")] = None,
    port: Annotated[int | None, typer.Option(help="8998 unless the config differs.")] = None,
    slots: Annotated[
        int | None, typer.Option(help="Conversations at a time; 4 unless the config differs.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="DUPLEX_TOKEN", help="Needed off loopback.")
    ] = None,
    ssl: Annotated[
        Path | None, typer.Option(help="https, by cert.pem and key.pem in this folder.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Serve the base model instead.")] = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Serve the base with this adapter, unmerged.")
    ] = None,
    voices: Annotated[
        Path | None,
        typer.Option(help="Folder of WAV files or PersonaPlex .pt voices; names are voice_prompt."),
    ] = None,
    roll: Annotated[
        bool, typer.Option("--roll", help="Go on behind the context's end; the prompt drops out.")
    ] = False,
    grades: Annotated[
        Path | None, typer.Option(help="File for people's grades; the run folder's for a config.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="RECOGNISER[:MODEL]",
            help="Show what users say and warn of echoes: faster-whisper:small, pocketsphinx.",
        ),
    ] = None,
    friend: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A server whose page may talk to this one too."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="duplex, or moshi: python -m moshi.server, without prompts.")
    ] = "duplex",
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
) -> None:
    """Serve the merged model of a config, any checkpoint folder, pocket, or a hub's owner/name.

    Example: duplex serve configs/pocket.yaml
    """
    from pipeline import serve_command

    options = serve_command.ServeOptions(
        host=host, port=port, token=token, base=base, adapter=adapter, voices=voices, slots=slots,
        roll=roll, ssl=ssl, grades=grades, engine=engine,
        friends=tuple(friend or ()), listen=listen,
    )  # fmt: skip
    serve_command.serve(target, options, runs, overrides or [])


@serving.command()
def probe(
    url: Annotated[str, typer.Argument(help="A page or chat URL with its text_prompt.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Take the tokenizer from here, not from the server.")
    ] = None,
    token: Annotated[str | None, typer.Option(envvar="DUPLEX_TOKEN")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait.")] = 60,
    as_json: AsJson = False,
) -> None:
    """Prove that a server fed the prompt in the URL to its model.

    Example: duplex probe 'http://127.0.0.1:8998/?text_prompt=You%20are%20Marcus.'
    """
    from pipeline import commands

    commands.probe(url, checkpoint, token, timeout_s, as_json=as_json)
