"""Who may ask for what. No aiohttp: requests come as plain mappings.

    owner     knows the server's token: in a header, once in a page's URL (then a cookie), or in
              a WebSocket's query, as stock clients have it
    trainee   opened a link (`links`): talks with its prompt alone, and does not see it
    local     on loopback without a token everyone is an owner, but only by a page of our own

Comparisons take constant time. Cookies carry the token's digest in their name: they know no ports,
and two servers of one host would take each other's.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from duplex.errors import RequestError
from pipeline.serving.links import LinkBook, Pass
from pipeline.serving.wire import ChatRequest


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
        links: of trainees.
    """

    def __init__(
        self, token: str | None, friends: Sequence[str] = (), links: LinkBook | None = None
    ):
        self._token = token
        self.links = links or LinkBook()
        mark = hashlib.sha256(f"duplex cookie {token}".encode()).hexdigest()[:8]
        self.token_cookie, self.pass_cookie = f"duplex_token_{mark}", f"duplex_pass_{mark}"
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
        if "pass" in query:
            return Visitor(self.read_pass(query["pass"]))
        # A browser sends cookies for whatever page asks: only our own may use them.
        if self.token_cookie in cookies or self.pass_cookie in cookies:
            self._check_origin(headers)
        if _equal(cookies.get(self.token_cookie, ""), token):
            return Visitor()
        if self.pass_cookie in cookies:
            return Visitor(self.read_pass(cookies[self.pass_cookie]))
        raise Denied(
            401, "needs the server's token: `Authorization: Bearer …`, or `?token=…` in the URL"
        )

    def read_pass(self, link: str) -> Pass:
        """
        Raises:
            Denied: no link of this server's, or one that is over.
        """
        found = self.links.find(link)
        if found is None:
            raise Denied(
                401, "that link is none of this server's, or it is over; ask for a new one"
            )
        return found

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
    # Headers may hold any bytes, as surrogates.
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), secret.encode())
