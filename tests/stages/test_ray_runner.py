"""Records made by the workers of a Ray cluster of two: digests, deaths, back-pressure, resume."""

import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from duplex.config import Config
from duplex.errors import RequestError, StageFailedError
from duplex.stage import StageContext
from tests.stages import ray_toys as toys
from tests.stages.ray_toys import NUM_TASKS, OtherStage, ToyStage, UnfitStage, config_of, lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs and no GPU, on this machine. Gives the address."""
    from pipeline.runners import ray as runner

    context = runner.ray.init(
        address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    yield context.address_info["gcs_address"]
    runner.ray.shutdown()


@pytest.fixture
def ray_runner(cluster):
    from pipeline.runners.ray import RayRunner

    return RayRunner()


def test_digest_blobs_and_rejects_are_those_of_a_local_run(tmp_path, ray_runner):
    behaviours = {3: ("reject", 0)}
    here, _ = toys.run(tmp_path / "here", behaviours)
    there, folder = toys.run(tmp_path / "there", behaviours, runner=ray_runner)
    assert there["digest"] == here["digest"] and there["key"] == here["key"]
    assert there["counts"] == {"tasks": NUM_TASKS, "records": NUM_TASKS - 1, "rejected": 1}
    assert folder.rejected()["r-03"]["message"] == "not this one"
    assert all(folder.blobs_are_whole(entry) for entry in folder.ledger().values())
    assert there["provenance"]["runner"] == {
        "name": "ray", "workers": 2, "deaths": 0, "num_cpus": 1, "num_gpus": 0,
    }  # fmt: skip
    assert "runner" not in here["provenance"]
    setups = lines(tmp_path / "there" / "setups")
    assert 1 <= len(setups) <= 2 and len(set(setups) - {str(os.getpid())}) == len(setups)


@pytest.mark.parametrize("most", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_record_that_kills_its_workers_is_rejected_and_no_other(
    tmp_path, ray_runner, capsys, most
):
    """Its worker holds four when it first dies: each of them is made alone, and counted then."""
    manifest, folder = toys.run(
        tmp_path, {0: ("die", 0)}, runner=ray_runner, in_flight=4, max_deaths=most
    )
    assert manifest["counts"] == {"tasks": NUM_TASKS, "records": NUM_TASKS - 1, "rejected": 1}
    fault = folder.rejected()["r-00"]
    assert fault["error"] == "RecordError" and fault["message"].startswith(f"{most} workers died")
    assert manifest["provenance"]["runner"]["deaths"] == 1 + most
    assert lines(tmp_path / "processed").count("r-00") == 1 + most
    said = capsys.readouterr().out
    assert re.search(r"a worker died that held r-00, .*: its process ended", said)
    assert f"a worker died at r-00 ({most} of {most}): its process ended" in said


@pytest.mark.slow  # one that dies with each try: above
def test_a_worker_that_dies_once_changes_no_digest(tmp_path, ray_runner):
    behaviours = {2: ("die-once", tmp_path / "died")}
    manifest, _ = toys.run(tmp_path / "there", behaviours, runner=ray_runner)
    calm, _ = toys.run(tmp_path / "here")
    assert (tmp_path / "died").exists()
    assert manifest["digest"] == calm["digest"]
    assert manifest["provenance"]["runner"]["deaths"] == 1


def test_no_more_records_are_sent_than_may_be_in_flight(tmp_path, ray_runner):
    """However slow the driver is with those that come back."""
    stage, config = ToyStage(), config_of(in_flight=2)
    ToyStage.behaviours = {}
    context = StageContext(config, tmp_path)
    tasks = toys.Counted(stage.tasks(context))
    outcomes = ray_runner.outcomes(stage, context, toys.folder_of(tmp_path), tasks, print)
    in_flight = []
    for taken, _ in enumerate(islice(outcomes, 8)):
        time.sleep(0.05)
        in_flight.append(tasks.drawn - taken)
        assert len(lines(tmp_path / "processed")) <= tasks.drawn
    outcomes.close()
    assert max(in_flight) <= 5  # two each, and one that is drawn to see whose batch it is in


def test_after_the_driver_is_killed_the_next_run_goes_on(tmp_path, cluster, ray_runner):
    calm, _ = toys.run(tmp_path / "calm")
    root = tmp_path / "killed"
    environment = os.environ | {"RAY_ADDRESS": cluster, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.stages.ray_toys", str(root)], cwd=ROOT, env=environment
    )
    folder = toys.folder_of(root)
    deadline = time.monotonic() + 120
    while len(folder.ledger()) < 3:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = len(folder.ledger())
    assert folder.manifest() is None and 3 <= kept < NUM_TASKS
    (root / "processed").unlink()
    manifest, _ = toys.run(root, runner=ray_runner)
    assert manifest["digest"] == calm["digest"]
    assert manifest["provenance"]["made"] == NUM_TASKS - kept


@pytest.mark.slow
def test_a_setup_that_takes_its_workers_with_it_ends_the_stage(tmp_path, ray_runner):
    with pytest.raises(StageFailedError, match="3 in a row died before they were set up"):
        toys.run(tmp_path, stage_type=UnfitStage, runner=ray_runner, workers=1)


def test_a_node_with_another_engine_is_refused(tmp_path, ray_runner, monkeypatch):
    monkeypatch.setenv("AT_THE_DRIVER", "1")
    with pytest.raises(StageFailedError, match=r"by version 1, engine 1; .* by version 1, engine"):
        toys.run(tmp_path, stage_type=OtherStage, runner=ray_runner, workers=1)
    assert not (tmp_path / "processed").exists()


def test_a_gpu_that_no_node_has_is_asked_for_in_vain(tmp_path, ray_runner):
    from pipeline.tensors import TensorsStage

    class Prepared(TensorsStage):
        def prepare(self, context):
            pass

    config = Config(name="toy", tensors={"runtime": {"device": "cuda"}})
    context = StageContext(config, tmp_path)
    outcomes = ray_runner.outcomes(Prepared(), context, toys.folder_of(tmp_path), [], print)
    with pytest.raises(RequestError, match="needs a node with a GPU, the cluster has none"):
        next(outcomes)


def test_workers_that_find_no_place_end_the_stage_with_what_they_ask_for(
    tmp_path, ray_runner, monkeypatch
):
    from pipeline.runners import placing

    monkeypatch.setitem(placing.PLACES, "speech", placing.Place(cpus=64))
    with pytest.raises(StageFailedError, match=r"within 0\.5 s .*none did.*'num_cpus': 64"):
        toys.run(tmp_path, runner=ray_runner, workers=1, start_timeout_s=0.5)


def test_without_the_package_the_request_is_wrong(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; "
        "sys.argv = ['duplex', 'run', 'configs/pocket.yaml', '--runner', 'ray', '--runs', "
        f"{str(tmp_path / 'runs')!r}]; from duplex.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2
    assert "pip install -e '.[ray]'" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_blobs_travel_through_a_store_where_nodes_share_nothing(tmp_path, ray_runner):
    calm, _ = toys.run(tmp_path / "here")
    url = f"file://{tmp_path / 'store'}"
    manifest, folder = toys.run(tmp_path / "there", runner=ray_runner, storage=url)
    assert manifest["digest"] == calm["digest"]
    assert all(folder.blobs_are_whole(entry) for entry in folder.ledger().values())
    names = {path.name for path in (folder.path / "blobs").iterdir()}
    assert {path.name for path in (tmp_path / "store" / "blobs").iterdir()} == names
    # The workers wrote into places of their own, and took them away.
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"toy"}
