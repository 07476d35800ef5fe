"""One command about a config's pods: what is asked for, what is shown, what may still run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from duplex.config import Config
from duplex.datafiles import CHECKOUT, find_path
from duplex.errors import PodError, RequestError, StageFailedError
from duplex.tokens import secret_values
from pipeline.pods.api import RunPod
from pipeline.pods.bill import HOUR_S, hours_left, spent_usd
from pipeline.pods.book import Book, PodEntry
from pipeline.pods.client import PodClient
from pipeline.pods.clock import Clock
from pipeline.pods.control import Control
from pipeline.pods.gpus import GpuType, fitting, load_gpus, with_margin
from pipeline.pods.place import Place
from pipeline.pods.request import Wish

GPUS = "data/gpus.yaml"
PASSED_ON = ("OPENAI_API_KEY", "HF_TOKEN")
GB = 1e9


@dataclass(frozen=True)
class PodOptions:
    """What the command line says of a pod. Money in dollars, memory and disks in GB."""

    image: str | None = None
    template: str | None = None
    gpus: tuple[str, ...] = ()
    gpu_memory: float | None = None
    max_usd_h: float | None = None
    budget_usd: float = 10.0
    idle_minutes: float = 30.0
    ready_minutes: float = 30.0
    hours: float | None = None
    cloud: str = "secure"
    network_volume: str | None = None
    volume_gb: int = 100
    disk_gb: int = 50
    data_centers: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    config_in_pod: str | None = None
    abandon_volume: bool = False
    yes: bool = False


class Session:
    """One command about the pods of one config."""

    def __init__(
        self, config: Config, config_path: Path, runs: Path, environment: Mapping[str, str],
        clock: Clock, *, as_json: bool,
    ):  # fmt: skip
        self.config, self.config_path, self.runs = config, config_path, runs
        self.clock, self.as_json = clock, as_json
        self.place = Place.of(environment)
        self.book = Book(runs, config.name)
        self._environment = environment
        self._api: RunPod | None = None

    @property
    def api(self) -> RunPod:
        if self._api is None:
            self._api = self.place.api(self.clock, secrets=self._secrets())
        return self._api

    @property
    def control(self) -> Control:
        return Control(self.api, self.book, self.clock, self.say)

    def close(self) -> None:
        if self._api is not None:
            self._api.close()

    def say(self, line: str) -> None:
        """A line for people; with `--json` standard output is the machine's."""
        print(line, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def connect(self, pod_id: str) -> PodClient:
        return self.place.client(pod_id, self.book.make_token())

    @contextmanager
    def running_pod(self) -> Iterator[tuple[PodEntry, PodClient]]:
        """
        Raises:
            PodError: none runs.
        """
        self.control.reconcile()
        entry = self.book.read().current
        if entry is None or not entry.runs or entry.id is None:
            raise PodError(
                f"a pod of {self.config.name} must run for that, found none. "
                f"`duplex pod up {self.config_path}` brings one up."
            )
        client = self.connect(entry.id)
        try:
            yield entry, client
        finally:
            client.close()

    # -- what is asked for

    def wish(self, options: PodOptions) -> Wish:
        """
        Raises:
            RequestError: what cannot be asked for, and why.
        """
        if self.config.train.runtime.nodes > 1:
            raise RequestError(
                "a pod is one machine: train.runtime.nodes must be 1, found "
                f"{self.config.train.runtime.nodes}. A pod may have several GPUs: train.processes"
            )
        if options.cloud not in ("secure", "community"):
            raise RequestError(f"--cloud must be secure or community, found {options.cloud}")
        for name in ("budget_usd", "idle_minutes", "ready_minutes"):
            if getattr(options, name) <= 0:
                option = name.replace("_", "-")
                raise RequestError(
                    f"--{option} must be more than 0, found {getattr(options, name)}"
                )
        state = self.book.read()
        held = state.network_volume if state.current is not None else None
        volume = options.network_volume or held
        if state.current is not None and volume != held:
            raise RequestError(
                f"the pod there is has {held or 'a volume of its own'}, --network-volume asks for "
                f"{volume}: `duplex pod down {self.config_path} --delete` first"
            )
        if volume is not None and options.cloud == "community":
            raise RequestError("--network-volume needs --cloud secure: no other cloud has them")
        image, template = (
            options.image or self._environment.get("DUPLEX_POD_IMAGE"),
            options.template,
        )
        if template is None and not image:
            raise RequestError(
                "--image must name an image made from runpod/Dockerfile (or DUPLEX_POD_IMAGE, or "
                "--template its template's id), found none. Nobody publishes one: see "
                "runpod/README.md"
            )
        return Wish(
            config=self.config.name,
            config_in_pod=options.config_in_pod or self._config_in_pod(),
            image=None if template else image,
            template=template,
            gpu_count=self.config.train.processes,
            cloud=_cloud(options.cloud),
            container_disk_gb=options.disk_gb,
            volume_gb=options.volume_gb,
            network_volume=volume,
            data_centers=options.data_centers,
            budget_usd=options.budget_usd,
            idle_minutes=options.idle_minutes,
            env={**self._passed_on(options.env), **self.place.pod_secrets(self.book.make_token())},
        )

    def _config_in_pod(self) -> str:
        """The image holds the checkout: a config of it has the same place there."""
        path = find_path(str(self.config_path)).resolve()
        if not path.is_relative_to(CHECKOUT):
            raise RequestError(
                f"{self.config_path}: a pod's config must be in the image, so within {CHECKOUT}; "
                "build the image with it, or say by --config-in-pod where it is there"
            )
        return path.relative_to(CHECKOUT).as_posix()

    def _passed_on(self, names: tuple[str, ...]) -> dict[str, str]:
        missing = [name for name in names if not self._environment.get(name)]
        if missing:
            raise RequestError(
                f"--env names variables of this environment, not set: {', '.join(missing)}"
            )
        held = {name: self._environment.get(name, "") for name in (*PASSED_ON, *names)}
        return {name: value for name, value in held.items() if value}

    def _secrets(self) -> list[str]:
        """What a message must not show: also what `--env` passes on, by its name."""
        token = self.book.token()
        return [*secret_values(self._environment), *([token] if token else [])]

    def gpus(self, options: PodOptions) -> list[GpuType]:
        """The types to try, cheapest first; says how much memory is needed and why."""
        from pipeline.doctor import training_memory

        if options.gpu_memory is not None:
            need, why = options.gpu_memory, "as --gpu-memory says"
        else:
            estimate = training_memory(self.config).total / GB
            need = with_margin(estimate)
            why = f"training is computed to take {estimate:.1f} GB, with a margin"
        count = self.config.train.processes
        chosen = fitting(
            load_gpus(find_path(GPUS)), need, only=options.gpus, max_usd_h=options.max_usd_h
        )
        each = f" on each of {count} GPUs" if count > 1 else ""
        self.say(f"{self.config.name} needs {need:.1f} GB{each}: {why}")
        return chosen

    # -- what is shown

    def show_estimate(self, gpus: list[GpuType], options: PodOptions) -> None:
        first, count = gpus[0], self.config.train.processes
        price = first.usd_h * count
        read = f", read {first.date}" if first.date else ""
        more = f"; if none is free: {', '.join(gpu.id for gpu in gpus[1:])}" if gpus[1:] else ""
        times = f"{count} x " if count > 1 else ""
        self.say(f"{times}{first.id}: {price:.2f} USD/h ({first.source}{read}){more}")
        spent = self.book.read().spent_usd(self.clock.now())
        hours = hours_left(options.budget_usd, spent, price)
        before = f", {spent:.2f} of it spent" if spent else ""
        self.say(
            f"at most {options.budget_usd:.2f} USD{before}: the pod ends itself after {hours:.1f} "
            f"hours, or after {options.idle_minutes:g} idle minutes. Storage is billed apart."
        )
        if options.hours is not None:
            self.say(f"{options.hours:g} h would cost about {options.hours * price:.2f} USD")

    def confirm(self, options: PodOptions) -> None:
        """
        Raises:
            RequestError: nobody can be asked. StageFailedError: the answer was no.
        """
        entry = self.book.read().current
        if options.yes or (entry is not None and entry.runs):
            return
        if self.as_json or not sys.stdin.isatty():
            raise RequestError("nothing was rented: say --yes to rent without being asked")
        if input("Rent it? [y/N] ").strip().lower() != "y":
            raise StageFailedError("nothing was rented: the answer was not y")

    def left_running(self) -> list[str]:
        """What may still cost money, and how to end it."""
        lines = []
        state = self.book.read()
        for entry in (*state.past, *state.pods):
            if entry.gone:
                continue
            if entry.id is None:
                lines.append(f"{entry.name} was asked for, nobody answered: it may run")
            elif entry.runs:
                lines.append(f"{entry.id} ({entry.gpu}) still runs at {entry.usd_h:.2f} USD/h")
        if lines:
            lines.append(f"to end it: duplex pod down {self.config_path}")
        return lines

    def bill(self) -> dict[str, Any]:
        now, state = self.clock.now(), self.book.read()
        rows = [
            {
                "name": pod.name, "id": pod.id, "gpu": pod.gpu, "usd_h": pod.usd_h,
                "price_from": pod.price_from,
                "state": "gone" if pod.gone else "running" if pod.runs else "stopped",
                "hours": sum(span.seconds(now) for span in pod.spans) / HOUR_S,
                "usd": spent_usd(pod.spans, now),
                "unseen_usd": pod.unseen_s / HOUR_S * pod.usd_h,
            }
            for pod in state.pods
        ]  # fmt: skip
        earlier = sum(spent_usd(pod.spans, now) for pod in state.past)
        return {"job": state.job, "pods": rows, "spent_usd": state.spent_usd(now),
                "earlier_usd": earlier}  # fmt: skip

    def show_bill(self) -> None:
        bill = self.bill()
        for row in bill["pods"]:
            if row["id"] is not None:
                self.say(
                    f"  {row['id']:<16} {row['gpu']:<24} {row['state']:<8} {row['hours']:7.2f} h "
                    f"at {row['usd_h']:.2f} USD/h ({row['price_from']}): {row['usd']:.2f} USD"
                    + f", of which {row['unseen_usd']:.2f} unseen, and maybe less"
                    * (row["unseen_usd"] >= 0.005)
                )
        earlier = f" (and {bill['earlier_usd']:.2f} before)" if bill["earlier_usd"] else ""
        self.say(f"spent {bill['spent_usd']:.2f} USD, storage apart{earlier}")


def _cloud(name: str) -> Literal["SECURE", "COMMUNITY"]:
    return "COMMUNITY" if name == "community" else "SECURE"
