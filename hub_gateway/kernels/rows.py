"""The kernels' table: the statements that read it, and a row as a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import RowMapping, Select, Table, bindparam, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.models import Kernel
from hub_gateway.kernels.types import (
    ExecutionState,
    KernelRecord,
    KernelStatus,
    KernelTarget,
    LaunchPlan,
    Registration,
    Resources,
)

__all__ = [
    "ALL_LISTED",
    "ALL_LIVE",
    "BY_ID",
    "BY_OWNER",
    "COLUMNS",
    "KERNELS",
    "LINK",
    "LIVE",
    "MINE",
    "PLAN",
    "one",
    "plan_of",
    "record_of",
]

LIVE = (KernelStatus.STARTING.value, KernelStatus.RUNNING.value, KernelStatus.STOPPING.value)
"""What may hold anything on a cluster."""
LISTED = (*LIVE, KernelStatus.QUEUED.value, KernelStatus.FAILED.value)

KERNELS = cast(Table, Kernel.__table__)
_SECRET = {"launch", "launch_token", "link_secret", "link_public"}
COLUMNS = [column for column in KERNELS.columns if column.name not in _SECRET]
"""What a record is made of."""

# Made once: building a statement of this width takes longer than running it.
_SELECT: Select[Any] = select(*COLUMNS).order_by(KERNELS.c.created_at, KERNELS.c.id)
BY_ID = _SELECT.where(KERNELS.c.id == bindparam("kernel"))
BY_OWNER = _SELECT.where(KERNELS.c.owner == bindparam("owner"), KERNELS.c.status.in_(LISTED))
ALL_LIVE = _SELECT.where(KERNELS.c.status.in_(LIVE))
MINE = ALL_LIVE.where(KERNELS.c.lease_holder == bindparam("holder"))
ALL_LISTED = _SELECT.where(KERNELS.c.status.in_(LISTED))
PLAN = select(Kernel.launch, Kernel.launch_token, Kernel.link_public).where(Kernel.id == bindparam("kernel"))
LINK = select(
    Kernel.id,
    Kernel.epoch,
    Kernel.agent_host,
    Kernel.agent_port,
    Kernel.agent_public_key,
    Kernel.agent_pid,
    Kernel.link_public,
    Kernel.link_secret,
    Kernel.proxy,
    Kernel.proxy_state,
).where(Kernel.agent_port.is_not(None), Kernel.id.in_(bindparam("kernels", expanding=True)))


def one(tx: Transaction, kernel_id: str) -> KernelRecord:
    """The record of a kernel that is there."""
    return record_of(tx.execute(BY_ID, {"kernel": kernel_id}).mappings().one())


def plan_of(found: Any) -> LaunchPlan:
    """A launch plan, as it was written."""
    return LaunchPlan(**{**found, "argv": tuple(found["argv"])})


def record_of(row: RowMapping | Mapping[str, Any]) -> KernelRecord:
    """A row of one of the statements above."""
    port = row["agent_port"]
    return KernelRecord(
        id=row["id"],
        owner=row["owner"],
        kernelspec=row["kernelspec"],
        proxy=row["proxy"],
        status=KernelStatus(row["status"]),
        target=KernelTarget(row["target"]),
        execution_state=ExecutionState(row["execution_state"]),
        created_at=row["created_at"],
        last_activity=row["last_activity"],
        epoch=row["epoch"],
        connections=row["connections"],
        groups=tuple(row["groups"]),
        hub_server=row["hub_server"],
        unix_user=row["unix_user"],
        resources=Resources(row["cpu"], row["memory"], row["gpu"], row["gpu_model"]),
        proxy_state=cast("dict[str, Any]", row["proxy_state"]),
        registration=None
        if port is None
        else Registration(row["agent_host"], port, row["agent_public_key"], row["agent_pid"] or 0),
        message=row["message"],
        exit_code=row["exit_code"],
        stderr_tail=row["stderr_tail"],
        started_at=row["started_at"],
        stopped_at=row["stopped_at"],
        path=row["path"],
        restarts=row["restarts"],
        cull_idle_timeout=row["cull_idle_timeout"],
        lease_holder=row["lease_holder"],
        launch_epoch=row["launch_epoch"],
        queue=row["queue"],
        principal=row["principal"],
        cost_center=row["cost_center"],
        queue_policy=row["queue_policy"],
        queue_reason=row["queue_reason"],
        queued_at=row["queued_at"],
        queue_deadline=row["queue_deadline"],
    )
