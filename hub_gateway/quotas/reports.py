"""Reports of use and cost, from the ledger and from what is still open."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, cast

from sqlalchemy import ColumnElement, Integer, Table, case, false, func, literal, or_, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session as Transaction
from traitlets import Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway import audit
from hub_gateway.db.models import Reservation, utcnow
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.errors import BadRequest
from hub_gateway.quotas import ledger, prices
from hub_gateway.quotas.ledger import Closed, groups_key
from hub_gateway.quotas.prices import GIB, Prices

__all__ = ["BY", "Report", "Reports", "Row", "report"]

BY = ("user", "group", "cost_center", "kernelspec", "proxy", "day")
NONE = "(none)"
HOUR, DAY = 3600.0, 86400.0
MEASURES = ("kernels", "kernel_hours", "core_hours", "gib_hours", "gpu_hours", "cost")
_LEDGER = cast(Table, LedgerEntry.__table__)
_OPEN = cast(Table, Reservation.__table__)
_KEYS = {
    "user": "owner",
    "group": "groups",
    "cost_center": "cost_center",
    "kernelspec": "kernelspec",
    "proxy": "proxy",
    "day": "owner",
}


@dataclass(frozen=True)
class Row:
    """One line: how many kernels, and what they used, in hours and cost units."""

    key: str
    kernels: int
    kernel_hours: float
    core_hours: float
    gib_hours: float
    gpu_hours: float
    cost: float


@dataclass(frozen=True)
class Report:
    """Use between two moments. `total` counts every kernel once, also where it stands in several rows (by group)."""

    by: str
    start: datetime
    end: datetime
    rows: tuple[Row, ...]
    total: Row
    currency: str
    note: str = ""

    def to_csv(self) -> str:
        """As CSV (RFC 4180). What a spreadsheet would take for a formula begins with an apostrophe."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        writer.writerow([self.by, *MEASURES])
        for row in (*self.rows, self.total):
            writer.writerow([_safe(row.key), row.kernels, *(f"{getattr(row, name):.6f}" for name in MEASURES[1:])])
        return text.getvalue()

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "by": self.by,
            "from": self.start.isoformat(),
            "to": self.end.isoformat(),
            "currency": self.currency,
            "rows": [asdict(row) for row in self.rows],
            "total": asdict(self.total),
            "note": self.note,
        }

    def to_table(self) -> str:
        """As a table for a terminal."""
        head = [self.by, "kernels", "kernel h", "core h", "GiB h", "GPU h", f"cost ({self.currency})"]
        lines = [head]
        for row in (*self.rows, self.total):
            name = "".join(character if character.isprintable() else "?" for character in row.key)
            lines.append([name, str(row.kernels), *(f"{getattr(row, one):,.2f}" for one in MEASURES[1:])])
        widths = [max(len(line[number]) for line in lines) for number in range(len(head))]
        text = "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
        return f"{text}\n{self.note}\n" if self.note else f"{text}\n"


def _safe(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r", "'") else text


@dataclass(frozen=True)
class _Used:
    """Seconds, and seconds times cores, bytes and GPUs, of one price and GPU model. Cost is linear in them."""

    gpu_model: str
    price_version: int
    kernels: int
    seconds: float
    cores: float
    memory: float
    gpus: float


class _Sums:
    """Sums by key."""

    def __init__(self, price_lists: dict[int, Prices]) -> None:
        self.prices = price_lists
        self.found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(MEASURES))

    def add(self, keys: Iterable[str], used: _Used) -> None:
        price = self.prices.get(used.price_version, self.prices[0])
        hours, cores, gibs, gpus = (
            amount / HOUR for amount in (used.seconds, used.cores, used.memory / GIB, used.gpus)
        )
        amounts = (used.kernels, hours, cores, gibs, gpus, price.cost(hours, cores, gibs, gpus, used.gpu_model))
        for key in keys:
            sums = self.found[key]
            for number, amount in enumerate(amounts):
                sums[number] += amount

    def rows(self) -> tuple[Row, ...]:
        made = [Row(key, int(sums[0]), *sums[1:]) for key, sums in self.found.items()]
        return tuple(sorted(made, key=lambda row: (-row.cost, -row.kernel_hours, row.key)))


@dataclass(frozen=True)
class _Question:
    """What a report is about, in seconds since the epoch."""

    by: str
    first: float
    last: float
    owner: str | None
    groups: Collection[str] | None


def report(
    tx: Transaction,
    by: str,
    start: datetime,
    end: datetime,
    owner: str | None = None,
    groups: Collection[str] | None = None,
    *,
    currency: str = "units",
    now: datetime | None = None,
) -> Report:
    """Use between two moments, clipped to them; what is open counts up to now.

    Of one owner, of those who were in one of some groups at launch, or of everybody. Raises `BadRequest`.
    """
    if by not in BY:
        raise BadRequest(f"A report is by one of {', '.join(BY)}; {by[:50]!r} is none of them.")
    if end <= start:
        raise BadRequest("A report needs a moment to begin that is before the one to end.")
    sums, total = _Sums(price_lists := prices.all_prices(tx)), _Sums(price_lists)
    asked = _Question(by, start.timestamp(), end.timestamp(), owner, groups)
    for keys, used in _days(tx, asked) if by == "day" else _entries(tx, asked):
        sums.add(keys, used)
        total.add(["total"], used)
    until = min(asked.last, (now or utcnow()).timestamp())
    for keys, used in _open(tx, asked, until):
        sums.add(keys, used)
        total.add(["total"], used)
    rows = sums.rows()
    if by == "day":
        rows = tuple(sorted(rows, key=lambda row: row.key))
    note = "A kernel counts for each of its owner's groups at launch, and once in the total." if by == "group" else ""
    all_of_it = total.rows()
    return Report(by, start, end, rows, all_of_it[0] if all_of_it else Row("total", 0, 0, 0, 0, 0, 0), currency, note)


def _open(tx: Transaction, asked: _Question, until: float) -> Iterator[tuple[list[str], _Used]]:
    """What is held still."""
    for row in tx.connection().execute(select(_OPEN).where(_OPEN.c.released_at.is_(None))):
        mine = set(row.groups or ())
        if asked.owner not in (None, row.owner) or (asked.groups is not None and mine.isdisjoint(asked.groups)):
            continue
        begin = max((row.billed_from or row.created_at).timestamp(), asked.first)
        if begin >= until:
            continue
        if asked.by == "day":
            for number, (day, seconds) in enumerate(_split(begin, until)):
                yield [day], _of_one(row, int(number == 0), seconds)
        else:
            value = groups_key(mine) if asked.by == "group" else getattr(row, _KEYS[asked.by])
            yield _keys(asked.by, value), _of_one(row, 1, until - begin)


def _of_one(row: Any, kernels: int, seconds: float) -> _Used:
    return _Used(
        row.gpu_model,
        row.price_version,
        kernels,
        seconds,
        seconds * row.cpu,
        seconds * row.memory,
        seconds * row.gpu,
    )


def _where(tx: Transaction, asked: _Question) -> list[ColumnElement[bool]]:
    stopped, started = _LEDGER.c.stopped, _LEDGER.c.started
    within: list[ColumnElement[bool]] = [started < asked.last]
    if asked.owner is None and _much(tx, asked):
        within = [stopped + 0.0 >= asked.first, started + 0.0 < asked.last]
    else:
        within.append(stopped >= asked.first)
    if asked.owner is not None:
        within.append(_LEDGER.c.owner == asked.owner)
    if asked.groups is not None:
        within.append(or_(false(), *(ledger.in_group(group) for group in asked.groups)))
    return within


def _much(tx: Transaction, asked: _Question) -> bool:
    """Whether a report is about so much of the ledger that reading all of it, in its order, is faster than an index."""
    columns = _LEDGER.c.stopped
    low, high = (tx.execute(select(which(columns))).scalar_one() for which in (func.min, func.max))
    return low is None or (min(high, asked.last) - max(low, asked.first)) * 4 > high - low


def _summed(
    tx: Transaction, key: ColumnElement[Any], where: list[ColumnElement[bool]], seconds: ColumnElement[Any], count: Any
) -> Iterator[tuple[Any, _Used]]:
    """Sums by key, price and GPU model."""
    names = ("gpu_model", "price_version", "cpu", "memory", "gpu")
    inner = (
        select(key.label("key"), *(_LEDGER.c[name] for name in names), seconds.label("x"), count.label("kernels"))
        .where(*where)
        .subquery()
    )
    of = inner.c
    grouped = (of.key, of.gpu_model, of.price_version)
    sums = (func.sum(value) for value in (of.kernels, of.x, of.x * of.cpu, of.x * of.memory, of.x * of.gpu))
    for value, *rest in tx.connection().execute(select(*grouped, *sums).group_by(*grouped)):
        yield value, _Used(rest[0], rest[1], int(rest[2]), *(float(amount) for amount in rest[3:]))


def _entries(tx: Transaction, asked: _Question) -> Iterator[tuple[list[str], _Used]]:
    # A correction stands at one moment: between its ends lies nothing, and what is left over is all of its seconds.
    late, early = _within(tx, asked)
    inside = late - early + (_LEDGER.c.seconds - (_LEDGER.c.stopped - _LEDGER.c.started))
    # Not the bare column: SQLite would go through its index, a jump for each entry, for the sake of its order.
    key = _LEDGER.c[_KEYS[asked.by]] + ""
    for value, used in _summed(tx, key, _where(tx, asked), inside, _counted()):
        yield _keys(asked.by, value), used


def _counted() -> ColumnElement[int]:
    """1 for an interval, 0 for a correction."""
    return case((_LEDGER.c.corrects.is_(None), 1), else_=0)


def _within(tx: Transaction, asked: _Question) -> tuple[ColumnElement[float], ColumnElement[float]]:
    """End and beginning of an entry, clipped."""
    sqlite = tx.get_bind().dialect.name == "sqlite"
    lower, upper = (func.min, func.max) if sqlite else (func.least, func.greatest)
    return lower(_LEDGER.c.stopped, asked.last), upper(_LEDGER.c.started, asked.first)


def _keys(by: str, value: str | None) -> list[str]:
    if by == "group":
        return [name for name in (value or "").split("\n") if name] or [NONE]
    return [value or NONE]


def _days(tx: Transaction, asked: _Question) -> Iterator[tuple[list[str], _Used]]:
    """By day (UTC): what an entry has of its first day and of its last is summed up by the database; few have more."""
    where = _where(tx, asked)
    late, early = _within(tx, asked)
    sqlite = tx.get_bind().dialect.name == "sqlite"
    lower = func.min if sqlite else func.least

    def number(moment: ColumnElement[float]) -> ColumnElement[int]:
        # PostgreSQL rounds where it casts, so it is told not to.
        return sql_cast(moment / DAY if sqlite else func.floor(moment / DAY), Integer)

    first, last = number(early), number(late)
    left_over = _LEDGER.c.seconds - (_LEDGER.c.stopped - _LEDGER.c.started)
    begins = lower(late, (first + 1) * DAY) - early + left_over
    for day, used in _summed(tx, first, where, begins, _counted()):
        yield [_day(day * DAY)], used
    nothing = literal(0)
    for day, used in _summed(tx, last, [*where, last > first, late > last * DAY], late - last * DAY, nothing):
        yield [_day(day * DAY)], used
    for row in tx.connection().execute(select(_LEDGER).where(*where, last > first + 1)):
        end = min(row.stopped, asked.last)
        parts = list(_split(max(row.started, asked.first), end))
        # One that ends at midnight has its last day whole.
        for name, seconds in parts[1:] if end % DAY == 0 else parts[1:-1]:
            yield [name], _of_one(row, 0, seconds)


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d")


def _split(begin: float, end: float) -> Iterator[tuple[str, float]]:
    while begin < end:
        day = datetime.fromtimestamp(begin, timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
        after = min(end, (day + timedelta(days=1)).timestamp())
        yield day.strftime("%Y-%m-%d"), after - begin
        begin = after


class Reports(LoggingConfigurable):
    """Reports, prices and what accountants do, as the web layer calls them; methods run in a transaction."""

    currency = Unicode("units", help="What cost is counted in, for example EUR; shown beside every cost.").tag(
        config=True
    )

    def report(
        self,
        tx: Transaction,
        by: str,
        start: datetime,
        end: datetime,
        owner: str | None = None,
        groups: Collection[str] | None = None,
    ) -> Report:
        """See `report`."""
        return report(tx, by, start, end, owner, groups, currency=self.currency)

    def prices(self, tx: Transaction) -> list[Prices]:
        """All price lists, newest first."""
        return sorted(prices.all_prices(tx).values(), key=lambda one: -one.version)

    def set_prices(self, tx: Transaction, actor: str, **rates: Any) -> Prices:
        """Add a price list. Raises `BadRequest`."""
        made = prices.set_prices(tx, actor, **rates)
        audit.append(tx, actor=actor, action="prices.set", subject=f"version {made.version}", detail=asdict(made))
        return made

    def close_month(self, tx: Transaction, month: str, actor: str) -> Closed:
        """Close a month. Raises `BadRequest`, `Conflict`."""
        made = ledger.close_month(tx, month, actor)
        audit.append(tx, actor=actor, action="month.close", subject=month, detail=asdict(made))
        return made

    def correct(self, tx: Transaction, entry: int, seconds: float, note: str, actor: str) -> dict[str, Any]:
        """Correct an entry. Raises `NotFound`, `BadRequest`."""
        made = ledger.correct(tx, entry, seconds, note, actor)
        detail = {"entry": entry, "seconds": seconds, "note": note, "correction": made}
        audit.append(tx, actor=actor, action="ledger.correct", subject=f"entry {entry}", detail=detail)
        return {"id": made, "corrects": entry, "seconds": seconds, "note": note}
