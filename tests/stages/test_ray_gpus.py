"""Workers of a cluster that says it has two GPUs: which each gets, and how many work at a time.

No GPU is needed: Ray gives out what it is told that a node has.
"""

import os
import time
from collections import defaultdict
from pathlib import Path

import pytest

from duplex.config import Config
from duplex.errors import RequestError, StageFailedError
from duplex.stage import StageContext
from pipeline.engines.neural import pick_device
from pipeline.runners.local import execute
from tests.stages.ray_toys import ToyStage, folder_of, lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_runner():
    from pipeline.runners import ray as runner

    runner.ray.init(
        address="local", num_cpus=5, num_gpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    yield runner.RayRunner()
    runner.ray.shutdown()


class SpeechOnGpu(ToyStage):
    """Notes what each record was made on: process, GPUs, from when to when.

    None is made before as many workers are set up as `wanted` says: all get some.
    """

    def process(self, task, seed, blobs):
        wanted, deadline = int((self._root / "wanted").read_text()), time.monotonic() + 120
        while len(lines(self._root / "setups")) < wanted:
            assert time.monotonic() < deadline, "too few workers found a place"
            time.sleep(0.02)
        began = time.monotonic()  # of the machine, the same in all processes
        records = super().process(task, seed, blobs)
        with (self._root / "made").open("a") as file:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            file.write(f"{os.getpid()} {gpus or 'none'} {began} {time.monotonic()}\n")
        return records


class TensorsOnGpu(SpeechOnGpu):
    name = "tensors"
    number = 5


class PickingStage(SpeechOnGpu):
    """Whose setup picks its device as the engines and the recognisers do."""

    def setup(self, context):
        super().setup(context)
        device = pick_device(context.config.speech.runtime.device)
        (context.runs_root / "device").write_text(device)


class BrokenStage(ToyStage):
    def setup(self, context):
        raise AssertionError("Torch not compiled with CUDA enabled")


def make(
    root, ray_runner, stage_type=SpeechOnGpu, *, wanted=2, device="auto", said=print, **runtime
):
    """(provenance, {process: {its GPUs}}, [(gpus, from, to)]) of a run whose stage takes GPUs."""
    stage_type.behaviours = dict.fromkeys(range(12), ("make", 0.05))
    config = Config.model_validate(
        {
            "name": "toy",
            "speech": {"checks": {"recogniser": "faster-whisper"}, "runtime": {"device": device}},
            "tensors": {"runtime": {"device": device}},
            "runner": {"runtime": runtime},
        }
    )
    (root / "wanted").write_text(str(wanted))
    context = StageContext(config, root, report=said)
    manifest = execute(stage_type(), context, folder_of(root), runner=ray_runner)
    rows = [line.split() for line in (root / "made").read_text().splitlines()]
    gpus = defaultdict(set)
    for pid, given, *_ in rows:
        gpus[pid].add(given)
    spans = [(given, float(began), float(ended)) for _, given, began, ended in rows]
    return manifest["provenance"]["runner"], gpus, spans


def most_at_once(spans):
    return max(sum(b <= began < e for _, b, e in spans) for _, began, _ in spans)


@pytest.mark.slow
@pytest.mark.parametrize("stage_type", [SpeechOnGpu, TensorsOnGpu])
def test_each_worker_gets_a_gpu_of_its_own(tmp_path, ray_runner, stage_type):
    notes, gpus, _ = make(tmp_path, ray_runner, stage_type)
    assert notes["workers"] == 2 and notes["num_gpus"] == 1
    assert sorted(map(sorted, gpus.values())) == [["0"], ["1"]]


@pytest.mark.slow
def test_no_more_work_at_a_time_than_there_are_gpus(tmp_path, ray_runner):
    """Two of four find no place; the others do their work."""
    notes, gpus, spans = make(tmp_path, ray_runner, workers=4)
    assert notes["workers"] == 4
    assert len(gpus) == 2 and most_at_once(spans) <= 2


@pytest.mark.slow
def test_two_share_a_gpu_where_the_config_says_so(tmp_path, ray_runner):
    notes, gpus, spans = make(tmp_path, ray_runner, wanted=4, gpu_share=0.5)
    assert notes["workers"] == 4 and notes["num_gpus"] == 0.5
    assert sorted(map(sorted, gpus.values())) == [["0"], ["0"], ["1"], ["1"]]
    for gpu in ("0", "1"):
        assert most_at_once([span for span in spans if span[0] == gpu]) <= 2


@pytest.mark.slow
def test_a_stage_on_the_cpu_sees_none(tmp_path, ray_runner):
    notes, gpus, _ = make(tmp_path, ray_runner, device="cpu")
    assert notes["num_gpus"] == 0 and notes["workers"] == 5
    assert set().union(*gpus.values()) == {"none"}


@pytest.mark.slow
def test_a_gpu_that_torch_cannot_use_is_said_and_the_cpu_taken(tmp_path, ray_runner):
    said = []
    make(tmp_path, ray_runner, PickingStage, said=said.append)
    assert (tmp_path / "device").read_text() == "cpu"
    (note,) = said  # of two workers on one node
    assert "speech: Ray gave a worker on" in note and "torch finds none there" in note


@pytest.mark.slow
def test_a_gpu_that_is_asked_for_and_torch_cannot_use_ends_the_stage(tmp_path, ray_runner):
    with pytest.raises(RequestError, match="device: cuda needs a GPU, torch finds none"):
        make(tmp_path, ray_runner, PickingStage, device="cuda")
    assert not (tmp_path / "made").exists()


def test_the_tensors_stage_says_so_too(tmp_path):
    from pipeline.tensors import TensorsStage

    config = Config(name="toy", tensors={"runtime": {"device": "cuda"}})
    with pytest.raises(RequestError, match=r"tensors\.runtime\.device: cuda needs a GPU"):
        TensorsStage().setup(StageContext(config, tmp_path))


@pytest.mark.slow
def test_a_setup_that_fails_in_words_of_others_names_its_node(tmp_path, ray_runner):
    with pytest.raises(
        StageFailedError, match=r"start on \S+, it raised AssertionError: Torch not"
    ):
        make(tmp_path, ray_runner, BrokenStage)
