"""RunPod's REST API v2: pods are listed, created, started, stopped, deleted. Over httpx.

Shapes as in its OpenAPI schema (https://docs.runpod.io/api-reference-v2/overview); the pages of a
list, which the schema of August 2026 lacks, as RunPod's own runpodctl reads them. For v1 RunPod
named November 15, 2026 as the end.

What comes back is a stranger's: sizes are bounded, ids are checked before they go into a host
name, and a server's text reaches a message short and without keys. Met here, most of it of v1: a
create that answered 500 and made the pod; lists that lag behind creates; prices as strings; what is
refused for want of a GPU comes as 4xx or 500 with a sentence and no code of its own.
"""

from __future__ import annotations

import json
import math
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

import httpx

from duplex.errors import PodError, RequestError
from duplex.tokens import SHORTEST_SECRET, masked
from pipeline.engines.redaction import redacted
from pipeline.pods.bill import parse_time
from pipeline.pods.clock import Clock

BASE_URL = "https://api.runpod.io/v2"
KEY_NAME = "RUNPOD_API_KEY"
USER_AGENT = "duplex-workbench"
MAX_REPLY_BYTES = 16 << 20
TIMEOUT_S = 60.0
ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 120.0
PAGE_SIZE, MAX_PAGES = 1000, 20

# What is not paid for, as v2 says of these two alone. Whatever else it says or will say counts as
# paid for.
FREE = frozenset({"EXITED", "TERMINATED"})

BAD_REQUEST, CONFLICT = 400, 409
_POD_ID = re.compile(r"[A-Za-z0-9]{1,64}")
_NO_CAPACITY = re.compile(
    r"no longer any instances|no instances currently available|not have the resources"
    r"|not enough free gpus|out of (?:stock|capacity)|no .{0,40}(?:capacity|available)",
    re.IGNORECASE,
)


@cache
def tls() -> ssl.SSLContext:
    """One for all connections: reading the certificates takes longer than a request."""
    return httpx.create_ssl_context()


class ApiTrouble(PodError):
    """The API did not do what was asked, or nobody knows whether it did.

    status: of HTTP; None where no answer came, or none that could be read.
    """

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class NoCapacity(ApiTrouble):
    """No machine with such a GPU is free."""


class NotThere(ApiTrouble):
    """No such pod."""


class Refused(ApiTrouble):
    """Asked properly, and refused: another try will not help."""


@dataclass(frozen=True)
class Pod:
    """What the API says of a pod. usd_h None: it named no price. started_s: since when it runs, or
    was made where it has not started; None: it does not say. When a pod ended is nowhere in v2.

    status: PROVISIONING, STARTING, RUNNING, ERROR, EXITED (stopped), TERMINATED.
    """

    id: str
    name: str
    status: str
    usd_h: float | None = None
    started_s: float | None = None

    @property
    def is_running(self) -> bool:
        """Whether it is paid for, ready or not."""
        return self.status not in FREE


class RunPod:
    """A connection to the API.

    Args:
        secrets: what must appear in no message, besides the key.
    """

    def __init__(
        self,
        key: str,
        clock: Clock,
        *,
        base_url: str = BASE_URL,
        secrets: Iterable[str] = (),
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
    ):
        self._secrets = [s for s in (key, *secrets) if len(s) >= SHORTEST_SECRET]
        self._clock, self._attempts = clock, attempts
        self._client = httpx.Client(
            base_url=base_url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}", "User-Agent": USER_AGENT},
            timeout=timeout_s,
            verify=tls(),
            follow_redirects=False,  # a redirect would carry the key elsewhere
        )

    def close(self) -> None:
        self._client.close()

    # -- calls

    def list_pods(self) -> list[Pod]:
        """
        Raises:
            ApiTrouble: no answer that can be read, after all attempts.
            RequestError: the key is not accepted.
        """
        entries: list[object] = []
        cursor = ""
        for _ in range(MAX_PAGES):
            path = f"pods?limit={PAGE_SIZE}" + (
                f"&cursor={quote(cursor, safe='')}" if cursor else ""
            )
            page = self._patiently("GET", path)
            found = page.get("pods") if isinstance(page, dict) else page
            if not isinstance(page, dict) or not isinstance(found, list):
                raise ApiTrouble(
                    f"the list of pods must be an array under `pods`, found {type(found).__name__}"
                )
            entries += found
            cursor = _next_page(page)
            if not cursor:
                return [pod for entry in entries if (pod := read_pod(entry)) is not None]
        raise ApiTrouble(f"the list of pods must end within {MAX_PAGES} pages, found more")

    def create(self, body: Mapping[str, Any]) -> Pod:
        """Asks once: a second request might make a second pod. 429 is tried again, since that one
        was turned away at the door.

        Raises:
            NoCapacity, Refused, ApiTrouble: nothing was made, or nobody knows: look for the name.
        """
        value = self._patiently("POST", "pods", body, retry_on=frozenset({429}))
        pod = read_pod(value)
        if pod is None:
            raise ApiTrouble("the answer to a create must hold a pod, found none")
        return pod

    def start(self, pod_id: str) -> None:
        """
        Raises:
            Refused, NoCapacity: its host has no GPU free. NotThere. ApiTrouble.
        """
        self._act(pod_id, "start")

    def stop(self, pod_id: str) -> None:
        """The API calls stopping a stopped pod a conflict, and it is none here.

        Raises:
            NotThere: it is gone. Refused: it runs, and cannot be stopped. ApiTrouble.
        """
        try:
            self._act(pod_id, "stop")
        except Refused as refused:
            if refused.status != CONFLICT or self.get(pod_id).is_running:
                raise

    def _act(self, pod_id: str, action: str) -> None:
        self._patiently(
            "POST", f"pods/{_checked(pod_id)}/action", {"action": action}, wants_json=False
        )

    def delete(self, pod_id: str) -> None:
        """Deletes it; one that is gone already is as good."""
        try:
            self._patiently("DELETE", f"pods/{_checked(pod_id)}", wants_json=False)
        except NotThere:
            return

    def get(self, pod_id: str) -> Pod:
        pod = read_pod(self._patiently("GET", f"pods/{_checked(pod_id)}"))
        if pod is None or pod.id != pod_id:
            raise ApiTrouble(f"the answer must hold pod {pod_id}, found another or none")
        return pod

    def update_env(self, pod_id: str, env: Mapping[str, str]) -> None:
        """Replaces a stopped pod's environment."""
        self._patiently("PATCH", f"pods/{_checked(pod_id)}", {"env": dict(env)}, wants_json=False)

    # -- one exchange

    def _patiently(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        wants_json: bool = True,
        retry_on: frozenset[int | None] | None = None,
    ) -> Any:
        """Asks until an answer comes; `retry_on` None: after whatever may go away by itself."""
        wait_s = FIRST_WAIT_S
        for attempt in range(1, self._attempts + 1):
            try:
                return self._once(method, path, body, wants_json)
            except (NoCapacity, NotThere, Refused):
                raise
            except ApiTrouble as trouble:
                may_retry = retry_on is None or trouble.status in retry_on
                if attempt == self._attempts or not may_retry:
                    raise
                asked_s = trouble.retry_after_s if isinstance(trouble, _Busy) else None
                self._clock.sleep(min(LONGEST_WAIT_S, wait_s if asked_s is None else asked_s))
                wait_s = min(LONGEST_WAIT_S, wait_s * 2)
        raise AssertionError("the last attempt returns or raises")

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None, wants_json: bool
    ) -> Any:
        place = f"RunPod's API ({method} /{path})"
        try:
            with self._client.stream(method, path, json=body) as response:
                content = _bounded(response)
        except httpx.HTTPError as error:
            raise ApiTrouble(
                f"{place} must answer, found {self.clean(str(error) or type(error).__name__)}"
            ) from None
        status = response.status_code
        said = self.clean(
            _problem(content) if status >= 400 else content.decode("utf-8", "replace")
        )
        if status in (401, 403):
            raise RequestError(
                f"{place} must accept the key of {KEY_NAME}, answered {status}. It comes from the "
                "environment variable of that name; make one with rights to pods at "
                "https://console.runpod.io/user/settings, and export it."
            )
        if status == 404:
            raise NotThere(f"{place} answered 404: {said}", status)
        if status == 429:
            raise _Busy(f"{place} answered 429: {said}", response.headers.get("Retry-After"))
        if status >= 400 and _NO_CAPACITY.search(said):
            raise NoCapacity(f"{place} answered {status}: {said}", status)
        if status >= 500 or status in (408, 425):
            raise ApiTrouble(f"{place} answered {status}: {said}", status)
        if not 200 <= status < 300:
            raise Refused(f"{place} answered {status}: {said}", status)
        if not wants_json:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise ApiTrouble(f"{place} must answer in JSON, found {said[:80]!r}") from None

    def clean(self, text: str) -> str:
        return redacted(masked(text, self._secrets))


class _Busy(ApiTrouble):
    def __init__(self, message: str, retry_after: str | None):
        super().__init__(message, 429)
        seconds = _number(retry_after)
        self.retry_after_s = seconds if seconds is not None and seconds > 0 else None


def _bounded(response: httpx.Response) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise httpx.ReadError("a reply that is larger than 16 MB")
    return bytes(content)


def _checked(pod_id: str) -> str:
    assert _POD_ID.fullmatch(pod_id), "ids are checked where they come in"
    return pod_id


def read_pod(value: object) -> Pod | None:
    """A pod from the API's JSON; None where it is none."""
    if not isinstance(value, dict):
        return None
    pod_id, name = value.get("id"), value.get("name")
    if not isinstance(pod_id, str) or not _POD_ID.fullmatch(pod_id):
        return None
    price = _number(value.get("cost"))
    return Pod(
        id=pod_id,
        name=name if isinstance(name, str) else "",
        status=str(value.get("status", ""))[:32].upper(),
        usd_h=price if price is not None and 0 < price < 1000 else None,
        started_s=parse_time(value.get("startedAt") or value.get("createdAt")),
    )


def _next_page(page: Mapping[str, Any]) -> str:
    """Where the list goes on; empty: nowhere."""
    pagination = page.get("pagination")
    cursor = pagination.get("nextCursor") if isinstance(pagination, dict) else None
    return cursor if isinstance(cursor, str) else ""


def _problem(content: bytes) -> str:
    """What an error says (RFC 9457: `detail`, and `errors` where the request breaks the schema);
    all of it where it is written otherwise."""
    text = content.decode("utf-8", "replace")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, dict) or not isinstance(value.get("detail"), str):
        return text
    errors = value.get("errors")
    return "; ".join(map(str, [value["detail"], *(errors if isinstance(errors, list) else [])]))


def _number(value: object) -> float | None:
    """Prices come as numbers and as strings."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
