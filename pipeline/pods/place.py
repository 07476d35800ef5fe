"""Where RunPod's API and its pods are, and the key: from the environment.

RUNPOD_API_KEY       of the account; read here, sent as a header, written nowhere
DUPLEX_POD_API_KEY   what a pod gets to stop itself: a key with fewer rights; the same if unset
DUPLEX_RUNPOD_URL    another base than https://api.runpod.io/v2
DUPLEX_POD_URL       another template than https://{pod}-{port}.proxy.runpod.net
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from duplex.errors import MissingInputError, RequestError
from pipeline.pods.api import BASE_URL, KEY_NAME, RunPod
from pipeline.pods.client import URL_TEMPLATE, PodClient
from pipeline.pods.clock import Clock

POD_KEY_NAME = "DUPLEX_POD_API_KEY"


@dataclass(frozen=True)
class Place:
    key: str = field(repr=False)
    pod_key: str = field(repr=False)
    api_url: str
    pod_url: str
    timeout_s: float = 60.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """
        Raises:
            MissingInputError: no key. RequestError: something that cannot be one, or no template.
        """
        key = (environment.get(KEY_NAME) or "").strip()
        if not key:
            raise MissingInputError(
                f"{KEY_NAME} must hold a key of a RunPod account, found nothing. Make one at "
                "https://console.runpod.io/user/settings, and export it."
            )
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise RequestError(f"{KEY_NAME} must be one word of plain characters, found others")
        template = environment.get("DUPLEX_POD_URL") or URL_TEMPLATE
        if "{pod}" not in template or "{port}" not in template:
            raise RequestError("DUPLEX_POD_URL must hold {pod} and {port}, as in " + URL_TEMPLATE)
        pod_key = (environment.get(POD_KEY_NAME) or "").strip()
        return cls(key, pod_key or key, environment.get("DUPLEX_RUNPOD_URL") or BASE_URL, template)

    def api(self, clock: Clock, secrets: Iterable[str]) -> RunPod:
        return RunPod(
            self.key, clock, base_url=self.api_url, secrets=(self.pod_key, *secrets),
            timeout_s=self.timeout_s,
        )  # fmt: skip

    def client(self, pod_id: str, token: str) -> PodClient:
        return PodClient(pod_id, token, template=self.pod_url)

    def pod_secrets(self, token: str) -> dict[str, str]:
        return {"DUPLEX_TOKEN": token, KEY_NAME: self.pod_key}
