"""What a worker of a cluster takes, by stage; which stages stay with the driver; what may travel.

Pure: the cluster is the mapping of its resources to their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from duplex.config import Config, RunnerRuntime
from duplex.errors import RequestError
from duplex.sections import Section
from duplex.stage import MapStage, Task

IN_PROCESS_ON_GPU = frozenset({"moshi-tts", "csm", "dia", "chatterbox"})
# Those that stay with the driver, and why. Their threads are many; their files and bills are one.
AT_THE_DRIVER = {
    "personas": "it reads files",
    "dialogues": "one log of exchanges, one budget, and a review of all of them together",
    "voices": "recordings are judged all together",
}


@dataclass(frozen=True)
class Place:
    """What a worker of a stage takes. `device`: what its config says it computes on."""

    cpus: float = 1
    device: Callable[[Config], str] = lambda config: "cpu"


def _speech_device(config: Config) -> str:
    """Engine, recogniser and comparison of voices share a worker, and its GPU if one can use it."""
    section, checks = config.speech, config.speech.checks
    engines = {config.voices.engine, section.engine, *section.engines.values()}
    listens = checks.same_speaker is not None or checks.recogniser == "faster-whisper"
    return section.runtime.device if listens or engines & IN_PROCESS_ON_GPU else "cpu"


PLACES = {
    "speech": Place(device=_speech_device),
    "tensors": Place(device=lambda config: config.tensors.runtime.device),
}


def why_at_the_driver(stage: MapStage, config: Config) -> str | None:
    """Why a stage's tasks are not sent away; None: they are."""
    if stage.name in AT_THE_DRIVER:
        return AT_THE_DRIVER[stage.name]
    if stage.threads(config) > 1:
        return "it waits for a server, in threads"
    return None


def options_of(stage: MapStage, config: Config, cluster: Mapping[str, float]) -> dict[str, float]:
    """What one worker asks Ray for, by what the cluster has in all.

    Raises:
        RequestError: its device is cuda, and no node has a GPU.
    """
    place = PLACES.get(stage.name, Place())
    device, gpus = place.device(config), cluster.get("GPU", 0)
    if device == "cuda" and not gpus:
        raise RequestError(
            f"{stage.name}.runtime.device: cuda needs a node with a GPU, the cluster has none. Add "
            "one, or set it to auto or cpu"
        )
    share = config.runner.runtime.gpu_share if device in ("cuda", "auto") and gpus else 0
    return {"num_cpus": place.cpus, "num_gpus": share}


def num_workers(
    settings: RunnerRuntime, options: Mapping[str, float], cluster: Mapping[str, float]
) -> int:
    """As many as the config says, or as the cluster holds at once."""
    if settings.workers is not None:
        return settings.workers
    fits = [
        cluster.get(resource, 0) / options[option]
        for option, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU"))
        if options[option]
    ]
    return max(1, int(min(fits)))


def without_secrets(section: Any) -> Any:
    """A config less all that is not shown of it: what is spread over machines needs no key."""
    hidden = {name: None for name, info in type(section).model_fields.items() if not info.repr}
    inner = {
        name: without_secrets(value)
        for name, value in section
        if isinstance(value, Section) and name not in hidden
    }
    return section.model_copy(update=hidden | inner)


def batch_of(task: Task) -> Any:
    """Tasks that one worker should do in a row: those whose payload names the same batch."""
    batch = getattr(task.payload, "batch", ())
    return tuple(mate.id for mate in batch) if len(batch) > 1 else task.id
