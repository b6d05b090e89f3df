"""What time does to limits: notices above soft ones, and an end after a grace above hard ones."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from sqlalchemy import Select, Table, Text, bindparam, delete, insert, or_, select, update
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.tenancy import PolicyState
from hub_gateway.kernels.types import KernelTarget, Resources
from hub_gateway.quotas import sentences
from hub_gateway.quotas.admission import BURST, Admission, Burst, burst_after
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.holders import in_group
from hub_gateway.quotas.policies import PolicyIndex
from hub_gateway.quotas.rates import EPSILON, prices_of, rate_of
from hub_gateway.quotas.resolve import applicable, slot
from hub_gateway.quotas.types import Counts, Demand, Policy, SubjectKind
from hub_gateway.quotas.use import EVERYONE, Holder, held_by, scope_of

__all__ = ["Line", "Notice", "Stop", "enforce", "look"]

T = TypeVar("T")

SOFT, OVER = "soft", "over"
TURN_SECONDS, REST_SECONDS = 0.0003, 0.002
"""A look at ten thousand kernels takes a sixth of a second of work."""
_OPEN = cast(Table, Reservation.__table__)
_STATES = cast(Table, PolicyState.__table__)
_OF = ("of_policy", "of_subject", "of_state")
_THAT = [_STATES.c[name] == bindparam(of) for name, of in zip(("policy_id", "subject", "state"), _OF, strict=True)]
_END = delete(_STATES).where(*_THAT)
_BURST = update(_STATES).where(*_THAT).values(since=bindparam("from"), until=bindparam("to"))
_SORT = (
    *(_OPEN.c.owner, _OPEN.c.owner_kind, cast_to(_OPEN.c.groups, Text)),
    *(_OPEN.c.kernelspec, _OPEN.c.proxy, _OPEN.c.queue),
)
"""Groups as they are written: they are parsed once for all who are in the same."""
_TAKEN = (_OPEN.c.cpu, _OPEN.c.memory, _OPEN.c.gpu, _OPEN.c.gpu_model)
_HELD: Select[Any] = (
    select(_OPEN.c.kernel_id, _OPEN.c.price_version, Kernel.target, *_SORT, *_TAKEN)
    .join(Kernel, Kernel.id == _OPEN.c.kernel_id)
    .where(_OPEN.c.released_at.is_(None))
    .order_by(_OPEN.c.created_at, _OPEN.c.kernel_id)
)
"""What is held, the oldest first."""


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


Line: TypeAlias = tuple[str, Holder]
"""The name of a policy, and whose use is compared with it."""


class _State(NamedTuple):
    """A row of what has to be remembered: not an object of the session, of which a look would make thousands."""

    policy_id: int
    subject: str
    state: str
    since: datetime
    until: datetime | None = None
    noticed_at: datetime | None = None

    @property
    def key(self) -> tuple[int, str, str]:
        """What tells it from others."""
        return self[:3]


@dataclass
class _Changes:
    """What a look has found out: rows to write, words to say, kernels to stop."""

    made: list[_State] = field(default_factory=list)
    ended: list[_State] = field(default_factory=list)
    burst: list[tuple[_State, Burst]] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.made or self.ended or self.burst or self.notices or self.stops)


class _Held(NamedTuple):
    """A kernel: not a dataclass, of which a look would make ten thousands."""

    id: str
    owner: str
    resources: Resources
    price: int
    """The version of the price list by which it is billed."""
    going: bool
    """Whether it is being stopped already, for whatever reason."""


class _Pace(Protocol):
    """How fast things are gone through."""

    def __call__(self, things: Iterable[T], /) -> Iterator[T]: ...


def look(tx: Transaction, admission: Admission, now: datetime) -> list[Line]:
    """The lines in which `enforce` would change something. Only reads, in short turns, and so holds nobody up."""
    return [line for line, changes in _survey(tx, admission, now, None, _in_turns) if changes]


def _in_turns(things: Iterable[T]) -> Iterator[T]:
    """The same, with a rest after each turn: at each of its statements a launch would wait for the interpreter."""
    ends = time.perf_counter() + TURN_SECONDS
    for thing in things:
        yield thing
        if time.perf_counter() >= ends:
            time.sleep(REST_SECONDS)
            ends = time.perf_counter() + TURN_SECONDS


def enforce(
    tx: Transaction, admission: Admission, now: datetime, lines: Collection[Line] | None = None
) -> tuple[list[Notice], list[Stop]]:
    """Look at what is held, in these lines or in all; what is to be told, once, and what is to be stopped.

    A kernel that is to be stopped has that as its target in this transaction: whoever dies right after it, it ends, and
    nobody is told twice. A grace begins anew where its policy is changed: what was told then is not true any more.
    """
    lock(tx)
    notices: list[Notice] = []
    stops: dict[str, Stop] = {}
    found = [changes for _, changes in _survey(tx, admission, now, lines)]
    _write(tx, found)
    for changes in found:
        notices += changes.notices
        for stop in changes.stops:
            stops.setdefault(stop.kernel_id, stop)
    for stop in stops.values():
        _end(tx, stop)
    return notices, list(stops.values())


def _write(tx: Transaction, found: Sequence[_Changes]) -> None:
    """Remember it; what ends makes room for what begins anew under the same key."""
    ended = [state.key for changes in found for state in changes.ended]
    made = [state._asdict() for changes in found for state in changes.made]
    burst = [(state.key, after) for changes in found for state, after in changes.burst]
    if ended:
        tx.connection().execute(_END, [dict(zip(_OF, key, strict=True)) for key in ended])
    if made:
        tx.connection().execute(insert(_STATES), made)
    if burst:
        values = [dict(zip((*_OF, "from", "to"), (*key, *after), strict=True)) for key, after in burst]
        tx.connection().execute(_BURST, values)


def _survey(
    tx: Transaction, admission: Admission, now: datetime, lines: Collection[Line] | None, paced: _Pace = iter
) -> Iterator[tuple[Line, _Changes]]:
    """What has changed in each line (of these)."""
    index = admission.policies.index(tx)
    states: dict[tuple[int | None, str, str], _State] = {}
    wanted = select(*(_STATES.c[name] for name in _State._fields))
    if lines is not None:
        wanted = wanted.where(_STATES.c.subject.in_({":".join(scope) for _, scope in lines}))
    for row in paced(tx.connection().execute(wanted)):
        state = _State(*row)
        states[state.key] = state
    held = _lines(tx, index, now, lines, paced)
    uses = held_by(tx, list({scope for _, scope in held}))
    for (name, scope), kernels in paced(held.items()):
        policy, subject = index.by_name[name], ":".join(scope)
        soft, over, burst = (states.pop((policy.id, subject, one), None) for one in (SOFT, OVER, BURST))
        used = admission.used(tx, policy, scope, uses[scope], now, enough=policy.least)
        changes = _Changes()
        limit = policy.hard
        if policy.burst is not None and limit is not None:
            limit = _burst(changes, policy, subject, burst, used, now)
        _soft(changes, policy, subject, soft, kernels, used, now)
        _over(changes, policy, subject, over, kernels, used, limit, now)
        yield (name, scope), changes
    names = {policy.id: policy.name for policy in index.by_name.values()}
    for (policy_id, subject, kind_of), found in states.items():
        kind, _, whose = subject.partition(":")
        line = (names.get(policy_id, ""), (kind, whose))
        if lines is not None and line not in lines:
            continue
        # Nothing is held there, or the policy does not count at this time.
        if kind_of in (SOFT, OVER):
            yield line, _Changes(ended=[found])
        elif found.until is None:
            yield line, _Changes(burst=[(found, (found.since, now))])


def _lines(
    tx: Transaction, index: PolicyIndex, now: datetime, lines: Collection[Line] | None, paced: _Pace
) -> dict[Line, list[_Held]]:
    """The kernels that count in each line that time does something to."""
    held: dict[Line, list[_Held]] = defaultdict(list)
    watched = [policy for policy in index.by_name.values() if _watched(policy)]
    if not watched:
        return held
    prices = prices_of(tx, watched)
    # One that nobody watches may count in the place of one that is watched.
    slots = {slot(policy) for policy in watched}
    rivals = index.only(lambda policy: slot(policy) in slots)
    groups_of: dict[str | None, frozenset[str]] = {}
    known: dict[tuple[object, ...], list[tuple[Policy, Line]]] = {}
    for key, price, target, *rest in paced(_kernels(tx, None if lines is None else {scope for _, scope in lines})):
        # Kernels of one sort meet the same policies.
        sort, taken = tuple(rest[: len(_SORT)]), rest[len(_SORT) :]
        if sort not in known:
            owner, kind, written, *about = sort
            if written not in groups_of:
                groups_of[written] = frozenset(json.loads(written or "null") or ())
            one = Demand(owner, SubjectKind(kind), groups_of[written], *about)
            counting = [policy for policy in applicable(rivals.of(one), one, now) if _watched(policy)]
            found = [(policy, (policy.name, scope_of(policy, owner, one.owner_kind))) for policy in counting]
            known[sort] = [(policy, line) for policy, line in found if lines is None or line in lines]
        if not known[sort]:
            continue
        kernel = _Held(key, sort[0], Resources(*taken), price, target != KernelTarget.RUNNING.value)
        for policy, line in known[sort]:
            if rate_of(policy, kernel.resources, prices(kernel.price)) > EPSILON:
                held[line].append(kernel)
    return held


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
    if policy.counts is Counts.KERNEL:
        return False
    limited = policy.hard is not None and (policy.grace_seconds is not None or policy.burst is not None)
    return policy.soft is not None or limited


def _kernels(tx: Transaction, scopes: Collection[Holder] | None) -> Iterable[Sequence[Any]]:
    """What is held, by anybody or by these, the oldest first."""
    wanted = _HELD
    if scopes is not None and (SubjectKind.EVERYONE.value, EVERYONE) not in scopes:
        owners = [name for kind, name in scopes if kind != SubjectKind.GROUP.value]
        groups = [in_group(tx, name, number) for number, (kind, name) in enumerate(scopes) if kind == "group"]
        wanted = _HELD.where(or_(_OPEN.c.owner.in_(owners), *groups))
    return tx.connection().execute(wanted)


def _by_owner(kernels: Sequence[_Held]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = defaultdict(list)
    for kernel in kernels:
        found[kernel.owner].append(kernel.id)
    return {owner: tuple(ids) for owner, ids in found.items()}


def _amount(policy: Policy, value: float) -> str:
    return shown(policy.resource, value, policy.gpu_model)


def _made(policy: Policy, subject: str, state: str, since: datetime, **more: datetime | None) -> _State:
    assert policy.id is not None
    return _State(policy.id, subject, state, since, **more)


def _burst(changes: _Changes, policy: Policy, subject: str, known: _State | None, used: float, now: datetime) -> float:
    """Note where use has gone above the hard limit, or come back, by whatever way; and up to which it may be used."""
    assert policy.hard is not None
    before = None if known is None else (known.since, known.until)
    after = burst_after(before, used > policy.hard + EPSILON, now)
    if after is not None and known is None:
        changes.made.append(_made(policy, subject, BURST, after[0], until=after[1]))
    elif after is not None and known is not None and after != before:
        changes.burst.append((known, after))
    return Admission.burst_limit(policy, after, now)


def _soft(
    changes: _Changes,
    policy: Policy,
    subject: str,
    known: _State | None,
    kernels: Sequence[_Held],
    used: float,
    now: datetime,
) -> None:
    if policy.soft is None or used <= policy.soft + EPSILON:
        if known is not None:
            changes.ended.append(known)
        return
    if known is not None:
        return
    changes.made.append(_made(policy, subject, SOFT, now, noticed_at=now))
    limit = "" if policy.hard is None else f", of {_amount(policy, policy.hard)} at most"
    sentence = (
        f"{_amount(policy, used)} are in use{sentences.window(policy)}: more than the soft limit of "
        f"{_amount(policy, policy.soft)} of the policy {policy.name}{limit}."
    )
    changes.notices += [Notice(owner, policy.name, SOFT, sentence, ids) for owner, ids in _by_owner(kernels).items()]


def _over(
    changes: _Changes,
    policy: Policy,
    subject: str,
    known: _State | None,
    kernels: Sequence[_Held],
    used: float,
    limit: float | None,
    now: datetime,
) -> None:
    staying = [kernel for kernel in kernels if not kernel.going]
    if not policy.resource.timed:
        used -= sum(rate_of(policy, kernel.resources) for kernel in kernels if kernel.going)
    over = limit is not None and (used >= limit - EPSILON if policy.resource.timed else used > limit + EPSILON)
    if policy.grace_seconds is None or limit is None or not over or not staying:
        if known is not None:
            changes.ended.append(known)
        return
    what = (
        f"{_amount(policy, used)} are in use{sentences.window(policy)}, and the policy {policy.name} allows "
        f"{_amount(policy, limit)}"
    )
    if known is not None and policy.updated_at is not None and known.since < policy.updated_at:
        changes.ended.append(known)
        known = None
    if known is None:
        until = now + timedelta(seconds=policy.grace_seconds)
        changes.made.append(_made(policy, subject, OVER, now, until=until, noticed_at=now))
        sentence = (
            f"{what}: in {sentences.span(policy.grace_seconds)} kernels are stopped, the newest first. Save your work, "
            "and shut down what you do not need."
        )
        told = _by_owner(staying)
        changes.notices += [Notice(owner, policy.name, OVER, sentence, ids) for owner, ids in told.items()]
        return
    if known.until is None or now < known.until:
        return
    for kernel in reversed(staying):
        if not policy.resource.timed:
            if used <= limit + EPSILON:
                break
            used -= rate_of(policy, kernel.resources)
        sentence = (
            f"This kernel was stopped: {what}, for longer than the grace of {sentences.span(policy.grace_seconds)}."
        )
        changes.stops.append(Stop(kernel.id, kernel.owner, policy.name, sentence))
