"""The `duplex` command: parses and dispatches, nothing else.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong. What a command needs is
imported inside it, so that `--help` and a run with nothing to do stay quick.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from duplex import (
    __version__,
    cli_bench,
    cli_data,
    cli_evaluate,
    cli_judge,
    cli_pod,
    cli_serve,
    cli_train,
)
from duplex.cli_options import RUNS, AsJson, Overrides, RunsRoot
from duplex.config import Config
from duplex.configfile import load_config
from duplex.errors import EXIT_WORK_FAILED, DuplexError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fine-tune full-duplex speech models to personas, and prove that it worked.\n\n"
    "Start with: duplex run configs/pocket.yaml",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.")]


@app.command()
def run(
    config: ConfigPath,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage to run.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last stage to run.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Run this stage by itself.")] = None,
    skip: Annotated[str, typer.Option("--skip", help="Stages to leave out, as in a,b.")] = "",
    runner: Annotated[str, typer.Option("--runner", help="local.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Processes for stages that can use several.")
    ] = None,
    retry_rejected: Annotated[bool, typer.Option(help="Try rejected records again.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline, or go on where it stopped.

    Example: duplex run configs/pocket.yaml --from tensors --set train.steps=20
    """
    from pipeline import commands

    overrides = [*(overrides or []), *_worker_overrides(workers)]
    settings = _load(config, overrides)
    commands.run(
        settings, config, runs, overrides, first=first, last=last, only=only, skip=skip,
        runner=runner, retry_rejected=retry_rejected, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip


@app.command()
def status(
    config: ConfigPath, runs: RunsRoot = RUNS, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Show where each stage stands: done, stale, running, failed or missing.

    Example: duplex status configs/pocket.yaml
    """
    from pipeline import commands

    commands.status(_load(config, overrides), runs, as_json=as_json)


@app.command()
def doctor(
    config: ConfigPath, runs: RunsRoot = RUNS, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Check machine, packages, data, secrets and disk for a config; estimate what it takes.

    Example: duplex doctor configs/coffee.yaml
    """
    from pipeline import commands

    commands.doctor(_load(config, overrides), runs, as_json=as_json)


@app.command(name="import")
def import_(
    config: ConfigPath,
    path: Annotated[Path | None, typer.Argument(metavar="PATH", help="What to bring in.")] = None,
    stage: Annotated[str, typer.Option("--stage", help="dialogues, speech or tensors.")] = "",
    forget: Annotated[bool, typer.Option("--forget", help="Undo: let the stage work.")] = False,
    persona: Annotated[str | None, typer.Option(help="speech: whose recordings these are.")] = None,
    prompt: Annotated[str | None, typer.Option(help="speech: their system prompt.")] = None,
    recogniser: Annotated[
        str | None, typer.Option(help="speech without transcripts: faster-whisper, pocketsphinx.")
    ] = None,
    recogniser_model: Annotated[
        str | None, typer.Option(help="faster-whisper: a size, a hub name or a folder.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of the recordings; en if not given.")
    ] = None,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Use existing dialogues, recordings or tensors as a stage's output.

    Example: duplex import configs/pocket.yaml --stage dialogues training.json
    """
    from pipeline import commands

    recording = {
        "persona": persona, "prompt": prompt, "recogniser": recogniser,
        "recogniser_model": recogniser_model, "language": language,
    }  # fmt: skip
    commands.import_(
        _load(config, overrides), runs, stage, path,
        forget=forget, recording=recording, as_json=as_json,
    )  # fmt: skip


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="pocket, a checkpoint folder, or a hub name.")],
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_model.safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be empty or not exist.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    dep_q: Annotated[
        int | None, typer.Option("--dep-q", help="8: cut a base with 16 depth steps, to serve it.")
    ] = None,
    runs: RunsRoot = RUNS,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into a base checkpoint by itself, with its certificate.

    Example: duplex merge pocket runs/pocket/06-train-1a2b3c4d/adapter merged/
    """
    from pipeline import checkpoints

    checkpoints.merge(base, adapter, out, dtype, dep_q, runs, as_json=as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE.pt|DIR", help="A tensor, or many.")],
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder whose codec and tokenizer to hold it to.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="SentencePiece model, to read text.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw one file's timeline: OUT.png.")] = None,
    audio: Annotated[bool, typer.Option(help="Measure loudness where a recording is.")] = True,
    as_json: AsJson = False,
) -> None:
    """Show what a tensor holds, phase by phase; exit 1 when it would harm training.

    Example: duplex inspect runs/pocket/05-tensors-1a2b3c4d
    """
    from pipeline import inspector

    inspector.show(
        path, model=model, tokenizer=tokenizer, picture=picture, audio=audio, as_json=as_json
    )


@app.command()
def clean(
    config: ConfigPath,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove stage folders that the config no longer needs, largest first.

    Example: duplex clean configs/pocket.yaml --dry-run
    """
    from pipeline import commands

    commands.clean(_load(config, overrides), runs, dry_run=dry_run, yes=yes, as_json=as_json)


convert = typer.Typer(no_args_is_help=True, help="Other programs' forms of data and models.")
app.add_typer(convert, name="convert")
convert.command(name="checkpoint")(cli_data.convert_checkpoint)
Source = Annotated[Path, typer.Argument(metavar="CONFIG|FOLDER", help="A config or stage folder.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write: new or empty.")]
SkipRefused = Annotated[
    bool, typer.Option("--skip-refused", help="Write the others when some cannot be converted.")
]


@convert.command(name="tensors")
def convert_tensors(
    source: Annotated[Path, typer.Argument(metavar="IN", help=".pt, folder, stage or config.")],
    out: Out,
    form: Annotated[str, typer.Option("--to", help="workbench or coffee.")],
    model: Annotated[
        str | None, typer.Option(help="pocket, a checkpoint folder or a hub name: its tokenizer.")
    ] = None,
    dialogues: Annotated[
        Path | None, typer.Option(help="training.json, to say what text the files lost.")
    ] = None,
    prompt_fill: Annotated[
        str, typer.Option(help="To coffee: pad or zero (-1) beside the prompt's text.")
    ] = "pad",
    skip_refused: SkipRefused = False,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Turn the predecessor's .pt files into the current contract, or back.

    Example: duplex convert tensors pt_files/ converted/ --to workbench --model pocket
    """
    from pipeline import convert as conversions

    conversions.tensors(
        source, out, form, model, dialogues, prompt_fill,
        skip_refused=skip_refused, runs=runs, overrides=overrides, as_json=as_json,
    )  # fmt: skip


@convert.command(name="moshi-finetune")
def convert_moshi_finetune(
    source: Source,
    out: Out,
    skip_refused: SkipRefused = False,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the speech of a run as a data set of moshi-finetune.

    Example: duplex convert moshi-finetune configs/pocket.yaml moshi-set/
    """
    from pipeline import convert as conversions

    conversions.moshi_finetune(
        source, out, skip_refused=skip_refused, runs=runs, overrides=overrides, as_json=as_json
    )


@convert.command(name="datasets")
def convert_datasets(
    source: Source,
    out: Out,
    runs: RunsRoot = RUNS,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write tensors and speech as a folder for Hugging Face `datasets`.

    Example: duplex convert datasets configs/pocket.yaml dataset/
    """
    from pipeline import convert as conversions

    conversions.datasets(source, out, runs=runs, overrides=overrides, as_json=as_json)


convert.command(name="adapter")(cli_data.convert_adapter)
convert.command(name="failures")(cli_data.convert_failures)
app.add_typer(cli_data.personas, name="personas")
app.add_typer(cli_data.hub)  # push and pull
app.add_typer(cli_train.training)  # compare
app.add_typer(cli_evaluate.evaluation)
app.add_typer(cli_judge.judging)  # judge
app.add_typer(cli_serve.serving)  # serve and probe
app.add_typer(cli_bench.benchmarks)  # bench
app.add_typer(cli_pod.pod, name="pod")


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def _worker_overrides(workers: int | None) -> list[str]:
    stages = ("speech", "tensors")
    return [] if workers is None else [f"{stage}.runtime.workers={workers}" for stage in stages]


def _load(path: Path, overrides: list[str] | None) -> Config:
    return load_config(path, overrides)


def main() -> None:
    """Entry point of the `duplex` script."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    try:
        app()
    except DuplexError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        from pipeline.runners.local import describe_os_error

        print(describe_os_error(error), file=sys.stderr)
        sys.exit(EXIT_WORK_FAILED)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
