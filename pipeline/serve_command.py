"""`duplex serve`: which files to serve, and the server that replaces this process."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duplex.characters import Persona
from duplex.config import Config, ModelSection
from duplex.configfile import load_config
from duplex.errors import MissingInputError, RequestError, ServerError
from pipeline.run import plan, run_folder_of
from pipeline.serving import placeholder

GRADES, LINKS = "grades.jsonl", "links.jsonl"
MAX_PORT = 65_535
ANY_HOST = ("0.0.0.0", "::")
MAX_ARGUMENT_BYTES = 100_000  # Linux takes 128 KiB


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; None: as the config, or the default."""

    host: str | None = None
    port: int | None = None
    token: str | None = None
    base: bool = False
    adapter: Path | None = None
    voices: Path | None = None
    slots: int | None = None
    roll: bool = False
    ssl: Path | None = None
    grades: Path | None = None
    engine: str = "duplex"
    friends: tuple[str, ...] = ()
    listen: str | None = None


@dataclass(frozen=True)
class Served:
    """What is to be served. label: in a word, for the page; adapter: unmerged, over `folder`."""

    folder: Path
    label: str
    adapter: Path | None = None


def serve(target: str, options: ServeOptions, runs: Path, overrides: Sequence[str]) -> None:
    """Serve until interrupted. Our own server replaces this process, so that signals reach it.

    Raises:
        RequestError, MissingInputError, ServerError: said before any URL is printed.
    """
    config = None if is_model(target) else load_config(Path(target), list(overrides))
    if options.engine not in ("duplex", "moshi"):
        raise RequestError(f"--engine must be duplex or moshi, found {options.engine}")
    runtime = (config or Config(name="any")).serve.runtime
    host = options.host or runtime.host
    port = runtime.port if options.port is None else options.port
    if not 0 <= port <= MAX_PORT:
        raise RequestError(f"--port must be 0 to {MAX_PORT}, found {port}")
    for friend in options.friends:
        require_origin(friend)
    served = served_model(target, config, options, runs)
    if not placeholder.is_held():
        require_free_port(host, port)
    if options.engine == "moshi":
        from pipeline.serving.stock import serve_stock

        code = serve_stock(served.folder, served.adapter, host=host, port=port, ssl=options.ssl)
        raise SystemExit(code)
    if config is not None:
        from pipeline.serving.wire import authority

        scheme = "http" if options.ssl is None else "https"
        at = authority(host, port)
        for name, url in persona_urls(config, runs, f"{scheme}://{at}"):
            print(f"{name:<20} {url}")
        if options.token or runtime.token:
            print("Each wants token=… in its query once; the browser keeps it.")
        if host in ANY_HOST:
            print(f"From elsewhere: this machine's address in the place of {at}.")
        print("Loading; these open once the line `serving at …` has come.")
    command = [sys.executable, "-m", "pipeline.serving.app", str(served.folder)]
    command += ["--host", host, "--port", str(port), "--device", runtime.device]
    command += ["--slots", str(runtime.slots if options.slots is None else options.slots)]
    command += ["--label", served.label]
    command += ["--adapter", str(served.adapter)] if served.adapter else []
    command += ["--roll"] if options.roll else []
    command += ["--listen", options.listen] if options.listen else []
    for friend in options.friends:
        command += ["--friend", friend]
    for name in ("ssl", "voices"):
        given = getattr(options, name)
        command += [f"--{name}", str(given)] if given else []
    grades = options.grades
    if config is not None:
        command += ["--sampling", config.serve.sampling.model_dump_json()]
        files = {name: str(path.resolve()) for name, path in run_voices(config, runs).items()}
        command += ["--voice-files", json.dumps(files)] if files else []
        command += [] if config.tensors.prompt else ["--bare"]
        command += ["--personas", _fitting(persona_entries(config, runs))]
        grades = grades or run_folder_of(config, runs) / GRADES
        command += ["--links", str(run_folder_of(config, runs) / LINKS)]
    command += ["--grades", str(grades)] if grades else []
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    token = options.token or runtime.token
    if token:
        environment["DUPLEX_TOKEN"] = token  # never on the command line, where others see it
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def is_model(target: str) -> bool:
    """Whether `target` means a model: a folder, `pocket`, or a hub's owner/name. Else a config."""
    path = Path(target)
    if path.is_dir() or target == "pocket":
        return True
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", target) and path.suffix not in (".yaml", ".yml")
    return bool(is_name) and not path.exists() and not path.parent.is_dir()


def require_origin(friend: str) -> None:
    """
    Raises:
        RequestError: it is nothing that a browser says of a page.
    """
    if not re.fullmatch(r"https?://[^/?#\s]+/?", friend):
        raise RequestError(
            f"--friend must be a server's origin, as http://127.0.0.1:8998, found {friend}"
        )


def served_model(target: str, config: Config | None, options: ServeOptions, runs: Path) -> Served:
    """The files that are meant. A base of sixteen depth steps is cut to the agent's eight.

    Raises:
        MissingInputError: they are not there. RequestError: base and adapter at once.
    """
    from training.servable import servable_checkpoint

    if options.base and options.adapter:
        raise RequestError("give --base, or --adapter for the base with it: not both")
    if config is None:
        folder = servable_checkpoint(ModelSection(base=target), runs, print).folder
        return Served(folder, "adapter" if options.adapter else "checkpoint", options.adapter)
    if options.base or options.adapter:
        folder = servable_checkpoint(config.model, runs, print).folder
        return Served(folder, "adapter" if options.adapter else "base", options.adapter)
    step = {step.stage.name: step for step in plan(config, runs)}["merge"]
    if not step.done or step.folder is None:
        raise MissingInputError(
            f"there must be a merged model under {run_folder_of(config, runs)}, found none for "
            "this config. Run `duplex run CONFIG --to merge` first, or serve with --base."
        )
    return Served(step.folder.artifact("weights").parent, "merged")


def persona_entries(config: Config, runs: Path) -> list[dict[str, str]]:
    """What the page offers: each persona of a run with its prompt, voice and greeting."""
    from pipeline.serving.wire import prompt_audio

    if not config.tensors.prompt:
        return []
    voices = run_voices(config, runs)
    step = plan(config, runs)[0]
    records = step.folder.records() if step.done and step.folder else ()
    return [
        {
            "id": record.id,
            "name": record.name,
            "text_prompt": record.prompts[0].strip(),
            **prompt_audio(record.id, voices),
        }
        for record in records
        if isinstance(record, Persona)
    ]


def persona_urls(config: Config, runs: Path, base: str) -> list[tuple[str, str]]:
    """The page of each persona, with its voice where the run's tensors have one."""
    from pipeline.serving.wire import page_url

    if not config.tensors.prompt:
        return [("without a prompt", f"{base}/")]
    urls = []
    for entry in persona_entries(config, runs):
        audio = {key: entry[key] for key in ("voice_prompt", "greeting") if key in entry}
        urls.append((entry["id"], page_url(base, entry["text_prompt"], **audio)))
    return urls


def item_urls(config: Config, base: str) -> list[tuple[str, str]]:
    """The page of each evaluation item: what the config's evaluation asks a model as.

    Raises:
        DataFileError: the files of `evaluate.items` cannot be read.
    """
    from pipeline.evaluation.items import load_all_items
    from pipeline.serving.wire import page_url

    if not config.tensors.prompt:
        return [("without a prompt", f"{base}/")]
    items = load_all_items(config.evaluate.items)
    return [(item.id, page_url(base, item.text_prompt)) for item in items]


def run_voices(config: Config, runs: Path) -> dict[str, Path]:
    from pipeline.serving.voices import files_of_run

    step = {step.stage.name: step for step in plan(config, runs)}["tensors"]
    return files_of_run(step.folder) if step.done and step.folder else {}


def require_free_port(host: str, port: int) -> None:
    """
    Raises:
        ServerError: another program has the port; said before any URL is printed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"port {port} on {host} must be free: {error.strerror}. "
                "Stop the program that has it, or choose another with --port."
            ) from None


def _fitting(entries: list[dict[str, str]]) -> str:
    """As many of the first entries as an argument holds: the page offers those."""
    while len((text := json.dumps(entries)).encode()) > MAX_ARGUMENT_BYTES:
        entries = entries[:-1]
    return text
