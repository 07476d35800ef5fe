"""The pod's own voice, from its first second: what `duplex pod` asks, over plain HTTP.

    python -m pipeline.pods.agent        settings: the environment (pipeline/pods/inside.py)

    GET /ping           204 while the model server starts, 200 when it is ready; no token.
                        As RunPod's balancer for serverless workers asks it.
    GET /status         {"pipeline": waiting|running|failed|done, "stages": [...], ...}
    GET /logs?tail=200  the last lines of the pipeline's output, without secrets
    GET /files          what may be brought home: name, bytes, sha256
    GET /files/<name>   one of these, with Range; a name is looked up in the list, never joined

It imports neither torch nor a stage. `status` is the `duplex status --json` of a process of its
own, kept for some seconds, so that a broken config breaks an answer and not the agent.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from duplex.configfile import load_config
from duplex.datafiles import CHECKOUT, find_path
from duplex.errors import EXIT_BAD_REQUEST, EXIT_DONE, DuplexError
from duplex.files import known_sha256
from duplex.lock import is_locked
from duplex.store import MANIFEST
from duplex.tokens import SHORTEST_TOKEN
from pipeline.pods.api import KEY_NAME
from pipeline.pods.inside import Inside
from pipeline.pods.names import SUBFOLDERS, Offered, is_stage_folder, may_be_fetched, ordered
from pipeline.pods.usage import read_usage, usage_path

STATUS_KEPT_S, STATUS_TIMEOUT_S = 10.0, 60.0
READY_KEPT_S, READY_TIMEOUT_S = 2.0, 3.0
MAX_TAIL, MAX_LOG_BYTES, MAX_FAILURE_BYTES = 5000, 1 << 20, 2000
OFFERS_KEPT_S = 5.0
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Agent:
    def __init__(self, inside: Inside):
        self._inside = inside
        self._status: tuple[float, dict[str, Any]] | None = None
        self._ready: tuple[float, bool] = (-READY_KEPT_S, False)
        self._offers: tuple[float, dict[str, Offered]] = (-OFFERS_KEPT_S, {})
        self._lock, self._offers_lock = asyncio.Lock(), asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/ping", self._ping)
        app.router.add_get("/status", self._show_status)
        app.router.add_get("/logs", self._logs)
        app.router.add_get("/files", self._files)
        app.router.add_get("/files/{name:.+}", self._file)
        return app

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path != "/ping":
            scheme, _, shown = request.headers.get("Authorization", "").partition(" ")
            given = shown.strip().encode("utf-8", "surrogateescape")
            if scheme.lower() != "bearer" or not hmac.compare_digest(
                given, self._inside.token.encode()
            ):
                raise web.HTTPUnauthorized(text="needs the pod's token: Authorization: Bearer …")
        return await handler(request)

    # -- state

    async def _ping(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if await self._server_is_ready() else 204)

    async def _server_is_ready(self) -> bool:
        now = time.monotonic()
        if now - self._ready[0] >= READY_KEPT_S:
            timeout = aiohttp.ClientTimeout(total=READY_TIMEOUT_S)
            is_ready = False
            try:
                async with (
                    aiohttp.ClientSession(timeout=timeout) as session,
                    session.get(f"http://127.0.0.1:{self._inside.port}/ready") as response,
                ):
                    is_ready = response.status == 200
            except (aiohttp.ClientError, TimeoutError):
                pass
            self._ready = (now, is_ready)
        return self._ready[1]

    async def _show_status(self, _: web.Request) -> web.StreamResponse:
        status = dict(await self._rows())
        usage = read_usage(usage_path(self._inside.runs, self._inside.job))
        failure = read_failure(self._inside.failed_file)
        names = self._inside.selection.of([row["name"] for row in status["stages"]])
        selected = [row for row in status["stages"] if row["name"] in names]
        status |= {
            "pipeline": pipeline_state(selected, self._is_running(), has_failed=bool(failure)),
            "message": failure or status["message"],
            "spent_usd": usage.spent_usd,
            "ended": usage.ended,
        }
        return web.json_response(text=self._inside.clean(json.dumps(status)))

    def _is_running(self) -> bool:
        folder = self._run_folder()
        return folder is not None and is_locked(folder)

    def _run_folder(self) -> Path | None:
        try:
            return self._inside.runs / load_config(self._config, list(self._inside.settings)).name
        except DuplexError:
            return None

    @property
    def _config(self) -> Path:
        return find_path(str(self._inside.config))

    async def _rows(self) -> dict[str, Any]:
        """The stages' rows, as they were a few seconds ago at most."""
        async with self._lock:
            if self._status is None or time.monotonic() - self._status[0] >= STATUS_KEPT_S:
                self._status = (time.monotonic(), await self._ask_status())
            return self._status[1]

    async def _ask_status(self) -> dict[str, Any]:
        command = [
            sys.executable, "-m", "duplex.cli", "status", str(self._config),
            "--runs", str(self._inside.runs), "--json",
            *(part for line in self._inside.settings for part in ("--set", line)),
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != KEY_NAME}
        path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        process = await asyncio.create_subprocess_exec(
            *command, env=environment | {"PYTHONPATH": path},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = await asyncio.wait_for(process.communicate(), STATUS_TIMEOUT_S)
            rows = json.loads(out)["stages"] if process.returncode == EXIT_DONE else []
        except (TimeoutError, ValueError, KeyError, TypeError):
            rows, err = [], b"duplex status gave no answer"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        stages = [
            {key: row.get(key) for key in ("name", "state", "counts", "seconds", "message")}
            for row in rows
        ]
        digest = known_sha256(self._config) if self._config.is_file() else None
        message = "" if rows else err.decode("utf-8", "replace")[-500:]
        return {"stages": stages, "config_sha256": digest, "message": message}

    # -- log

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        try:
            tail = int(request.query.get("tail", "200"))
        except ValueError:
            raise web.HTTPBadRequest(text="tail must be a number of lines") from None
        content = last_bytes(self._inside.log, MAX_LOG_BYTES).decode("utf-8", "replace")
        lines = content.splitlines()[-min(max(tail, 0), MAX_TAIL) or len(content) + 1 :]
        text = "\n".join(lines) if tail > 0 else ""
        return web.Response(text=self._inside.clean(text))

    # -- files

    async def _files(self, _: web.Request) -> web.StreamResponse:
        offers = await self._list()
        return web.json_response(
            {"files": [{"name": offer.name, "bytes": offer.num_bytes, "sha256": offer.sha256}
                       for offer in ordered(offers.values())]}
        )  # fmt: skip

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        folder = self._run_folder()
        if folder is None or not await asyncio.to_thread(is_offered, folder, name):
            raise web.HTTPNotFound(text="no file of that name is on the list; see /files")
        return web.FileResponse(folder / name, headers={"Cache-Control": "no-store"})

    async def _list(self) -> dict[str, Offered]:
        """The list, as it was a few seconds ago at most."""
        async with self._offers_lock:
            if time.monotonic() - self._offers[0] >= OFFERS_KEPT_S:
                folder = self._run_folder()
                found = {} if folder is None else await asyncio.to_thread(list_offers, folder)
                self._offers = (time.monotonic(), found)
            return self._offers[1]


def list_offers(run_folder: Path) -> dict[str, Offered]:
    """Name -> file, of the complete stages of a run. Digests are the manifest's where it has them:
    an adapter is not read to list it."""
    found: dict[str, Offered] = {}
    folders = sorted(run_folder.iterdir()) if run_folder.is_dir() else []
    for folder in folders:
        if not _is_complete(folder):
            continue
        known = _manifest_digests(folder / MANIFEST)
        for path in _within(folder):
            name = path.relative_to(run_folder).as_posix()
            if not is_offered(run_folder, name):
                continue
            sha256 = known.get(path.relative_to(folder).as_posix()) or known_sha256(path)
            found[name] = Offered(name, path.stat().st_size, sha256)
    return found


def is_offered(run_folder: Path, name: str) -> bool:
    """Whether `name` is on the list of this run: looks at that file, and at its stage's folder."""
    if not may_be_fetched(name):
        return False
    path, folder = run_folder / name, run_folder / name.partition("/")[0]
    is_linked = any(
        part.is_symlink() for part in (path, *path.parents) if part.is_relative_to(folder)
    )
    return not is_linked and path.is_file() and _is_complete(folder)


def _is_complete(folder: Path) -> bool:
    return (
        not folder.is_symlink() and is_stage_folder(folder.name) and (folder / MANIFEST).is_file()
    )


def _within(folder: Path) -> Iterator[Path]:
    """What could be on the list. A stage may hold tens of thousands of recordings beside it,
    which are not looked at."""
    for place in (folder, *(folder / name for name in SUBFOLDERS)):
        if place.is_dir() and not place.is_symlink():
            yield from sorted(place.iterdir())


def _manifest_digests(manifest: Path) -> dict[str, str]:
    try:
        return {file["path"]: file["sha256"] for file in json.loads(manifest.read_bytes())["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_failure(path: Path | None) -> str:
    """Why start.sh gave up; nothing where it has not."""
    if path is None or not path.is_file():
        return ""
    text = last_bytes(path, MAX_FAILURE_BYTES).decode("utf-8", "replace").strip()
    return text or "start.sh gave up; its log says why"


def pipeline_state(
    rows: list[dict[str, Any]], is_running: bool, *, has_failed: bool = False
) -> str:
    """waiting | running | failed | done, of the stages that the pod is to do.

    Args:
        is_running: somebody holds the run folder's lock.
        has_failed: start.sh gave up: doctor, a stage or the model server.
    """
    states = [row["state"] for row in rows]
    if is_running or "running" in states:
        return "running"
    if has_failed:
        return "failed"
    if states and all(state == "done" for state in states):
        return "done"
    return "failed" if "failed" in states else "waiting"


def last_bytes(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - limit))
            return file.read(limit)
    except OSError:
        return b""


async def serve(inside: Inside) -> None:
    runner = web.AppRunner(Agent(inside).app(), access_log=None)
    await runner.setup()
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    try:
        await web.TCPSite(runner, "0.0.0.0", inside.agent_port).start()
        print(f"pod agent on port {inside.agent_port}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> int:
    inside = Inside.of(os.environ)
    if len(inside.token) < SHORTEST_TOKEN:
        print(
            f"DUPLEX_TOKEN must have at least {SHORTEST_TOKEN} characters, since anybody can reach "
            f"the pod's ports; found {len(inside.token)}",
            file=sys.stderr,
        )
        return EXIT_BAD_REQUEST
    asyncio.run(serve(inside))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
