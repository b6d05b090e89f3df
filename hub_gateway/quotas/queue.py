"""The queue: kernels that wait for room, in the order of fair share. Its rows are kernels with the status `queued`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeAlias, cast

from sqlalchemy import Integer, Table, case, func, select, update
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.kernels.admissions import Admitter, tell_refusal
from hub_gateway.kernels.rows import KERNELS, record_of
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus
from hub_gateway.metrics import METRICS
from hub_gateway.quotas import sentences
from hub_gateway.quotas.admission import Fit
from hub_gateway.quotas.holders import Room
from hub_gateway.quotas.policies import PolicyIndex
from hub_gateway.quotas.prices import Prices
from hub_gateway.quotas.rates import EPSILON, prices_at, rate_of
from hub_gateway.quotas.resolve import applicable
from hub_gateway.quotas.types import Counts, Demand
from hub_gateway.quotas.use import Holder, scope_of

__all__ = ["Dispatched", "QueueEntry", "decayed_use", "dispatch", "due", "entries", "ordinal"]

HOUR = 3600.0
REMEMBERED = 7
"""Half-lives after which use is forgotten: less than a hundredth of it is left."""
Line: TypeAlias = tuple[str, Holder]
"""Where kernels wait behind each other: the name of a policy, and whose use it is compared with."""
_LEDGER = cast(Table, LedgerEntry.__table__)
_QUEUED = (
    select(*(column for column in KERNELS.columns if column.name not in ("launch", "launch_token", "link_secret")))
    .where(KERNELS.c.status == KernelStatus.QUEUED.value)
    .order_by(KERNELS.c.queued_at, KERNELS.c.id)
)


@dataclass(frozen=True)
class QueueEntry:
    """One kernel that waits. `position` counts from 1 among those that wait for the same room."""

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
    """When room is likely: if such kernels run as long as they did lately, or as time grows old; None: nobody knows."""

    @property
    def sentence(self) -> str:
        """What its notebook shows."""
        until = "" if self.deadline is None else f" It waits until {self.deadline:%H:%M} UTC."
        return f"{ordinal(self.position)} in the queue of {self.queue}: {self.reason}.{until}"


@dataclass(frozen=True)
class Dispatched:
    """What one look at the queue did: ids of kernels that may start now, and of those that waited in vain."""

    admitted: tuple[str, ...] = ()
    expired: tuple[str, ...] = ()


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


class _Walk:
    """One walk along the queue: who has to wait behind whom.

    Whoever is blocked in a line keeps those behind from what they need of it; whoever needs something else passes.
    """

    def __init__(self, index: PolicyIndex, prices: Prices, now: datetime) -> None:
        self._index = index
        self._prices = prices
        self._now = now
        self._needs: dict[Demand, frozenset[Line]] = {}
        self._blocking: set[Line] = set()

    def behind(self, demand: Demand) -> bool:
        """Whether somebody before waits for room that this one needs, too."""
        if not self._blocking:
            return False
        needs = self._needs.get(demand)
        if needs is None:
            needs = self._needs[demand] = frozenset(
                (policy.name, scope_of(policy, demand.owner, demand.owner_kind))
                for policy in applicable(self._index.of(demand), demand, self._now)
                if policy.counts is not Counts.KERNEL
                and policy.hard is not None
                and rate_of(policy, demand.resources, self._prices) > EPSILON
            )
        return not self._blocking.isdisjoint(needs)

    def block(self, name: str, demand: Demand) -> None:
        """This one waits for that policy."""
        line = _line(self._index, name, demand)
        if line is not None:
            self._blocking.add(line)


def _walk(tx: Transaction, admitter: Admitter, now: datetime) -> _Walk:
    index = admitter.admission.policies.index(tx)
    return _Walk(index, prices_at(tx, index.by_name.values(), now), now)


def _line(index: PolicyIndex, name: str, demand: Demand) -> Line | None:
    policy = index.by_name.get(name)
    return None if policy is None else (name, scope_of(policy, demand.owner, demand.owner_kind))


def _overdue(record: KernelRecord, now: datetime) -> bool:
    return record.queue_deadline is not None and now >= record.queue_deadline


def due(tx: Transaction, admitter: Admitter, now: datetime, *, half_life: float) -> bool:
    """Whether `dispatch` would change anything. Only reads, and so holds nobody up."""
    walk = _walk(tx, admitter, now)
    for record in _ordered(tx, now, half_life):
        demand = admitter.demand(record)
        if _overdue(record, now):
            return True
        if walk.behind(demand):
            continue
        verdict = admitter.admission.decide(tx, demand, now, kernel_id=record.id, looking=True)
        if verdict.outcome != "queued" or (verdict.policy and verdict.policy != record.queue_policy):
            return True
        walk.block(verdict.policy, demand)
    return False


def dispatch(tx: Transaction, admitter: Admitter, now: datetime, *, half_life: float) -> Dispatched:
    """Admit what fits now, in order, and end what waited too long, or can never be admitted any more."""
    lock(tx)
    admitted, expired = [], []
    walk = _walk(tx, admitter, now)
    for record in _ordered(tx, now, half_life):
        demand = admitter.demand(record)
        if _overdue(record, now):
            verdict = admitter.admission.decide(tx, demand, now, kernel_id=record.id)
            reason = verdict.sentence if verdict.outcome == "queued" else record.queue_reason
            _give_up(tx, record, demand, now, f"The kernel waited until its deadline: {reason}; start it again.")
            expired.append(record.id)
            continue
        if walk.behind(demand):
            continue
        verdict = admitter.dequeue(tx, record, now)
        if verdict.outcome == "admitted":
            admitted.append(record.id)
            METRICS.queue_wait_seconds.observe(max(0.0, (now - (record.queued_at or now)).total_seconds()))
        elif verdict.outcome == "queued":
            walk.block(verdict.policy, demand)
        else:
            _give_up(tx, record, demand, now, verdict.sentence, verdict.policy)
            expired.append(record.id)
    return Dispatched(tuple(admitted), tuple(expired))


def _give_up(
    tx: Transaction, record: KernelRecord, demand: Demand, now: datetime, sentence: str, policy: str = ""
) -> None:
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
    tell_refusal(tx, demand, policy or record.queue_policy, sentence, kernel=record.id)


def entries(
    tx: Transaction, admitter: Admitter, now: datetime, *, half_life: float, only: Collection[str] | None = None
) -> Sequence[QueueEntry]:
    """What waits, in order; of `only` these kernels, where that is given. Only reads."""
    index = admitter.admission.policies.index(tx)
    closed = admitter.admission.policies.maintenance(tx)
    shut = sentences.maintenance(closed).rstrip(".") if closed else ""
    positions: dict[Line | None, int] = defaultdict(int)
    rooms: dict[Line, tuple[Fit, Room] | None] = {}
    found = []
    for record in _ordered(tx, now, half_life):
        demand = admitter.demand(record)
        line = _line(index, record.queue_policy, demand)
        positions[line] += 1
        if only is not None and record.id not in only:
            continue
        if line is not None and line not in rooms:
            rooms[line] = _room(tx, admitter, index, record.queue_policy, demand, now)
        known = None if line is None else rooms[line]
        reason = record.queue_reason if known is None else sentences.waiting(demand, *known, now)
        found.append(
            QueueEntry(
                kernel_id=record.id,
                owner=record.owner,
                kernelspec=record.kernelspec,
                path=record.path or "",
                queue=record.queue_policy,
                position=positions[line],
                reason=shut or reason,
                queued_at=record.queued_at or record.created_at,
                deadline=record.queue_deadline,
                frees_in=None if shut or known is None else known[1].frees_in,
            )
        )
    return found


def _room(
    tx: Transaction, admitter: Admitter, index: PolicyIndex, name: str, demand: Demand, now: datetime
) -> tuple[Fit, Room] | None:
    """What those of one line wait for: how much is used, who holds it, and when it may free."""
    fits = admitter.admission.fits(tx, index, demand, now)
    fit = next((fit for fit in fits if fit.policy.name == name), None)
    return None if fit is None else (fit, admitter.admission.room(tx, fit, demand, now))
