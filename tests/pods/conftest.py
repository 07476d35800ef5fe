"""A fake RunPod, a config, and the sums that must hold however a test ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from duplex.configfile import load_config
from pipeline import pod_command
from pipeline.pod_session import PodOptions, Session
from pipeline.pods.gpus import load_gpus
from tests.factories import write_yaml
from tests.pods.fake_runpod import KEY, FakeClock, FakeRunPod

ROOT = Path(__file__).resolve().parents[2]
TYPES = {gpu.id: gpu.usd_h for gpu in load_gpus(ROOT / "data" / "gpus.yaml")}
CHEAPEST, NEXT = "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090"
POLL_S = 20.0


@dataclass
class Desk:
    """Where a user sits: a config, a run root, an environment, and the commands."""

    folder: Path
    fake: FakeRunPod
    clock: FakeClock
    environment: dict[str, str]

    @property
    def config(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def session(self, *, as_json: bool = False) -> Session:
        session = Session(
            load_config(self.config), self.config, self.runs, self.environment, self.clock,
            as_json=as_json,
        )  # fmt: skip
        object.__setattr__(session.place, "timeout_s", 0.5)
        return session

    def options(self, **changes: object) -> PodOptions:
        fields: dict[str, object] = {
            "image": "someone/duplex", "config_in_pod": "configs/small.yaml", "gpu_memory": 20.0,
            "budget_usd": 5.0, "yes": True,
        }  # fmt: skip
        return PodOptions(**(fields | changes))  # type: ignore[arg-type]

    def up(self, **changes: object) -> Session:
        return self._do(pod_command.up, self.options(**changes))

    def run(self, **changes: object) -> Session:
        return self._do(pod_command.run, self.options(**changes))

    def down(self, *, delete: bool = False, strays: bool = False) -> Session:
        return self._do(pod_command.down, delete=delete, strays=strays)

    def status(self) -> Session:
        return self._do(pod_command.status)

    def _do(self, command, *arguments: object, **named: object) -> Session:
        session = self.session()
        try:
            command(session, *arguments, **named)
        finally:
            session.close()
        return session

    def ours_usd(self) -> float:
        """What our own book says that everything cost."""
        bill = self.session().bill()
        return bill["spent_usd"] + bill["earlier_usd"]

    def unseen_usd(self) -> float:
        state = self.session().book.read()
        return sum(p.unseen_s / 3600 * p.usd_h for p in (*state.pods, *state.past))

    def bodies(self) -> list[dict]:
        return [body for method, path, body in self.fake.requests
                if (method, path) == ("POST", "pods")]  # fmt: skip


@pytest.fixture
def desk(tmp_path):
    clock = FakeClock()
    write_yaml(tmp_path / "small.yaml", {"name": "small"})
    with FakeRunPod(clock) as fake:
        # Dearer than the table: what is rented costs what the API says.
        fake.prices = {name: round(price * 1.25, 2) for name, price in TYPES.items()}
        environment = {
            "RUNPOD_API_KEY": KEY,
            "DUPLEX_RUNPOD_URL": fake.api_url,
            "DUPLEX_POD_URL": fake.pod_url,
        }
        place = Desk(tmp_path, fake, clock, environment)
        yield place
        settle(place)


def settle(desk: Desk) -> None:
    """After each test: all can be ended, every dollar is in our book, no secret is in a file."""
    if desk.environment["RUNPOD_API_KEY"] == KEY:
        desk.fake.faults.clear()
        for pod in desk.fake.pods.values():
            pod.host_taken = False
        desk.down(delete=True, strays=True)
        assert desk.fake.running() == []
        largest = max((pod.usd_h for pod in desk.fake.pods.values()), default=0)
        strangers = sum(pod.usd(desk.clock.now()) for pod in desk.fake.pods.values()
                        if pod.body["name"].startswith("other"))  # fmt: skip
        # To the second; a pod that was gone when somebody looked again is billed at most.
        bill, rounding = desk.fake.bill_usd() - strangers, largest / 3600 + 1e-9
        assert desk.ours_usd() - desk.unseen_usd() - rounding <= bill <= desk.ours_usd() + rounding
    token = desk.session().book.token()
    for path in desk.folder.rglob("*"):
        if path.is_file() and path.name != "token":
            content = path.read_bytes()
            assert KEY.encode() not in content
            assert token is None or token.encode() not in content
