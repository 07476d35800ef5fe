"""The commands about public benchmarks: `duplex bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from duplex.cli_options import AsJson

benchmarks = typer.Typer()


@benchmarks.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="Full-Duplex-Bench 1.0, as it is handed out.")],
    url: Annotated[str, typer.Argument(help="A served model's page or chat URL.")],
    out: Annotated[Path, typer.Option(help="Folder to write, or to go on with.")],
    text_prompt: Annotated[str | None, typer.Option(help="Instead of the URL's.")] = None,
    voice_prompt: Annotated[str | None, typer.Option(help="A voice that the server has.")] = None,
    recogniser: Annotated[
        str | None, typer.Option(help="Words from faster-whisper or pocketsphinx, not the model.")
    ] = None,
    recogniser_model: Annotated[
        str | None, typer.Option(help="faster-whisper: a size, a hub name or a folder.")
    ] = None,
    language: Annotated[str, typer.Option(help="Of the recogniser.")] = "en",
    real_time: Annotated[bool, typer.Option("--real-time", help="A frame every 80 ms.")] = False,
    lead_in_s: Annotated[
        float, typer.Option("--lead-in-s", help="Seconds of silence before the user.")
    ] = 0.0,
    token: Annotated[str | None, typer.Option(envvar="DUPLEX_TOKEN")] = None,
    as_json: AsJson = False,
) -> None:
    """Play Full-Duplex-Bench to a server: its files, its columns as published and put right.

    Example: duplex bench fdb-v1 http://127.0.0.1:8998 --out bench-out --lead-in-s 2
    """
    from pipeline import bench as benchmark

    options = benchmark.BenchOptions(
        text_prompt=text_prompt, voice_prompt=voice_prompt, recogniser=recogniser,
        recogniser_model=recogniser_model, language=language, real_time=real_time,
        lead_in_s=lead_in_s, token=token,
    )  # fmt: skip
    benchmark.show(folder, url, out, options, as_json=as_json)
