"""Settings of every test: offline, one thread a worker, and what shares a fixture together."""

import os
import sys

import hypothesis
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

# Examples are timed by the wall clock, and machines that run tests are busy.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")


# Handed out first, in this order, so that no worker is left with a long group at the end: what
# takes ten seconds or more. Those of e2e share one finished run: the first of them makes it while
# the other worker is busy with groups that do not ask for it.
LONGEST_FIRST = (
    "tests/e2e/test_kills.py",
    "tests/stages/test_llm_run.py",
    "tests/stages/test_train.py",
    "tests/stages/test_train_processes.py",
    "tests/stages/test_ray_runner.py",
    "tests/stages/test_page.py",
    "tests/stages/test_page_grades.py",
    "tests/stages/test_serving_process.py",
    "tests/e2e/test_documentation.py",
    "tests/e2e/test_notebooks.py",
    "tests/stages/hub",
    "tests/e2e/test_damage.py",
    "tests/e2e/test_pipeline.py",
    "tests/stages/test_data_order.py",
    "tests/e2e/test_start_script.py",
    "tests/e2e/test_pod_readme.py",
    "tests/e2e/test_requests.py",
    "tests/stages/test_recogniser.py",
    "tests/contract/test_prompt_contract.py",
    "tests/stages/test_recordings.py",
    "tests/stages/test_fuzz.py",
    "tests/stages/test_persona_docs.py",
    "tests/stages/test_train_profiles.py",
    "tests/stages/test_evaluate_stage.py",
    "tests/stages/test_persona_commands.py",
)


def group_of(nodeid: str) -> str:
    """A module, or all tests of the hub: they share a trained run."""
    module = nodeid.split("::")[0]
    return "tests/stages/hub" if module.startswith("tests/stages/hub/") else module


class Grouped(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {group: index for index, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(group_of(item.nodeid), len(place)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Grouped:
    config.option.loadscopereorder = False  # it would put the groups with the most tests first
    return Grouped(config, log)
