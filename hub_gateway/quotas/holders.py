"""Who holds what counts for a limit: by how much, since when, and when the first of it is likely to come free."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import ColumnElement, Integer, cast, func, select, text
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.quotas.resolve import covers
from hub_gateway.quotas.types import Counts, Demand, ObjectKind, Policy, Resource, SubjectKind
from hub_gateway.quotas.use import held_by, scope_of

__all__ = ["Holding", "Room", "Share", "frees_in", "holdings", "in_group", "shares"]

KNOWN = 200
"""Of how many kernels, the oldest ones, it is asked when they may end."""
LATELY, ENOUGH = 50, 3
_AMOUNTS: dict[Resource, Any] = {
    Resource.KERNELS: Reservation.kernels,
    Resource.STARTING: cast(Reservation.starting, Integer),
    Resource.CPU: Reservation.cpu,
    Resource.MEMORY: Reservation.memory,
    Resource.GPU: Reservation.gpu,
    Resource.KERNEL_HOURS: Reservation.kernels,
    Resource.CORE_HOURS: Reservation.cpu,
    Resource.GPU_HOURS: Reservation.gpu,
    Resource.COST: Reservation.kernels,
}
_OBJECTS: dict[ObjectKind, Any] = {
    ObjectKind.KERNELSPEC: Reservation.kernelspec,
    ObjectKind.PROXY: Reservation.proxy,
    ObjectKind.QUEUE: Reservation.queue,
}
# Exact, also for names with quotes; what does not hold the name at all is passed over before it is parsed.
_MEMBER = {
    "sqlite": "instr(reservations.groups, :quoted) > 0 AND EXISTS "
    "(SELECT 1 FROM json_each(reservations.groups) WHERE value = :group_name)",
    "postgresql": "strpos(CAST(reservations.groups AS TEXT), :quoted) > 0 AND EXISTS "
    "(SELECT 1 FROM json_array_elements_text(reservations.groups) AS one WHERE one = :group_name)",
}


@dataclass(frozen=True)
class Holding:
    """A kernel that counts for a policy."""

    kernel_id: str
    owner: str
    kernelspec: str
    title: str
    """The notebook's name, or the kernelspec's."""
    since: datetime
    amount: float
    """How much of it, in the resource's base unit."""


@dataclass(frozen=True)
class Share:
    """What one person holds of what a policy limits, with how many kernels."""

    owner: str
    amount: float
    kernels: int


@dataclass(frozen=True)
class Room:
    """Who holds what a launch needs: its owner's own kernels, others by how much; and when some comes free."""

    own: Sequence[Holding] = ()
    others: Sequence[Share] = ()
    """Who holds the most, first."""
    more: int = 0
    """How many people hold some beside these."""
    frees_in: timedelta | None = None
    """None: nobody knows."""

    @property
    def kernels(self) -> int:
        """How many kernels hold it, at least."""
        return len(self.own) + sum(one.kernels for one in self.others) + self.more


def in_group(tx: Transaction, group: str, number: int = 0) -> ColumnElement[bool]:
    """Whether a reservation's owner was in a group at launch. `number` tells several in one statement apart."""
    quoted, name = f"quoted_{number}", f"group_{number}"
    member = _MEMBER[tx.get_bind().dialect.name].replace(":quoted", f":{quoted}").replace(":group_name", f":{name}")
    return text(f"({member})").bindparams(**{quoted: json.dumps(group), name: group})  # type: ignore[return-value]


def _counting(tx: Transaction, policy: Policy, demand: Demand) -> list[ColumnElement[bool]]:
    """Which reservations count for a policy, as a launch of this owner meets it."""
    found = [Reservation.released_at.is_(None), _AMOUNTS[policy.resource] > 0]
    if policy.gpu_model:
        found.append(Reservation.gpu_model == policy.gpu_model)
    if policy.counts is not Counts.TOGETHER or policy.subject_kind in (SubjectKind.USER, SubjectKind.SERVICE):
        found.append(Reservation.owner == demand.owner)
    elif policy.subject_kind is SubjectKind.GROUP:
        found.append(in_group(tx, policy.subject))
    if policy.object_kind is not ObjectKind.ANY:
        # A glob, which only Python matches as policies do: over the few names of what is held.
        scope = scope_of(policy, demand.owner, demand.owner_kind)
        held = held_by(tx, [scope])[scope]
        names = {
            getattr(one, policy.object_kind.value)
            for one in held
            if covers(policy, one.kernelspec, one.proxy, one.queue)
        }
        found.append(_OBJECTS[policy.object_kind].in_(sorted(names)))
    return found


def holdings(
    tx: Transaction, policy: Policy, demand: Demand, *, own: bool = False, limit: int = KNOWN
) -> list[Holding]:
    """The kernels that count for a policy, oldest first: the owner's own, or everybody's of a common limit.

    `own` leaves out those of others.
    """
    kernel, reservation = Kernel, Reservation
    found = (
        select(
            kernel.id,
            kernel.owner,
            kernel.kernelspec,
            kernel.path,
            reservation.created_at,
            _AMOUNTS[policy.resource],
        )
        .join(reservation, reservation.kernel_id == kernel.id)
        .where(*_counting(tx, policy, demand))
        .order_by(reservation.created_at)
        .limit(limit)
    )
    if own:
        found = found.where(reservation.owner == demand.owner)
    return [
        Holding(key, owner, spec, (path or "").rpartition("/")[2] or spec, since, float(amount))
        for key, owner, spec, path, since, amount in tx.execute(found)
    ]


def shares(tx: Transaction, policy: Policy, demand: Demand, *, limit: int) -> tuple[list[Share], int]:
    """What others hold of what a policy limits, the largest shares first; and how many more people do."""
    amount = func.sum(_AMOUNTS[policy.resource])
    found = (
        select(Reservation.owner, amount, func.count(), func.count().over())
        .where(*_counting(tx, policy, demand), Reservation.owner != demand.owner)
        .group_by(Reservation.owner)
        .order_by(amount.desc(), Reservation.owner)
        .limit(limit)
    )
    rows = tx.execute(found).all()
    return [Share(row[0], float(row[1]), row[2]) for row in rows], (rows[0][3] - len(rows) if rows else 0)


def frees_in(tx: Transaction, held: Iterable[Holding], now: datetime) -> timedelta | None:
    """When the first of these kernels ends, if each lives as long as the median of its kind did lately."""
    usual: dict[str, float | None] = {}
    left = []
    for one in held:
        if one.kernelspec not in usual:
            lately = tx.scalars(
                select(LedgerEntry.seconds)
                .where(LedgerEntry.kernelspec == one.kernelspec, LedgerEntry.kind == "interval")
                .order_by(LedgerEntry.id.desc())
                .limit(LATELY)
            ).all()
            usual[one.kernelspec] = median(lately) if len(lately) >= ENOUGH else None
        lasts = usual[one.kernelspec]
        if lasts is not None:
            left.append(lasts - (now - one.since).total_seconds())
    ahead = [seconds for seconds in left if seconds > 0]
    return timedelta(seconds=max(60.0, min(ahead))) if ahead else None
