"""RunPod's REST API v2 and its pod proxy on loopback, with state, faults and a bill to the second.

The time is a `FakeClock`'s: it passes when somebody sleeps on it, and what is due happens at its
own moment, however late somebody looks. Real time passes for the sockets alone.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web

from tests.pods.schema_v2 import ACTIONS, faults_of_create, problem

KEY = "rpa_FAKE0KEY0THAT0MUST0NOT0BE0SEEN"
HANG_S = 0.8  # longer than the tests' clients wait
PAGE_SIZE = 2  # pods on a page of the list, however many are asked for
PROVISIONING_S = 15.0


class FakeClock:
    def __init__(self, start_s: float = 1_800_000_000.0):
        self._now, self._lock = start_s, threading.Lock()
        self.slept: list[float] = []
        self.on_sleep: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds
            self.slept.append(seconds)
        self.on_sleep()


@dataclass
class FakePod:
    """spans: [start, end] of what is billed. ready_s: when its services answer."""

    id: str
    body: dict[str, Any]
    usd_h: float
    status: str = "RUNNING"
    spans: list[list[float | None]] = field(default_factory=list)
    ready_s: float = 0.0
    host_taken: bool = False
    forward: dict[int, str] = field(default_factory=dict)  # port -> a real service's URL

    @property
    def network_volume(self) -> str | None:
        return next((m["volumeId"] for m in self.body["mounts"].get("network", ())), None)

    def usd(self, now_s: float) -> float:
        seconds = sum((now_s if end is None else end) - start for start, end in self.spans)  # type: ignore[operator]
        return seconds / 3600 * self.usd_h


@dataclass
class Fault:
    """What the next matching request gets. `acts`: it is done all the same."""

    method: str
    path: str  # a word of it
    status: int = 500
    text: str = "Something went wrong. Please try again later or contact support."
    headers: dict[str, str] = field(default_factory=dict)
    acts: bool = False
    hang: bool = False
    times: int = 1


class FakeRunPod:
    """
    Attributes:
        prices: GPU type -> the API's price for an hour.
        taken: GPU types of which none is free.
        boot_s: from start to a service that answers; None: it never does.
        work_s: how long the pipeline runs once the pod answers.
    """

    def __init__(self, clock: FakeClock):
        self.clock = clock
        self.pods: dict[str, FakePod] = {}
        self.prices: dict[str, float] = {}
        self.taken: set[str] = set()
        self.boot_s: float | None = 120.0
        self.work_s = 600.0
        self.worked_s = 0.0  # on the volume: goes on behind a preemption
        self.pipeline_fails = False
        self.failure = ""  # why start.sh gave up, before any stage has failed
        self.loop_s: float | None = None  # its container ends so often, and is started again
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.events: list[tuple[float, Callable[[], None]]] = []
        self.list_lag_s = 0.0
        self.price_lag_s = 0.0  # how long a new pod has no price
        self.keys: list[str | None] = []
        self.forward: dict[int, str] = {}
        self._number = 0
        self._thread_ready = threading.Event()
        self.url = ""

    # -- time

    def at(self, seconds_from_now: float, what: Callable[[], None]) -> None:
        self.events.append((self.clock.now() + seconds_from_now, what))

    def _catch_up(self) -> None:
        due = sorted((e for e in self.events if e[0] <= self.clock.now()), key=lambda e: e[0])
        for event in due:
            self.events.remove(event)
            self._moment = event[0]
            event[1]()
        self._moment = self.clock.now()

    # -- what happens to pods

    def running(self) -> list[FakePod]:
        self._catch_up()
        return [pod for pod in self.pods.values() if pod.status == "RUNNING"]

    def bill_usd(self) -> float:
        self._catch_up()
        return sum(pod.usd(self.clock.now()) for pod in self.pods.values())

    def end(self, pod: FakePod, status: str = "EXITED") -> None:
        if pod.spans and pod.spans[-1][1] is None:
            pod.spans[-1][1] = self._moment
            self._bank_work(pod, self._moment)
        pod.status = status

    def preempt(self, *, vanish: bool = False) -> None:
        for pod in list(self.pods.values()):
            if pod.status == "RUNNING":
                self.end(pod, "TERMINATED" if vanish else "EXITED")

    def _begin(self, pod: FakePod) -> None:
        pod.status = "RUNNING"
        pod.spans.append([self._moment, None])
        pod.ready_s = float("inf") if self.boot_s is None else self._moment + self.boot_s

    def _bank_work(self, pod: FakePod, now_s: float) -> None:
        self.worked_s += max(0.0, now_s - pod.ready_s) if pod.ready_s != float("inf") else 0.0

    def _create(self, body: dict[str, Any]) -> FakePod:
        self._number += 1
        gpu = body["gpu"]
        pod = FakePod(
            f"pod{self._number:04d}x", body, self.prices.get(gpu["id"], 1.0) * gpu["count"],
            forward=dict(self.forward),
        )  # fmt: skip
        self._begin(pod)
        self.pods[pod.id] = pod
        return pod

    def describe(self, pod: FakePod) -> dict[str, Any]:
        start = pod.spans[-1][0]
        assert start is not None
        since_s = self.clock.now() - start
        runs = pod.status == "RUNNING"
        provisioning = runs and since_s < PROVISIONING_S
        moment = datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "id": pod.id,
            "name": pod.body["name"],
            "image": pod.body.get("image", "of-the-template"),
            "status": "PROVISIONING" if provisioning else pod.status,
            "actions": ACTIONS["PROVISIONING" if provisioning else pod.status],
            "cost": pod.usd_h if runs and since_s >= self.price_lag_s else 0.0,
            "env": pod.body["env"],
            "mounts": pod.body["mounts"],
            "createdAt": moment,
            "startedAt": None if provisioning else moment,
        }

    # -- the API

    async def _api(self, request: web.Request) -> web.StreamResponse:
        self._catch_up()
        path = request.match_info["path"]
        content = await request.read()
        body = json.loads(content) if content else None
        self.requests.append((request.method, path, body))
        self.keys.append(request.headers.get("Authorization"))
        asked = f"{path}/{body['action']}" if path.endswith("/action") else path
        fault = self._fault(request.method, asked)
        if fault is not None and not fault.acts:
            return await self._faulty(fault)
        answer = self._answer(request, path, body)
        return answer if fault is None else await self._faulty(fault)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.path in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None

    async def _faulty(self, fault: Fault) -> web.StreamResponse:
        if fault.hang:
            await asyncio.sleep(HANG_S)
        return web.Response(status=fault.status, text=fault.text, headers=fault.headers)

    def _answer(self, request: web.Request, path: str, body: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return problem(401, "Unauthorized", "the key is not known")
        parts = path.split("/")
        if parts[0] != "pods":
            return problem(404, "Not Found", "no such path")
        if request.method == "POST" and len(parts) == 1:
            if faults := faults_of_create(body):
                return problem(422, "Unprocessable Entity", "the body breaks the schema", faults)
            if body["gpu"]["id"] in self.taken:
                text = (
                    "There are no longer any instances available with the requested specifications."
                )
                return problem(400, "Bad Request", text)
            return web.json_response(self.describe(self._create(body)), status=201)
        if len(parts) == 1:
            visible = [
                pod for pod in self.pods.values()
                if pod.status != "GONE" and self.clock.now() - pod.spans[0][0] >= self.list_lag_s  # type: ignore[operator]
            ]  # fmt: skip
            first = int(request.query.get("cursor") or 0)
            last = first + min(PAGE_SIZE, int(request.query["limit"]))
            return web.json_response(
                {
                    "pods": [self.describe(pod) for pod in visible[first:last]],
                    "pagination": {"nextCursor": str(last) if last < len(visible) else None,
                                   "hasNextPage": last < len(visible)},
                }
            )  # fmt: skip
        pod = self.pods.get(parts[1])
        if pod is None or pod.status == "GONE":
            return problem(404, "Not Found", "pod not found")
        if request.method == "GET":
            return web.json_response(self.describe(pod))
        if request.method == "DELETE":
            self.end(pod, "GONE")
            return web.Response(status=204)
        if request.method == "PATCH":
            pod.body["env"] = body["env"]
            return web.json_response(self.describe(pod))
        if parts[2:] != ["action"] or set(body) != {"action"}:
            return problem(404, "Not Found", "no such path")
        if body["action"] not in ACTIONS[pod.status]:
            text = f"{body['action']} is not valid for a pod that is {pod.status}"
            return problem(409, "Conflict", text)
        if body["action"] == "stop":
            if pod.network_volume:
                return problem(400, "Bad Request", "pods with a network volume cannot be stopped")
            self.end(pod)
            return web.json_response(self.describe(pod))
        if pod.host_taken:
            text = "There are not enough free GPUs on the host machine to start this pod."
            return problem(400, "Bad Request", text)
        self._begin(pod)
        return web.json_response(self.describe(pod))

    # -- the proxy

    async def _proxy(self, request: web.Request) -> web.StreamResponse:
        self._catch_up()
        pod = self.pods.get(request.match_info["pod"])
        port, path = int(request.match_info["port"]), request.match_info["path"]
        now = self.clock.now()
        if pod is None or pod.status != "RUNNING" or now < pod.ready_s:
            return web.Response(status=502, text="<html>bad gateway</html>")
        if port in pod.forward:
            return await self._pass_on(request, f"{pod.forward[port]}/{path}")
        if self.loop_s is not None and (now - pod.ready_s) // self.loop_s % 2:
            return web.Response(status=502, text="nothing listens")
        worked = self.worked_s + now - pod.ready_s
        is_done = worked >= self.work_s and not self.pipeline_fails
        if port == 8998:
            if not is_done:
                return web.Response(status=502, text="nothing listens")
            return web.Response(status=200)
        if path == "ping":
            return web.Response(status=200 if is_done else 204)
        if request.headers.get("Authorization") != f"Bearer {pod.body['env']['DUPLEX_TOKEN']}":
            return web.Response(status=401)
        if path == "status":
            state = "done" if is_done else "failed" if self.pipeline_fails else "running"
            row = {"name": "train", "state": state, "message": "no memory" * self.pipeline_fails}
            if self.failure:
                state, row["state"] = "failed", "missing"
            elif self.loop_s is not None:
                state = row["state"] = "waiting"
            answer = {"pipeline": state, "stages": [row], "message": self.failure}
            return web.json_response(answer)
        if path == "files":
            return web.json_response({"files": []})
        if path == "logs":
            return web.Response(text="\x1b[31mred\x1b[0m line\nlast line " + KEY[:3])
        return web.Response(status=404)

    async def _pass_on(self, request: web.Request, url: str) -> web.StreamResponse:
        headers = {
            k: v
            for k, v in request.headers.items()
            if k in ("Authorization", "Range", "Accept-Encoding")
        }
        try:
            async with (
                aiohttp.ClientSession(auto_decompress=False) as session,
                session.get(url, headers=headers, params=request.query) as answer,
            ):
                kept = {
                    k: v
                    for k, v in answer.headers.items()
                    if k in ("Content-Range", "Content-Type")
                }
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
        except aiohttp.ClientError:
            return web.Response(status=502)

    # -- the server

    def __enter__(self) -> FakeRunPod:
        self._moment = self.clock.now()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._thread_ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_route("*", "/v2/{path:.+}", self._api)
        app.router.add_route("GET", "/proxy/{pod}/{port}/{path:.*}", self._proxy)
        app.router.add_route("*", "/{path:.*}", self._astray)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        address = site._server.sockets[0].getsockname()  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{address[1]}"
        self._thread_ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.run_until_complete(asyncio.sleep(0.05))  # what hangs is cancelled by now
        self._loop.close()

    async def _astray(self, _: web.Request) -> web.StreamResponse:
        self.requests.append(("ASTRAY", "", None))
        return web.Response(status=404)

    @property
    def api_url(self) -> str:
        return f"{self.url}/v2"

    @property
    def pod_url(self) -> str:
        return f"{self.url}/proxy/{{pod}}/{{port}}"
