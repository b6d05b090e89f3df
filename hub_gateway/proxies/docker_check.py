"""Whether a Docker daemon can run kernels: what `jupyter hubgateway check` says of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hub_gateway.errors import Unavailable
from hub_gateway.proxies.base import Finding
from hub_gateway.proxies.docker_client import DockerDaemon, errors, said

__all__ = ["check_daemon"]


async def check_daemon(
    daemon: DockerDaemon,
    what: str,
    images: Iterable[str],
    networks: Iterable[str],
    *,
    swarm: bool = False,
    wanted: bool = True,
) -> list[Finding]:
    """The findings for a daemon, its images and its networks. One that nobody wants need not be there."""
    try:
        return await daemon.ask(lambda api: _look(api, daemon.url, what, images, networks, swarm=swarm, wanted=wanted))
    except Unavailable as error:
        fault = f"Docker cannot be reached: {error.hint}"
        hint = "check that dockerd runs, that `url` names it, and that the gateway's account may use its socket"
        mismatch = isinstance(error.__cause__, errors().InvalidVersion)
    except errors().APIError as error:
        fault = f"Docker refuses to answer: {said(error)}"
        hint, mismatch = "check the gateway's rights", False
    if mismatch or re.search(r"client version \S+ is too (old|new)", fault):
        hint = "upgrade Docker: API 1.41 (Docker 20.10) is needed"
    return [Finding("error", what, fault, hint) if wanted else Finding("ok", what, f"not in use; {fault}")]


def _look(
    api: Any, url: str, what: str, images: Iterable[str], networks: Iterable[str], *, swarm: bool, wanted: bool
) -> list[Finding]:
    version, info = api.version(), api.info()
    found = [Finding("ok", what, f"Docker {version['Version']} (API {version['ApiVersion']}) answers at {url}")]
    if tuple(int(part) for part in version["ApiVersion"].split(".")) < (1, 41):
        found.append(Finding("error", what, f"its API {version['ApiVersion']} is too old", "upgrade to Docker 20.10"))
    state = info.get("Swarm", {})
    if swarm and not wanted and not state.get("ControlAvailable"):
        return [Finding("ok", what, f"not in use; the daemon at {url} is no manager of a swarm")]
    if swarm and not state.get("ControlAvailable"):
        found.append(
            Finding("error", what, f"it is no manager of a swarm ({state.get('LocalNodeState')})", "set `url` to one")
        )
    for name, there in (("MemoryLimit", "memory"), ("CpuCfsQuota", "cpu"), ("PidsLimit", "processes")):
        if not info.get(name):
            hint = "enable the cgroup controllers of the machine's kernel"
            found.append(Finding("warning", what, f"the machine cannot limit the {there} of containers", hint))
    for image in filter(None, images):
        try:
            api.inspect_image(image)
        except errors().NotFound:
            hint = f"docker pull {image}; or the first user waits for it"
            found.append(Finding("warning", what, f"the image {image} is not there yet", hint))
    for network in filter(None, networks):
        try:
            api.inspect_network(network)
        except errors().NotFound:
            hint = f"docker network create {network}"
            found.append(Finding("error", what, f"there is no network {network}", hint))
    return found
