"""What a kernel's container is to be, as data: for a container of one daemon and for a service of a swarm.

The shapes are those of the Docker Engine API 1.41: `ContainerCreate` and `ServiceCreate`. Nothing here is text that
is pasted together; what comes from a user is a value in its own place, and never a path or an option by itself.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import LaunchFailed
from hub_gateway.kernels.types import Resources
from hub_gateway.proxies.agent_config import agent_config
from hub_gateway.proxies.base import LaunchRequest

__all__ = [
    "AGENT_DIR",
    "AGENT_PORT",
    "EPOCH",
    "FILES",
    "GATEWAY",
    "KERNEL",
    "ContainerPlan",
    "Limits",
    "Mount",
    "agent_document",
    "command",
    "container_config",
    "labels",
    "mount_of",
    "object_name",
    "scratch",
    "working_directory",
]

GATEWAY, KERNEL, EPOCH = "hub-gateway.gateway", "hub-gateway.kernel", "hub-gateway.epoch"
AGENT_DIR = "/opt/hub-gateway"
AGENT_PORT = 8877
"""Where the agent listens in its container: the port of Enterprise Gateway's response address, which is free here."""
RUNTIME_ROOT = "/run/hub-gateway"
FILES = ("container.py", "agent.py", "ipykernel_launcher.py")
"""What of launchers/ is shipped with each container."""
NANO = 10**9

_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")


@dataclass(frozen=True)
class Mount:
    """A directory of the host (absolute `source`), or a named volume, that a container sees at `target`."""

    source: str
    target: str
    read_only: bool = False

    @property
    def kind(self) -> Literal["bind", "volume"]:
        return "bind" if self.source.startswith("/") else "volume"

    def as_data(self, labels: Mapping[str, str]) -> dict[str, Any]:
        """The API's `Mount`."""
        data = {"Type": self.kind, "Source": self.source, "Target": self.target, "ReadOnly": self.read_only}
        if self.kind == "bind":
            # What the host mounts below it later is none of the kernel's business.
            return {**data, "BindOptions": {"Propagation": "rprivate"}}
        return {**data, "VolumeOptions": {"Labels": dict(labels)}}


@dataclass(frozen=True)
class Limits:
    """What a container may use beside its kernel's resources. Sizes in bytes."""

    pids: int
    tmpfs: int
    shm: int
    log_driver: str
    log_options: Mapping[str, str]


@dataclass(frozen=True)
class ContainerPlan:
    """One container, complete."""

    name: str
    image: str
    python: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    user: str
    home: str
    cwd: str
    labels: Mapping[str, str]
    mounts: tuple[Mount, ...]
    networks: tuple[str, ...]
    resources: Resources
    limits: Limits
    read_only: bool
    init: bool
    publish: str | None = None
    """The address of the host at which the agent's port is published; None: it is reached at the container's own."""
    constraints: tuple[str, ...] = ()


def labels(gateway_id: str, kernel_id: str, epoch: int) -> dict[str, str]:
    """By these a container is known again, by any gateway process."""
    return {GATEWAY: gateway_id, KERNEL: kernel_id, EPOCH: str(epoch)}


def object_name(gateway_id: str, kernel_id: str, epoch: int) -> str:
    """The name of a launch's container: of the same launch there cannot be two."""
    # Hashed: kernel ids may come from clients, and the name must be safe and not too long for a swarm.
    return f"hub-gateway-{hashlib.sha256(f'{gateway_id}/{kernel_id}'.encode()).hexdigest()[:16]}-{epoch}"


def mount_of(template: Mapping[str, Any], names: Mapping[str, str], roots: tuple[str, ...]) -> Mount:
    """A mount from a template of the configuration: `{username}` and the like are filled. Raises `LaunchFailed`.

    A directory of the host must lie below one of `roots`, before and after it is filled.
    """
    source, target = template.get("source"), template.get("target")
    if not isinstance(source, str) or not isinstance(target, str) or not source or not target.startswith("/"):
        raise LaunchFailed(
            "A volume of the kernel's container is not well described; ask the administrator.",
            hint=f"a volume needs a `source` and an absolute `target`, this one is {dict(template)!r}",
        )
    source, target = _filled(source, names), _filled(target, names)
    if source.startswith("/"):
        source = posixpath.normpath(source)
        if not any(source == root or source.startswith(f"{root.rstrip('/')}/") for root in roots):
            raise LaunchFailed(
                f"The kernel's container may not have {source} of its host; ask the administrator.",
                hint="allowed_host_roots names the directories below which volumes may lie: "
                + (", ".join(roots) or "none"),
            )
    return Mount(source, posixpath.normpath(target), bool(template.get("read_only", False)))


def _filled(text: str, names: Mapping[str, str]) -> str:
    for name, value in names.items():
        placeholder = "{" + name + "}"
        if placeholder not in text:
            continue
        if not _COMPONENT.fullmatch(value):
            raise LaunchFailed(
                f"The name {value[:64]!r} cannot be a part of a directory's name, so there is no volume for it; "
                "ask the administrator."
            )
        text = text.replace(placeholder, value)
    return text


def working_directory(wish: str | None, home: str, mounts: tuple[Mount, ...]) -> str:
    """Where a kernel starts: where its user's server asks for, if that is a place that the container shares."""
    if wish and wish.startswith("/"):
        wanted = posixpath.normpath(wish)
        if any(wanted == one.target or wanted.startswith(f"{one.target.rstrip('/')}/") for one in mounts):
            return wanted
    return home


def agent_document(request: LaunchRequest, plan: ContainerPlan) -> bytes:
    """The agent's configuration, secrets included: what goes to its standard input, or into a secret of a swarm."""
    # Launchers of the gateway's own machine are found in the container at another place.
    argv = [word.replace(str(launchers_dir()), AGENT_DIR) for word in request.argv]
    if argv[0] in ("python", "python3"):
        argv[0] = plan.python
    account = {"HOME": plan.home, "USER": plan.user, "LOGNAME": plan.user, "LANG": "C.UTF-8"}
    document = agent_config(
        request,
        argv=argv,
        launchers=Path(AGENT_DIR),
        runtime_dir=f"{RUNTIME_ROOT}/kernel",
        env={**account, **request.env},
        cwd=plan.cwd,
        listen="0.0.0.0",  # noqa: S104 (of the container)
        ports=(AGENT_PORT, AGENT_PORT),
    )
    return json.dumps(document).encode()


def command(plan: ContainerPlan, *arguments: str) -> list[str]:
    """How the agent is started in the container."""
    return [plan.python, "-I", f"{AGENT_DIR}/container.py", *arguments]


def scratch(plan: ContainerPlan) -> list[str]:
    """What a container can write to that has no volume there: gone with it, and counted as its memory."""
    shared = {one.target for one in plan.mounts}
    places = ["/tmp", RUNTIME_ROOT]  # noqa: S108 (in the container)
    if not any(plan.home == one or plan.home.startswith(f"{one.rstrip('/')}/") for one in shared):
        places.append(plan.home)
    return [place for place in places if place not in shared]


def container_config(plan: ContainerPlan) -> dict[str, Any]:
    """The body of `POST /containers/create`."""
    resources, limits = plan.resources, plan.limits
    host: dict[str, Any] = {
        "ReadonlyRootfs": plan.read_only,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "GroupAdd": [str(group) for group in plan.groups],
        "Init": plan.init,
        "PidsLimit": limits.pids,
        "ShmSize": limits.shm,
        "NanoCpus": int(resources.cpu * NANO),
        "Memory": resources.memory,
        "MemorySwap": resources.memory,  # as much as the memory: no swap
        "NetworkMode": plan.networks[0],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": limits.log_driver, "Config": dict(limits.log_options)},
        "Tmpfs": dict.fromkeys(scratch(plan), f"rw,nosuid,nodev,mode=1777,size={limits.tmpfs}"),
        "Mounts": [
            *(one.as_data(plan.labels) for one in plan.mounts),
            # Without a name it is this container's alone, and removed with it. It belongs to root, whom no kernel is.
            {"Type": "volume", "Target": AGENT_DIR, "VolumeOptions": {"NoCopy": True, "Labels": dict(plan.labels)}},
        ],
    }
    if resources.gpu:
        host["DeviceRequests"] = [{"Driver": "", "Count": resources.gpu, "Capabilities": [["gpu"]]}]
    config: dict[str, Any] = {
        "Image": plan.image,
        "User": f"{plan.uid}:{plan.gid}",
        "Entrypoint": command(plan),
        "Cmd": [],
        "WorkingDir": "/",
        "Labels": dict(plan.labels),
        "Healthcheck": {"Test": ["NONE"]},
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "Tty": False,
        "HostConfig": host,
    }
    if plan.publish is not None:
        port = f"{AGENT_PORT}/tcp"
        config["ExposedPorts"] = {port: {}}
        host["PortBindings"] = {port: [{"HostIp": plan.publish, "HostPort": ""}]}
    return config
