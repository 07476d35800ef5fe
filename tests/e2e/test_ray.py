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


def start(workplace, cluster, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "duplex.cli", "run", "small.yaml", "--to", "tensors",
         "--runner", "ray", "--workers", "2", *options],
        cwd=workplace.folder, env=environment() | {"RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip


def digests(workplace, names=DATA_STAGES):
    found = workplace.digests()
    return {name: found[name] for name in names}


@pytest.mark.slow  # 45 s; the runner by itself is in tests/stages/test_ray_runner.py
@pytest.mark.timeout(600)
def test_a_run_on_a_cluster_that_loses_a_worker_has_the_local_digests(finished, cluster, tmp_path):
    workplace = make_workplace(tmp_path / "there")
    finished.lend_models(workplace.runs)
    process = start(workplace, cluster)
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("5 tensors: running"):
            kill_a_worker_at_work(process)
    assert process.wait() == 0, seen
    assert digests(workplace) == digests(finished)
    provenance = {name: m["provenance"]["runner"] for name, m in workplace.manifests().items()}
    assert provenance["tensors"]["deaths"] == 1
    assert provenance["speech"]["workers"] == 2
    assert "at_the_driver" in provenance["dialogues"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_workers_share_no_files_has_the_local_digests(finished, cluster, tmp_path):
    workplace = make_workplace(tmp_path / "there")
    finished.lend_models(workplace.runs)
    url = f"file://{tmp_path / 'store'}"
    process = start(workplace, cluster, "--set", f"runner.runtime.storage={url}")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert digests(workplace) == digests(finished)
    stored = {path.name for path in (tmp_path / "store" / "blobs").iterdir()}
    # voices are lent, speech and tensors are made there
    assert stored == {path.name for path in workplace.run_folder.glob("0[345]-*/blobs/*")}
