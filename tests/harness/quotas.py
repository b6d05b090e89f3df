"""Kernels that are admitted, and never started: what tests of limits, the queue and the ledger need."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import delete, update

from hub_gateway.db.models import Kernel, Reservation, utcnow
from hub_gateway.db.tenancy import Meter
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, LaunchPlan, NewKernel
from hub_gateway.quotas import use
from hub_gateway.quotas.types import Policy

__all__ = ["apart", "begin", "drift", "new", "put", "release"]


def new(number: int, owner: str = "bob", **more: Any) -> NewKernel:
    """A kernel to admit, `k<number>`."""
    usual = {"kernelspec": "python", "proxy": "local", "plan": LaunchPlan(argv=("python",), env={})}
    return NewKernel(**{"id": f"k{number}", "owner": owner, **usual, **more})


def apart(store: KernelStore) -> None:
    """Have launches admitted as if each came to a process of its own: all at once, and not in one transaction."""
    store._together.run = store.write  # type: ignore[method-assign]


async def put(store: KernelStore, policy: Policy) -> Policy:
    """Set a policy, as an administrator."""
    return await store.write(lambda tx: store.admission.policies.put(tx, policy, "admin"))


async def release(store: KernelStore, kernel_id: str, at: datetime | None = None) -> None:
    """A kernel has ended."""

    def end(tx: Any) -> None:
        store.admission.release(tx, kernel_id, at or utcnow())
        tx.execute(update(Kernel).where(Kernel.id == kernel_id).values(status=KernelStatus.STOPPED.value))

    await store.write(end)


async def begin(store: KernelStore, kernel_id: str, at: datetime) -> None:
    """Have a kernel be held since an earlier moment."""

    def change(tx: Any) -> None:
        found = tx.get_one(Reservation, kernel_id)
        found.billed_from = found.created_at = at
        tx.execute(delete(Meter))  # which know when it was taken

    await store.write(change)


async def drift(store: KernelStore) -> int:
    """How many sums are not those of the reservations."""
    return await store.write(use.recount)
