"""What is asked of RunPod's REST API for one pod. Pure: settings in, JSON body out.

Field names as in the API's reference for `POST /v2/pods`, which refuses unknown ones. Of image and
template one is sent: an image name would win over the template's. The volume covers `/workspace`,
whatever the image has there: code is in `/app`. No start command is sent: the image's entry point
is start.sh, and a template's command stays its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SERVE_PORT, AGENT_PORT = 8998, 8999
MOUNT = "/workspace"
RUNS_IN_POD = f"{MOUNT}/runs"
# Of the image's CUDA: on a host with an older driver the container does not start, and is billed.
MIN_CUDA = "12.8"
PREFIX = "duplex-"
_NAME = re.compile(
    rf"{PREFIX}(?P<config>[a-z0-9][a-z0-9_.-]*)-(?P<job>[0-9a-f]{{8}})-(?P<n>[0-9]+)"
)


@dataclass(frozen=True)
class Wish:
    """A pod as it is wanted. `env` holds secrets: it is sent, never shown or kept."""

    config: str  # the config's name
    config_in_pod: str
    image: str | None = None
    template: str | None = None
    gpu_count: int = 1
    cloud: Literal["SECURE", "COMMUNITY"] = "SECURE"
    container_disk_gb: int = 50
    volume_gb: int = 100
    network_volume: str | None = None
    data_centers: tuple[str, ...] = ()
    budget_usd: float = 10.0
    idle_minutes: float = 30.0
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def keeps_data(self) -> bool:
        """Whether everything worth keeping outlives the pod's deletion."""
        return self.network_volume is not None


def pod_name(config: str, job: str, number: int) -> str:
    return f"{PREFIX}{config}-{job}-{number}"


def read_name(name: str) -> tuple[str, str] | None:
    """(config, job) of a pod of ours; None: somebody else's."""
    found = _NAME.fullmatch(name)
    return (found["config"], found["job"]) if found else None


def pod_env(wish: Wish, *, job: str, usd_h: float, spent_usd: float) -> dict[str, str]:
    """What start.sh, agent and watchdog read. The secrets of `wish.env` are among it."""
    return {
        **wish.env,
        "DUPLEX_CONFIG": wish.config_in_pod,
        "DUPLEX_RUNS": RUNS_IN_POD,
        "DUPLEX_HOST": "0.0.0.0",
        "DUPLEX_PORT": str(SERVE_PORT),
        "DUPLEX_AGENT_PORT": str(AGENT_PORT),
        "DUPLEX_JOB": job,
        "DUPLEX_BUDGET_USD": f"{wish.budget_usd:g}",
        "DUPLEX_PRICE_USD_H": f"{usd_h:g}",
        "DUPLEX_IDLE_MINUTES": f"{wish.idle_minutes:g}",
        "DUPLEX_SPENT_USD": f"{spent_usd:.6f}",
        "DUPLEX_DATA_OUTLIVES_POD": "1" if wish.keeps_data else "0",
    }


def create_body(wish: Wish, name: str, gpu: str, env: Mapping[str, str]) -> dict[str, Any]:
    """The body of `POST /v2/pods`, for one GPU type: which one was rented is then known."""
    body: dict[str, Any] = {
        "name": name,
        "cloud": wish.cloud,
        "gpu": {"id": gpu, "count": wish.gpu_count, "minCudaVersion": MIN_CUDA},
        "disk": wish.container_disk_gb,
        "ports": [f"{SERVE_PORT}/http", f"{AGENT_PORT}/http"],
        "env": dict(env),
    }
    if wish.template is not None:
        body["templateId"] = wish.template
    else:
        body["image"] = wish.image
    if wish.network_volume is not None:
        body["mounts"] = {"network": [{"volumeId": wish.network_volume, "path": MOUNT}]}
    else:
        body["mounts"] = {"persistent": {"size": wish.volume_gb, "path": MOUNT}}
    if wish.data_centers:
        body["dataCenterIds"] = list(wish.data_centers)
    return body
