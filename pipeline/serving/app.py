"""The server process: start and stop.

    python -m pipeline.serving.app CHECKPOINT_DIR [--port 8998] [--device auto] [--slots 4]

The port is bound before the model is loaded, so a taken port is known at once and health
checks are answered while 15 GB are read. The event loop never waits for torch: that runs in
one worker thread.

Without a token the server answers on loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import logging
import os
import signal
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from duplex.config import SamplingSection, ServeRuntime
from duplex.errors import (
    EXIT_DONE,
    EXIT_WORK_FAILED,
    DuplexError,
    MissingInputError,
    RequestError,
)
from duplex.files import write_json
from duplex.tokens import SHORTEST_TOKEN
from pipeline.serving.access import is_loopback
from pipeline.serving.limits import HEADER_S, Limits
from pipeline.serving.placeholder import dismiss
from pipeline.serving.routes import STOP_GRACE_S, ServerSettings, make_runner

if TYPE_CHECKING:
    from pipeline.serving.desk import Desk
    from pipeline.serving.hearing import Recognition
    from pipeline.serving.model import ServedModel

CERTIFICATE, KEY = "cert.pem", "key.pem"  # as moshi.server's --ssl has them


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    _log_to_stderr(args.token)
    try:
        return asyncio.run(_serve(args))
    except DuplexError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    limits = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.serving.app",
        description="Serve a checkpoint folder to Moshi clients and browsers.",
        epilog="example: python -m pipeline.serving.app runs/pocket/07-merge-1a2b3c4d/checkpoint",
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8998, help="0: any free port")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--token",
        default=os.environ.get("DUPLEX_TOKEN") or None,
        help="what clients must know; better in the environment, as DUPLEX_TOKEN",
    )
    parser.add_argument(
        "--sampling",
        type=SamplingSection.model_validate_json,
        default=SamplingSection(),
        metavar="JSON",
        help="what holds where a URL names no sampling, as the config's serve.sampling",
    )
    parser.add_argument("--voices", type=Path, help="folder of recordings and packaged voices")
    parser.add_argument("--voice-files", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument(
        "--bare", action="store_true", help="feed no prompt: the model was trained without"
    )
    parser.add_argument(
        "--slots", type=int, default=ServeRuntime().slots, help="conversations at a time"
    )
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter, left unmerged")
    parser.add_argument(
        "--roll", action="store_true",
        help="go on where the model's context is full: the oldest drops out, the prompt first",
    )  # fmt: skip
    parser.add_argument(
        "--session-s", type=float, default=limits.session_s, help="longest conversation"
    )
    parser.add_argument(
        "--idle-s", type=float, default=limits.idle_s, help="longest time without audio"
    )
    parser.add_argument(
        "--max-strangers",
        type=int,
        default=limits.max_strangers,
        help="connections without a token",
    )
    parser.add_argument(
        "--ssl", type=Path, metavar="DIR", help=f"serve https by DIR/{CERTIFICATE} and DIR/{KEY}"
    )
    parser.add_argument("--label", default="", help="what is served, in a word, for the page")
    parser.add_argument(
        "--friend", action="append", default=[], metavar="ORIGIN",
        help="another server whose page may talk to this one too, as http://127.0.0.1:8998",
    )  # fmt: skip
    parser.add_argument(
        "--listen", metavar="RECOGNISER[:MODEL]",
        help="show what users say, and warn of replies that repeat it: faster-whisper:small, "
        "pocketsphinx",
    )  # fmt: skip
    parser.add_argument("--grades", type=Path, help="file that gets people's grades, as JSON lines")
    parser.add_argument("--links", type=Path, help="file of trainees' links, kept over starts")
    parser.add_argument("--personas", type=json.loads, default=[], help=argparse.SUPPRESS)
    parser.add_argument("--ready-file", type=Path, help='gets {"url": …} once it is up')
    parser.add_argument(
        "--die-with-stdin", action="store_true", help="stop when standard input ends"
    )
    args = parser.parse_args(argv)
    for name, least in (("slots", 1), ("max_strangers", 1), ("session_s", 1), ("idle_s", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


async def _serve(args: argparse.Namespace) -> int:
    if not is_loopback(args.host) and not args.token:
        raise RequestError(
            f"a server that others can reach (host {args.host}) must have a token, found none. "
            "Set DUPLEX_TOKEN, or listen on 127.0.0.1."
        )
    if args.token and len(args.token) < SHORTEST_TOKEN:
        raise RequestError(
            f"a token must have at least {SHORTEST_TOKEN} characters, found {len(args.token)}; "
            "`openssl rand -hex 16` makes a good one"
        )
    secure = _ssl_context(args.ssl)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    if args.die_with_stdin:
        threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()

    from pipeline.serving.desk import Desk  # numpy: not for --help

    worker = ThreadPoolExecutor(1, thread_name_prefix="model")
    desk = Desk(worker)
    desk.recognition = _recognition(args.listen)
    runner = make_runner(desk, _settings(args))
    await runner.setup()
    stopped = asyncio.create_task(stop.wait())
    # The model loads in its thread meanwhile.
    loading = loop.run_in_executor(worker, _load, args)
    try:
        code = await _listen(runner, args, desk, stopped, loading, secure)
    finally:
        stopped.cancel()
        await runner.cleanup()
    if not loading.done():
        # Nothing stops a thread that is reading weights; there is nothing to save either.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


async def _listen(
    runner: web.AppRunner,
    args: argparse.Namespace,
    desk: Desk,
    stopped: asyncio.Task[bool],
    loading: asyncio.Future[ServedModel],
    secure: ssl.SSLContext | None,
) -> int:
    from pipeline.serving.wire import authority  # numpy: not for --help

    assert runner.server is not None
    # Not by aiohttp's site: before a handshake a connection of https is nobody's, for a minute.
    wait_s = None if secure is None else HEADER_S
    dismiss(args.host, args.port)
    try:
        listener = await asyncio.get_running_loop().create_server(
            runner.server, args.host, args.port, ssl=secure, ssl_handshake_timeout=wait_s
        )
    except OSError as error:
        print(f"error: {_cannot_listen(args, error)}", file=sys.stderr)
        return EXIT_WORK_FAILED
    scheme = "http" if secure is None else "https"
    url = f"{scheme}://{authority(args.host, listener.sockets[0].getsockname()[1])}"
    await asyncio.wait({stopped, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not stopped.done():
        model = desk.model = loading.result()
        desk.counts.slots.set(desk.num_slots)
        print(
            f"serving at {url}/: {args.checkpoint} on {model.device}, {desk.num_slots} at a time",
            flush=True,
        )
        if secure is None and not is_loopback(args.host):
            print(
                "Browsers give a page its microphone only over https or on localhost: use --ssl, "
                "or a proxy that has a certificate, as RunPod's.",
                flush=True,
            )
        if args.ready_file:
            write_json(args.ready_file, {"url": url})
        await stopped
    listener.close()
    return EXIT_DONE


def _load(args: argparse.Namespace) -> ServedModel:
    from pipeline.serving.model import ServedModel
    from pipeline.serving.voices import files_in

    voices = {name: Path(path) for name, path in args.voice_files.items()}
    if args.voices:
        voices |= files_in(args.voices)
    model = ServedModel.load(
        args.checkpoint,
        args.device,
        voices,
        bare=args.bare,
        num_slots=args.slots,
        adapter=args.adapter,
    )
    model.warm_up()
    return model


def _recognition(wanted: str | None) -> Recognition | None:
    """
    Raises:
        RequestError, MissingInputError: no such recogniser, or its package is not installed.
    """
    if wanted is None:
        return None
    from pipeline.engines.recogniser import make_recogniser
    from pipeline.serving.hearing import Recognition

    name, _, model = wanted.partition(":")
    try:
        return Recognition(make_recogniser(name, model or None, "en"))
    except (RequestError, MissingInputError) as error:
        text = str(error).replace("--recogniser-model ", "--listen NAME:")
        raise type(error)(text.replace("--recogniser", "--listen")) from None


def _settings(args: argparse.Namespace) -> ServerSettings:
    limits = Limits(
        max_strangers=args.max_strangers,
        session_s=args.session_s,
        idle_s=args.idle_s,
        roll=args.roll,
    )
    return ServerSettings(
        token=args.token,
        sampling=args.sampling,
        limits=limits,
        personas=tuple(args.personas),
        label=args.label,
        grades=args.grades,
        is_secure=args.ssl is not None,
        friends=tuple(friend.rstrip("/") for friend in args.friend),
        links=args.links,
    )


def _ssl_context(folder: Path | None) -> ssl.SSLContext | None:
    """
    Raises:
        RequestError: no certificate and key that belong together.
    """
    if folder is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    except OSError as error:
        raise RequestError(
            f"--ssl must be a folder with {CERTIFICATE} and {KEY} that belong together, found "
            f"{folder}: {error.strerror or error}. For yourself: openssl req -x509 -newkey "
            f"rsa:2048 -nodes -days 365 -subj /CN=localhost -keyout {KEY} -out {CERTIFICATE}"
        ) from None
    return context


def _cannot_listen(args: argparse.Namespace, error: OSError) -> str:
    where = f"port {args.port} on {args.host}"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{where} must be free, another program has it. "
            "Stop that one, or choose another with --port (0: any free one)."
        )
    return f"{where} must be ours to listen on: {error.strerror or error}"


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Ends the process when the other end of standard input is gone, however it went."""
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(stop.set)
    time.sleep(STOP_GRACE_S)  # a daemon thread: normally the process has ended by now
    os._exit(EXIT_WORK_FAILED)


class _Redacting(logging.Formatter):
    def __init__(self, token: str | None):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._secrets = {token, quote(token, safe="")} if token else set()

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text


def _without_content(record: logging.LogRecord) -> bool:
    """aiohttp quotes a request that is none in its traceback: it may hold prompts and links."""
    if record.exc_info and isinstance(record.exc_info[1], BadHttpMessage):
        record.exc_info = None
    return True


def _log_to_stderr(token: str | None) -> None:
    handler = logging.StreamHandler()
    handler.addFilter(_without_content)
    handler.setFormatter(_Redacting(token))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
