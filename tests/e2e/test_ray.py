"""`duplex run --runner ray`: personas to tensors, a worker killed, the digests of a local run."""

import subprocess
import sys
import time

import psutil
import pytest

from pipeline.run import STAGE_NAMES
from tests.e2e.conftest import environment, make_workplace

DATA_STAGES = STAGE_NAMES[: STAGE_NAMES.index("tensors") + 1]


@pytest.fixture(scope="module")
def cluster():
    from pipeline.runners import ray as runner

    context = runner.ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield context.address_info["gcs_address"]
    runner.ray.shutdown()


def kill_a_worker_at_work(process):
    """SIGKILL to the first worker of this cluster that is seen within a record."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for child in psutil.Process().children(recursive=True):
            try:
                title = child.cmdline()[:1]
                if title == ["ray::Worker.work"]:
                    child.kill()
                    return
            except psutil.Error:
                continue
        time.sleep(0.02)
    pytest.fail("no worker was ever seen at work")


@pytest.mark.slow  # 45 s; the runner by itself is in tests/stages/test_ray_runner.py
@pytest.mark.timeout(600)
def test_a_run_on_a_cluster_that_loses_a_worker_has_the_local_digests(finished, cluster, tmp_path):
    workplace = make_workplace(tmp_path / "there")
    finished.lend_models(workplace.runs)
    process = subprocess.Popen(
        [sys.executable, "-m", "duplex.cli", "run", "small.yaml", "--to", "tensors",
         "--runner", "ray", "--workers", "2"],
        cwd=workplace.folder, env=environment() | {"RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("5 tensors: running"):
            kill_a_worker_at_work(process)
    assert process.wait() == 0, seen
    found, wanted = workplace.manifests(), finished.digests()
    assert {name: found[name]["digest"] for name in DATA_STAGES} == {
        name: wanted[name] for name in DATA_STAGES
    }
    assert found["tensors"]["provenance"]["runner"]["deaths"] == 1
    assert found["speech"]["provenance"]["runner"]["workers"] == 2
    assert "at_the_driver" in found["dialogues"]["provenance"]["runner"]
