"""Reports of use and cost, from the ledger and from what is still open."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, cast

from sqlalchemy import ColumnElement, Integer, Table, and_, case, false, func, or_, select
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

    @property
    def amounts(self) -> tuple[float, float, float, float]:
        """What cost depends on."""
        return self.seconds, self.cores, self.memory, self.gpus

    def having(self, amounts: Iterable[float], kernels: int = 0) -> _Used:
        """Other amounts at the same price."""
        return _Used(self.gpu_model, self.price_version, kernels, *amounts)


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
        continues = row.billed_from is not None and row.billed_from > row.created_at
        new = int(not continues or row.billed_from.timestamp() <= asked.first)
        if asked.by == "day":
            for number, (day, seconds) in enumerate(_split(begin, until)):
                yield [day], _of_one(row, new * int(number == 0), seconds)
        else:
            value = groups_key(mine) if asked.by == "group" else getattr(row, _KEYS[asked.by])
            yield _keys(asked.by, value), _of_one(row, new, until - begin)


def _new(entry: Any, asked: _Question) -> int:
    """Whether the report counts a kernel for this entry: not if it has counted it for an earlier one."""
    return int(not entry.continues or entry.started <= asked.first)


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


def _of_them(tx: Transaction, asked: _Question) -> list[ColumnElement[bool]]:
    """Whose entries a report is about."""
    found: list[ColumnElement[bool]] = []
    if asked.owner is not None:
        found.append(_LEDGER.c.owner == asked.owner)
    if asked.groups is not None:
        found.append(or_(false(), *(ledger.in_group(tx, group) for group in asked.groups)))
    return found


def _inside(tx: Transaction, asked: _Question) -> list[ColumnElement[bool]]:
    """Entries that need no clipping: nearly all, and summed up by the database."""
    stopped: ColumnElement[float] = _LEDGER.c.stopped
    started: ColumnElement[float] = _LEDGER.c.started
    if asked.owner is None and _much(tx, asked):
        # Not the bare columns: through an index, each entry would be a jump.
        stopped, started = stopped + 0.0, started + 0.0
    return [stopped >= asked.first, stopped <= asked.last, started >= asked.first, started < asked.last]


def _much(tx: Transaction, asked: _Question) -> bool:
    """Whether a report is about so much of the ledger that reading all of it, in its order, is faster than an index."""
    columns = _LEDGER.c.stopped
    low, high = (tx.execute(select(which(columns))).scalar_one() for which in (func.min, func.max))
    return low is None or (min(high, asked.last) - max(low, asked.first)) * 4 > high - low


def _crossing(tx: Transaction, asked: _Question) -> Iterator[tuple[Any, float, float]]:
    """Entries that go over an end of the time, clipped: what ran at those two moments. No correction is among them."""
    stopped, started = _LEDGER.c.stopped, _LEDGER.c.started
    crosses = (
        and_(stopped > asked.first, started < asked.first),
        and_(stopped > asked.last, started >= asked.first, started < asked.last),
    )
    for cross in crosses:
        for row in tx.connection().execute(select(_LEDGER).where(cross, *_of_them(tx, asked))):
            yield row, max(row.started, asked.first), min(row.stopped, asked.last)


def _summed(
    tx: Transaction,
    asked: _Question,
    keys: Sequence[ColumnElement[Any]],
    where: Sequence[ColumnElement[bool]],
    measures: Sequence[Any],
) -> Iterator[tuple[tuple[Any, ...], _Used, list[float]]]:
    """Sums by keys, price and GPU model: what was used in the entries' seconds, and further measures.

    A correction counts for no kernel, and has all of its seconds at one moment. What continues an entry that is
    counted already, too, counts for none.
    """
    of = _LEDGER.c
    grouped = [*keys, of.gpu_model, of.price_version]
    kernels = func.sum(case((and_(of.corrects.is_(None), or_(~of.continues, of.started <= asked.first)), 1), else_=0))
    seconds = (of.seconds, of.seconds * of.cpu, of.seconds * of.memory, of.seconds * of.gpu)
    sums = (func.sum(value) for value in (*seconds, *measures))
    statement = select(*grouped, kernels, *sums).where(*where).group_by(*grouped)
    known = len(keys)
    for row in tx.connection().execute(statement):
        amounts = [float(amount) for amount in row[known + 3 :]]
        used = _Used(row[known], row[known + 1], int(row[known + 2]), *amounts[:4])
        yield tuple(row[:known]), used, amounts[4:]


def _entries(tx: Transaction, asked: _Question) -> Iterator[tuple[list[str], _Used]]:
    name = _KEYS[asked.by]
    # Not the bare column: SQLite would go through its index, a jump for each entry, for the sake of its order.
    where = [*_inside(tx, asked), *_of_them(tx, asked)]
    for (value,), used, _ in _summed(tx, asked, [_LEDGER.c[name] + ""], where, ()):
        yield _keys(asked.by, value), used
    for row, begin, end in _crossing(tx, asked):
        yield _keys(asked.by, getattr(row, name)), _of_one(row, _new(row, asked), end - begin)


def _keys(by: str, value: str | None) -> list[str]:
    if by == "group":
        return [name for name in (value or "").split("\n") if name] or [NONE]
    return [value or NONE]


def _days(tx: Transaction, asked: _Question) -> Iterator[tuple[list[str], _Used]]:
    """By day (UTC). An entry of one day is in the sums as it is; one of several is summed up by its first and last."""
    of = _LEDGER.c
    sqlite = tx.get_bind().dialect.name == "sqlite"

    def number(moment: ColumnElement[float]) -> ColumnElement[int]:
        # PostgreSQL rounds where it casts, so it is told not to.
        return sql_cast(moment / DAY if sqlite else func.floor(moment / DAY), Integer)

    first, last = number(of.started), number(of.stopped)
    where = [*_inside(tx, asked), *_of_them(tx, asked)]
    for (day,), used, _ in _summed(tx, asked, [first], [*where, first == last], ()):
        yield [_day(day * DAY)], used
    late = of.stopped - last * DAY
    measures = (late, late * of.cpu, late * of.memory, late * of.gpu, of.cpu, of.memory, of.gpu)
    for (one, other), used, amounts in _summed(tx, asked, [first, last], [*where, last > first], measures):
        all_of_it, ends, each = used.amounts, amounts[:4], (used.kernels, *amounts[4:])
        between = [DAY * amount for amount in each]
        days = other - one - 1
        begins = [amount - end - days * day for amount, end, day in zip(all_of_it, ends, between, strict=True)]
        yield [_day(one * DAY)], used.having(begins, used.kernels)
        for day in range(one + 1, other):
            yield [_day(day * DAY)], used.having(between)
        if ends[0] > 0:  # not at midnight
            yield [_day(other * DAY)], used.having(ends)
    for row, begin, end in _crossing(tx, asked):
        for index, (name, seconds) in enumerate(_split(begin, end)):
            yield [name], _of_one(row, _new(row, asked) * int(index == 0), seconds)


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

    def correct(
        self, tx: Transaction, entry: int, seconds: float, note: str, actor: str, cost_center: str | None = None
    ) -> dict[str, Any]:
        """Correct an entry. Raises `NotFound`, `BadRequest`."""
        made = ledger.correct(tx, entry, seconds, note, actor, cost_center=cost_center)
        detail = {"entry": entry, "seconds": seconds, "cost_center": cost_center, "note": note, "correction": made}
        audit.append(tx, actor=actor, action="ledger.correct", subject=f"entry {entry}", detail=detail)
        return {"id": made, "corrects": entry, "seconds": seconds, "cost_center": cost_center, "note": note}
