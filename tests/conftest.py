"""Settings of every test: offline, one thread a worker, and what shares a fixture together."""

import os
import sys

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
# Containers often set this. Tests start dozens of processes: without compiled files on disk each
# compiles torch and what else it imports anew; a server started in 10.2 s instead of 3.7.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


class Grouped(LoadScopeScheduling):
    """One group for tests that share a finished run, end-to-end and of the hub; else a module."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        return next((name for name in ("e2e", "hub") if f"/{name}/" in module), module)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Grouped:
    return Grouped(config, log)
