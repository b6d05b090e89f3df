"""Whether a launch is admitted: decided, and reserved, in one transaction.

Everything here runs inside of a writing transaction of the caller's, under `db.lock`: admissions of one database
happen one after the other, through however many processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TypeAlias, cast

from sqlalchemy import Table, bindparam, delete, insert, select, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock, locked
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.tenancy import PolicyState
from hub_gateway.errors import LaunchRefused
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas import ledger, meters, prices, sentences
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.holders import Room, frees_in, holdings, shares
from hub_gateway.quotas.policies import MAINTENANCE, PolicyIndex, PolicyStore
from hub_gateway.quotas.rates import EPSILON, prices_at, rate_of
from hub_gateway.quotas.resolve import applicable, covers, window_bounds
from hub_gateway.quotas.types import Action, Counts, Demand, Policy, Resource, SubjectKind, Verdict, WindowKind
from hub_gateway.quotas.use import Held, Holder, change, held_by, holders_of, metered_for, scope_of

__all__ = ["BURST", "QUEUED", "Admission", "Burst", "Fit", "burst_after"]

BURST = "burst"
STATED = {Resource.CPU: "many cores", Resource.CORE_HOURS: "many cores", Resource.MEMORY: "much memory"}
HALVINGS = 10
"""How exactly it is told when a rolling window has room: to a thousandth of the window."""
QUEUED = KernelStatus.QUEUED.value
Burst: TypeAlias = tuple[datetime, datetime | None]
"""Since when use is above a hard limit with a burst, and (where it no longer is) until when it was."""
_RESERVATIONS = cast(Table, Reservation.__table__)
_STATES = cast(Table, PolicyState.__table__)
_BURST_OF = select(_STATES.c.since, _STATES.c.until).where(
    _STATES.c.policy_id == bindparam("of_policy"),
    _STATES.c.subject == bindparam("of_subject"),
    _STATES.c.state == BURST,
)
_RESERVE = insert(_RESERVATIONS).values(price_version=prices.CURRENT).returning(_RESERVATIONS.c.price_version)


@dataclass(frozen=True)
class Fit:
    """How a launch fits into one policy: what it needs, what is used, and up to which limit (None: no limit) now.

    Of what is used up over time `need` is what it takes in an hour.
    """

    policy: Policy
    need: float
    used: float
    limit: float | None

    @property
    def fits(self) -> bool:
        """Whether it is within the limit."""
        if self.limit is None or self.need <= EPSILON:
            return True
        if self.policy.resource.timed:
            return self.used < self.limit - EPSILON
        return self.used + self.need <= self.limit + EPSILON

    @property
    def hopeless(self) -> bool:
        """Whether it would not fit even if nothing were used."""
        return self.limit is not None and not self.policy.resource.timed and self.need > self.limit + EPSILON


def burst_after(known: Burst | None, over: bool, now: datetime) -> Burst | None:
    """A burst as it stands when use is seen above the hard limit (`over`), or not; None: there was none lately."""
    if known is None:
        return (now, None) if over else None
    since, until = known
    if over and until is not None:
        spent = until - since
        # What was not recovered meanwhile is spent already.
        return (now if now - until >= spent else now - spent), None
    if not over and until is None:
        return since, now
    return known


class Admission:
    """Decides and reserves for one gateway process. Its methods run in a transaction.

    `where` is where a user sees their limits: it stands in every refusal.
    """

    def __init__(self, policies: PolicyStore | None = None, *, where: str = "") -> None:
        self.policies = policies or PolicyStore()
        self.where = where

    # Deciding

    def decide(
        self, tx: Transaction, demand: Demand, now: datetime, *, kernel_id: str | None = None, looking: bool = False
    ) -> Verdict:
        """Whether this launch is admitted now, has to wait, or is refused. Nothing is written.

        `kernel_id` is a kernel that waits already: it does not wait for itself, and maintenance has it wait on.
        `looking` is for who only wants to know: nobody is held up meanwhile.
        """
        if not looking:
            lock(tx)
        closed = self.policies.maintenance(tx)
        if closed and kernel_id is not None:
            return Verdict("queued", sentence=sentences.maintenance(closed).rstrip("."))
        if closed:
            return Verdict("refused", policy=MAINTENANCE, sentence=sentences.maintenance(closed))
        if looking:  # who launches has been there before
            try:
                # What waits is not cut down any more.
                least = Resources() if kernel_id is None else demand.resources
                demand, _ = self.clamped(tx, demand, least, now)
            except LaunchRefused as error:
                return Verdict("refused", policy=error.policy, sentence=error.message)
        index = self.policies.index(tx)
        fits = self.fits(tx, index, demand, now, exact=False)
        blocked = [fit for fit in fits if not fit.fits]
        if not blocked:
            waiting = self._behind(tx, index, fits, kernel_id)
            if waiting is None:
                return Verdict("admitted", notices=sentences.soft(fits))
            blocked = [waiting]
        return self._blocked(tx, demand, blocked, now)

    def clamped(
        self, tx: Transaction, demand: Demand, least: Resources, now: datetime
    ) -> tuple[Demand, tuple[str, ...]]:
        """The launch, cut down to what one kernel may take, and a notice for each cut.

        Where it states no cores or no memory, it gets what one kernel may take. Raises `LaunchRefused` where the
        kernelspec needs more than that at least, and where a limit is about what is not stated.
        """
        taken, notices = demand.resources, []
        policies = [one for one in applicable(self.policies.index(tx).of(demand), demand, now) if one.hard is not None]
        of_one = [one for one in policies if one.counts is Counts.KERNEL]
        for policy in sorted(of_one, key=lambda one: one.hard or 0.0):
            hard = policy.hard or 0.0
            silent = policy.resource is not Resource.GPU and rate_of(policy, taken) <= 0
            if rate_of(policy, taken) <= hard and not silent:
                continue
            limit = shown(policy.resource, hard, policy.gpu_model)
            # Of no cores or no memory a resource manager understands: as much as there is.
            nothing = hard < 1 if policy.resource is Resource.MEMORY else hard <= 0
            useless = nothing and policy.resource is not Resource.GPU
            if useless or rate_of(policy, replace(least, gpu_model=taken.gpu_model)) > hard:
                error = LaunchRefused(
                    f"A kernel of {demand.kernelspec} needs more than the {limit} that one kernel may take "
                    f"(policy {policy.name}); choose another kernel, or ask the administrator."
                )
                error.policy = policy.name
                raise error
            if not silent:
                asked = shown(policy.resource, rate_of(policy, taken), policy.gpu_model)
                notices.append(
                    f"The kernel gets {limit} and not {asked}: one may not take more (policy {policy.name})."
                )
            if policy.resource is Resource.CPU:
                taken = replace(taken, cpu=hard)
            elif policy.resource is Resource.MEMORY:
                taken = replace(taken, memory=int(hard))
            else:
                taken = replace(taken, gpu=int(hard))
        for policy in policies:
            what = STATED.get(policy.resource)
            if what is not None and demand.kernelspec and rate_of(policy, taken) <= 0:
                error = LaunchRefused(
                    f"The kernelspec {demand.kernelspec} does not say how {what} its kernels take, which the policy "
                    f"{policy.name} limits; choose another kernel, or ask the administrator to state it."
                )
                error.policy = policy.name
                raise error
        return replace(demand, resources=taken), tuple(notices)

    def fits(
        self, tx: Transaction, index: PolicyIndex, demand: Demand, now: datetime, *, exact: bool = True
    ) -> list[Fit]:
        """How a launch fits into each policy that applies to it.

        Not `exact` is for who only wants to know whether it fits: what is used may be less than is told.
        """
        policies = [one for one in applicable(index.of(demand), demand, now) if one.counts is not Counts.KERNEL]
        if not policies:
            return []
        held = held_by(tx, holders_of(demand.owner, demand.owner_kind, demand.groups))
        if locked(tx) and any(one.id in index.metered for one in policies):
            meters.read(tx, metered_for(demand.owner, demand.groups))
        cost = prices_at(tx, policies, now)
        return [
            self._fit(tx, policy, demand, held, now, rate_of(policy, demand.resources, cost), exact=exact)
            for policy in policies
        ]

    def _fit(
        self,
        tx: Transaction,
        policy: Policy,
        demand: Demand,
        held: dict[Holder, list[Held]],
        now: datetime,
        need: float,
        *,
        exact: bool,
    ) -> Fit:
        scope = scope_of(policy, demand.owner, demand.owner_kind)
        used = self.used(tx, policy, scope, held.get(scope, ()), now, enough=None if exact else policy.least)
        limit = policy.hard
        if limit is not None and policy.burst is not None and used + need > limit:
            limit = self.burst_limit(policy, _burst_of(tx, policy, scope), now)
        return Fit(policy, need, used, limit)

    def used(
        self,
        tx: Transaction,
        policy: Policy,
        scope: Holder,
        held: Sequence[Held],
        now: datetime,
        *,
        since: datetime | None = None,
        enough: float | None = None,
    ) -> float:
        """What is used of a policy by its scope, in the base unit; of what is used up over time `since` then only.

        `enough` is for who only wants to know whether it is less than that, see `meters.used`.
        """
        if policy.resource.timed and since is not None:
            return meters.timed_use(tx, policy, scope, since, now).amount
        if policy.resource.timed:
            return meters.used(tx, policy, scope, now, enough=enough)
        mine = (row for row in held if covers(policy, row.kernelspec, row.proxy, row.queue))
        if policy.resource is Resource.GPU and policy.gpu_model:
            mine = (row for row in mine if row.gpu_model == policy.gpu_model)
        return float(sum(getattr(row, policy.resource.value) for row in mine))

    @staticmethod
    def burst_limit(policy: Policy, burst: Burst | None, now: datetime) -> float:
        """Up to which a scope may use a policy with a burst now: the burst while it lasts, else the hard limit."""
        assert policy.hard is not None and policy.burst is not None
        if burst is None:
            return policy.burst
        lasts = timedelta(seconds=policy.burst_seconds or 0)
        since, until = burst
        if until is not None:
            spent = min(until - since, lasts)
            if now - until >= spent or spent < lasts:
                return policy.burst
            return policy.hard
        return policy.burst if now - since < lasts else policy.hard

    def _behind(self, tx: Transaction, index: PolicyIndex, fits: list[Fit], kernel_id: str | None) -> Fit | None:
        """The policy for which others wait already, so that this launch has to wait behind them."""
        names = [
            fit.policy.name
            for fit in fits
            if fit.policy.action is Action.QUEUE
            and fit.policy.counts is Counts.TOGETHER
            and fit.limit is not None
            and fit.need > EPSILON
        ]
        if not names or kernel_id is not None:
            return None
        found = tx.execute(
            select(Kernel.queue_policy).where(Kernel.status == QUEUED, Kernel.queue_policy.in_(names)).limit(1)
        ).scalar_one_or_none()
        return next((fit for fit in fits if fit.policy.name == found), None)

    def _blocked(self, tx: Transaction, demand: Demand, blocked: list[Fit], now: datetime) -> Verdict:
        refusing = [fit for fit in blocked if fit.policy.action is Action.REJECT or fit.hopeless]
        if refusing:
            fit = refusing[0]
            room = Room() if fit.hopeless else self.room(tx, fit, demand, now)
            sentence = sentences.refusal(demand, fit, room, now, self.where)
            return Verdict("refused", policy=fit.policy.name, sentence=sentence, frees_in=room.frees_in)
        room = self.room(tx, blocked[0], demand, now)
        deadlines = [fit.policy.queue_seconds for fit in blocked if fit.policy.queue_seconds is not None]
        return Verdict(
            "queued",
            policy=blocked[0].policy.name,
            sentence=sentences.waiting(demand, blocked[0], room, now),
            deadline=now + timedelta(seconds=min(deadlines)) if deadlines else None,
            frees_in=room.frees_in,
        )

    def room(self, tx: Transaction, fit: Fit, demand: Demand, now: datetime) -> Room:
        """Who holds what a launch needs of a policy, and when some of it comes free."""
        policy = fit.policy
        own = holdings(tx, policy, demand, own=True)
        others, more = shares(tx, policy, demand, limit=sentences.NAMED)
        if policy.resource.timed:
            return Room(own, others, more, self._anew_in(tx, fit, demand, now))
        oldest = holdings(tx, policy, demand) if others else own
        return Room(own, others, more, frees_in(tx, oldest, now))

    def _anew_in(self, tx: Transaction, fit: Fit, demand: Demand, now: datetime) -> timedelta | None:
        """When there is time again: at the end of a calendar window, or when enough of a rolling one has grown old.

        That is if nothing of it runs until then.
        """
        policy = fit.policy
        begin, end = window_bounds(policy, now)
        if not fit.limit or fit.limit <= EPSILON:
            return None
        if policy.window is WindowKind.CALENDAR:
            return end - now
        scope = scope_of(policy, demand.owner, demand.owner_kind)
        early, late = begin, now
        for _ in range(HALVINGS):
            middle = early + (late - early) / 2
            if self.used(tx, policy, scope, (), now, since=middle) < fit.limit - EPSILON:
                late = middle
            else:
                early = middle
        return late - begin

    # Reserving

    def reserve(
        self,
        tx: Transaction,
        demand: Demand,
        now: datetime,
        *,
        kernel_id: str,
        principal: str | None,
        unix_user: str | None,
        cost_center: str,
        again: bool = False,
    ) -> None:
        """Reserve what an admitted launch takes; `again` where it may have been admitted before, and has a row."""
        taken = demand.resources
        values = {
            "kernel_id": kernel_id,
            "owner": demand.owner,
            "owner_kind": demand.owner_kind.value,
            "groups": sorted(demand.groups),
            "kernelspec": demand.kernelspec,
            "proxy": demand.proxy,
            "queue": demand.queue,
            "kernels": 1,
            "starting": True,
            "cpu": taken.cpu,
            "memory": taken.memory,
            "gpu": taken.gpu,
            "gpu_model": taken.gpu_model,
            "created_at": now,
            "billed_from": now,
            "released_at": None,
            "principal": principal,
            "unix_user": unix_user,
            "cost_center": cost_center,
            "priced_at": now,
        }
        if again:
            tx.connection().execute(delete(_RESERVATIONS).where(_RESERVATIONS.c.kernel_id == kernel_id))
        made = tx.connection().execute(_RESERVE, values).scalar_one()
        meters.taken(tx, self.policies.index(tx), {**values, "price_version": made})
        with self._bursts(tx, demand, now):
            change(
                tx,
                holders_of(demand.owner, demand.owner_kind, demand.groups),
                (demand.kernelspec, demand.proxy, demand.queue, taken.gpu_model),
                kernels=1,
                starting=1,
                resources=taken,
            )

    def release(self, tx: Transaction, kernel_id: str, at: datetime) -> bool:
        """Give back what a kernel holds, and write it into the ledger; whether it held anything."""
        lock(tx)
        columns = _RESERVATIONS.c
        row = (
            tx.connection()
            .execute(select(_RESERVATIONS).where(columns.kernel_id == kernel_id, columns.released_at.is_(None)))
            .mappings()
            .one_or_none()
        )
        if row is None:
            return False
        tx.connection().execute(
            update(_RESERVATIONS).where(columns.kernel_id == kernel_id).values(released_at=at, starting=False)
        )
        owner_kind = SubjectKind(row["owner_kind"])
        resources = Resources(row["cpu"], row["memory"], row["gpu"], row["gpu_model"])
        groups = frozenset(row["groups"] or ())
        demand = Demand(row["owner"], owner_kind, groups, row["kernelspec"], row["proxy"], row["queue"], resources)
        with self._bursts(tx, demand, at):
            change(
                tx,
                holders_of(row["owner"], owner_kind, groups),
                (row["kernelspec"], row["proxy"], row["queue"], row["gpu_model"]),
                kernels=row["kernels"],
                starting=int(row["starting"]),
                resources=resources,
                sign=-1,
            )
        meters.given_back(tx, self.policies.index(tx), row, ledger.close(tx, row, at))
        return True

    def ready(self, tx: Transaction, kernel_id: str) -> None:
        """The kernel has started: it no longer counts as one that does."""
        lock(tx)
        columns = _RESERVATIONS.c
        row = (
            tx.connection()
            .execute(
                update(_RESERVATIONS)
                .where(columns.kernel_id == kernel_id, columns.released_at.is_(None), columns.starting.is_(True))
                .values(starting=False)
                .returning(_RESERVATIONS)
            )
            .mappings()
            .one_or_none()
        )
        if row is not None:
            change(
                tx,
                holders_of(row["owner"], SubjectKind(row["owner_kind"]), row["groups"] or ()),
                (row["kernelspec"], row["proxy"], row["queue"], row["gpu_model"]),
                kernels=0,
                starting=1,
                sign=-1,
            )

    @contextmanager
    def _bursts(self, tx: Transaction, demand: Demand, now: datetime) -> Iterator[None]:
        """Around a change of what is held: remember when use went above a hard limit with a burst, and came back."""
        index = self.policies.index(tx)
        policies: list[Policy] = []
        if any(one.burst is not None for one in index.of(demand)):
            # Only of what counts: under a grant the policy below it is not in its burst.
            policies = [one for one in applicable(index.of(demand), demand, now) if one.burst is not None]
        before = self._over(tx, policies, demand, now)
        yield
        for policy, was, over in zip(policies, before, self._over(tx, policies, demand, now), strict=True):
            # What was not above and is not has no burst that goes on, but for a limit that was raised: see `enforce`.
            if was or over:
                _note_burst(tx, policy, scope_of(policy, demand.owner, demand.owner_kind), over, now)

    def _over(self, tx: Transaction, policies: Sequence[Policy], demand: Demand, now: datetime) -> list[bool]:
        """Whether use is above the hard limit of each."""
        held = held_by(tx, holders_of(demand.owner, demand.owner_kind, demand.groups)) if policies else {}
        scopes = [scope_of(policy, demand.owner, demand.owner_kind) for policy in policies]
        return [
            self.used(tx, policy, scope, held.get(scope, ()), now, enough=policy.hard) > (policy.hard or 0.0) + EPSILON
            for policy, scope in zip(policies, scopes, strict=True)
        ]


def _note_burst(tx: Transaction, policy: Policy, scope: Holder, over: bool, now: datetime) -> None:
    before = _burst_of(tx, policy, scope)
    after = burst_after(before, over, now)
    if after is None or after == before:
        return
    key = {"policy_id": policy.id, "subject": ":".join(scope), "state": BURST}
    values = {"since": after[0], "until": after[1]}
    if before is None:
        tx.connection().execute(insert(_STATES), {**key, **values})
    else:
        of = (_STATES.c[name] == value for name, value in key.items())
        tx.connection().execute(update(_STATES).where(*of).values(values))


def _burst_of(tx: Transaction, policy: Policy, scope: Holder) -> Burst | None:
    row = tx.connection().execute(_BURST_OF, {"of_policy": policy.id, "of_subject": ":".join(scope)}).one_or_none()
    return None if row is None else (row[0], row[1])
