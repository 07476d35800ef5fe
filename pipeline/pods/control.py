"""The steps that cost money or end its spending: create, start, stop, delete; and the book.

Every call that may cost money is written down before it is made. What the API says afterwards,
by name and by id, is the truth; `reconcile` brings the book to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duplex.errors import PodError
from pipeline.pods.api import (
    BAD_REQUEST,
    CONFLICT,
    ApiTrouble,
    NoCapacity,
    NotThere,
    Pod,
    Refused,
    RunPod,
)
from pipeline.pods.bill import HOUR_S, hours_left, plausible
from pipeline.pods.book import UNANSWERED_S, Book, PodEntry, PodState
from pipeline.pods.clock import Clock
from pipeline.pods.gpus import GpuType
from pipeline.pods.request import Wish, create_body, pod_env, read_name

FIND_TRIES, FIND_WAIT_S = 4, 5.0  # the list lags behind a create
LAG_S = 120.0  # and behind a delete
CLOCK_SLACK_S = 300.0  # how far RunPod's clock and ours may differ
CREATE_ROUNDS, ROUND_WAIT_S = 3, 60.0
END_TRIES, END_WAIT_S = 6, 5.0
IN_VAIN_S = 900.0  # a watchdog asks ten times to be ended, half a minute and some answers apart


@dataclass(frozen=True)
class Strays:
    """Pods named as ours that the book does not know. others: of other configs."""

    own: tuple[Pod, ...]
    others: tuple[Pod, ...]


class Control:
    """The pods of one config.

    Args:
        report: gets a line for each thing that happens.
    """

    def __init__(self, api: RunPod, book: Book, clock: Clock, report: Callable[[str], None]):
        self.book = book
        self._api, self._clock, self._report = api, clock, report

    # -- the book against the API

    def reconcile(self) -> Strays:
        """Bring the book to what the API lists, and end what nobody wants: a second running pod.

        Raises:
            ApiTrouble: the API cannot be asked; the book stays as it is.
        """
        pods = self._api.list_pods()
        state = self.book.read()
        listed = {pod.id: pod for pod in pods}
        named = {pod.name: pod for pod in pods}
        for entry in (*state.pods, *state.past):
            pod = listed.get(entry.id) if entry.id else named.get(entry.name)
            if pod is not None:
                self._note(entry, pod)
            elif not entry.gone:
                self._note_absence(entry)
        state = self.book.read()
        self._end_surplus(state)
        known = {entry.id for entry in (*state.pods, *state.past)}
        own, others = [], []
        for pod in pods:
            ours = read_name(pod.name)
            if ours is None or pod.id in known or pod.status == "TERMINATED":
                continue
            (own if ours[0] == self.book.config else others).append(pod)
        return Strays(tuple(own), tuple(others))

    def _note(self, entry: PodEntry, pod: Pod) -> None:
        """What the API lists of a pod goes into the book."""
        now = self._clock.now()
        last = entry.spans[-1] if entry.spans else None
        if entry.gone and last and last.end_s is not None and now - last.end_s < LAG_S:
            return  # the list still has what was just deleted
        if pod.is_running:
            first = entry.asked_s if last is None else last.end_s or last.start_s
            since = plausible(pod.started_s, first, now)
            self.book.running(entry.name, pod.id, pod.usd_h, since or first, now)
            return
        ended, unseen_s = self._end_of(entry)
        self.book.ended(
            entry.name, ended, gone=pod.status == "TERMINATED", pod_id=pod.id, unseen_s=unseen_s
        )

    def _note_absence(self, entry: PodEntry) -> None:
        """It is not in the list, which lags: a pod is gone when its own address says so."""
        if entry.id is None:
            if self._clock.now() - entry.asked_s > UNANSWERED_S:
                self.book.ended(entry.name, entry.asked_s, gone=True)
            return
        try:
            self._note(entry, self._api.get(entry.id))
        except NotThere:
            self._gone(entry)

    def _gone(self, entry: PodEntry) -> None:
        ended, unseen_s = self._end_of(entry)
        self.book.ended(entry.name, ended, gone=True, unseen_s=unseen_s)

    def _end_of(self, entry: PodEntry) -> tuple[float, float]:
        """When a pod ended that no longer runs, and how much of that is a guess, in seconds.

        The API does not say. It is taken to have run until now, or until its own budget and the
        time in which its watchdog may have asked in vain.
        """
        now = self._clock.now()
        first = entry.spans[-1].start_s if entry.spans else entry.asked_s
        seen = min(max(entry.seen_s, first), now)
        left_h = hours_left(entry.budget_usd, self.book.read().spent_usd(seen), entry.usd_h)
        ended = min(now, seen + left_h * HOUR_S + IN_VAIN_S)
        return ended, ended - seen

    def _end_surplus(self, state: PodState) -> None:
        """A create that nobody answered, asked again, may have made two: one is enough."""
        running = [pod for pod in (*state.past, *state.pods) if pod.runs]
        for pod in running[:-1]:
            self._report(f"{pod.name} ({pod.id}) runs beside another pod of ours: deleting it")
            self.delete(pod)

    # -- up

    def create(self, wish: Wish, gpus: Sequence[GpuType]) -> PodEntry:
        """Rent the first type that is to be had; asked again for a while, under new names.

        Raises:
            PodError: none is to be had, or the API refuses. RequestError: the key is not accepted.
        """
        trouble: ApiTrouble | None = None
        for round_number in range(CREATE_ROUNDS):
            if round_number:
                self._report(f"asking again in {ROUND_WAIT_S:.0f} s")
                self._clock.sleep(ROUND_WAIT_S)
                if (late := self._late()) is not None:
                    return late
            refused: list[Refused] = []
            for gpu in gpus:
                try:
                    return self._create_one(wish, gpu)
                except NoCapacity:
                    self._report(f"no {gpu.id} is free" + "; trying the next" * (gpu != gpus[-1]))
                except Refused as error:
                    refused.append(error)
                    self._report(f"{gpu.id}: {error}" + "; trying the next" * (gpu != gpus[-1]))
                except ApiTrouble as error:
                    trouble = error
                    self._report(f"{error}; no pod has shown up")
                    break
            if len(refused) == len(gpus):  # so it is no matter of the type
                raise PodError(f"{refused[-1]}. Nothing was rented.")
        if trouble is not None:
            raise PodError(
                f"{trouble}. No pod has shown up. If one does later, `duplex pod status` finds it "
                "and `duplex pod down` ends it; its own budget ends it too."
            )
        raise PodError(
            f"one of {', '.join(gpu.id for gpu in gpus)} must be free, found none in "
            f"{CREATE_ROUNDS} rounds. Nothing was rented. Try later, with --cloud community, or "
            "with other types by --gpu."
        )

    def _late(self) -> PodEntry | None:
        """A pod that an earlier round made after all."""
        try:
            self.reconcile()
        except ApiTrouble:
            return None
        current = self.book.read().current
        return current if current is not None and current.runs else None

    def _create_one(self, wish: Wish, gpu: GpuType) -> PodEntry:
        """
        Raises:
            NoCapacity: no machine with that GPU is free. Refused: so it may be, or a rule is
                broken, for which the API has the same code. ApiTrouble: nobody knows of a pod.
            PodError: the API refuses what is asked for.
        """
        price, now = gpu.usd_h * wish.gpu_count, self._clock.now()
        state = self.book.read()
        entry = self.book.ask(gpu.id, price, now, wish.budget_usd, wish.idle_minutes)
        env = pod_env(wish, job=state.job, usd_h=price, spent_usd=state.spent_usd(now))
        try:
            pod = self._api.create(create_body(wish, entry.name, gpu.id, env))
            if pod.name not in ("", entry.name):
                raise ApiTrouble("the answer to a create must be about our pod, found another")
        except ApiTrouble as trouble:
            is_no = isinstance(trouble, NoCapacity | Refused)  # an answer, and not only an error
            pod = self._find(entry.name, tries=1 if is_no else FIND_TRIES)
            if pod is None and is_no:
                self.book.ended(entry.name, now, gone=True)
            if pod is None and isinstance(trouble, Refused) and trouble.status != BAD_REQUEST:
                raise PodError(f"{trouble}. Nothing was rented.") from None
            if pod is None:
                raise
            self._report(f"the API answered with an error, and made the pod: {pod.id}")
        since = plausible(pod.started_s, now, self._clock.now())
        self.book.running(entry.name, pod.id, pod.usd_h, since or now, now)
        current = self.book.read().find(entry.name)
        assert current is not None
        source = "the API's price" if current.price_from == "api" else f"price {gpu.source}"
        self._report(f"rented {current.id}: {gpu.id} at {current.usd_h:.2f} USD/h ({source})")
        return current

    def _find(self, name: str, tries: int) -> Pod | None:
        """A pod by its name, although nobody answered for it. The list lags: asks again."""
        for attempt in range(tries):
            if attempt:
                self._clock.sleep(FIND_WAIT_S)
            try:
                pods = [pod for pod in self._api.list_pods() if pod.name == name]
            except ApiTrouble:
                continue
            if pods:
                return pods[0]
        return None

    def start(self, entry: PodEntry, wish: Wish) -> bool:
        """Start a stopped pod, with the limits of today. False: its host has no GPU free."""
        assert entry.id is not None
        try:
            self._renew_env(entry, wish)
            # Paid from here on, for all that is known; the list says later since when it was.
            now = self._clock.now()
            self.book.running(entry.name, entry.id, None, now, now)
            self._api.start(entry.id)
        except NotThere:
            self._gone_unstarted(entry)
            return True  # the next look finds none, and creates
        except ApiTrouble as trouble:
            try:
                pod = self._api.get(entry.id)
            except NotThere:
                self._gone_unstarted(entry)
                return True
            current = self.book.read().find(entry.name)
            self._note(current or entry, pod)
            if pod.is_running:
                return True
            self._report(f"{entry.id} does not start: {trouble}")
            return False
        self._report(f"started {entry.id}")
        return True

    def _gone_unstarted(self, entry: PodEntry) -> None:
        """It was not there to be started, so it has cost nothing since."""
        spans = (self.book.read().find(entry.name) or entry).spans
        start_s = spans[-1].start_s if spans else entry.asked_s
        self.book.ended(entry.name, start_s, gone=True)

    def _renew_env(self, entry: PodEntry, wish: Wish) -> None:
        """What the pod reads is in its environment: limits, keys, the token, what to run. All of it
        is sent: what of it the pod has already is not known here, since no secret is kept."""
        assert entry.id is not None
        state = self.book.read()
        spent = state.spent_usd(self._clock.now())
        env = pod_env(wish, job=state.job, usd_h=entry.usd_h, spent_usd=spent)
        try:
            self._api.update_env(entry.id, env)
        except NotThere:
            raise
        except ApiTrouble as trouble:
            self._report(
                f"{trouble}. The pod keeps its old environment, with limits of "
                f"{entry.budget_usd:g} USD and {entry.idle_minutes:g} idle minutes; this command "
                "keeps the new ones"
            )
            return
        self.book.update(
            entry.name,
            lambda pod: pod.model_copy(
                update={"budget_usd": wish.budget_usd, "idle_minutes": wish.idle_minutes}
            ),
        )

    # -- down

    def delete(self, entry: PodEntry) -> None:
        assert entry.id is not None
        self._api.delete(entry.id)
        self._confirm_end(entry.id)
        self.book.ended(entry.name, self._clock.now(), gone=True)

    def stop(self, entry: PodEntry) -> None:
        assert entry.id is not None
        try:
            self._api.stop(entry.id)
            self._confirm_end(entry.id)
        except NotThere:
            self._gone(entry)
        except Refused as refused:
            if refused.status != CONFLICT:
                raise
            raise PodError(
                f"{refused}. It may cost money. A pod in the state ERROR cannot be stopped: "
                "`duplex pod down --delete` ends it, and its own volume with it."
            ) from None
        else:
            self.book.ended(entry.name, self._clock.now(), gone=False)

    def _confirm_end(self, pod_id: str) -> None:
        """
        Raises:
            PodError: it still runs. That must not pass for an end.
        """
        for attempt in range(END_TRIES):
            if attempt:
                self._clock.sleep(END_WAIT_S)
            try:
                if not self._api.get(pod_id).is_running:
                    return
            except NotThere:
                return
        raise PodError(
            f"pod {pod_id} must have ended, the API still calls it RUNNING: it may cost money. "
            "Try `duplex pod down` again, or end it at https://console.runpod.io/pods."
        )

    def down(self, *, delete: bool, strays: bool = False) -> list[str]:
        """Stop, or delete, every pod of this config; says what was done. Nothing left is no error.

        A pod with a network volume is deleted: it cannot be stopped, and all that is worth
        keeping is on the volume.

        Args:
            strays: also delete pods under this config's name that no book here knows; they may be
                another machine's.

        Raises:
            PodError: something could not be ended, and may still run.
        """
        self.book.want("down")
        found, done = self.reconcile(), []
        state = self.book.read()
        deletes = delete or state.network_volume is not None
        for entry in (*state.past, *state.pods):
            if entry.id is None or entry.gone:
                continue
            if deletes:
                self.delete(entry)
                done.append(f"deleted {entry.id}")
            elif entry.runs:
                self.stop(entry)
                done.append(f"stopped {entry.id}; its volume is kept, and paid for")
            else:
                done.append(f"{entry.id} is stopped already; its volume is kept, and paid for")
        for pod in found.own if strays else ():
            self._api.delete(pod.id)
            self._confirm_end(pod.id)
            done.append(f"deleted {pod.id} ({pod.name}), which no book here knew")
        if delete and any(not entry.gone for entry in self.book.read().pods):
            done.append(
                "an unanswered create may still make a pod: look again in a quarter of an hour"
            )
        elif delete:
            self.book.end_job()
        return done
