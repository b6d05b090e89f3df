"""Reports of use and cost, from the ledger and from what is still open."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, cast

from sqlalchemy import Integer, Table, case, func, or_, select
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


class _Sums:
    """Sums by key, of rows that are alike."""

    def __init__(self, price_lists: dict[int, Prices]) -> None:
        self.prices = price_lists
        self.found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(MEASURES))

    def add(self, keys: Iterable[str], row: Any, kernels: int, seconds: float) -> None:
        hours = seconds / HOUR
        rate = self.prices.get(row.price_version, self.prices[0]).per_hour(row.cpu, row.memory, row.gpu, row.gpu_model)
        amounts = (kernels, hours, hours * row.cpu, hours * row.memory / GIB, hours * row.gpu, hours * rate)
        for key in keys:
            sums = self.found[key]
            for number, amount in enumerate(amounts):
                sums[number] += amount

    def rows(self) -> tuple[Row, ...]:
        made = [Row(key, int(sums[0]), *sums[1:]) for key, sums in self.found.items()]
        return tuple(sorted(made, key=lambda row: (-row.cost, -row.kernel_hours, row.key)))


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
    first, last = start.timestamp(), end.timestamp()
    if by == "day":
        _days(tx, sums, total, first, last, owner, groups)
    else:
        _entries(tx, by, sums, total, first, last, owner, groups)
    until = min(last, (now or utcnow()).timestamp())
    for row in tx.connection().execute(select(_OPEN).where(_OPEN.c.released_at.is_(None))):
        mine = set(row.groups or ())
        if (owner is not None and row.owner != owner) or (groups is not None and mine.isdisjoint(groups)):
            continue
        begin = max((row.billed_from or row.created_at).timestamp(), first)
        if begin >= until:
            continue
        if by == "day":
            for number, (day, seconds) in enumerate(_split(begin, until)):
                sums.add([day], row, int(number == 0), seconds)
        else:
            sums.add(_keys(by, groups_key(mine) if by == "group" else getattr(row, _KEYS[by])), row, 1, until - begin)
        total.add(["total"], row, 1, until - begin)
    rows = sums.rows()
    if by == "day":
        rows = tuple(sorted(rows, key=lambda row: row.key))
    note = "A kernel counts for each of its owner's groups at launch, and once in the total." if by == "group" else ""
    all_of_it = total.rows()
    return Report(by, start, end, rows, all_of_it[0] if all_of_it else Row("total", 0, 0, 0, 0, 0, 0), currency, note)


def _where(first: float, last: float, owner: str | None, groups: Collection[str] | None) -> list[Any]:
    within = [_LEDGER.c.stopped >= first, _LEDGER.c.started < last]
    if owner is not None:
        within.append(_LEDGER.c.owner == owner)
    if groups is not None:
        within.append(or_(*(ledger.in_group(group) for group in groups)))
    return within


def _clipped(tx: Transaction, first: float, last: float) -> Any:
    """Seconds within the bounds. A correction stands at one moment, and counts whole."""
    sqlite = tx.get_bind().dialect.name == "sqlite"
    lower, upper = (func.min, func.max) if sqlite else (func.least, func.greatest)
    inside = lower(_LEDGER.c.stopped, last) - upper(_LEDGER.c.started, first)
    return case((_LEDGER.c.kind == "interval", inside), else_=_LEDGER.c.seconds)


_SORT = ("cpu", "memory", "gpu", "gpu_model", "price_version")


def _entries(
    tx: Transaction,
    by: str,
    sums: _Sums,
    total: _Sums,
    first: float,
    last: float,
    owner: str | None,
    groups: Collection[str] | None,
) -> None:
    key = _LEDGER.c[_KEYS[by]]
    columns = [_LEDGER.c[name] for name in _SORT]
    counted = func.sum(case((_LEDGER.c.kind == "interval", 1), else_=0)).label("kernels")
    seconds = func.sum(_clipped(tx, first, last)).label("seconds_in")
    statement = (
        select(key.label("key"), *columns, counted, seconds)
        .where(*_where(first, last, owner, groups))
        .group_by(key, *columns)
    )
    for row in tx.connection().execute(statement):
        sums.add(_keys(by, row.key), row, row.kernels, row.seconds_in)
        total.add(["total"], row, row.kernels, row.seconds_in)


def _keys(by: str, value: str | None) -> list[str]:
    if by == "group":
        return [name for name in (value or "").split("\n") if name] or [NONE]
    return [value or NONE]


def _days(
    tx: Transaction,
    sums: _Sums,
    total: _Sums,
    first: float,
    last: float,
    owner: str | None,
    groups: Collection[str] | None,
) -> None:
    """By day (UTC): what lies within one day is summed up by the database, what does not is split here."""
    columns = [_LEDGER.c[name] for name in _SORT]
    where = _where(first, last, owner, groups)
    counted = func.sum(case((_LEDGER.c.kind == "interval", 1), else_=0)).label("kernels")
    seconds = func.sum(_clipped(tx, first, last)).label("seconds_in")
    day = _day_number(tx, "started")
    within = select(day.label("day"), *columns, counted, seconds).where(*where, day == _day_number(tx, "stopped"))
    for row in tx.connection().execute(within.group_by(day, *columns)):
        sums.add([_day(row.day * DAY)], row, row.kernels, row.seconds_in)
        total.add(["total"], row, row.kernels, row.seconds_in)
    for row in tx.connection().execute(select(_LEDGER).where(*where, day != _day_number(tx, "stopped"))):
        inside = max(row.started, first), min(row.stopped, last)
        for number, (name, seconds_in) in enumerate(_split(*inside)):
            sums.add([name], row, int(number == 0), seconds_in)
        total.add(["total"], row, 1, inside[1] - inside[0])


def _day_number(tx: Transaction, name: str) -> Any:
    """The number of a day since 1970; PostgreSQL rounds where it casts, so it is told not to."""
    value = _LEDGER.c[name] / DAY
    return sql_cast(value if tx.get_bind().dialect.name == "sqlite" else func.floor(value), Integer)


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, timezone.utc).strftime("%Y-%m-%d")


def _split(begin: float, end: float) -> Iterable[tuple[str, float]]:
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
