"""The server process: routes, access, start and stop.

    python -m pipeline.serving.app CHECKPOINT_DIR [--port 8998] [--device auto]

The port is bound before the model is loaded, so a taken port is known at once and health
checks are answered while 15 GB are read. The event loop never waits for torch: that runs in
one worker thread.

Without a token the server answers on loopback only. A token comes as `Authorization: Bearer`
or, since browsers set no headers on WebSockets, as `?token=`; there is no access log, and
what is logged goes through a formatter that blanks it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import hmac
import ipaddress
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from aiohttp import web

from duplex import __version__
from duplex.config import SamplingSection
from duplex.errors import EXIT_DONE, EXIT_WORK_FAILED, DuplexError, RequestError
from duplex.files import sha256_bytes, write_json
from duplex.frames import SAMPLE_RATE
from pipeline.serving import wire

if TYPE_CHECKING:
    from pipeline.serving.chat import ChatDesk
    from pipeline.serving.conversation import Speaker

NAME = "duplex-workbench"
PAGE = Path(__file__).parent / "static" / "index.html"
OPEN_PATHS = ("/health", "/ready", "/ping")  # for load balancers, which hold no token
STOP_GRACE_S = 10
# The page is one file: nothing is fetched from elsewhere, and no other site may frame it.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; "
    "connect-src 'self' ws: wss:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """The routes around a `ChatDesk`. Ready when the desk has its speaker."""

    def __init__(self, desk: ChatDesk, token: str | None, defaults: SamplingSection | None = None):
        self._desk = desk
        self._token = token
        self._defaults = defaults or SamplingSection()
        self._sockets: set[web.WebSocketResponse] = set()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/ping", self._ping)
        app.router.add_get("/api/info", self._info)
        app.router.add_get("/api/tokenizer", self._tokenizer)
        app.router.add_get(wire.CHAT_PATH, self._chat)
        app.on_shutdown.append(self._close_sockets)  # pyright: ignore[reportArgumentType]
        return app

    # -- access

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._token is None:
            # Any page in the user's browser can reach loopback: only our own may talk to us.
            origin = request.headers.get("Origin")
            if origin and urlsplit(origin).netloc != request.host:
                raise web.HTTPForbidden(text=f"must be asked by its own page, not by {origin}")
            # A foreign name that was made to point at loopback would pass the line above.
            if not is_loopback(request.url.host or ""):
                raise web.HTTPForbidden(text="must be asked as localhost: it has no token")
        elif request.path not in OPEN_PATHS and not self._knows_token(request):
            raise web.HTTPUnauthorized(
                text="needs the server's token: `Authorization: Bearer …` or `?token=…`"
            )
        return await handler(request)

    def _knows_token(self, request: web.Request) -> bool:
        assert self._token is not None
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.query.get("token", "")
        return hmac.compare_digest(given.strip().encode(), self._token.encode())

    # -- routes

    async def _page(self, _: web.Request) -> web.StreamResponse:
        headers = {
            "Content-Security-Policy": PAGE_POLICY,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        return web.FileResponse(PAGE, headers=headers)

    async def _health(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.StreamResponse:
        is_ready = self._desk.speaker is not None
        state = {"ready": is_ready, "busy": self._desk.busy}
        return web.json_response(state, status=200 if is_ready else 503)

    async def _ping(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=204 if self._desk.speaker is None else 200)

    async def _info(self, _: web.Request) -> web.StreamResponse:
        speaker = self._speaker()
        return web.json_response(
            {
                "name": NAME,
                "version": __version__,
                "protocol": wire.PROTOCOL,
                "model_digest": speaker.model_digest,
                "tokenizer_digest": sha256_bytes(speaker.tokenizer_file),
                "sample_rate": SAMPLE_RATE,
                "card": speaker.lm.card,
                "context": speaker.lm.context,
                "device": str(speaker.device),
                "voices": speaker.voices.names,
                "bare": speaker.bare,
            }
        )

    async def _tokenizer(self, _: web.Request) -> web.StreamResponse:
        content = self._speaker().tokenizer_file
        return web.Response(body=content, content_type="application/octet-stream")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        speaker = self._speaker()
        try:
            wanted = wire.parse_chat_request(request.query.items(), self._defaults)
            speaker.plan(wanted.text_prompt, wanted.voice_prompt, wanted.greeting)
        except RequestError as error:
            raise web.HTTPBadRequest(text=str(error)) from None
        from pipeline.serving.chat import HEARTBEAT_S

        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=wire.MAX_MESSAGE_BYTES, compress=False
        )
        await ws.prepare(request)
        self._sockets.add(ws)
        try:
            await self._desk.welcome(ws, wanted)
        finally:
            self._sockets.discard(ws)
        return ws

    def _speaker(self) -> Speaker:
        if self._desk.speaker is None:
            raise web.HTTPServiceUnavailable(text="the model is being loaded; see /ready")
        return self._desk.speaker

    async def _close_sockets(self, _: web.Application) -> None:
        for ws in tuple(self._sockets):
            await ws.close(code=wire.CLOSE_GOING_AWAY, message=b"the server stops")


def make_runner(
    desk: ChatDesk, token: str | None = None, defaults: SamplingSection | None = None
) -> web.AppRunner:
    """The app with what aiohttp must be told: long request lines, and no access log."""
    return web.AppRunner(
        Server(desk, token, defaults).app(),
        access_log=None,
        max_line_size=wire.MAX_LINE_BYTES,
        max_field_size=wire.MAX_LINE_BYTES,
        shutdown_timeout=STOP_GRACE_S / 2,
    )


# -- the process


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    _log_to_stderr(args.token)
    try:
        return asyncio.run(_serve(args))
    except DuplexError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parse(argv: list[str] | None) -> argparse.Namespace:
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
    parser.add_argument("--voices", type=Path, help="folder of mono WAV files, for voice_prompt")
    parser.add_argument("--voice-files", type=json.loads, default={}, help=argparse.SUPPRESS)
    parser.add_argument(
        "--bare", action="store_true", help="feed no prompt: the model was trained without"
    )
    parser.add_argument("--ready-file", type=Path, help='gets {"url": …} once it is up')
    parser.add_argument(
        "--die-with-stdin", action="store_true", help="stop when standard input ends"
    )
    return parser.parse_args(argv)


async def _serve(args: argparse.Namespace) -> int:
    if not is_loopback(args.host) and not args.token:
        raise RequestError(
            f"a server that others can reach (host {args.host}) must have a token, found none. "
            "Set DUPLEX_TOKEN, or listen on 127.0.0.1."
        )
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, stop.set)
    if args.die_with_stdin:
        threading.Thread(target=_watch_stdin, args=(loop, stop), daemon=True).start()

    from pipeline.serving.chat import ChatDesk  # sphn and numpy: not for --help

    worker = ThreadPoolExecutor(1, thread_name_prefix="model")
    desk = ChatDesk(worker)
    runner = make_runner(desk, args.token, args.sampling)
    await runner.setup()
    stopped = asyncio.create_task(stop.wait())
    # The model loads in its thread meanwhile.
    loading = loop.run_in_executor(worker, _load, args)
    try:
        code = await _listen(runner, args, desk, stopped, loading)
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
    desk: ChatDesk,
    stopped: asyncio.Task[bool],
    loading: asyncio.Future[Speaker],
) -> int:
    try:
        await web.TCPSite(runner, args.host, args.port).start()
    except OSError as error:
        print(f"error: {_cannot_listen(args, error)}", file=sys.stderr)
        return EXIT_WORK_FAILED
    url = f"http://{_authority(args.host, runner.addresses[0][1])}"
    await asyncio.wait({stopped, loading}, return_when=asyncio.FIRST_COMPLETED)
    if not stopped.done():
        desk.speaker = loading.result()
        print(f"serving at {url}/: {args.checkpoint} on {desk.speaker.device}", flush=True)
        if args.ready_file:
            write_json(args.ready_file, {"url": url})
        await stopped
    return EXIT_DONE


def _load(args: argparse.Namespace) -> Speaker:
    from pipeline.serving.conversation import Speaker
    from pipeline.serving.voices import files_in

    voices = {name: Path(path) for name, path in args.voice_files.items()}
    if args.voices:
        voices |= files_in(args.voices)
    speaker = Speaker.load(args.checkpoint, args.device, voices, bare=args.bare)
    speaker.warm_up()
    return speaker


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authority(host: str, port: int) -> str:
    """Where to reach a server that listens on `host`: on any address means on this one."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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


def _log_to_stderr(token: str | None) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting(token))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
