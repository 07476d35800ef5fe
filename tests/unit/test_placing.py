"""What a worker of a cluster takes, and what travels to it."""

import pytest

from duplex.base import canonical_json
from duplex.config import Config, RunnerRuntime
from duplex.stage import Task
from pipeline.dialogues import DialoguesStage
from pipeline.runners.placing import (
    batch_of,
    num_workers,
    options_of,
    why_at_the_driver,
    without_secrets,
)
from pipeline.speech import SpeechStage
from pipeline.tensors import TensorsStage

CPUS, GPUS = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}


def config(**sections):
    return Config.model_validate({"name": "c", **sections})


def gpus(stage, cluster, **sections):
    return options_of(stage, config(**sections), cluster)["num_gpus"]


def test_a_gpu_is_taken_where_the_config_allows_it_and_there_is_one():
    assert gpus(TensorsStage(), CPUS) == 0
    assert gpus(TensorsStage(), GPUS) == 1
    assert gpus(TensorsStage(), GPUS, tensors={"runtime": {"device": "cpu"}}) == 0
    half = {"runtime": {"gpu_share": 0.5}}
    assert gpus(TensorsStage(), GPUS, runner=half) == 0.5


@pytest.mark.parametrize(
    ("speech", "voices", "share"),
    [
        ({}, {}, 0),  # espeak
        ({"engine": "dia"}, {}, 1),
        ({"engines": {"en": "csm"}}, {}, 1),
        ({"engine": "dia", "runtime": {"device": "cpu"}}, {}, 0),
        ({}, {"engine": "pocket-tts", "names": {"female": ["alba"]}}, 0),  # speaks on a CPU
        ({"checks": {"recogniser": "faster-whisper"}}, {}, 1),
        ({"checks": {"same_speaker": "owner/name"}}, {}, 1),
    ],
)
def test_speech_takes_one_for_neural_engines_and_listeners(speech, voices, share):
    assert gpus(SpeechStage(), GPUS, speech=speech, voices=voices) == share


def test_as_many_workers_as_the_scarcer_resource_holds():
    on_cpu, on_gpu = {"num_cpus": 1.0, "num_gpus": 0}, {"num_cpus": 1.0, "num_gpus": 0.5}
    assert num_workers(RunnerRuntime(), on_cpu, GPUS) == 8
    assert num_workers(RunnerRuntime(), on_gpu, GPUS) == 4
    assert num_workers(RunnerRuntime(workers=3), on_gpu, GPUS) == 3
    assert num_workers(RunnerRuntime(), on_cpu, {}) == 1


def test_stages_that_share_a_log_or_wait_for_a_server_stay_with_the_driver():
    server = config(
        voices={"engine": "openai-speech", "names": {"female": ["a"]}},
        speech={"engine": "openai-speech", "model": "m"},
    )
    assert "budget" in (why_at_the_driver(DialoguesStage(), config()) or "")
    assert "server" in (why_at_the_driver(SpeechStage(), server) or "")
    assert why_at_the_driver(SpeechStage(), config()) is None
    assert why_at_the_driver(TensorsStage(), config()) is None


def test_what_is_sent_to_workers_holds_no_secret():
    full = config(
        dialogues={"runtime": {"api_key": "hush-1"}},
        speech={"runtime": {"api_key": "hush-2"}},
        serve={"runtime": {"token": "hush-3"}},
        train={"steps": 7},
    )
    sent = without_secrets(full)
    assert "hush" in canonical_json(full.model_dump(mode="json"))
    assert "hush" not in canonical_json(sent.model_dump(mode="json"))
    assert all(sent.keyed(stage) == full.keyed(stage) for stage in ("dialogues", "speech", "train"))


def test_the_runner_enters_no_key():
    calm, other = config(), config(runner={"runtime": {"workers": 9, "in_flight": 5}})
    for stage in (SpeechStage(), TensorsStage()):
        inputs = dict.fromkeys(stage.reads, "d")
        assert stage.folder_key(calm, inputs) == stage.folder_key(other, inputs)
        task = Task("t", ("s",))
        assert stage.record_key(calm, task) == stage.record_key(other, task)


def test_a_batch_stays_together():
    class Clip:
        def __init__(self, *batch):
            self.batch = batch

    class Mate:
        def __init__(self, name):
            self.id = name

    a, b = Mate("a"), Mate("b")
    assert batch_of(Task("a", (), Clip(a, b))) == batch_of(Task("b", (), Clip(a, b)))
    assert batch_of(Task("a", (), Clip(a))) != batch_of(Task("b", (), Clip(b)))
    assert batch_of(Task("a", ())) == "a"
