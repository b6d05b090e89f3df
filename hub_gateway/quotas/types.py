"""The words of quotas, shared by admission, the queue, the ledger and the web layer.

Amounts are floats in base units: kernels and GPUs in devices, cpu in cores, memory in bytes, `*_hours` in hours, cost
in the units of the price list.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hub_gateway.kernels.types import Resources

__all__ = [
    "Action",
    "Counts",
    "Demand",
    "ObjectKind",
    "Origin",
    "Period",
    "Policy",
    "Resource",
    "SubjectKind",
    "Verdict",
    "Weekly",
    "WindowKind",
]


class SubjectKind(str, enum.Enum):
    """Whom a policy is about."""

    USER = "user"
    GROUP = "group"
    SERVICE = "service"
    EVERYONE = "everyone"


class ObjectKind(str, enum.Enum):
    """What of theirs it is about."""

    ANY = "any"
    KERNELSPEC = "kernelspec"
    PROXY = "proxy"
    QUEUE = "queue"  # of YARN, Slurm, ...; a Kubernetes namespace


class Resource(str, enum.Enum):
    """What is limited. The last four are used up over time, in a window; the others are held at one instant."""

    KERNELS = "kernels"
    STARTING = "starting"
    CPU = "cpu"
    MEMORY = "memory"
    GPU = "gpu"
    KERNEL_HOURS = "kernel_hours"
    CORE_HOURS = "core_hours"
    GPU_HOURS = "gpu_hours"
    COST = "cost"

    @property
    def timed(self) -> bool:
        """Whether it is used up over time."""
        return self in (Resource.KERNEL_HOURS, Resource.CORE_HOURS, Resource.GPU_HOURS, Resource.COST)


class Counts(str, enum.Enum):
    """What the limit is compared with."""

    EACH = "each"  # what each user (or service) of the subject holds by themselves
    TOGETHER = "together"  # what all of the subject hold together
    KERNEL = "kernel"  # what one kernel takes: a larger wish is cut down to it


class WindowKind(str, enum.Enum):
    """Over which time something is counted."""

    NOW = "now"
    ROLLING = "rolling"
    CALENDAR = "calendar"


class Period(str, enum.Enum):
    """A calendar window: the current one of these, in the policy's time zone. Weeks begin on Monday."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class Action(str, enum.Enum):
    """What happens to a launch that does not fit."""

    REJECT = "reject"
    QUEUE = "queue"  # with `queue_seconds`: until then


class Origin(str, enum.Enum):
    """How a policy came about."""

    POLICY = "policy"
    GRANT = "grant"  # temporary, for one user, by an approver


@dataclass(frozen=True)
class Weekly:
    """A time of the week at which a policy holds: days 0 (Monday) to 6, minutes of the day; `end` may be 1440.

    One that ends at or before its begin goes on into the next day.
    """

    days: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Policy:
    """One row of `policies`. `hard` None is no limit (an exemption where it wins over others)."""

    name: str
    subject_kind: SubjectKind
    subject: str = "*"
    object_kind: ObjectKind = ObjectKind.ANY
    object: str = "*"
    """A glob (`fnmatch`, case-sensitive) over names of the object's kind."""
    resource: Resource = Resource.KERNELS
    gpu_model: str = ""
    """A GPU model; empty is all of them together."""
    counts: Counts = Counts.EACH
    window: WindowKind = WindowKind.NOW
    window_seconds: int | None = None
    period: Period | None = None
    timezone: str = "UTC"
    hard: float | None = None
    soft: float | None = None
    burst: float | None = None
    burst_seconds: int | None = None
    action: Action = Action.REJECT
    queue_seconds: int | None = None
    grace_seconds: int | None = None
    """After how long over the limit kernels are stopped; None: what runs is left alone."""
    priority: int = 0
    enabled: bool = True
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    weekly: tuple[Weekly, ...] = ()
    note: str = ""
    origin: Origin = Origin.POLICY
    delegated: bool = False
    """Set by a lead, whose permission is for some only: it holds beside what administrators set, never in its place."""
    approver: str | None = None
    id: int | None = None
    version: int = 0
    created_at: datetime | None = None
    created_by: str = ""
    updated_at: datetime | None = None
    updated_by: str = ""

    @property
    def least(self) -> float | None:
        """From which amount on it does something: the soft limit, or the hard one; None where it has neither."""
        return min((one for one in (self.soft, self.hard) if one is not None), default=None)


@dataclass(frozen=True)
class Demand:
    """A launch, as policies see it."""

    owner: str
    owner_kind: SubjectKind  # USER or SERVICE
    groups: frozenset[str]
    kernelspec: str
    proxy: str
    queue: str = ""
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True)
class Verdict:
    """Whether a launch is admitted now, queued or refused, and by which policy."""

    outcome: str
    """`admitted`, `queued` or `refused`."""
    policy: str = ""
    sentence: str = ""
    """For the user: limit, use, who holds it, when it frees, where to look."""
    position: int = 0
    """In the queue, from 1."""
    deadline: datetime | None = None
    frees_in: timedelta | None = None
    notices: tuple[str, ...] = ()
    """Sentences about soft limits that this launch crosses."""
