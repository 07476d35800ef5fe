"""Several machines in one training run: they find each other, compare, and end together.

The first node listens at `train.runtime.main_address`; each other one connects to it, and the
connection lives as long as the run. JSON lines travel on it:

    first ─► node   {"duplex": 1, "proof": file name, "challenge": hex}
    node ─► first   {"node": 1, "host": "gpu-2", "proof": hex, "challenge": hex, "claims": {…}}
    first ─► node   {"refused": ["…"]} or {"welcome": true, "proof": hex}
    first ─► node   {"start": port of torch's store}           once all are there
    both ways       {"alive": true} every 5 s, {"done": true}, {"error": class, "message": …}
    first ─► node   {"end": true}

**Proof.** The first node writes a random file into the run folder, and each side answers the
other's challenge with an HMAC under it. So a node that does not share the folder is found before it
costs anything, nobody else on the network takes part, and no node follows a stranger who listens at
the address. What torch opens beside this connection has
no such check: the nodes' network must be private.

**Claims** are all that must be equal: settings, data, code, packages. No secret is among them.

A connection that ends, or is silent for a minute, is a node that is gone. Imports no torch.
"""

from __future__ import annotations

import hashlib
import hmac
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from duplex.config_train import split_address
from duplex.errors import RequestError, WorkError
from duplex.files import write_atomic
from training.links import (
    Event,
    Link,
    Place,
    differences,
    free_port,
    interface_of,
    printable,
)

PROTOCOL = 1
HELLO_S = 120.0  # for a node to say who it is: it reads its files first, over a network perhaps
SEEN_WITHIN_S = 10.0  # a network file system may be late
RETRY_S = 0.5
MOST_STRANGERS = 32  # connections that have not yet said who they are, besides the nodes'
PROOF_PREFIX = ".join-"
WELCOME = "welcome "  # before a node's challenge: no answer to one side serves the other
_PROOF_NAME = re.compile(re.escape(PROOF_PREFIX) + "[0-9a-f]{16}")


class Team:
    """This node and those that it is linked to; `run_workers` takes part in it.

    Used in a `with`: an error inside is told to the others, which end with it.
    """

    def __init__(self, processes: int, nodes: int, node: int, join_timeout_s: float):
        self.events: queue.Queue[Event] = queue.Queue()
        self.node, self.nodes, self._processes = node, nodes, processes
        self.join_timeout_s = join_timeout_s
        self._links: dict[int, Link] = {}
        self._hosts: dict[int, str] = {}
        self.place = Place(0, processes)

    @property
    def others(self) -> frozenset[int]:
        return frozenset(self._links)

    def name_of(self, node: int) -> str:
        host = self._hosts.get(node)
        return f"node {node} ({host})" if host else f"node {node}"

    def tell(self, *, but: int | None = None, **message: Any) -> None:
        for node, link in list(self._links.items()):
            if node != but:
                link.send(**message)

    def _set_place(self, host: str, port: int, local_host: str) -> None:
        here = self._processes // self.nodes
        interface = interface_of(local_host)
        self.place = Place(here, self._processes, self.node * here, host, port, interface)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None:
            ours = type(error).__name__ if isinstance(error, WorkError) else "WorkError"
            text = str(error) if isinstance(error, Exception) else "it was stopped"
            self.tell(error=ours, message=f"{self.name_of(self.node)}: {text}", order=1)
        for link in list(self._links.values()):
            link.close()


class FirstNode(Team):
    """Waits for the others.

    Args:
        folder: where the proof is written; all nodes must see it.
        claims: what each other node must say of itself too.
    """

    def __init__(
        self,
        address: str,
        *,
        processes: int,
        nodes: int,
        join_timeout_s: float,
        folder: Path,
        claims: Mapping[str, Any],
        report: Callable[[str], None],
    ):
        super().__init__(processes, nodes, 0, join_timeout_s)
        self._address, self._folder = address, folder
        self._claims, self._report = dict(claims), report
        self._admitting = threading.Lock()
        self._strangers = threading.Semaphore(MOST_STRANGERS + nodes)
        self._closed = False
        self._secret = secrets.token_hex(16)
        self._proof = folder / f"{PROOF_PREFIX}{secrets.token_hex(8)}"
        self._refused: list[str] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        """
        Raises:
            RequestError: the address cannot be listened at.
            WorkError: not all nodes came in time.
        """
        host, port = split_address(self._address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # A name may lead to a loopback address on its own machine: all of them, then.
        inside = host in ("localhost", "::1") or host.startswith("127.")
        try:
            self._listener = socket.create_server((host if inside else "", port), family=family)
        except OSError as error:
            raise RequestError(
                f"train.runtime.main_address must be free on node 0, {self._address} is not: "
                f"{error.strerror}. End what listens there, or take another port on all nodes."
            ) from None
        for old in self._folder.glob(f"{PROOF_PREFIX}*"):  # of a run that was killed
            old.unlink(missing_ok=True)
        write_atomic(self._proof, self._secret.encode())
        try:
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
            self._gather()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        finally:
            self._listener.close()
            self._proof.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._admitting:
            self._closed = True
        if kind is None:
            self.tell(end=True)
        super().__exit__(kind, error, _)

    def _gather(self) -> None:
        deadline = time.monotonic() + self.join_timeout_s
        self._report(
            f"waiting at {self._address} for {self.nodes - 1} more of {self.nodes} nodes, at most "
            f"{self.join_timeout_s:g} s"
        )
        while len(self._links) < self.nodes - 1:
            try:
                kind, node, message = self.events.get(timeout=max(0, deadline - time.monotonic()))
            except queue.Empty:
                raise WorkError(self._describe_missing()) from None
            if kind == "note" and message is not None:
                self._report(message["note"])
            elif message is None or "error" in message:
                with self._admitting:
                    gone = self._links.pop(node, None)
                if gone is not None:
                    gone.close()
                    self._report(f"{self.name_of(node)} has left again")
        links = list(self._links.values())
        port = free_port()
        self._set_place(links[0].local_host, port, links[0].local_host)
        self.tell(start=port)

    def _describe_missing(self) -> str:
        missing = [str(n) for n in range(1, self.nodes) if n not in self._links]
        turned_away = f" Turned away: {'; '.join(self._refused[-3:])}." if self._refused else ""
        return (
            f"all {self.nodes} nodes must join within {self.join_timeout_s:g} s "
            f"(train.runtime.join_timeout_s), found node {', '.join(missing)} missing."
            f"{turned_away} Nothing was trained. Start the same command there with its "
            f"train.runtime.node_rank; it must reach {self._address} of this machine."
        )

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:  # closed: all are here, or it was given up
                return
            if not self._strangers.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._admit, args=(connection, address[0]), daemon=True).start()

    def _admit(self, connection: socket.socket, address: str) -> None:
        link = Link(connection)
        # Of the whole message: one byte now and then would keep a connection for ever.
        too_late = threading.Timer(HELLO_S, link.close)
        too_late.daemon = True
        too_late.start()
        try:
            challenge = secrets.token_hex(16)
            link.send(duplex=PROTOCOL, proof=self._proof.name, challenge=challenge)
            hello = link.receive(HELLO_S) or {}
            too_late.cancel()
            expected = _sign(self._secret, challenge)
            if not hmac.compare_digest(expected, str(hello.get("proof", "")).encode()):
                if "node" in hello:
                    self._turn_away(link, f"a node at {address}", [_not_shared(self._folder)])
                link.close()
                return
            node, host = int(hello["node"]), printable(str(hello["host"]))
            reasons = differences(self._claims, hello["claims"])
            with self._admitting:
                if not 0 < node < self.nodes:
                    reasons = [f"node_rank must be 1 to {self.nodes - 1} there, found {node}"]
                elif not reasons and node in self._links:
                    reasons = [f"{self.name_of(node)} is here already"]
                elif not reasons and self._closed:
                    reasons = ["node 0 waits no longer"]
                if not reasons:
                    self._hosts[node] = host
                    answer = _sign(self._secret, WELCOME + str(hello["challenge"])).decode()
                    link.send(welcome=True, proof=answer)
                    self._links[node] = link
            if reasons:
                self._turn_away(link, f"node {node} ({host})", reasons)
                link.close()
                return
            self._note(f"{self.name_of(node)} has joined")
            link.follow(node, self.events)
        except (KeyError, TypeError, ValueError, AttributeError):
            link.close()
        finally:
            too_late.cancel()
            self._strangers.release()

    def _turn_away(self, link: Link, who: str, reasons: list[str]) -> None:
        link.send(refused=reasons)
        self._refused.append(f"{who}: {'; '.join(reasons)}")
        self._note(f"{who} was turned away: {'; '.join(reasons)}")

    def _note(self, note: str) -> None:
        self.events.put(("note", 0, {"note": note}))


class OtherNode(Team):
    """A node that has reached the first one."""

    def __init__(
        self, link: Link, *, processes: int, nodes: int, node: int, join_timeout_s: float, host: str
    ):
        super().__init__(processes, nodes, node, join_timeout_s)
        self._links[0], self._host = link, host

    def introduce(
        self, folder: Path, claims: Mapping[str, Any], report: Callable[[str], None]
    ) -> None:
        """Say who this is, and wait until all nodes are there.

        Args:
            folder: as the first node's, seen from here.

        Raises:
            RequestError: the first node refuses this one; says why.
            WorkError: the first node is gone, gave up, or is something else.
        """
        link = self._links[0]
        hello = link.receive(HELLO_S) or {}
        name, challenge = str(hello.get("proof", "")), str(hello.get("challenge", ""))
        if hello.get("duplex") != PROTOCOL or not _PROOF_NAME.fullmatch(name):
            raise WorkError(
                "train.runtime.main_address must lead to node 0 of this run, in the same version; "
                "something else answers there, or it has just ended."
            )
        secret = _read_soon(folder / name)
        ours = secrets.token_hex(16)
        link.send(
            node=self.node,
            host=socket.gethostname(),
            proof="" if secret is None else _sign(secret, challenge).decode(),
            challenge=ours,
            claims=dict(claims),
        )
        answer = link.receive(HELLO_S) or {}
        if "refused" in answer:
            reasons = "\n".join(f"  - {printable(str(one))}" for one in answer["refused"])
            raise RequestError(f"node 0 turned this node away; nothing was trained:\n{reasons}")
        if "welcome" not in answer:
            raise WorkError("node 0 must answer a node that joins, it ended. See its message.")
        proof = str(answer.get("proof", "")).encode()
        if secret is None or not hmac.compare_digest(_sign(secret, WELCOME + ours), proof):
            raise WorkError(
                "train.runtime.main_address must lead to node 0 of this run: who answers there "
                "does not know this run folder. Take another port, or see who listens there."
            )
        report(f"node {self.node} of {self.nodes} has joined; waiting for the others")
        link.follow(0, self.events)
        try:
            _, _, message = self.events.get(timeout=self.join_timeout_s)
        except queue.Empty:
            raise WorkError(
                f"node 0 must start within {self.join_timeout_s:g} s "
                "(train.runtime.join_timeout_s), it did not."
            ) from None
        if message is None or "start" not in message:
            raise WorkError(f"node 0 ended before it began: {(message or {}).get('message', '')}")
        self._set_place(self._host, int(message["start"]), link.local_host)

    def wait_for_end(self) -> bool:
        """Whether the first node says that it has handed in what was trained.

        Raises:
            WorkError: it says that it failed.
        """
        while True:
            kind, _, message = self.events.get()
            if kind != "node":
                continue
            if message is None or "end" in message:
                return message is not None
            if "error" in message:
                raise WorkError(str(message["message"]))


def connect(address: str, timeout_s: float, wait: Callable[[], bool] = lambda: True) -> Link | None:
    """A link to the first node, which may start later than this one.

    Args:
        wait: asked after each attempt that failed; False: give up, None is returned.

    Raises:
        WorkError: it did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while wait():
        try:
            return Link(socket.create_connection(split_address(address), timeout=5))
        except OSError as error:
            if time.monotonic() > deadline:
                raise WorkError(
                    f"node 0 must answer at {address} (train.runtime.main_address) within "
                    f"{timeout_s:g} s (train.runtime.join_timeout_s), found: {error}. Start the "
                    "run there, or open that port between the nodes."
                ) from None
        time.sleep(RETRY_S)
    return None


def _sign(secret: str, challenge: str) -> bytes:
    return hmac.new(secret.encode(), challenge.encode(), hashlib.sha256).hexdigest().encode()


def _read_soon(path: Path) -> str | None:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        try:
            return path.read_text()
        except OSError:
            if time.monotonic() > deadline:
                return None
            with suppress(OSError):
                list(path.parent.iterdir())  # which makes a network file system look again
            time.sleep(RETRY_S)


def _not_shared(folder: Path) -> str:
    return (
        f"all nodes must share the run root, and it does not see {folder} as node 0 does: give it "
        "by --runs where it is mounted there"
    )
