"""The local state of a config's pods: every pod that was ever asked for, what ran, what it cost.

    <run root>/.pods/<config>/state.json   no secrets
    <run root>/.pods/<config>/token        mode 0600; what the pod's services ask for
    <run root>/.pods/<config>/.lock        one `up` or `run` at a time

A pod is written down, with its unique name, before it is asked for. Whatever becomes of the
answer, or of this process, it is found again by that name.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from duplex.base import Frozen
from duplex.datafiles import describe_faults
from duplex.errors import CorruptFileError
from duplex.files import write_json
from pipeline.pods.bill import Span, closed, opened, spent_usd
from pipeline.pods.request import pod_name

FOLDER, STATE, TOKEN = ".pods", "state.json", "token"
SEEN_EVERY_S = 60.0
UNANSWERED_S = 900.0  # an unanswered create may still show up in the list so long


class PodEntry(Frozen):
    """One pod. id None: nobody answered yet when it was asked for.

    price_from: whose `usd_h` is, the table's until the API names its own.
    budget_usd, idle_minutes: the limits that it keeps by itself.
    seen_s: when it was last seen to run. unseen_s: how much of what is billed nobody saw, since it
        was gone when somebody looked again: the bill is at most that, and may be less.
    """

    name: str
    asked_s: float
    gpu: str
    usd_h: Annotated[float, Field(ge=0)]
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{1,64}$")] | None = None
    budget_usd: float = 0.0
    idle_minutes: float = 0.0
    price_from: Literal["table", "api"] = "table"
    spans: tuple[Span, ...] = ()
    seen_s: float = 0.0
    unseen_s: Annotated[float, Field(ge=0)] = 0.0
    gone: bool = False

    @property
    def runs(self) -> bool:
        return bool(self.spans) and self.spans[-1].end_s is None


class PodState(Frozen):
    """job: what one budget is for; a new one begins after `down --delete`.
    wanted: `down` tells an `up` or `run` elsewhere to leave the pod alone.
    fetched: stage folders that `sync` made here."""

    job: str
    wanted: Literal["up", "down"] = "up"
    pods: tuple[PodEntry, ...] = ()
    past: tuple[PodEntry, ...] = ()  # of earlier jobs
    fetched: tuple[str, ...] = ()
    network_volume: str | None = None

    def spent_usd(self, now_s: float) -> float:
        """Of this job, all its pods together."""
        return sum(spent_usd(pod.spans, now_s) for pod in self.pods)

    @property
    def current(self) -> PodEntry | None:
        """The pod to go on with: the newest that is known to exist."""
        existing = [pod for pod in self.pods if pod.id is not None and not pod.gone]
        running = [pod for pod in existing if pod.runs]
        return (running or existing or [None])[-1]

    def find(self, name: str) -> PodEntry | None:
        return next((pod for pod in (*self.pods, *self.past) if pod.name == name), None)


class Book:
    """Reads and writes the state of one config; each change is on disk before it returns."""

    def __init__(self, runs: Path, config: str):
        self.config = config
        self.folder = runs / FOLDER / config
        self._path = self.folder / STATE

    @property
    def exists(self) -> bool:
        return self._path.exists()

    def read(self) -> PodState:
        """The state on disk; another command may have changed it. A new one if there is none.

        Raises:
            CorruptFileError: it cannot be read.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return PodState(job=secrets.token_hex(4))
        try:
            return PodState.model_validate_json(content)
        except ValidationError as error:
            raise CorruptFileError(
                f"{self._path}: must be the state of {self.config}'s pods, cannot be read as that: "
                f"{describe_faults(error)[:300]}. Move it away; `duplex pod status` then lists "
                "what still runs."
            ) from None

    def change(self, how: Callable[[PodState], PodState]) -> PodState:
        before = self.read()
        state = how(before)
        if state != before or not self.exists:
            write_json(self._path, state.model_dump(mode="json"))
        return state

    def update(self, name: str, how: Callable[[PodEntry], PodEntry]) -> PodState:
        def changed(state: PodState) -> PodState:
            pods = tuple(how(pod) if pod.name == name else pod for pod in state.pods)
            past = tuple(how(pod) if pod.name == name else pod for pod in state.past)
            return state.model_copy(update={"pods": pods, "past": past})

        return self.change(changed)

    # -- what happens to a pod

    def ask(
        self, gpu: str, usd_h: float, now_s: float, budget_usd: float, idle_minutes: float
    ) -> PodEntry:
        """Write down a pod that is about to be asked for, under a name that was never used."""
        state = self.read()
        name = pod_name(self.config, state.job, len(state.pods))
        entry = PodEntry(
            name=name, asked_s=now_s, gpu=gpu, usd_h=usd_h,
            budget_usd=budget_usd, idle_minutes=idle_minutes,
        )  # fmt: skip
        self.change(lambda s: s.model_copy(update={"pods": (*s.pods, entry), "wanted": "up"}))
        return entry

    def running(
        self, name: str, pod_id: str, usd_h: float | None, start_s: float, now_s: float
    ) -> PodState:
        """It runs, since `start_s` if that was not known. usd_h: the API's, if it named one."""

        def changed(pod: PodEntry) -> PodEntry:
            is_news = now_s - pod.seen_s >= SEEN_EVERY_S or not pod.runs
            price = pod.usd_h if usd_h is None else usd_h
            source = pod.price_from if usd_h is None else "api"
            spans = opened(pod.spans, start_s, price)
            return pod.model_copy(
                update={"id": pod_id, "usd_h": price, "price_from": source, "spans": spans,
                        "gone": False, "seen_s": now_s if is_news else pod.seen_s}
            )  # fmt: skip

        return self.update(name, changed)

    def ended(
        self,
        name: str,
        end_s: float,
        *,
        gone: bool,
        pod_id: str | None = None,
        unseen_s: float = 0.0,
    ) -> PodState:
        """It runs no more, since `end_s`; `gone`: it does not exist any more either."""

        def changed(pod: PodEntry) -> PodEntry:
            spans = closed(pod.spans, end_s)
            unseen = pod.unseen_s + (unseen_s if spans != pod.spans else 0.0)
            return pod.model_copy(
                update={"id": pod_id or pod.id, "spans": spans, "unseen_s": unseen, "gone": gone}
            )

        return self.update(name, changed)

    def want(self, wanted: Literal["up", "down"]) -> PodState:
        return self.change(lambda state: state.model_copy(update={"wanted": wanted}))

    def end_job(self) -> PodState:
        """All pods are deleted: the next one begins another job with a budget of its own."""
        return self.change(
            lambda s: s.model_copy(
                update={"job": secrets.token_hex(4), "past": (*s.past, *s.pods), "pods": ()}
            )
        )

    # -- the token

    @property
    def token_path(self) -> Path:
        return self.folder / TOKEN

    def token(self) -> str | None:
        try:
            return self.token_path.read_text().strip() or None
        except FileNotFoundError:
            return None

    def make_token(self) -> str:
        """The token of this config's pods, made at the first call; its file is for its owner."""
        if held := self.token():
            return held
        self.folder.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(24)
        temporary = self.folder / f".{TOKEN}-{os.getpid()}-{time.monotonic_ns()}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, token.encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(self.token_path)
        return token
