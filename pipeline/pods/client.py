"""What the pod itself says, through RunPod's proxy: plain HTTP, one host name a port.

    https://<pod>-8998.proxy.runpod.net/ping, /ready      the model server
    https://<pod>-8999.proxy.runpod.net/ping, /status, …  our agent, by the token

The proxy stands behind Cloudflare: an answer that takes more than 100 s is cut off, so files come
in pieces. Where nothing listens it answers 404 or 502 itself. All of it is a stranger's word:
bounded, checked, and without control characters before a terminal sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast, get_args

import httpx

from duplex.errors import PodError
from pipeline.pods.api import USER_AGENT, tls
from pipeline.pods.lifecycle import PipelineState
from pipeline.pods.names import Offered, read_offers
from pipeline.pods.request import AGENT_PORT, SERVE_PORT

URL_TEMPLATE = "https://{pod}-{port}.proxy.runpod.net"
TIMEOUT_S = 30.0
MAX_JSON_BYTES, MAX_LOG_BYTES = 4 << 20, 4 << 20
PIECE_BYTES = 8 << 20
_CONTROL = re.compile(r"[^\n\t\x20-\x7e\u00a0-\U0010ffff]")
STAGE_STATES = ("done", "stale", "running", "failed", "missing")


def plain(text: str) -> str:
    """`text` without what would move a terminal's cursor, colour it, or worse."""
    return _CONTROL.sub("", text)


@dataclass(frozen=True)
class PodStatus:
    """What the agent says of the pipeline. stages: (name, state, message)."""

    pipeline: PipelineState
    stages: tuple[tuple[str, str, str], ...] = ()
    config_sha256: str | None = None
    message: str = ""
    spent_usd: float | None = None

    @property
    def num_done(self) -> int:
        return sum(state == "done" for _, state, _ in self.stages)


class PodClient:
    """The services of one pod.

    Args:
        template: with `{pod}` and `{port}`.
        agent: another place of the agent than the template's.
    """

    def __init__(
        self,
        pod_id: str,
        token: str,
        *,
        template: str = URL_TEMPLATE,
        agent: str | None = None,
        timeout_s: float = TIMEOUT_S,
    ):
        self._token = token
        self.server = template.format(pod=pod_id, port=SERVE_PORT).rstrip("/")
        self.agent = (agent or template.format(pod=pod_id, port=AGENT_PORT)).rstrip("/")
        self._client = httpx.Client(
            headers={"User-Agent": USER_AGENT}, timeout=timeout_s, verify=tls(),
            follow_redirects=False,
        )  # fmt: skip

    def close(self) -> None:
        self._client.close()

    # -- probes: they answer no, whatever goes wrong

    def agent_answers(self) -> bool:
        return self._status_of(f"{self.agent}/ping") in (200, 204)

    def server_is_ready(self) -> bool:
        """`/ping` is 204 while the model loads; `/ready` says that a conversation could begin."""
        if self._status_of(f"{self.server}/ping") != 200:
            return False
        return self._status_of(f"{self.server}/ready") == 200

    def _status_of(self, url: str) -> int | None:
        try:
            with self._client.stream("GET", url) as response:
                return response.status_code
        except httpx.HTTPError:
            return None

    # -- asked by the token

    def status(self) -> PodStatus:
        """
        Raises:
            PodError: no answer, or none that can be read.
        """
        return read_status(self._json("/status"))

    def logs(self, tail: int) -> str:
        with self._ask("/logs", {"tail": str(tail)}) as response:
            content = _bounded(response, MAX_LOG_BYTES)
        return plain(content.decode("utf-8", "replace")).replace(self._token, "***")

    def files(self) -> tuple[list[Offered], int]:
        """What may be fetched, and how many entries of the list were refused."""
        return read_offers(self._json("/files"))

    def piece(self, offer: Offered, start: int) -> bytes:
        """The bytes of a file from `start` on, one piece at most.

        Raises:
            PodError: no answer, or not the bytes that were asked for.
        """
        end = min(offer.num_bytes, start + PIECE_BYTES) - 1
        # What is compressed on the way has other bytes than those that were asked for.
        headers = {"Range": f"bytes={start}-{end}", "Accept-Encoding": "identity"}
        with self._ask(f"/files/{offer.name}", None, headers) as response:
            content = _bounded(response, end - start + 1)
            given = response.headers.get("Content-Range")
        if response.status_code == 200 and start == 0 and len(content) == offer.num_bytes:
            return content
        wanted = f"bytes {start}-{end}/{offer.num_bytes}"
        if response.status_code != 206 or given != wanted or not content:
            raise PodError(
                f"{offer.name}: the pod must send {wanted}, found {plain(str(given))[:80]} with "
                f"{len(content)} bytes (HTTP {response.status_code})"
            )
        return content

    def _json(self, path: str) -> Any:
        with self._ask(path) as response:
            content = _bounded(response, MAX_JSON_BYTES)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise PodError(f"the pod's {path} must be JSON, found {len(content)} bytes") from None

    @contextmanager
    def _ask(
        self, path: str, query: dict[str, str] | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        headers = {"Authorization": f"Bearer {self._token}"} | (headers or {})
        try:
            with self._client.stream(
                "GET", f"{self.agent}{path}", params=query, headers=headers
            ) as response:
                if response.status_code == 401:
                    raise PodError(
                        f"the pod's {path} must accept our token, answered 401: it was made with "
                        "another one. `duplex pod down CONFIG --delete`, then `up` again."
                    )
                if not 200 <= response.status_code < 300:
                    raise PodError(
                        f"the pod's {path} must answer, answered HTTP {response.status_code}"
                    )
                yield response
        except httpx.HTTPError as error:
            raise PodError(f"the pod's {path} must answer, found {type(error).__name__}") from None


def _bounded(response: httpx.Response, limit: int) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > limit:
            raise PodError(f"the pod must send at most {limit} bytes here, sent more")
    return bytes(content)


def read_status(value: object) -> PodStatus:
    """An agent's `/status`; what is strange in it is left out."""
    if not isinstance(value, dict):
        raise PodError(f"the pod's /status must be an object, found {type(value).__name__}")
    state = value.get("pipeline")
    stages = []
    rows = value.get("stages")
    for row in rows[:20] if isinstance(rows, list) else ():
        if isinstance(row, dict) and row.get("state") in STAGE_STATES:
            name, message = str(row.get("name", ""))[:40], str(row.get("message") or "")[:500]
            stages.append((plain(name), str(row["state"]), plain(message)))
    spent, digest = value.get("spent_usd"), value.get("config_sha256")
    return PodStatus(
        pipeline=cast(PipelineState, state) if state in get_args(PipelineState) else "unknown",
        stages=tuple(stages),
        config_sha256=digest if isinstance(digest, str) else None,
        message=plain(str(value.get("message") or "")[:500]),
        spent_usd=float(spent) if isinstance(spent, int | float) else None,
    )
