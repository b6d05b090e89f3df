"""The ledger: what was held, by whom, from when to when. Written once, never changed.

An open reservation is the open interval of its kernel. Its entry is written in the transaction that gives it back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Float,
    RowMapping,
    Select,
    Table,
    and_,
    case,
    extract,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy import cast as cast_to
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock
from hub_gateway.db.models import Reservation, utcnow
from hub_gateway.db.tenancy import LedgerEntry, LedgerMonth
from hub_gateway.errors import BadRequest, Conflict, NotFound
from hub_gateway.metrics import METRICS
from hub_gateway.quotas.holders import in_group as reserved_in_group
from hub_gateway.quotas.prices import all_prices
from hub_gateway.quotas.types import Resource
from hub_gateway.quotas.use import drop_meters, metered_for

__all__ = [
    "Closed",
    "Entry",
    "TimedUse",
    "close",
    "close_month",
    "correct",
    "entries",
    "groups_key",
    "in_group",
    "timed_use",
]

_LEDGER = cast(Table, LedgerEntry.__table__)
_OPEN = cast(Table, Reservation.__table__)
_MONTH = re.compile(r"(\d{4})-(0[1-9]|1[0-2])\Z")
_COPIED = (
    *("kernel_id", "owner", "cost_center", "principal", "unix_user", "kernelspec", "proxy", "queue"),
    *("cpu", "memory", "gpu", "gpu_model", "price_version"),
)
HOUR, DAY = 3600.0, 86400.0
EPOCH = 2440587.5
"""The beginning of 1970 as a Julian day."""


@dataclass(frozen=True)
class Closed:
    """A closed month: how many entries stand in it, how many kernel-seconds of it, and a digest over all of them."""

    month: str
    entries: int
    seconds: float
    digest: str


@dataclass(frozen=True)
class Entry:
    """A line of the ledger, as it was written."""

    id: int
    kind: str
    """`interval`, or `correction` of another entry."""
    kernel_id: str
    owner: str
    groups: tuple[str, ...]
    """Those of the owner at launch."""
    cost_center: str
    principal: str | None
    unix_user: str | None
    kernelspec: str
    proxy: str
    queue: str
    cpu: float
    memory: int
    gpu: int
    gpu_model: str
    price_version: int
    started: datetime
    stopped: datetime
    seconds: float
    corrects: int | None
    note: str
    actor: str | None


@dataclass(frozen=True)
class TimedUse:
    """What was used up between two moments, in hours or cost units."""

    amount: float
    per_hour: float
    """What all that is open now takes in an hour."""
    latest: float
    """When the last of it began or ended (seconds since the epoch; 0: there is nothing)."""


def groups_key(groups: Collection[str]) -> str:
    """Names of groups as the ledger keeps them: sorted, each on a line of its own, which is closed at both ends."""
    return "".join(f"\n{group}\n" for group in sorted(set(groups)))


def in_group(tx: Transaction, group: str) -> ColumnElement[bool]:
    """Whether an entry's owner was in a group at launch. Exact also in its case, as LIKE is not on SQLite."""
    if not group:
        return false()  # between any two there is a name of no letters
    find = func.instr if _sqlite(tx) else func.strpos
    return find(_LEDGER.c.groups, f"\n{group}\n") > 0


def close(tx: Transaction, reservation: RowMapping, at: datetime) -> datetime:
    """Write the entry of a reservation that ends now; when it ends. To be called in the transaction that ends it."""
    begin: datetime = reservation["billed_from"] or reservation["created_at"]
    # A clock that was put back must not make anybody's use negative.
    end = max(begin, at)
    _add(tx, reservation, begin.timestamp(), end.timestamp())
    return end


def _add(tx: Transaction, reservation: RowMapping, started: float, stopped: float) -> None:
    tx.connection().execute(
        insert(_LEDGER).values(
            kind="interval",
            groups=groups_key(reservation["groups"] or ()),
            started=started,
            stopped=stopped,
            continues=reservation["billed_from"] is not None and reservation["billed_from"] > reservation["created_at"],
            seconds=stopped - started,
            note="",
            recorded_at=utcnow(),
            **{name: reservation[name] for name in _COPIED},
        )
    )
    METRICS.ledger_entries.inc()


def timed_use(
    tx: Transaction,
    resource: Resource,
    start: datetime,
    end: datetime,
    *,
    owner: str | None = None,
    group: str | None = None,
    gpu_model: str = "",
    covers: Callable[[str, str, str], bool] = lambda kernelspec, proxy, queue: True,
) -> TimedUse:
    """What was used up between two moments: entries, clipped, and what is still open.

    Of one owner, of the members of a group (at launch), or of everybody; of the kernels that `covers` (by kernelspec,
    proxy and queue).
    """
    first, last = start.timestamp(), end.timestamp()
    sort = ("kernelspec", "proxy", "queue", "cpu", "memory", "gpu", "gpu_model", "price_version")
    ledger = _LEDGER.c
    where = [ledger.stopped > first, ledger.started < last]
    if owner is not None:
        where.append(ledger.owner == owner)
    if group is not None:
        where.append(in_group(tx, group))
    later, earlier = (func.min, func.max) if _sqlite(tx) else (func.least, func.greatest)
    clipped = later(ledger.stopped, last) - earlier(ledger.started, first)
    # A correction stands at one moment, and counts whole.
    counted = func.sum(case((ledger.kind == "interval", clipped), else_=ledger.seconds))
    ended: Select[Any] = select(*(ledger[name] for name in sort), counted, func.max(ledger.stopped), literal(0))
    rows = tx.connection().execute(ended.where(*where).group_by(*(ledger[name] for name in sort)))
    sums: list[tuple[Any, ...]] = [tuple(row) for row in rows]
    begun = _seconds(tx, func.coalesce(_OPEN.c.billed_from, _OPEN.c.created_at))
    still: list[ColumnElement[bool]] = [_OPEN.c.released_at.is_(None)]
    if owner is not None:
        still.append(_OPEN.c.owner == owner)
    if group is not None:
        still.append(reserved_in_group(tx, group))
    # Not a condition: a moment is read of those only that are counted.
    held = func.sum(earlier(last - earlier(begun, first), 0.0))
    going: Select[Any] = select(*(_OPEN.c[name] for name in sort), held, func.max(begun), func.count())
    rows = tx.connection().execute(going.where(*still).group_by(*(_OPEN.c[name] for name in sort)))
    sums += [tuple(row) for row in rows]
    prices = all_prices(tx) if resource is Resource.COST else {}
    total = per_hour = latest = 0.0
    for kernelspec, proxy, queue, cpu, memory, gpu, model, version, seconds, last_of, count in sums:
        if not covers(kernelspec, proxy, queue) or (gpu_model and model != gpu_model):
            continue
        rate = {
            Resource.KERNEL_HOURS: 1.0,
            Resource.CORE_HOURS: cpu,
            Resource.GPU_HOURS: gpu,
        }.get(resource)
        if rate is None:
            rate = prices.get(version, prices[0]).per_hour(cpu, memory, gpu, model)
        total += rate * seconds / HOUR
        per_hour += rate * count
        latest = max(latest, last_of)
    return TimedUse(total, per_hour, latest)


def _seconds(tx: Transaction, moment: ColumnElement[Any]) -> ColumnElement[float]:
    """A moment of a column as seconds since the epoch, which SQLite keeps as a text."""
    if _sqlite(tx):
        return (func.julianday(moment) - EPOCH) * DAY
    return cast_to(extract("epoch", moment), Float)


def _sqlite(tx: Transaction) -> bool:
    return tx.get_bind().dialect.name == "sqlite"


def _bounds(month: str) -> tuple[datetime, datetime]:
    found = _MONTH.match(month)
    if found is None:
        raise BadRequest(f"A month is written as 2030-01; {month[:20]!r} is none.")
    begin = datetime(int(found[1]), int(found[2]), 1, tzinfo=timezone.utc)
    return begin, (begin + timedelta(days=32)).replace(day=1)


def close_month(tx: Transaction, month: str, actor: str, *, now: datetime | None = None) -> Closed:
    """Close a month (UTC) that is over: nothing is added to it any more. Raises `BadRequest`, `Conflict`.

    Reservations that go on over its end are split there: an entry up to the end, and the reservation from there.
    Entries of kernels that ended later, but began before the end, are in both months: their seconds are clipped, as in
    reports.
    """
    begin, end = _bounds(month)
    moment = now or utcnow()
    if end > moment:
        raise BadRequest(f"The month {month} is not over; it can be closed from {end:%Y-%m-%d} (UTC) on.")
    lock(tx)
    if tx.get(LedgerMonth, month) is not None:
        raise Conflict(f"The month {month} is closed already.")
    spanning = select(_OPEN).where(_OPEN.c.released_at.is_(None), _OPEN.c.billed_from < end)
    for row in tx.connection().execute(spanning).mappings().all():
        _add(tx, row, row["billed_from"].timestamp(), end.timestamp())
        tx.connection().execute(update(_OPEN).where(_OPEN.c.kernel_id == row["kernel_id"]).values(billed_from=end))
    digest, entries, seconds = hashlib.sha256(), 0, 0.0
    stands = and_(_LEDGER.c.started < end.timestamp(), or_(_LEDGER.c.stopped > begin.timestamp(), _at(begin, end)))
    for entry in tx.connection().execute(select(_LEDGER).where(stands).order_by(_LEDGER.c.id)):
        digest.update(repr(tuple(entry)).encode())
        entries += 1
        if entry.kind == "interval":
            seconds += min(entry.stopped, end.timestamp()) - max(entry.started, begin.timestamp())
        else:
            seconds += entry.seconds
    tx.add(
        LedgerMonth(
            month=month,
            closed_at=moment,
            closed_by=actor,
            entries=entries,
            seconds=seconds,
            digest=digest.hexdigest(),
        )
    )
    tx.flush()
    return Closed(month, entries, seconds, digest.hexdigest())


def _at(begin: datetime, end: datetime) -> ColumnElement[bool]:
    return and_(_LEDGER.c.stopped >= begin.timestamp(), _LEDGER.c.stopped < end.timestamp())


def correct(
    tx: Transaction,
    entry: int,
    seconds: float,
    note: str,
    actor: str,
    *,
    cost_center: str | None = None,
    now: datetime | None = None,
) -> int:
    """Correct an entry: `seconds` more (or, negative, fewer) than it says, all of it billed to `cost_center`.

    None is the cost centre to which it is billed now. A correction is one entry, or two where the cost centre changes:
    what is taken from the old one, and what the new one gets; the number of the last one is the answer. They stand at
    this moment, whatever the month of what they correct. Raises `NotFound`, `BadRequest`.
    """
    moment = (now or utcnow()).timestamp()
    lock(tx)
    found = tx.connection().execute(select(_LEDGER).where(_LEDGER.c.id == entry)).mappings().one_or_none()
    if found is None or found["kind"] != "interval":
        raise NotFound(f"The ledger has no entry {entry} that could be corrected; corrections are not corrected again.")
    billed_to, billed = _billed(tx, entry)
    to = billed_to if cost_center is None else cost_center
    if billed + seconds < 0:
        raise BadRequest(f"Entry {entry} says {billed:g} seconds; it cannot be less than none.")
    if to == billed_to and not seconds:
        raise BadRequest(f"Entry {entry} says that already; give seconds, or another cost centre.")
    parts = [(to, seconds)] if to == billed_to else [(billed_to, -billed), (to, billed + seconds)]
    copied = {name: found[name] for name in (*_COPIED, "groups")}
    whose = metered_for(found["owner"], filter(None, found["groups"].split("\n")))
    drop_meters(tx, whose)
    number = 0
    for centre, amount in parts:
        values = {"started": moment, "stopped": moment, "seconds": amount, "corrects": entry, "actor": actor}
        made = tx.connection().execute(
            insert(_LEDGER)
            .values(
                {**copied, **values, "kind": "correction", "note": note, "recorded_at": utcnow(), "cost_center": centre}
            )
            .returning(_LEDGER.c.id)
        )
        number = int(made.scalar_one())
        METRICS.ledger_entries.inc()
    return number


def entries(
    tx: Transaction,
    *,
    owner: str | None = None,
    groups: Collection[str] | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[Entry]:
    """Entries, the newest first: everybody's, or those of an owner and of launches in one of these groups."""
    wanted = select(_LEDGER).order_by(_LEDGER.c.id.desc()).limit(limit)
    if owner is not None:
        wanted = wanted.where(_LEDGER.c.owner == owner)
    if groups is not None:
        wanted = wanted.where(or_(false(), *(in_group(tx, group) for group in groups)))
    if before is not None:
        wanted = wanted.where(_LEDGER.c.id < before)
    return [_entry(row) for row in tx.connection().execute(wanted).mappings()]


def _entry(row: RowMapping) -> Entry:
    same = (*_COPIED, "id", "kind", "seconds", "note", "corrects", "actor")
    started, stopped = (datetime.fromtimestamp(row[name], timezone.utc) for name in ("started", "stopped"))
    groups = tuple(filter(None, row["groups"].split("\n")))
    return Entry(**{name: row[name] for name in same}, groups=groups, started=started, stopped=stopped)


def _billed(tx: Transaction, entry: int) -> tuple[str, float]:
    """To which cost centre an entry is billed, after its corrections, and how many seconds. They move it as a whole."""
    stands = or_(_LEDGER.c.id == entry, _LEDGER.c.corrects == entry)
    sums = (
        tx.connection()
        .execute(
            select(_LEDGER.c.cost_center, func.sum(_LEDGER.c.seconds), func.max(_LEDGER.c.id))
            .where(stands)
            .group_by(_LEDGER.c.cost_center)
        )
        .all()
    )
    centre, seconds, _ = max(sums, key=lambda row: row[2])  # where the last correction has put it
    return centre, float(seconds)
