"""Who may drive a kernel: leases by the database's clock, with a fencing epoch.

A lease is taken by a conditional update, which raises the kernel's epoch. Everything that its holder
writes names holder and epoch; a holder that slept through the end of its lease and lost it writes
nothing any more, and its agents refuse it (they have heard the higher epoch).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Table, bindparam, delete, insert, or_, select, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.clock import db_now
from hub_gateway.db.lock import lock
from hub_gateway.db.models import Instance, Kernel, utcnow
from hub_gateway.kernels.rows import LIVE
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelRecord, KernelStatus, KernelTarget

__all__ = ["Lease", "LeaseLost", "Leases"]

_TABLE = cast(Table, Kernel.__table__)
_FENCED = (
    _TABLE.update()
    .where(
        _TABLE.c.id == bindparam("kernel"),
        _TABLE.c.lease_holder == bindparam("holder"),
        _TABLE.c.epoch == bindparam("fence"),
    )
    .returning(_TABLE.c.target)
)

FORGET_INSTANCES_AFTER = 7 * 86400.0


class LeaseLost(Exception):
    """Somebody else drives this kernel now; drop it."""


@dataclass(frozen=True)
class Lease:
    """The right to drive one kernel."""

    kernel_id: str
    epoch: int


class Leases:
    """The leases of one gateway process."""

    def __init__(self, store: KernelStore, *, replica: str) -> None:
        self.store = store
        self.replica = replica
        self.instance = store.instance

    async def open(self, *, sole: bool) -> Sequence[str]:
        """Announce this process and take what nobody holds; the ids of the kernels taken.

        `sole` says that no other process of the same replica lives: its leases are taken at once,
        without waiting for them to run out.
        """

        def take(tx: Transaction) -> Sequence[str]:
            tx.execute(
                insert(Instance).values(
                    id=self.instance, replica=self.replica, pid=os.getpid(), started=db_now(), heartbeat=db_now()
                )
            )
            predecessors = select(Instance.id).where(Instance.replica == self.replica, Instance.id != self.instance)
            free = or_(Kernel.lease_holder.is_(None), Kernel.lease_until < db_now())
            if sole:
                free = or_(free, Kernel.lease_holder.in_(predecessors))
            taken = self._claim(tx, free)
            if sole:
                tx.execute(delete(Instance).where(Instance.replica == self.replica, Instance.id != self.instance))
            tx.execute(delete(Instance).where(Instance.heartbeat < db_now() - FORGET_INSTANCES_AFTER))
            return taken

        return await self.store.write(take)

    async def claim(self, kernel_id: str | None = None) -> Sequence[str]:
        """Take one kernel, or all, whose lease has run out; the ids taken."""
        run_out = or_(Kernel.lease_holder.is_(None), Kernel.lease_until < db_now())
        wanted = run_out if kernel_id is None else (run_out & (Kernel.id == kernel_id))
        # Looked up first: a scan that finds nothing must not cost a write.
        some = select(Kernel.id).where(Kernel.status.in_(LIVE), wanted).limit(1)
        if await self.store.db.read(lambda tx: tx.execute(some).first()) is None:
            return []
        return await self.store.write(lambda tx: self._claim(tx, wanted))

    def _claim(self, tx: Transaction, where: Any) -> Sequence[str]:
        return list(
            tx.execute(
                update(Kernel)
                .where(Kernel.status.in_(LIVE), where)
                .values(
                    lease_holder=self.instance,
                    lease_until=db_now() + self.store.lease_seconds,
                    epoch=Kernel.epoch + 1,
                )
                .returning(Kernel.id)
                .execution_options(synchronize_session=False)
            ).scalars()
        )

    async def renew(self) -> None:
        """Renew all of this process's leases, in one statement."""

        def renew(tx: Transaction) -> None:
            tx.execute(
                update(Kernel)
                .where(Kernel.lease_holder == self.instance, Kernel.status.in_(LIVE))
                .values(lease_until=db_now() + self.store.lease_seconds)
                .execution_options(synchronize_session=False)
            )
            tx.execute(update(Instance).where(Instance.id == self.instance).values(heartbeat=db_now()))

        await self.store.db.write(renew)

    async def unfinished(self) -> Mapping[str, KernelTarget]:
        """The kernels that this process holds and that are not where they should be, and where that is."""
        statement = select(Kernel.id, Kernel.target).where(
            Kernel.lease_holder == self.instance,
            Kernel.status.in_(LIVE),
            or_(Kernel.status != KernelStatus.RUNNING.value, Kernel.target != KernelTarget.RUNNING.value),
        )
        return await self.store.db.read(lambda tx: {key: KernelTarget(target) for key, target in tx.execute(statement)})

    async def close(self) -> None:
        """Let go of everything, so that another replica (or the next process) need not wait."""

        def let_go(tx: Transaction) -> None:
            tx.execute(
                update(Kernel)
                .where(Kernel.lease_holder == self.instance)
                .values(lease_until=0.0)
                .execution_options(synchronize_session=False)
            )
            tx.execute(delete(Instance).where(Instance.id == self.instance))

        await self.store.write(let_go)

    def of(self, record: KernelRecord) -> Lease | None:
        """The lease that this process has on a kernel, as read; None where it has none."""
        return Lease(record.id, record.epoch) if record.lease_holder == self.instance else None

    async def update(self, lease: Lease, *, release: bool = False, ready: bool = False, **values: Any) -> KernelTarget:
        """Write to a leased kernel; what its target is now. Raises `LeaseLost`.

        In the same transaction, `release` gives its reservation back, and `ready` has it no longer count as starting.
        """

        def write(tx: Transaction) -> KernelTarget:
            if release or ready:
                lock(tx)  # before the row's: whoever admits takes them in this order, too
            statement = _FENCED.values(**values)
            named = {"kernel": lease.kernel_id, "holder": self.instance, "fence": lease.epoch}
            target = tx.connection().execute(statement, named).scalar_one_or_none()
            if target is None:
                raise LeaseLost(lease.kernel_id)
            if release:
                self.store.admission.release(tx, lease.kernel_id, utcnow())
            elif ready:
                self.store.admission.ready(tx, lease.kernel_id)
            return KernelTarget(target)

        return await self.store.write(write)
