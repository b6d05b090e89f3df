"""Meters: what was used up in a window, told without reading the ledger at each launch.

A meter is a straight line, base + slope * (t - beginning of the window). A kernel that takes r and is held from s on
adds r to the slope and takes r * (s - beginning) off the base; given back at e, it takes r off the slope and adds
r * (e - beginning) to the base. So it does not matter in which order that happens, and the clocks of several gateways
need not agree to the millisecond.

The ledger and the open reservations are the truth: a meter that is missing, or of another version of its policy, is
read from them. Where a new calendar window begins, only the slope goes on.

A rolling window begins anew at every moment, and what has grown older than it is in the ledger alone. Its meter counts
from where the window began when it was read: that is at least what is used. As long as even that is below a limit
nothing has to be read; where it is not, the meter is read anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple, cast

from sqlalchemy import RowMapping, Table, bindparam, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import locked
from hub_gateway.db.tenancy import Meter
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas import ledger
from hub_gateway.quotas.policies import PolicyIndex
from hub_gateway.quotas.rates import prices_of, rate_of
from hub_gateway.quotas.resolve import covers, window_bounds
from hub_gateway.quotas.types import Policy, SubjectKind, WindowKind
from hub_gateway.quotas.use import METERS, Holder, metered_for

__all__ = ["given_back", "read", "taken", "timed_use", "used"]

HOUR = 3600.0
YEAR = timedelta(days=366)
SKEW = 1.0
"""By how much (seconds) the clocks of gateways may differ. Who is further behind than that reads the ledger."""
_TABLE = cast(Table, Meter.__table__)
_KEY = ("policy_id", "subject_kind", "subject")
_LINE = ("version", "begins", "base", "slope", "latest")
_OF = select(_TABLE).where(*(_TABLE.c[name] == bindparam(f"of_{name}") for name in _KEY))
_ALL_OF = select(_TABLE).where(
    tuple_(_TABLE.c.subject_kind, _TABLE.c.subject).in_(bindparam("holders", expanding=True))
)
_MOVE = (
    update(_TABLE)
    .where(*(_TABLE.c[name] == bindparam(f"of_{name}") for name in _KEY))
    .values({name: bindparam(f"new_{name}") for name in _LINE})
)


class _Line(NamedTuple):
    """A row, of which all times are seconds."""

    policy_id: int
    subject_kind: str
    subject: str
    version: int
    begins: float
    base: float
    slope: float
    latest: float
    """The last moment at which something was taken or given back: the line holds from there on."""

    def at(self, begins: float) -> _Line:
        """The same in a window that begins then, in which all that goes on began before it."""
        return self if begins <= self.begins else self._replace(begins=begins, base=0.0)

    def used(self, moment: float) -> float:
        """Hours (or cost units) at a moment."""
        return (self.base + self.slope * (moment - self.begins)) / HOUR

    def moved(self, rate: float, moment: float) -> _Line:
        """After a kernel has begun to take `rate`, or (negative) ends to take it."""
        off = rate * (max(moment, self.begins) - self.begins)
        return self._replace(base=self.base - off, slope=self.slope + rate, latest=max(self.latest, moment))


def _put(dialect: Any) -> Any:
    made = dialect.insert(_TABLE)
    return made.on_conflict_do_update(index_elements=list(_KEY), set_={name: made.excluded[name] for name in _LINE})


_PUT = {"sqlite": _put(sqlite), "postgresql": _put(postgresql)}


def used(tx: Transaction, policy: Policy, scope: Holder, now: datetime, *, enough: float | None = None) -> float:
    """What its scope has used up of a policy in its window, in hours or cost units; never less than nothing.

    Who only wants to know whether it is less than `enough` may be told more than it is, if that is less, too.
    """
    return max(0.0, _used(tx, policy, scope, now, enough))


def _used(tx: Transaction, policy: Policy, scope: Holder, now: datetime, enough: float | None) -> float:
    begin, end = window_bounds(policy, now)
    if policy.id is None or policy.window is WindowKind.NOW:
        return timed_use(tx, policy, scope, begin, now).amount
    begins, moment = begin.timestamp(), now.timestamp()
    if policy.window is WindowKind.ROLLING:
        return _rolled(tx, policy, scope, now, enough)
    known = _line(tx, policy.id, scope)
    line = None if known is None else known.at(begins)
    if line is None or line.version != policy.version:
        if not locked(tx) or timed_use(tx, policy, scope, end, end + YEAR).latest >= end.timestamp():
            # What a clock that goes before has written into the next window would not be in this line, nor in the next.
            return timed_use(tx, policy, scope, begin, now).amount
        line = _read_anew(tx, policy, policy.id, scope, begin, end)
    if line.begins > begins or moment < line.latest - SKEW:
        # The clock was put back, into the window before or before what is known.
        return timed_use(tx, policy, scope, begin, now).amount
    return line.used(moment)


def _rolled(tx: Transaction, policy: Policy, scope: Holder, now: datetime, enough: float | None) -> float:
    """What was used up in a rolling window, see `used`."""
    assert policy.id is not None
    begin, moment = window_bounds(policy, now)[0], now.timestamp()
    line = None if enough is None else _line(tx, policy.id, scope)
    if line is not None and enough is not None and line.version == policy.version:
        # It does not hold for a clock that was put back.
        holds = line.begins <= begin.timestamp() and moment >= line.latest - SKEW
        if holds and line.used(moment) < enough:
            return line.used(moment)
    if locked(tx):
        line = _read_anew(tx, policy, policy.id, scope, begin, now + YEAR)
        if moment >= line.latest - SKEW:
            return line.used(moment)
    return timed_use(tx, policy, scope, begin, now).amount


def _read_anew(tx: Transaction, policy: Policy, policy_id: int, scope: Holder, begin: datetime, end: datetime) -> _Line:
    """A meter from `begin` on, as the ledger and what is open say it. As of `end` all that is open is a line."""
    found = timed_use(tx, policy, scope, begin, end)
    begins = begin.timestamp()
    base = found.amount * HOUR - found.per_hour * (end.timestamp() - begins)
    line = _Line(policy_id, *scope, policy.version, begins, base, found.per_hour, max(found.latest, begins))
    tx.connection().execute(_PUT[tx.get_bind().dialect.name], line._asdict())
    read(tx, [scope])[scope][policy_id] = line
    return line


def read(tx: Transaction, holders: Iterable[Holder]) -> dict[Holder, dict[int, _Line]]:
    """The lines of these by policy, in one statement for all that are not known yet to who holds the lock."""
    known: dict[Holder, dict[int, _Line]] = tx.info.setdefault(METERS, {})
    unknown = [holder for holder in holders if holder not in known]
    if unknown:
        known.update((holder, {}) for holder in unknown)
        for row in tx.connection().execute(_ALL_OF, {"holders": unknown}):
            line = _Line(*row)
            known[line.subject_kind, line.subject][line.policy_id] = line
    return known


def _line(tx: Transaction, policy_id: int, scope: Holder) -> _Line | None:
    if locked(tx):
        return read(tx, [scope])[scope].get(policy_id)
    key = zip(_KEY, (policy_id, *scope), strict=True)
    row = tx.connection().execute(_OF, {f"of_{name}": value for name, value in key}).one_or_none()
    return None if row is None else _Line(*row)


def timed_use(tx: Transaction, policy: Policy, scope: Holder, start: datetime, end: datetime) -> ledger.TimedUse:
    """What its scope has used up of a policy between two moments, from the ledger and what is open."""
    kind, name = scope
    return ledger.timed_use(
        tx,
        policy.resource,
        start,
        end,
        owner=name if kind in (SubjectKind.USER.value, SubjectKind.SERVICE.value) else None,
        group=name if kind == SubjectKind.GROUP.value else None,
        gpu_model=policy.gpu_model,
        covers=lambda kernelspec, proxy, queue: covers(policy, kernelspec, proxy, queue),
    )


def taken(tx: Transaction, index: PolicyIndex, reservation: Mapping[str, Any] | RowMapping) -> None:
    """Begin to count a reservation. To be called in the transaction that makes it."""
    _move(tx, index, reservation, 1.0, reservation["billed_from"])


def given_back(tx: Transaction, index: PolicyIndex, reservation: Mapping[str, Any] | RowMapping, at: datetime) -> None:
    """Count a reservation up to a moment. To be called in the transaction that gives it back."""
    _move(tx, index, reservation, -1.0, at)


def _move(
    tx: Transaction, index: PolicyIndex, reservation: Mapping[str, Any] | RowMapping, sign: float, at: datetime
) -> None:
    metered = index.metered
    if not metered:
        return
    holders = metered_for(reservation["owner"], reservation["groups"] or ())
    known = read(tx, holders)
    lines = [line for holder in holders for line in known[holder].values() if line.policy_id in metered]
    prices = prices_of(tx, (metered[line.policy_id] for line in lines))
    resources = Resources(reservation["cpu"], reservation["memory"], reservation["gpu"], reservation["gpu_model"])
    changed = []
    for line in lines:
        policy = metered[line.policy_id]
        if line.version != policy.version:
            continue  # it is read anew when it is asked for
        if not covers(policy, reservation["kernelspec"], reservation["proxy"], reservation["queue"]):
            continue
        rate = rate_of(policy, resources, prices(reservation["price_version"]))
        begins = window_bounds(policy, at)[0].timestamp() if policy.window is WindowKind.CALENDAR else line.begins
        moved = line.at(begins).moved(sign * rate, at.timestamp())
        known[line.subject_kind, line.subject][line.policy_id] = moved
        changed.append(
            {f"of_{name}": getattr(moved, name) for name in _KEY} | {f"new_{n}": getattr(moved, n) for n in _LINE}
        )
    if changed:
        tx.connection().execute(_MOVE, changed)
