"""What the server answers: page, state, conversations, links, grades. See docs/serving.md.

There is no access log, and what is logged goes through a formatter that blanks the token.
"""

from __future__ import annotations

import json
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from duplex import __version__
from duplex.config import SamplingSection
from duplex.errors import RequestError
from duplex.files import sha256_bytes
from duplex.frames import SAMPLE_RATE
from pipeline.serving import counts, wire
from pipeline.serving.access import Access, Denied, Visitor
from pipeline.serving.bodies import LinkBody, PromptBody, read_body
from pipeline.serving.grades import GradeBook
from pipeline.serving.limits import KEEPALIVE_S, ConnectionGuard, Limits
from pipeline.serving.links import LinkBook

if TYPE_CHECKING:
    from pipeline.serving.desk import Desk
    from pipeline.serving.model import ServedModel

NAME = "duplex-workbench"
PAGES = Path(__file__).parent / "static"
SCRIPTS = ("page.css", "main.js", "talk.js", "pane.js", "sound.js", "opus.js", "capture.js")
OPEN_PATHS = ("/health", "/ready", "/ping")  # for load balancers, which hold no token
STOP_GRACE_S = 10
MAX_BODY_BYTES = 256 * 1024
KEPT_PROMPTS = 256
MAX_PROMPT_CHARS = 20_000
UNREAD_BYTES = 64 * 1024  # 1.3 s of PCM; Linux takes twice as much
COOKIE_S = 30 * 24 * 3600
# All of the page comes from here, it talks to this server and its friends, and nobody may frame it.
POLICY = (
    "default-src 'none'; script-src 'self' blob:; style-src 'self'; img-src data:; "
    "media-src blob:; connect-src 'self'{friends}; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
VISITOR = "visitor"  # key of a request


@dataclass(frozen=True)
class ServerSettings:
    """What a server is started with, besides its model.

    personas: {id, name, text_prompt, voice_prompt, greeting}, for the page to choose from.
    label: what is served, in a word: base, merged, adapter.
    grades: file that gets what people think of their conversations; None: they are refused.
    friends: origins of other servers: their pages may talk to this one, and this one's page to
        them, for two models side by side.
    links: file of trainees' links, which a later start reads again.
    """

    token: str | None = None
    sampling: SamplingSection = field(default_factory=SamplingSection)
    limits: Limits = field(default_factory=Limits)
    personas: tuple[Mapping[str, str], ...] = ()
    label: str = ""
    grades: Path | None = None
    is_secure: bool = False
    friends: tuple[str, ...] = ()
    links: Path | None = None


class Routes:
    """The routes around a `Desk`. Ready when the desk has its model."""

    def __init__(self, desk: Desk, settings: ServerSettings):
        self._desk = desk
        self._settings = settings
        self._access = Access(settings.token, settings.friends, LinkBook(settings.links))
        self._grades = None if settings.grades is None else GradeBook(settings.grades)
        self._sockets: set[web.WebSocketResponse] = set()
        self._prompts: OrderedDict[str, str] = OrderedDict()
        self.guard: ConnectionGuard | None = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._check], client_max_size=MAX_BODY_BYTES)
        add = app.router.add_get
        add("/", self._page)
        for name in SCRIPTS:
            add(f"/static/{name}", self._script)
        add("/health", self._health)
        add("/ready", self._ready)
        add("/ping", self._ping)
        add("/metrics", self._metrics)
        add("/api/info", self._info)
        add("/api/tokenizer", self._tokenizer)
        add(wire.CHAT_PATH, self._chat)
        app.router.add_post("/api/prompts", self._keep_prompt)
        app.router.add_post("/api/links", self._make_link)
        app.router.add_post("/api/grades", self._grade)
        app.router.add_route("OPTIONS", "/api/info", self._preflight)
        app.on_response_prepare.append(self._tell_friends)  # pyright: ignore[reportArgumentType]
        app.on_shutdown.append(self._close_sockets)  # pyright: ignore[reportArgumentType]
        return app

    # -- access

    @web.middleware
    async def _check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path in OPEN_PATHS or request.method == "OPTIONS":
                response = await handler(request)
                response.force_close()  # who has not said who they are keeps no connection
                return response
            request[VISITOR] = self._access.visitor(request.headers, request.query, request.cookies)
            if self.guard is not None:
                self.guard.known(request.protocol)
            return await handler(request)
        except Denied as denied:
            refusal = self._refused(denied.status, str(denied))
            refusal.force_close()
            return refusal
        except RequestError as error:
            return self._refused(400, str(error))
        except web.HTTPException as error:
            if error.status >= 400:
                self._desk.counts.refused.labels(str(error.status)).inc()
            raise

    def _refused(self, status: int, text: str) -> web.Response:
        self._desk.counts.refused.labels(str(status)).inc()
        return web.Response(status=status, text=text)

    @staticmethod
    def _visitor(request: web.Request, *, owner: bool = False) -> Visitor:
        visitor: Visitor = request[VISITOR]
        if owner and not visitor.is_owner:
            raise Denied(403, "that is for who holds the server's token, a pass is not enough")
        return visitor

    async def _preflight(self, _: web.Request) -> web.StreamResponse:
        """What a browser asks before it sends a friend's request with a token."""
        return web.Response(status=204, headers={"Access-Control-Allow-Headers": "Authorization"})

    async def _tell_friends(self, request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin")
        if origin is not None and self._access.is_friend(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"

    # -- the page

    async def _page(self, request: web.Request) -> web.StreamResponse:
        """The page; a token or pass in its URL becomes a cookie, so that it is not passed on."""
        self._visitor(request)
        shown = {key: request.query[key] for key in ("token", "pass") if key in request.query}
        if not shown or not self._access.has_token:
            friends = "".join(
                f" {friend} ws{friend.removeprefix('http')}" for friend in self._settings.friends
            )
            headers = {"Content-Security-Policy": POLICY.format(friends=friends), **_HEADERS}
            return web.FileResponse(PAGES / "index.html", headers=headers)
        rest = request.url.without_query_params("token", "pass")
        # Relative, so that it holds behind a proxy too.
        answer = web.Response(
            status=303, headers={**_HEADERS, "Location": f"./?{rest.raw_query_string}"}
        )
        if not rest.raw_query_string:
            answer.headers["Location"] = "./"
        secure = self._settings.is_secure or request.headers.get("X-Forwarded-Proto") == "https"
        for key, name in (
            ("token", self._access.token_cookie),
            ("pass", self._access.pass_cookie),
        ):
            if key in shown:
                answer.set_cookie(
                    name, shown[key], max_age=COOKIE_S, httponly=True, samesite="Strict",
                    secure=secure,
                )  # fmt: skip
            elif key == "token":
                answer.del_cookie(name)  # else an owner who tries a link would see the owner's page
        return answer

    async def _script(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGES / request.path.rpartition("/")[2], headers=_HEADERS)

    # -- state

    async def _health(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.StreamResponse:
        desk = self._desk
        is_ready = desk.model is not None
        state = {"ready": is_ready, "slots": desk.num_slots, "taken": desk.num_taken}
        return web.json_response(state, status=200 if is_ready else 503)

    async def _ping(self, _: web.Request) -> web.StreamResponse:
        return web.Response(status=204 if self._desk.model is None else 200)

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        self._visitor(request, owner=True)
        content = self._desk.counts.text()
        return web.Response(body=content, headers={"Content-Type": counts.CONTENT_TYPE})

    async def _info(self, request: web.Request) -> web.StreamResponse:
        visitor, model = self._visitor(request), self._model()
        info = {
            "name": NAME,
            "version": __version__,
            "protocol": wire.PROTOCOL,
            "label": self._settings.label,
            "model_digest": model.model_digest,
            "tokenizer_digest": sha256_bytes(model.tokenizer_file),
            "sample_rate": SAMPLE_RATE,
            "card": model.lm.card,
            "context": model.lm.context,
            "device": str(model.device),
            "slots": self._desk.num_slots,
            "taken": self._desk.num_taken,
            "bare": model.bare,
            "sampling": self._settings.sampling.model_dump(),
            "takes_grades": self._grades is not None,
            "friends": list(self._settings.friends),
            "visitor": "owner" if visitor.is_owner else "trainee",
        }
        if visitor.given is None:
            info |= {
                "voices": model.voices.names,
                "personas": list(self._settings.personas),
                "gives_links": self._access.has_token,
            }
        else:
            given = visitor.given
            info |= {"pass": {"name": given.name, "expires": given.expires}}
        return web.json_response(info)

    async def _tokenizer(self, request: web.Request) -> web.StreamResponse:
        self._visitor(request, owner=True)
        content = self._model().tokenizer_file
        return web.Response(body=content, content_type="application/octet-stream")

    # -- conversations

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        visitor, model = self._visitor(request), self._model()
        wanted = visitor.limited(self._wanted(request.query.items()))
        planned = model.plan(wanted.text_prompt, wanted.voice_prompt, wanted.greeting)
        from pipeline.serving.chat import HEARTBEAT_S, converse

        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=wire.MAX_MESSAGE_BYTES, compress=False
        )
        await ws.prepare(request)
        _bound_unread(request)
        self._sockets.add(ws)
        try:
            limits = self._settings.limits
            if visitor.given is not None:  # a link ends what it began too
                left_s = max(0.0, visitor.given.expires - time.time())
                limits = replace(limits, session_s=min(limits.session_s, left_s))
            await converse(self._desk, request, ws, wanted, planned, limits)
        finally:
            self._sockets.discard(ws)
        return ws

    def _wanted(self, query: Any) -> wire.ChatRequest:
        """What a query asks for, a kept prompt in the place of its id."""
        pairs = list(query)
        wanted = wire.parse_chat_request(pairs, self._settings.sampling)
        prompt_id = dict(pairs).get("prompt_id")
        if not prompt_id:
            return wanted
        if wanted.text_prompt:
            raise RequestError("give text_prompt or prompt_id, not both")
        if prompt_id not in self._prompts:
            raise RequestError(
                f"prompt_id must be one that /api/prompts gave; the last {KEPT_PROMPTS} are kept, "
                f"found {prompt_id[:80]!r}"
            )
        return replace(wanted, text_prompt=self._prompts[prompt_id])

    async def _keep_prompt(self, request: web.Request) -> web.StreamResponse:
        """A prompt that is too long for a URL gets an id for one."""
        self._visitor(request, owner=True)
        text = read_body(PromptBody, await _json(request)).text_prompt.strip()
        if not 0 < len(text) <= MAX_PROMPT_CHARS:
            raise RequestError(
                f"text_prompt must be 1 to {MAX_PROMPT_CHARS} characters, found {len(text)}"
            )
        self._model().plan(text)
        name = sha256_bytes(text.encode())[:24]
        self._prompts[name] = text
        self._prompts.move_to_end(name)
        while len(self._prompts) > KEPT_PROMPTS:
            self._prompts.popitem(last=False)
        return web.json_response({"prompt_id": name})

    async def _make_link(self, request: web.Request) -> web.StreamResponse:
        """A link for a trainee: with its own prompt, which it does not show, and an end."""
        self._visitor(request, owner=True)
        if not self._access.has_token:
            raise RequestError(
                "who has no token needs no link: this server answers on loopback alone. Start it "
                "with DUPLEX_TOKEN set to let others in."
            )
        body = read_body(LinkBody, await _json(request))
        query = body.model_dump(exclude={"name", "hours"}).items()
        wanted = self._wanted((key, value) for key, value in query if value)
        if not wanted.text_prompt and not self._model().bare:
            raise RequestError("a link must hold a prompt, found none: write who the model is")
        self._model().plan(wanted.text_prompt, wanted.voice_prompt, wanted.greeting)
        link = self._access.links.add(
            body.name.strip(), wanted.text_prompt, wanted.voice_prompt, wanted.greeting, body.hours
        )
        return web.json_response({"pass": link, "path": f"/?pass={link}"})

    async def _grade(self, request: web.Request) -> web.StreamResponse:
        visitor, model = self._visitor(request), self._model()
        if self._grades is None:
            raise RequestError(
                "this server keeps no grades: start it for a config, or with --grades FILE"
            )
        content = await _json(request)
        if visitor.given is not None:
            # Whose page does not know the prompt, and is not to say another one.
            content |= {"persona": visitor.given.name, "text_prompt": visitor.given.text_prompt}
        self._grades.add(content, model.model_digest, self._settings.label)
        return web.json_response({"kept": True})

    def _model(self) -> ServedModel:
        if self._desk.model is None:
            raise web.HTTPServiceUnavailable(text="the model is being loaded; see /ready")
        return self._desk.model

    async def _close_sockets(self, _: web.Application) -> None:
        for ws in tuple(self._sockets):
            await ws.close(code=wire.CLOSE_GOING_AWAY, message=b"the server stops")


_HEADERS = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def _bound_unread(request: web.Request) -> None:
    """The kernel would hold megabytes for a client that does not read: minutes of audio."""
    place = None if request.transport is None else request.transport.get_extra_info("socket")
    if place is not None:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD_BYTES)


async def _json(request: web.Request) -> dict[str, Any]:
    """
    Raises:
        RequestError: the body is no JSON object.
    """
    try:
        content = json.loads(await request.text())
    except (ValueError, UnicodeDecodeError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content


class _Runner(web.AppRunner):
    """aiohttp's runner, whose connections are counted and limited."""

    def __init__(self, routes: Routes, desk: Desk, limits: Limits):
        super().__init__(
            routes.app(),
            access_log=None,
            max_line_size=wire.MAX_LINE_BYTES,
            max_field_size=wire.MAX_LINE_BYTES,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=STOP_GRACE_S / 2,
        )
        self._routes, self._desk, self._limits = routes, desk, limits

    async def setup(self) -> None:
        await super().setup()
        assert self.server is not None
        self._routes.guard = ConnectionGuard(self.server, self._limits, self._desk.counts)


def make_runner(desk: Desk, settings: ServerSettings | None = None) -> web.AppRunner:
    """The app with what aiohttp must be told: long request lines, and no access log."""
    settings = settings or ServerSettings()
    return _Runner(Routes(desk, settings), desk, settings.limits)
