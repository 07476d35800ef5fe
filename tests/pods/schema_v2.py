"""What RunPod's OpenAPI schema of v2 says of pods, as far as the fake holds requests to it."""

from __future__ import annotations

from typing import Any

from aiohttp import web

# Of the reference: which transition is valid in which state.
ACTIONS = {
    "PROVISIONING": ["stop", "terminate"], "RUNNING": ["stop", "restart", "terminate"],
    "ERROR": ["start", "terminate"], "EXITED": ["start", "terminate"], "TERMINATED": [],
}  # fmt: skip
# Of the reference's `CreatePodRequest`, which allows no other.
FIELDS = {
    "name": str, "image": str, "templateId": str, "cloud": str, "gpu": dict, "disk": int,
    "mounts": dict, "ports": list, "env": dict, "dataCenterIds": list,
}  # fmt: skip
GPU_FIELDS = {"id": str, "count": int, "minCudaVersion": str, "allowedCudaVersions": list}


def problem(status: int, title: str, detail: str, errors: list[str] | None = None) -> web.Response:
    """RFC 9457, as all of v2's errors."""
    body = {"title": title, "status": status, "detail": detail} | (
        {"errors": errors} if errors else {}
    )
    return web.json_response(body, status=status, content_type="application/problem+json")


def faults_of_create(body: dict[str, Any]) -> list[str]:
    """What the schema refuses; the mounts' own shapes included."""
    faults = [f"$: additional property '{name}'" for name in body if name not in FIELDS]
    faults += [f"{name}: wrong type" for name, kind in FIELDS.items()
               if name in body and not isinstance(body[name], kind)]  # fmt: skip
    faults += [f"gpu.{name}" for name, value in body.get("gpu", {}).items()
               if not isinstance(value, GPU_FIELDS.get(name, ()))]  # fmt: skip
    faults += [f"env.{name}" for name, value in body.get("env", {}).items()
               if not isinstance(value, str)]  # fmt: skip
    if "name" not in body or not {"image", "templateId"} & set(body) or "gpu" not in body:
        faults.append("$: name, gpu, and image or templateId are required")
    mounts = body.get("mounts", {})
    shapes = [set(mount) for mount in mounts.get("network", ())]
    if set(mounts) == {"network"} and shapes == [{"volumeId", "path"}]:
        return faults
    if set(mounts) == {"persistent"} and set(mounts["persistent"]) == {"size", "path"}:
        return faults
    return [*faults, "mounts: one of persistent {size, path} and network [{volumeId, path}]"]
