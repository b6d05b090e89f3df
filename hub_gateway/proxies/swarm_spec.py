"""A kernel's service in a swarm, as data (Docker Engine API 1.41: `ServiceCreate`, `Task`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hub_gateway.proxies.base import Phase, PhaseReport
from hub_gateway.proxies.docker_spec import AGENT_DIR, AGENT_PORT, ContainerPlan, command, scratch

__all__ = ["SECRET", "Placement", "phase_of", "service_spec"]

SECRET = "/run/secrets/hub-gateway"  # noqa: S105 (a path)
NANO = 10**9
GPU = "NVIDIA-GPU"
"""The generic resource as which nodes offer GPUs, by Docker's and NVIDIA's convention."""
RUNNING = "running"
WAITING = ("new", "allocated", "pending", "assigned", "accepted", "preparing", "ready", "starting")
KILLED = 137


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


def phase_of(task: Mapping[str, Any]) -> PhaseReport:
    """What a task's state means for its kernel, with the swarm's own words."""
    status = task["Status"]
    state, words = str(status["State"]), str(status.get("Err") or "")
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
