"""What the launches of the last days would have met under other policies."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from heapq import heappop, heappush
from typing import Any, cast

from sqlalchemy import Table, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.models import Reservation
from hub_gateway.db.tenancy import AuditEntry, LedgerEntry
from hub_gateway.errors import BadRequest
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.policies import PolicyIndex
from hub_gateway.quotas.prices import Prices, all_prices
from hub_gateway.quotas.rates import EPSILON, prices_then, rate_of
from hub_gateway.quotas.resolve import applicable, covers, window_bounds
from hub_gateway.quotas.types import Action, Counts, Demand, Policy, Resource, SubjectKind
from hub_gateway.quotas.use import Holder, scope_of

__all__ = ["Simulation", "UserOutcome", "simulate"]

HOUR = 3600.0
MAX_LAUNCHES = 200_000
SERVICE = "services/"
_LEDGER = cast(Table, LedgerEntry.__table__)


@dataclass(frozen=True)
class UserOutcome:
    """One user's launches, and how many of them would have been refused or queued."""

    user: str
    launches: int
    refused: int
    queued: int
    admitted_again: int = 0
    """Launches that were refused then, and would have been admitted."""


@dataclass(frozen=True)
class Simulation:
    """What a set of policies would have done to what happened."""

    days: int
    launches: int
    refused: int
    queued: int
    admitted_again: int
    by_user: tuple[UserOutcome, ...]
    sentence: str


@dataclass
class _Launch:
    demand: Demand
    started: float
    stopped: float
    seconds: float
    price: int
    refused: bool = False


def _history(
    tx: Transaction, prices: Mapping[int, Prices], first: datetime, since: datetime, now: datetime
) -> list[_Launch]:
    """Launches in order: what ran since `first`, of the ledger and open ones, and what was refused after `since`."""
    found: list[_Launch] = []
    last: dict[str, _Launch] = {}

    def add(row: Any, groups: frozenset[str], started: float, stopped: float, continues: bool) -> None:
        if continues and (earlier := last.get(row.kernel_id)) is not None:
            earlier.stopped, earlier.seconds = stopped, earlier.seconds + stopped - started
            return
        last[row.kernel_id] = _launch(row, groups, started, stopped, row.price_version)
        found.append(last[row.kernel_id])

    intervals = select(_LEDGER).where(_LEDGER.c.kind == "interval", _LEDGER.c.stopped > first.timestamp())
    entries = tx.connection().execute(intervals.order_by(_LEDGER.c.id).limit(MAX_LAUNCHES + 1)).all()
    for row in entries:
        groups = frozenset(name for name in row.groups.split("\n") if name)
        add(row, groups, row.started, row.stopped, row.continues)
    for row in tx.execute(select(Reservation.__table__).where(Reservation.released_at.is_(None))):
        begin = row.billed_from or row.created_at
        add(row, frozenset(row.groups or ()), begin.timestamp(), now.timestamp(), begin > row.created_at)
    if max(len(entries), len(found)) > MAX_LAUNCHES:
        raise BadRequest(
            f"More than {MAX_LAUNCHES} kernels ran in that time, which takes too long to replay; choose fewer days."
        )
    lately = sorted(one.stopped - one.started for one in found)
    usual = lately[len(lately) // 2] if lately else HOUR
    refused = select(AuditEntry.at, AuditEntry.subject, AuditEntry.detail).where(
        AuditEntry.action == "kernel.refused", AuditEntry.at > since
    )
    for at, owner, text in tx.execute(refused):
        detail = json.loads(text)
        demand = Demand(
            owner,
            _kind(owner),
            frozenset(detail.get("groups") or ()),
            detail.get("kernelspec", ""),
            detail.get("proxy", ""),
            resources=Resources(**(detail.get("resources") or {})),
        )
        begin = at.timestamp()
        found.append(
            _Launch(demand, begin, begin + usual, usual, prices_then(prices.values(), at).version, refused=True)
        )
    return sorted(found, key=lambda one: one.started)


def _kind(owner: str) -> SubjectKind:
    return SubjectKind.SERVICE if owner.startswith(SERVICE) else SubjectKind.USER


def _launch(row: Any, groups: frozenset[str], started: float, stopped: float, price: int) -> _Launch:
    resources = Resources(row.cpu, row.memory, row.gpu, row.gpu_model)
    demand = Demand(row.owner, _kind(row.owner), groups, row.kernelspec, row.proxy, row.queue, resources)
    return _Launch(demand, started, stopped, stopped - started, price)


class _Sweep:
    """Goes forward in time over launches: what is held (`rate`), and what was used since the beginning (`used`)."""

    def __init__(self, launches: list[tuple[float, float, float]]) -> None:
        self._launches = launches
        """Start, stop and rate, by start; it grows at its end."""
        self._next = 0
        self._stops: list[tuple[float, float]] = []
        self._at = 0.0
        self.rate = 0.0
        self.used = 0.0

    def to(self, moment: float) -> None:
        """Go on to a moment, which is never before the last one."""
        while self._next < len(self._launches) and self._launches[self._next][0] <= moment:
            start, stop, rate = self._launches[self._next]
            self._next += 1
            self._stop_until(start)
            self._go(start)
            self.rate += rate
            heappush(self._stops, (stop, rate))
        self._stop_until(moment)
        self._go(moment)

    def _stop_until(self, moment: float) -> None:
        while self._stops and self._stops[0][0] <= moment:
            stop, rate = heappop(self._stops)
            self._go(stop)
            self.rate -= rate

    def _go(self, moment: float) -> None:
        self.used += self.rate * max(0.0, moment - self._at)
        self._at = max(self._at, moment)


class _Meter:
    """What one scope holds and uses of one policy. Time only goes forward."""

    def __init__(self) -> None:
        self._launches: list[tuple[float, float, float]] = []
        self._head, self._tail = _Sweep(self._launches), _Sweep(self._launches)

    def add(self, started: float, stopped: float, rate: float) -> None:
        self._launches.append((started, max(started, stopped), rate))

    def held(self, at: float) -> float:
        self._head.to(at)
        return self._head.rate

    def used(self, begin: float, at: float) -> float:
        self._head.to(at)
        self._tail.to(begin)
        return (self._head.used - self._tail.used) / HOUR


class _World:
    """What would be held and used, if only what is admitted had run."""

    def __init__(self, prices: dict[int, Prices]) -> None:
        self.prices = prices
        self.meters: dict[tuple[str, Holder], _Meter] = defaultdict(_Meter)

    def add(self, launch: _Launch, policies: Iterable[Policy]) -> None:
        demand = launch.demand
        for policy in policies:
            rate = self.rate(policy, launch)
            if rate and covers(policy, demand.kernelspec, demand.proxy, demand.queue):
                scope = scope_of(policy, demand.owner, demand.owner_kind)
                self.meters[policy.name, scope].add(launch.started, launch.stopped, rate)

    def used(self, policy: Policy, scope: Holder, at: float, now: datetime) -> float:
        meter = self.meters[policy.name, scope]
        if not policy.resource.timed:
            return meter.held(at)
        return meter.used(window_bounds(policy, now)[0].timestamp(), at)

    def rate(self, policy: Policy, one: _Launch) -> float:
        """What a launch takes of a policy."""
        return rate_of(policy, one.demand.resources, self.prices.get(one.price, self.prices[0]))


def simulate(tx: Transaction, policies: Sequence[Policy], days: int, now: datetime) -> Simulation:
    """Replay the last days. Raises `BadRequest` where more was launched than can be replayed while somebody waits.

    A launch that would have waited runs at once: nobody knows how long it would have. What the ledger does not know is
    left out: how long kernels took to start (limits of starting kernels), and bursts.
    """
    by_subject: dict[tuple[SubjectKind, str], list[Policy]] = defaultdict(list)
    counting = [one for one in policies if one.counts is not Counts.KERNEL and one.resource is not Resource.STARTING]
    for policy in counting:
        by_subject[policy.subject_kind, policy.subject].append(policy)
    index = PolicyIndex("simulated", {}, {key: tuple(some) for key, some in by_subject.items()})
    prices = all_prices(tx)
    world = _World(prices)
    since = now - timedelta(days=days)
    begins = [window_bounds(policy, since)[0] for policy in counting if policy.resource.timed]
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for launch in _history(tx, prices, min([since, *begins]), since, now):
        in_time = launch.started >= since.timestamp()
        outcome = _outcome(index, world, launch) if in_time else "admitted"
        of_user = counts[launch.demand.owner]
        if in_time:
            of_user[0] += 1
            of_user[1] += outcome == "refused"
            of_user[2] += outcome == "queued"
            of_user[3] += launch.refused and outcome != "refused"
        if outcome != "refused":
            world.add(launch, index.of(launch.demand))
    users = tuple(
        UserOutcome(owner, *some)
        for owner, some in sorted(counts.items(), key=lambda item: (-item[1][1], -item[1][2], item[0]))
        if some[0]
    )
    launches, refused, queued, again = (
        sum(getattr(one, name) for one in users) for name in ("launches", "refused", "queued", "admitted_again")
    )
    return Simulation(days, launches, refused, queued, again, users, _sentence(users, launches, refused, queued, days))


def _outcome(index: PolicyIndex, world: _World, launch: _Launch) -> str:
    demand, queued = launch.demand, False
    moment = datetime.fromtimestamp(launch.started, timezone.utc)
    for policy in applicable(index.of(demand), demand, moment):
        if policy.hard is None:
            continue
        need = world.rate(policy, launch)
        if need <= EPSILON:
            continue
        used = world.used(policy, scope_of(policy, demand.owner, demand.owner_kind), launch.started, moment)
        fits = used < policy.hard if policy.resource.timed else used + need <= policy.hard + EPSILON
        if not fits and (policy.action is Action.REJECT or (not policy.resource.timed and need > policy.hard)):
            return "refused"
        queued = queued or not fits
    return "queued" if queued else "admitted"


def _sentence(users: Sequence[UserOutcome], launches: int, refused: int, queued: int, days: int) -> str:
    hit = sum(1 for one in users if one.refused or one.queued)
    if not launches:
        return f"There were no launches in the last {days} days."
    if not hit:
        return f"It would have admitted all {launches} launches of the last {days} days."
    people = f"{hit} user{'' if hit == 1 else 's'}"
    waits = f" and queued {queued}" if queued else ""
    return f"It would have refused {refused}{waits} of the {launches} launches of the last {days} days, of {people}."
