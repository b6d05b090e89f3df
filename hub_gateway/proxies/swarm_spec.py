"""A kernel's service in a swarm, as data (Docker Engine API 1.41: `ServiceCreate`, `Task`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hub_gateway.proxies.base import Phase, PhaseReport
from hub_gateway.proxies.docker_spec import AGENT_DIR, AGENT_PORT, ContainerPlan, command, scratch

__all__ = [
    "SECRET",
    "Placement",
    "attempt_of",
    "given_up",
    "newest",
    "phase_of",
    "service_spec",
    "spoilt",
    "stranded",
]

SECRET = "/run/secrets/hub-gateway"  # noqa: S105 (a path)
NANO = 10**9
GPU = "NVIDIA-GPU"
"""The generic resource as which nodes offer GPUs, by Docker's and NVIDIA's convention."""
RUNNING = "running"
WAITING = ("new", "allocated", "pending", "assigned", "accepted", "preparing", "ready", "starting")
KILLED = 137
BUSY = "device or resource busy"
UP = ("ready", "unknown")
"""The states of a node that is there; a manager that has just started does not know yet."""


@dataclass(frozen=True)
class Placement:
    """Where a service may run, and how its agent is reached."""

    constraints: tuple[str, ...]
    publish: bool
    grace_seconds: float


def service_spec(
    plan: ContainerPlan, placement: Placement, secret: Mapping[str, str], configs: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """The arguments of docker's `create_service`.

    `secret` and each of `configs` (by file name) hold `id` and `name`.
    """
    resources, limits = plan.resources, plan.limits
    cpu, memory = int(resources.cpu * NANO), resources.memory
    generic = [{"DiscreteResourceSpec": {"Kind": GPU, "Value": resources.gpu}}] if resources.gpu else []
    container = {
        "Image": plan.image,
        "Command": command(plan, SECRET),
        "User": f"{plan.uid}:{plan.gid}",
        "Groups": [str(group) for group in plan.groups],
        "Dir": "/",
        "ReadOnly": plan.read_only,
        "Init": plan.init,
        "CapabilityDrop": ["ALL"],
        # Older daemons than 25 do not know it; with no capabilities to gain there is not much that it prevents.
        "Privileges": {"NoNewPrivileges": True},
        "StopGracePeriod": int(placement.grace_seconds * NANO),
        "Healthcheck": {"Test": ["NONE"]},
        "Mounts": [
            *(one.as_data(plan.labels) for one in plan.mounts),
            *(
                {"Type": "tmpfs", "Target": place, "TmpfsOptions": {"SizeBytes": limits.tmpfs, "Mode": 0o1777}}
                for place in scratch(plan)
            ),
            {"Type": "tmpfs", "Target": "/dev/shm", "TmpfsOptions": {"SizeBytes": limits.shm, "Mode": 0o1777}},  # noqa: S108
        ],
        "Secrets": [
            {
                "SecretID": secret["id"],
                "SecretName": secret["name"],
                "File": {"Name": SECRET.rpartition("/")[2], "UID": str(plan.uid), "GID": str(plan.gid), "Mode": 0o400},
            }
        ],
        "Configs": [
            {
                "ConfigID": config["id"],
                "ConfigName": config["name"],
                "File": {"Name": f"{AGENT_DIR}/{file}", "UID": "0", "GID": "0", "Mode": 0o444},
            }
            for file, config in configs.items()
        ],
    }
    ports = [{"Protocol": "tcp", "TargetPort": AGENT_PORT, "PublishMode": "host"}] if placement.publish else []
    return {
        "name": plan.name,
        # On the service alone: the proxy for single containers takes what has them for its own.
        "labels": dict(plan.labels),
        "mode": {"Replicated": {"Replicas": 1}},
        "endpoint_spec": {"Ports": ports},
        "task_template": {
            "ContainerSpec": container,
            "Resources": {
                "Limits": {"NanoCPUs": cpu, "MemoryBytes": memory, "Pids": limits.pids},
                # What it may use is also what is set aside for it, so that nodes are never promised twice.
                "Reservations": {"NanoCPUs": cpu, "MemoryBytes": memory, "GenericResources": generic},
            },
            # The agent starts its kernel again by itself; a task that ends is a kernel that has ended.
            "RestartPolicy": {"Condition": "none"},
            "Placement": {"Constraints": list(placement.constraints)},
            "LogDriver": {"Name": limits.log_driver, "Options": dict(limits.log_options)},
            "Networks": [{"Target": name} for name in plan.networks],
        },
    }


def attempt_of(task_template: Mapping[str, Any]) -> int:
    """How often a service's task was started anew, by the template of the service or by the task's own."""
    return int(task_template.get("ForceUpdate") or 0)


def newest(tasks: Iterable[Mapping[str, Any]], attempt: int) -> Mapping[str, Any] | None:
    """The task of a service, of those that it ever had; None where the one of this attempt is not there yet."""
    found = max(tasks, key=lambda one: (attempt_of(one["Spec"]), str(one["CreatedAt"])), default=None)
    return None if found is None or attempt_of(found["Spec"]) < attempt else found


def spoilt(task: Mapping[str, Any]) -> bool:
    """Whether a task was never started for a reason that passes.

    dockerd mounts secrets, writes them, and remounts them read-only. The last step fails with EBUSY where another of
    its threads forks meanwhile: until that child has called exec it holds the file that is being written.
    """
    status = task["Status"]
    ran = (status.get("ContainerStatus") or {}).get("PID")
    return status["State"] in ("failed", "rejected") and not ran and BUSY in str(status.get("Err"))


def given_up(task: Mapping[str, Any]) -> bool:
    """Whether the swarm itself wants a task to end: its node is lost, or drained, or its service is removed."""
    return task.get("DesiredState") in ("shutdown", "remove", "orphaned")


def stranded(task: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """Why nothing can be heard of a task any more; empty where its node is there.

    The swarm ends such a task as soon as its node is back, and does not start it anew elsewhere.
    """
    place = task.get("NodeID")
    if not place:
        return ""
    if place not in nodes:
        return "its node was removed from the swarm"
    node = nodes[place]
    state = str(node["Status"]["State"])
    name = node.get("Description", {}).get("Hostname", place)
    return "" if state in UP else f"its node {name} has left the swarm, or does not answer any more ({state})"


def phase_of(task: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]] | None = None) -> PhaseReport:
    """What a task's state means for its kernel, with the swarm's own words. `nodes`, by id, where it is `given_up`."""
    status = task["Status"]
    state, words = str(status["State"]), str(status.get("Err") or "")
    if state in (RUNNING, *WAITING) and given_up(task) and (why := stranded(task, nodes or {})):
        return PhaseReport(Phase.GONE, why)
    if state == RUNNING:
        return PhaseReport(Phase.RUNNING)
    if state in WAITING:
        return PhaseReport(Phase.PENDING, f"The swarm has not started the kernel yet: {words}." if words else "")
    code = (status.get("ContainerStatus") or {}).get("ExitCode")
    if code == KILLED:
        limit = int(task["Spec"].get("Resources", {}).get("Limits", {}).get("MemoryBytes") or 0)
        allowed = f" of {limit / 2**20:.0f} MiB" if limit else ""
        return PhaseReport(
            Phase.GONE,
            f"its task was killed (exit code 137), most often as it ran out of memory{allowed}",
            code,
        )
    return PhaseReport(Phase.GONE, f"its task is {state}{f': {words}' if words else ''}", code)
