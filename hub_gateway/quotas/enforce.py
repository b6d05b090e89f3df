"""What time does to limits: notices above soft ones, and an end after a grace above hard ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from sqlalchemy import Table, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.models import Reservation
from hub_gateway.db.tenancy import PolicyState
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas import sentences
from hub_gateway.quotas.admission import Admission, need_of, scope_of
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.resolve import applicable
from hub_gateway.quotas.types import Counts, Demand, Policy, SubjectKind
from hub_gateway.quotas.use import Holder, held_by, lock

__all__ = ["Notice", "Stop", "enforce"]

SOFT, OVER = "soft", "over"
EPSILON = 1e-6
_OPEN = cast(Table, Reservation.__table__)


@dataclass(frozen=True)
class Notice:
    """Something to tell an owner, in these notebooks."""

    owner: str
    policy: str
    event: str
    sentence: str
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """A kernel to be stopped, and what its notebook is told."""

    kernel_id: str
    owner: str
    policy: str
    sentence: str


@dataclass(frozen=True)
class _Kernel:
    id: str
    since: datetime
    demand: Demand


def enforce(tx: Transaction, admission: Admission, now: datetime) -> tuple[list[Notice], list[Stop]]:
    """Look at everything that is held; what is to be told, once, and what is to be stopped."""
    lock(tx)
    index = admission.policies.index(tx)
    if not any(_watched(policy) for policy in index.by_name.values()):
        return [], []
    held: dict[tuple[str, Holder], list[_Kernel]] = defaultdict(list)
    for kernel in _kernels(tx):
        for policy in applicable(index.of(kernel.demand), kernel.demand, now):
            if _watched(policy) and (policy.resource.timed or need_of(policy, kernel.demand.resources) > 0):
                scope = scope_of(policy, kernel.demand.owner, kernel.demand.owner_kind)
                held[policy.name, scope].append(kernel)
    notices: list[Notice] = []
    stops: list[Stop] = []
    seen = set()
    for (name, scope), kernels in held.items():
        policy = index.by_name[name]
        seen.add((policy.id, ":".join(scope)))
        rows = held_by(tx, [scope])[scope]
        used = admission.used(tx, policy, scope, rows, now)
        notices += _soft(tx, policy, scope, kernels, used, now)
        told, ended = _over(tx, policy, scope, kernels, used, now)
        notices += told
        stops += ended
    for state in tx.scalars(select(PolicyState).where(PolicyState.state.in_((SOFT, OVER)))):
        if (state.policy_id, state.subject) not in seen:
            tx.delete(state)
    return notices, stops


def _watched(policy: Policy) -> bool:
    return policy.counts is not Counts.KERNEL and (
        policy.soft is not None or (policy.hard is not None and policy.grace_seconds is not None)
    )


def _kernels(tx: Transaction) -> list[_Kernel]:
    found = []
    for row in tx.connection().execute(select(_OPEN).where(_OPEN.c.released_at.is_(None))).mappings():
        demand = Demand(
            row["owner"],
            SubjectKind(row["owner_kind"]),
            frozenset(row["groups"] or ()),
            row["kernelspec"],
            row["proxy"],
            row["queue"],
            Resources(row["cpu"], row["memory"], row["gpu"], row["gpu_model"]),
        )
        found.append(_Kernel(row["kernel_id"], row["created_at"], demand))
    return found


def _by_owner(kernels: Sequence[_Kernel]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.demand.owner].append(kernel.id)
    return {owner: tuple(ids) for owner, ids in found.items()}


def _state(tx: Transaction, policy: Policy, scope: Holder, state: str) -> PolicyState | None:
    return tx.get(PolicyState, (policy.id, ":".join(scope), state))


def _amount(policy: Policy, value: float) -> str:
    return shown(policy.resource, value, policy.gpu_model)


def _soft(
    tx: Transaction, policy: Policy, scope: Holder, kernels: Sequence[_Kernel], used: float, now: datetime
) -> list[Notice]:
    known = _state(tx, policy, scope, SOFT)
    if policy.soft is None or used <= policy.soft + EPSILON:
        if known is not None:
            tx.delete(known)
        return []
    if known is not None:
        return []
    tx.add(PolicyState(policy_id=policy.id, subject=":".join(scope), state=SOFT, since=now, noticed_at=now))
    limit = "" if policy.hard is None else f", of {_amount(policy, policy.hard)} at most"
    sentence = (
        f"{_amount(policy, used)} are in use{sentences.window(policy)}: more than the soft limit of "
        f"{_amount(policy, policy.soft)} of the policy {policy.name}{limit}."
    )
    return [Notice(owner, policy.name, SOFT, sentence, ids) for owner, ids in _by_owner(kernels).items()]


def _over(
    tx: Transaction, policy: Policy, scope: Holder, kernels: Sequence[_Kernel], used: float, now: datetime
) -> tuple[list[Notice], list[Stop]]:
    known = _state(tx, policy, scope, OVER)
    limit = policy.burst if policy.burst is not None else policy.hard
    over = limit is not None and (used >= limit - EPSILON if policy.resource.timed else used > limit + EPSILON)
    if policy.grace_seconds is None or limit is None or not over:
        if known is not None:
            tx.delete(known)
        return [], []
    what = (
        f"{_amount(policy, used)} are in use{sentences.window(policy)}, and the policy {policy.name} allows "
        f"{_amount(policy, limit)}"
    )
    if known is None:
        until = now + timedelta(seconds=policy.grace_seconds)
        tx.add(
            PolicyState(
                policy_id=policy.id, subject=":".join(scope), state=OVER, since=now, until=until, noticed_at=now
            )
        )
        sentence = (
            f"{what}: in {sentences.span(policy.grace_seconds)} kernels are stopped, the newest first. Save your work, "
            "and shut down what you do not need."
        )
        return [Notice(owner, policy.name, OVER, sentence, ids) for owner, ids in _by_owner(kernels).items()], []
    if known.until is None or now < known.until:
        return [], []
    stops = []
    for kernel in sorted(kernels, key=lambda one: one.since, reverse=True):
        if not policy.resource.timed:
            if used <= limit + EPSILON:
                break
            used -= need_of(policy, kernel.demand.resources)
        sentence = (
            f"This kernel was stopped: {what}, for longer than the grace of {sentences.span(policy.grace_seconds)}."
        )
        stops.append(Stop(kernel.id, kernel.demand.owner, policy.name, sentence))
    tx.delete(known)
    return [], stops
