"""The words of a kernel's life, shared by the database, the controller and the web layer."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

__all__ = [
    "JSON",
    "CreateKernel",
    "ExecutionState",
    "KernelRecord",
    "KernelStatus",
    "KernelTarget",
    "LaunchPlan",
    "NewKernel",
    "Registration",
    "Resources",
    "isoformat",
]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


class KernelStatus(str, enum.Enum):
    """Where a kernel is: what the controller last recorded."""

    QUEUED = "queued"  # not admitted yet: it waits for room under a limit, and holds nothing
    STARTING = "starting"  # admitted; being submitted, or submitted and not yet registered or ready
    RUNNING = "running"  # its agent is registered and the kernel answered
    STOPPING = "stopping"  # a stop is under way
    STOPPED = "stopped"  # proven gone; the row is history
    FAILED = "failed"  # it ended by itself or never started; `message` says why; still listed as `dead`


class KernelTarget(str, enum.Enum):
    """Where a kernel should be: what its owner (or the culler, or a policy) asked for."""

    RUNNING = "running"
    STOPPED = "stopped"
    ENDED = "ended"  # stopped by somebody else, with a reason: it stays listed as failed, so that its notebook says why


class ExecutionState(str, enum.Enum):
    """`execution_state` of the Jupyter REST API."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    RESTARTING = "restarting"
    DEAD = "dead"


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: cpu in cores, memory in bytes, gpu in devices. 0 means unspecified."""

    cpu: float = 0.0
    memory: int = 0
    gpu: int = 0
    gpu_model: str = ""


@dataclass(frozen=True)
class Registration:
    """Where a kernel's agent listens, and the CURVE public key (Z85) that it must prove to own."""

    host: str
    port: int
    public_key: str
    pid: int = 0


@dataclass(frozen=True)
class KernelRecord:
    """One row of `kernels`, read. Times are aware and in UTC. Secrets are decrypted on demand only."""

    id: str
    owner: str
    kernelspec: str
    proxy: str
    status: KernelStatus
    target: KernelTarget
    execution_state: ExecutionState
    created_at: datetime
    last_activity: datetime
    epoch: int
    connections: int = 0
    groups: tuple[str, ...] = ()
    hub_server: str | None = None
    unix_user: str | None = None
    resources: Resources = field(default_factory=Resources)
    proxy_state: Mapping[str, JSON] = field(default_factory=dict)
    registration: Registration | None = None
    message: str = ""
    exit_code: int | None = None
    stderr_tail: str = ""
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    path: str | None = None
    restarts: int = 0
    cull_idle_timeout: float | None = None
    lease_holder: str | None = None
    launch_epoch: int = 0
    queue: str = ""
    principal: str | None = None
    cost_center: str = ""
    queue_policy: str = ""
    """The policy for which a queued kernel waits."""
    queue_reason: str = ""
    queued_at: datetime | None = None
    queue_deadline: datetime | None = None

    @property
    def live(self) -> bool:
        """Whether it may hold anything on the cluster."""
        return self.status not in (KernelStatus.QUEUED, KernelStatus.STOPPED, KernelStatus.FAILED)


@dataclass(frozen=True)
class CreateKernel:
    """What a client asks for: a kernelspec, environment variables, and for which notebook."""

    name: str | None = None
    """Name of the kernelspec; None is the default one."""
    env: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """What to start, fixed at admission: a later change of the kernelspec does not touch this kernel."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None = None
    interrupt_mode: Literal["signal", "message"] = "signal"
    config: Mapping[str, JSON] = field(default_factory=dict)
    transport: Literal["auto", "ipc", "tcp"] = "auto"
    encryption: Literal["none", "curve"] = "none"
    """What the kernel understands."""
    start_seconds: float | None = None
    """How long its launch may take; None is the gateway's usual."""
    tickets: str = field(default="", repr=False)
    """Kerberos tickets that the client has brought along (a credential cache, base64)."""


@dataclass(frozen=True)
class NewKernel:
    """A kernel to admit."""

    id: str
    owner: str
    kernelspec: str
    proxy: str
    plan: LaunchPlan
    groups: tuple[str, ...] = ()
    hub_server: str | None = None
    unix_user: str | None = None
    path: str | None = None
    resources: Resources = field(default_factory=Resources)
    least: Resources = field(default_factory=Resources)
    """Below this no policy may cut the resources down: the launch is refused then."""
    cull_idle_timeout: float | None = None
    service: bool = False
    """Whether the owner is a service of the Hub."""
    queue: str = ""
    principal: str | None = None
    identity_rule: str = ""
    cost_center: str = ""


def isoformat(moment: datetime) -> str:
    """`%Y-%m-%dT%H:%M:%S.%fZ`, microseconds always: jupyter_server's gateway client parses just that."""
    # Six times as fast as strftime, which shows in a list of kernels. The moment is in UTC: "+00:00" is cut off.
    return moment.isoformat(timespec="microseconds")[:26] + "Z"
