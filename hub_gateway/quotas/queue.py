"""The queue: kernels that wait for room, in the order of fair share. Its rows are kernels with the status `queued`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from statistics import median
from typing import cast

from sqlalchemy import Integer, Table, case, func, select, update
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.kernels.admissions import Admitter
from hub_gateway.kernels.rows import KERNELS, record_of
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus
from hub_gateway.metrics import METRICS
from hub_gateway.quotas import sentences
from hub_gateway.quotas.types import Demand, Policy, SubjectKind
from hub_gateway.quotas.use import lock

__all__ = ["Dispatched", "QueueEntry", "decayed_use", "dispatch", "entries", "ordinal"]

HOUR = 3600.0
REMEMBERED = 7
"""Half-lives after which use is forgotten: less than a hundredth of it is left."""
_LEDGER = cast(Table, LedgerEntry.__table__)
_QUEUED = (
    select(*(column for column in KERNELS.columns if column.name not in ("launch", "launch_token", "link_secret")))
    .where(KERNELS.c.status == KernelStatus.QUEUED.value)
    .order_by(KERNELS.c.queued_at, KERNELS.c.id)
)


@dataclass(frozen=True)
class QueueEntry:
    """One kernel that waits. `position` counts from 1 among those that wait for the same policy."""

    kernel_id: str
    owner: str
    kernelspec: str
    path: str
    queue: str
    """The policy for which it waits."""
    position: int
    reason: str
    queued_at: datetime
    deadline: datetime | None
    frees_in: timedelta | None
    """When room is likely, if such kernels run as long as they did lately; None: nobody knows."""

    @property
    def sentence(self) -> str:
        """What its notebook shows."""
        frees = ""
        if self.frees_in is not None:
            frees = f"; by experience the first of them ends in about {sentences.span(self.frees_in.total_seconds())}"
        until = "" if self.deadline is None else f" It waits until {self.deadline:%H:%M} UTC."
        return f"{ordinal(self.position)} in the queue of {self.queue}: {self.reason}{frees}.{until}"


@dataclass(frozen=True)
class Dispatched:
    """What one look at the queue did: ids of kernels that may start now, and of those that waited too long."""

    admitted: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()
    waiting: tuple[QueueEntry, ...] = field(default=())


def ordinal(number: int) -> str:
    """`1st`, `2nd`, `3rd`, `11th`."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def decayed_use(tx: Transaction, owners: Iterable[str], now: datetime, half_life: float) -> dict[str, float]:
    """What owners used lately: core-seconds (a kernel counts one core at least), halved every `half_life` seconds."""
    names = sorted(set(owners))
    found: dict[str, float] = defaultdict(float)
    if not names:
        return found
    moment, ledger = now.timestamp(), _LEDGER.c
    age = sql_cast((moment - ledger.stopped) / HOUR, Integer)
    weight = case((ledger.cpu > 1.0, ledger.cpu), else_=1.0)
    rows = tx.connection().execute(
        select(ledger.owner, age, func.sum(weight * ledger.seconds))
        .where(ledger.owner.in_(names), ledger.stopped > moment - REMEMBERED * half_life)
        .group_by(ledger.owner, age)
    )
    for owner, hours, used in rows:
        found[owner] += used * 0.5 ** (max(0.0, hours) * HOUR / half_life)
    still = select(Reservation.owner, Reservation.cpu, Reservation.created_at).where(
        Reservation.owner.in_(names), Reservation.released_at.is_(None)
    )
    for owner, cpu, since in tx.execute(still):
        found[owner] += max(1.0, cpu) * max(0.0, (now - since).total_seconds())
    return found


def _ordered(tx: Transaction, now: datetime, half_life: float) -> list[KernelRecord]:
    waiting = [record_of(row) for row in tx.execute(_QUEUED).mappings()]
    used = decayed_use(tx, (record.owner for record in waiting), now, half_life)
    return sorted(waiting, key=lambda one: (used.get(one.owner, 0.0), one.queued_at or one.created_at, one.id))


def dispatch(tx: Transaction, admitter: Admitter, now: datetime, *, half_life: float) -> Dispatched:
    """Admit what fits now, in order, and end what waited too long.

    Who is blocked by a policy keeps those behind from what that policy limits; others pass.
    """
    lock(tx)
    admitted, expired = [], []
    blocking: set[str] = set()
    for record in _ordered(tx, now, half_life):
        if record.queue_deadline is not None and now >= record.queue_deadline:
            _give_up(tx, record, now, f"The kernel waited until its deadline: {record.queue_reason}; start it again.")
            expired.append(record.id)
            continue
        if blocking and not blocking.isdisjoint(admitter.needs(tx, record, now)):
            continue
        verdict = admitter.dequeue(tx, record, now)
        if verdict.outcome == "admitted":
            admitted.append(record.id)
            METRICS.queue_wait_seconds.observe(max(0.0, (now - (record.queued_at or now)).total_seconds()))
        elif verdict.outcome == "queued":
            blocking.add(verdict.policy)
        else:
            _give_up(tx, record, now, verdict.sentence)
            expired.append(record.id)
    return Dispatched(tuple(admitted), tuple(expired), tuple(entries(tx, admitter, now, half_life=half_life)))


def _give_up(tx: Transaction, record: KernelRecord, now: datetime, sentence: str) -> None:
    tx.execute(
        update(Kernel)
        .where(Kernel.id == record.id)
        .values(
            status=KernelStatus.FAILED.value,
            execution_state=ExecutionState.DEAD.value,
            message=sentence,
            stopped_at=now,
            queue_policy="",
        )
    )


def entries(tx: Transaction, admitter: Admitter, now: datetime, *, half_life: float) -> Sequence[QueueEntry]:
    """Everything that waits, in order."""
    positions: dict[str, int] = defaultdict(int)
    frees: dict[str, timedelta | None] = {}
    found = []
    policies = admitter.admission.policies.index(tx).by_name
    for record in _ordered(tx, now, half_life):
        name = record.queue_policy
        positions[name] += 1
        if name not in frees:
            policy = policies.get(name)
            frees[name] = None if policy is None else _frees_in(tx, policy, record, now)
        found.append(
            QueueEntry(
                kernel_id=record.id,
                owner=record.owner,
                kernelspec=record.kernelspec,
                path=record.path or "",
                queue=name,
                position=positions[name],
                reason=record.queue_reason,
                queued_at=record.queued_at or record.created_at,
                deadline=record.queue_deadline,
                frees_in=frees[name],
            )
        )
    return found


def _frees_in(tx: Transaction, policy: Policy, record: KernelRecord, now: datetime) -> timedelta | None:
    """When the first kernel that counts for a policy ends, if each lives as long as the median of its kind."""
    demand = Demand(record.owner, SubjectKind.USER, frozenset(record.groups), record.kernelspec, record.proxy)
    held = sentences.holdings(tx, policy, demand)
    usual: dict[str, float | None] = {}
    left = []
    for one in held:
        if one.kernelspec not in usual:
            lately = tx.scalars(
                select(LedgerEntry.seconds)
                .where(LedgerEntry.kernelspec == one.kernelspec, LedgerEntry.kind == "interval")
                .order_by(LedgerEntry.id.desc())
                .limit(50)
            ).all()
            usual[one.kernelspec] = median(lately) if len(lately) >= 3 else None
        lasts = usual[one.kernelspec]
        if lasts is not None:
            left.append(lasts - (now - one.since).total_seconds())
    ahead = [seconds for seconds in left if seconds > 0]
    return timedelta(seconds=max(60.0, min(ahead))) if ahead else None
