"""Who may ask for what. No aiohttp: requests come as plain mappings.

    owner     knows the server's token: in a header, once in a page's URL (then a cookie), or in
              a WebSocket's query, as stock clients have it
    trainee   holds a pass: a prompt, a name and an end, signed with the token. Talks with that
              prompt alone and does not see it
    local     on loopback without a token everyone is an owner, but only by a page of our own

A pass is `payload.signature` in URL-safe base64: JSON and its HMAC-SHA256. Another token ends all
passes. Comparisons take constant time.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlsplit

from duplex.errors import RequestError
from pipeline.serving.wire import ChatRequest

TOKEN_COOKIE = "duplex_token"
PASS_COOKIE = "duplex_pass"
LONGEST_PASS_H = 24 * 31
NAME_CHARS = 80


@dataclass(frozen=True)
class Pass:
    """What a trainee was given. expires: seconds since 1970."""

    name: str
    text_prompt: str
    voice_prompt: str
    greeting: str
    expires: int

    def signed(self, token: str) -> str:
        payload = json.dumps(asdict(self), separators=(",", ":"), ensure_ascii=False).encode()
        return f"{_encode(payload)}.{_encode(_signature(payload, token))}"


@dataclass(frozen=True)
class Visitor:
    """Who asks: an owner, or a trainee with a pass."""

    given: Pass | None = None

    @property
    def is_owner(self) -> bool:
        return self.given is None

    def limited(self, wanted: ChatRequest) -> ChatRequest:
        """A request as the visitor may make it: a trainee's has the prompt of the pass.

        Raises:
            RequestError: a trainee asks for another.
        """
        if self.given is None:
            return wanted
        if wanted.text_prompt or wanted.voice_prompt or wanted.greeting:
            raise RequestError("a pass brings its own prompt and voice; leave them out of the URL")
        own = self.given
        return replace(
            wanted,
            text_prompt=own.text_prompt,
            voice_prompt=own.voice_prompt,
            greeting=own.greeting,
        )


class Denied(Exception):
    """status: of HTTP."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Access:
    """The rules of one server.

    Args:
        token: None: loopback alone, and everyone is an owner.
        friends: origins of other servers, whose pages may ask as our own may.
    """

    def __init__(self, token: str | None, friends: Sequence[str] = ()):
        self._token = token
        self._friends = frozenset(friend.rstrip("/") for friend in friends)

    def is_friend(self, origin: str | None) -> bool:
        return origin is not None and origin in self._friends

    @property
    def has_token(self) -> bool:
        return self._token is not None

    def visitor(
        self, headers: Mapping[str, str], query: Mapping[str, str], cookies: Mapping[str, str]
    ) -> Visitor:
        """
        Raises:
            Denied: 401 without what is needed, 403 from a page of someone else.
        """
        token = self._token
        if token is None:
            self._check_local(headers)
            return Visitor()
        scheme, _, bearer = headers.get("Authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else query.get("token", "")
        if shown:
            if _equal(shown, token):
                return Visitor()
            raise Denied(401, "that is not this server's token")
        # A browser sends cookies for whatever page asks: only our own may use them.
        if "pass" in query:
            return Visitor(self.read_pass(query["pass"]))
        if TOKEN_COOKIE in cookies or PASS_COOKIE in cookies:
            self._check_origin(headers)
        if _equal(cookies.get(TOKEN_COOKIE, ""), token):
            return Visitor()
        if PASS_COOKIE in cookies:
            return Visitor(self.read_pass(cookies[PASS_COOKIE]))
        raise Denied(
            401, "needs the server's token: `Authorization: Bearer …`, or `?token=…` in the URL"
        )

    def read_pass(self, text: str) -> Pass:
        """
        Raises:
            Denied: not signed by this server's token, or over.
        """
        assert self._token is not None
        payload, _, signature = text.partition(".")
        content = _decode(payload)
        if not content or not hmac.compare_digest(
            _decode(signature), _signature(content, self._token)
        ):
            raise Denied(401, "that pass is none of this server's; ask for a new link")
        found = Pass(**json.loads(content))
        if found.expires < time.time():
            raise Denied(401, "that pass is over; ask for a new link")
        return found

    def sign(self, name: str, wanted: ChatRequest, hours: float) -> str:
        """A pass with the prompt of `wanted`.

        Raises:
            RequestError: no token to sign with, or not a time or name to give.
        """
        if self._token is None:
            raise RequestError(
                "a link for others must be signed with a token, this server has none. Start it "
                "with DUPLEX_TOKEN set."
            )
        if not 0 < hours <= LONGEST_PASS_H:
            raise RequestError(f"hours must be more than 0 and at most {LONGEST_PASS_H}")
        if not 0 < len(name) <= NAME_CHARS:
            raise RequestError(f"name must be 1 to {NAME_CHARS} characters, found {len(name)}")
        expires = int(time.time() + hours * 3600)
        given = Pass(name, wanted.text_prompt, wanted.voice_prompt, wanted.greeting, expires)
        return given.signed(self._token)

    def _check_local(self, headers: Mapping[str, str]) -> None:
        # Any page in the user's browser can reach loopback: only our own may talk to us.
        self._check_origin(headers)
        # A foreign name that was made to point at loopback would pass the line above.
        if not is_loopback(_host_name(headers.get("Host", ""))):
            raise Denied(403, "must be asked as localhost: it has no token")

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        origin = headers.get("Origin")
        if self.is_friend(origin):
            return
        # A proxy in front of a pod may put its own name into Host; browsers cannot set the other.
        hosts = {headers.get("Host", ""), headers.get("X-Forwarded-Host", "")} - {""}
        if origin is not None and _authority(origin) not in hosts:
            raise Denied(403, f"must be asked by its own page, not by {origin[:200]}")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _authority(origin: str) -> str:
    """host:port of an origin; "" of `null`, which sandboxed pages and files send."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _equal(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode(), secret.encode())


def _signature(payload: bytes, token: str) -> bytes:
    # Another use of the token than showing it: a signature tells nothing about it.
    key = hmac.new(token.encode(), b"duplex pass", hashlib.sha256).digest()
    return hmac.new(key, payload, hashlib.sha256).digest()


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
