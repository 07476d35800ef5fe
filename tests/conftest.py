"""Settings of every test: offline, one thread a worker, and what shares a fixture together."""

import os

import pytest

# Before torch is imported anywhere: two workers with two threads each would starve each other.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One group for the end-to-end tests, which share a finished run; else one a module."""
    for item in items:
        module = item.nodeid.split("::")[0]
        group = "e2e" if "/e2e/" in module else module
        item.add_marker(pytest.mark.xdist_group(group))
