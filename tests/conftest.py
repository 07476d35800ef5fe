"""Settings of every test: offline, one thread a worker, and what shares a fixture together."""

import os

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# Before torch is imported anywhere: two workers with two threads each would starve each other.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class Grouped(LoadScopeScheduling):
    """One group for tests that share a finished run, end-to-end and of the hub; else a module."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        return next((name for name in ("e2e", "hub") if f"/{name}/" in module), module)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Grouped:
    return Grouped(config, log)
