"""What time does to limits: notices above soft ones, and an end after a grace above hard ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from sqlalchemy import Table, select, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.tenancy import PolicyState
from hub_gateway.kernels.types import KernelTarget, Resources
from hub_gateway.quotas import sentences
from hub_gateway.quotas.admission import Admission
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.rates import EPSILON, prices_of, rate_of
from hub_gateway.quotas.resolve import applicable
from hub_gateway.quotas.types import Counts, Demand, Policy, SubjectKind
from hub_gateway.quotas.use import Holder, held_by, lock, scope_of

__all__ = ["Notice", "Stop", "enforce"]

SOFT, OVER = "soft", "over"
_OPEN = cast(Table, Reservation.__table__)
_HELD = select(_OPEN, Kernel.target).join(Kernel, Kernel.id == _OPEN.c.kernel_id).where(_OPEN.c.released_at.is_(None))


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
class _Held:
    id: str
    since: datetime
    demand: Demand
    price: int
    """The version of the price list by which it is billed."""
    going: bool
    """Whether it is being stopped already, for whatever reason."""


def enforce(tx: Transaction, admission: Admission, now: datetime) -> tuple[list[Notice], list[Stop]]:
    """Look at everything that is held; what is to be told, once, and what is to be stopped.

    A kernel that is to be stopped has that as its target in this transaction: whoever dies right after it, it ends, and
    nobody is told twice. A grace begins anew where its policy is changed: what was told then is not true any more.
    """
    lock(tx)
    index = admission.policies.index(tx)
    if not any(_watched(policy) for policy in index.by_name.values()):
        return [], []
    prices = prices_of(tx, index.by_name.values())
    held: dict[tuple[str, Holder], list[_Held]] = defaultdict(list)
    for kernel in _kernels(tx):
        for policy in applicable(index.of(kernel.demand), kernel.demand, now):
            if _watched(policy) and rate_of(policy, kernel.demand.resources, prices(kernel.price)) > EPSILON:
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
        limit = policy.hard if policy.burst is None else admission.burst_limit(tx, policy, scope, now)
        told, ended = _over(tx, policy, scope, kernels, used, limit, now)
        notices += told
        stops += [stop for stop in ended if stop.kernel_id not in {one.kernel_id for one in stops}]
    for state in tx.scalars(select(PolicyState).where(PolicyState.state.in_((SOFT, OVER)))):
        if (state.policy_id, state.subject) not in seen:
            tx.delete(state)
    for stop in stops:
        _end(tx, stop)
    return notices, stops


def _end(tx: Transaction, stop: Stop) -> None:
    tx.execute(
        update(Kernel)
        .where(Kernel.id == stop.kernel_id)
        .values(target=KernelTarget.ENDED.value, message=stop.sentence)
        .execution_options(synchronize_session=False)
    )
    detail = {"kernel": stop.kernel_id, "policy": stop.policy, "message": stop.sentence}
    audit.append(tx, actor=audit.GATEWAY, action="kernel.stop", subject=stop.owner, detail=detail)


def _watched(policy: Policy) -> bool:
    return policy.counts is not Counts.KERNEL and (
        policy.soft is not None or (policy.hard is not None and policy.grace_seconds is not None)
    )


def _kernels(tx: Transaction) -> list[_Held]:
    found = []
    for row in tx.connection().execute(_HELD).mappings():
        demand = Demand(
            row["owner"],
            SubjectKind(row["owner_kind"]),
            frozenset(row["groups"] or ()),
            row["kernelspec"],
            row["proxy"],
            row["queue"],
            Resources(row["cpu"], row["memory"], row["gpu"], row["gpu_model"]),
        )
        going = row["target"] != KernelTarget.RUNNING.value
        found.append(_Held(row["kernel_id"], row["created_at"], demand, row["price_version"], going))
    return found


def _by_owner(kernels: Sequence[_Held]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.demand.owner].append(kernel.id)
    return {owner: tuple(ids) for owner, ids in found.items()}


def _state(tx: Transaction, policy: Policy, scope: Holder, state: str) -> PolicyState | None:
    return tx.get(PolicyState, (policy.id, ":".join(scope), state))


def _amount(policy: Policy, value: float) -> str:
    return shown(policy.resource, value, policy.gpu_model)


def _soft(
    tx: Transaction, policy: Policy, scope: Holder, kernels: Sequence[_Held], used: float, now: datetime
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
    tx: Transaction,
    policy: Policy,
    scope: Holder,
    kernels: Sequence[_Held],
    used: float,
    limit: float | None,
    now: datetime,
) -> tuple[list[Notice], list[Stop]]:
    known = _state(tx, policy, scope, OVER)
    staying = [kernel for kernel in kernels if not kernel.going]
    if not policy.resource.timed:
        used -= sum(rate_of(policy, kernel.demand.resources) for kernel in kernels if kernel.going)
    over = limit is not None and (used >= limit - EPSILON if policy.resource.timed else used > limit + EPSILON)
    if policy.grace_seconds is None or limit is None or not over or not staying:
        if known is not None:
            tx.delete(known)
        return [], []
    what = (
        f"{_amount(policy, used)} are in use{sentences.window(policy)}, and the policy {policy.name} allows "
        f"{_amount(policy, limit)}"
    )
    if known is not None and policy.updated_at is not None and known.since < policy.updated_at:
        tx.delete(known)
        tx.flush()
        known = None
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
        return [Notice(owner, policy.name, OVER, sentence, ids) for owner, ids in _by_owner(staying).items()], []
    if known.until is None or now < known.until:
        return [], []
    stops = []
    for kernel in sorted(staying, key=lambda one: one.since, reverse=True):
        if not policy.resource.timed:
            if used <= limit + EPSILON:
                break
            used -= rate_of(policy, kernel.demand.resources)
        sentence = (
            f"This kernel was stopped: {what}, for longer than the grace of {sentences.span(policy.grace_seconds)}."
        )
        stops.append(Stop(kernel.id, kernel.demand.owner, policy.name, sentence))
    return [], stops
