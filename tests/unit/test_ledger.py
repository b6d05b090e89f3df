"""The ledger and its reports: every second is billed once, nothing is ever changed."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import DatabaseError

from hub_gateway.db.models import Kernel, Reservation, utcnow
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.errors import BadRequest, Conflict, NotFound
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas import ledger, prices
from hub_gateway.quotas.reports import BY, Report, Reports, Row, report
from hub_gateway.quotas.types import Resource
from tests.harness.quotas import begin, new, release

GIB = 2**30


def at(day: int, hour: float = 0.0, month: int = 2) -> datetime:
    return datetime(2028, month, day, tzinfo=timezone.utc) + timedelta(hours=hour)


async def ran(store: KernelStore, number: int, start: datetime, stop: datetime | None, **more: Any) -> None:
    """A kernel that ran (None: runs still)."""
    await store.admit(new(number, **more))
    await begin(store, f"k{number}", start)
    if stop is not None:
        await release(store, f"k{number}", stop)


async def made(store: KernelStore, by: str, start: datetime, end: datetime, **more: Any) -> Report:
    return await store.db.read(lambda tx: report(tx, by, start, end, **more))


async def test_a_report_adds_up(quota_store: KernelStore) -> None:
    """Clipped to its bounds, by whatever key, with the price of the launch."""
    models = {"a100": 5}
    await quota_store.write(
        lambda tx: prices.set_prices(tx, "admin", kernel_hour=1, core_hour=2, gib_hour=0.5, gpu_models=models)
    )
    big = Resources(cpu=2, memory=4 * GIB, gpu=1, gpu_model="a100")
    await ran(quota_store, 1, at(1), at(1, 10), owner="alice", groups=("lab", "x"), cost_center="42", resources=big)
    await ran(quota_store, 2, at(1, 6), at(3), owner="bob", groups=("lab",))
    await ran(quota_store, 3, at(2, 12), None, owner="bob")
    span = {"start": at(1, 5), "end": at(3), "now": at(2, 18)}
    found = await made(quota_store, "user", **span)
    rows = {row.key: row for row in found.rows}
    assert rows["alice"] == Row("alice", 1, 5.0, 10.0, 20.0, 5.0, 5 * (1 + 4 + 2 + 5))
    assert rows["bob"].kernels == 2 and rows["bob"].kernel_hours == 42 + 6
    assert found.total.kernel_hours == 53 and found.total.kernels == 3
    groups = await made(quota_store, "group", **span)
    assert {row.key: row.kernel_hours for row in groups.rows} == {"lab": 47, "x": 5, "(none)": 6}
    assert groups.total == found.total and "once in the total" in groups.note
    days = await made(quota_store, "day", **span)
    assert [(row.key, row.kernel_hours) for row in days.rows] == [("2028-02-01", 23), ("2028-02-02", 30)]
    assert days.total.kernel_hours == 53
    centres = await made(quota_store, "cost_center", **span)
    assert {row.key for row in centres.rows} == {"42", "(none)"}
    assert (await made(quota_store, "user", **span, owner="bob")).total == replace(rows["bob"], key="total")
    assert (await made(quota_store, "user", **span, groups=["x"])).total.kernel_hours == 5
    assert (await made(quota_store, "user", **span, groups=["la"])).total.kernels == 0
    with pytest.raises(BadRequest):
        await made(quota_store, "moon", **span)
    with pytest.raises(BadRequest):
        await made(quota_store, "user", at(2), at(1))


async def test_prices_are_those_of_the_launch(quota_store: KernelStore) -> None:
    await ran(quota_store, 1, at(1), at(1, 1))
    await quota_store.write(lambda tx: prices.set_prices(tx, "admin", kernel_hour=10))
    await ran(quota_store, 2, at(1), at(1, 1))
    assert (await made(quota_store, "user", at(1), at(2))).total.cost == 10
    past = utcnow() - timedelta(days=1)
    with pytest.raises(BadRequest, match="past"):
        await quota_store.write(lambda tx: prices.set_prices(tx, "admin", valid_from=past, kernel_hour=1))
    with pytest.raises(BadRequest, match="negative"):
        await quota_store.write(lambda tx: prices.set_prices(tx, "admin", kernel_hour=-1))


async def test_prices_are_kept_as_they_are_given(quota_store: KernelStore) -> None:
    """Also those of which a thousandth is nothing."""
    rates = {"kernel_hour": 0.00001, "core_hour": 0.0125, "gib_hour": 0.0004, "gpu_models": {"a100": 1.23456}}
    await quota_store.write(lambda tx: prices.set_prices(tx, "admin", **rates) and None)
    kept = (await quota_store.db.read(prices.all_prices))[1]
    assert {name: getattr(kept, name) for name in rates} == rates
    await ran(quota_store, 1, at(1), at(1, 10), resources=Resources(memory=GIB))
    assert (await made(quota_store, "user", at(1), at(2))).total.cost == pytest.approx(10 * (0.0004 + 0.00001))


@pytest.mark.parametrize("change", [delete(LedgerEntry), update(LedgerEntry).values(seconds=0.0)])
async def test_the_database_refuses_changes(quota_store: KernelStore, change: Any) -> None:
    await ran(quota_store, 1, at(1), at(2))
    with pytest.raises(DatabaseError, match="append-only"):
        await quota_store.write(lambda tx: tx.execute(change) and None)
    assert (await made(quota_store, "user", at(1), at(3))).total.kernel_hours == 24


async def test_a_month_is_closed_once_and_for_all(quota_store: KernelStore) -> None:
    """What runs on over its end is split there; a correction of it stands in the month in which it is made."""
    await ran(quota_store, 1, at(28), at(29, 12))
    await ran(quota_store, 2, at(29), None)
    close = lambda tx: ledger.close_month(tx, "2028-02", "admin", now=at(2, month=3))  # noqa: E731
    closed = await quota_store.write(close)
    assert (closed.entries, closed.seconds) == (2, 36 * 3600 + 24 * 3600)
    with pytest.raises(Conflict, match="closed already"):
        await quota_store.write(close)
    with pytest.raises(BadRequest, match="not over"):
        await quota_store.write(lambda tx: ledger.close_month(tx, "2028-03", "admin", now=at(2, month=3)))
    with pytest.raises(BadRequest, match="written as"):
        await quota_store.write(lambda tx: ledger.close_month(tx, "2028-3", "admin"))
    await release(quota_store, "k2", at(1, 6, month=3))
    february = await made(quota_store, "user", at(1), at(1, month=3))
    march = await made(quota_store, "user", at(1, month=3), at(1, month=4))
    assert (february.total.kernel_hours, march.total.kernel_hours) == (60, 6)
    assert (february.total.kernels, march.total.kernels) == (2, 1)
    for by in BY:
        both = await made(quota_store, by, at(1), at(1, month=4))
        assert (both.total.kernels, both.total.kernel_hours) == (2, 66), "a kernel counts once, in however many entries"
    first = await quota_store.db.read(lambda tx: tx.scalars(select(LedgerEntry.id).order_by(LedgerEntry.id)).first())
    assert first is not None
    await quota_store.write(lambda tx: ledger.correct(tx, first, -3600, "an outage", "admin", now=at(5, month=3)))
    assert (await made(quota_store, "user", at(1), at(1, month=3))).total.kernel_hours == 60
    assert (await made(quota_store, "user", at(1, month=3), at(1, month=4))).total.kernel_hours == 5
    with pytest.raises(BadRequest, match="less than none"):
        await quota_store.write(lambda tx: ledger.correct(tx, first, -36 * 3600, "too much", "admin"))
    with pytest.raises(NotFound):
        await quota_store.write(lambda tx: ledger.correct(tx, 999, 1, "nothing", "admin"))


async def test_a_clock_that_was_put_back_makes_nothing_negative(quota_store: KernelStore) -> None:
    await ran(quota_store, 1, at(2), at(1))
    assert (await made(quota_store, "user", at(1), at(3))).total.kernel_hours == 0


async def test_a_kernel_over_the_end_of_a_month_is_in_each_with_its_share(quota_store: KernelStore) -> None:
    """It had ended when the first of them was closed, so its entry was not split."""
    await ran(quota_store, 1, at(29, 20), at(1, 4, month=3))
    sums = {}
    for month in ("2028-02", "2028-03"):
        close = partial(ledger.close_month, month=month, actor="admin", now=at(2, month=4))
        sums[month] = (await quota_store.write(close)).seconds / 3600
    assert sums == {"2028-02": 4, "2028-03": 4}


LIVES = st.lists(st.tuples(st.integers(0, 40 * 24), st.integers(0, 50 * 24), st.booleans()), min_size=1, max_size=8)


@given(LIVES, st.lists(st.integers(0, 90 * 24), min_size=2, max_size=2, unique=True))
def test_intervals_split_by_days_sum_up(lives: list[tuple[int, int, bool]], bounds: list[int]) -> None:
    """The parts of a day, over all days, are the whole."""
    from hub_gateway.quotas.reports import _split

    first, last = (at(1).timestamp() + 3600.0 * hour for hour in sorted(bounds))
    for start, length, _ in lives:
        begins = max(first, at(1).timestamp() + 3600.0 * start)
        ends = min(last, at(1).timestamp() + 3600.0 * (start + length))
        if begins < ends:
            parts = list(_split(begins, ends))
            assert sum(seconds for _, seconds in parts) == pytest.approx(ends - begins)
            assert len({day for day, _ in parts}) == len(parts) and all(0 < part <= 86400 for _, part in parts)


async def test_sums_equal_lifetimes(quota_store: KernelStore) -> None:
    """Through kernels that failed and were started again, months closed meanwhile, and whatever is still open."""
    lived = timedelta()
    for number in range(1, 8):
        start, stop = at(number, number), at(number + 20, 2 * number)
        await ran(quota_store, number, start, stop if number % 3 else None, owner=f"user{number % 2}")
        lived += (stop if number % 3 else at(10, month=3)) - start
    await quota_store.write(lambda tx: ledger.close_month(tx, "2028-02", "admin", now=at(1, month=3)))
    for number in (3, 6):
        await release(quota_store, f"k{number}", at(10, month=3))
    for number in (1, 2):
        # It died long ago; between its lives nobody pays.
        failed = update(Kernel).where(Kernel.id == f"k{number}").values(status=KernelStatus.FAILED.value)
        await quota_store.write(lambda tx, failed=failed: tx.execute(failed) and None)
        await quota_store.revive(f"k{number}")
        await begin(quota_store, f"k{number}", at(12, month=3))
        await release(quota_store, f"k{number}", at(12, 5 * number, month=3))
        lived += timedelta(hours=5 * number)
    found = await made(quota_store, "user", at(1, month=1), at(1, month=6))
    assert found.total.kernels == 9, "who is started again is another kernel on the bill"
    assert found.total.kernel_hours == lived.total_seconds() / 3600
    billed = await quota_store.db.read(lambda tx: tx.execute(select(func.sum(LedgerEntry.seconds))).scalar_one())
    assert billed == lived.total_seconds()
    still = await quota_store.db.read(
        lambda tx: tx.scalars(select(Reservation.kernel_id).where(Reservation.released_at.is_(None))).all()
    )
    assert still == []


STARTS = st.integers(0, 75 * 24)
KERNELS = st.lists(st.tuples(STARTS, st.integers(0, 50 * 24)), min_size=1, max_size=5)
CORRECTIONS = st.lists(st.tuples(STARTS, st.integers(0, 4), st.integers(-3600, 3600)), max_size=3)
CLOSED = (("2028-02", at(1), at(1, month=3)), ("2028-03", at(1, month=3), at(1, month=4)))


async def test_closed_sums_equal_reports(quota_store: KernelStore) -> None:
    """Whenever kernels ended, months were closed and entries corrected: nobody is billed twice for the same hour."""
    loop, plan = asyncio.get_running_loop(), quota_store.admitter.secrets(new(0).plan)

    class Undone(Exception):
        pass

    def example(tx: Any, lives: Any, wrong: Any, delays: Any) -> None:
        for number, (start, _) in enumerate(lives):
            quota_store.admitter.admit(tx, new(number), plan)
            row = tx.get_one(Reservation, f"k{number}")
            row.created_at = row.billed_from = at(1, start)
            tx.flush()
        acts: list[tuple[datetime, Any]] = []
        for number, (start, lasts) in enumerate(lives):
            acts.append((at(1, start + lasts), partial(quota_store.admission.release, tx, f"k{number}")))
        for moment, which, seconds in wrong:
            acts.append((at(1, moment), partial(corrected, tx, which, seconds)))
        closed = []
        for (month, _, end), delay in zip(CLOSED, delays, strict=True):
            moment = end + timedelta(hours=delay)
            acts.append((moment, lambda now, month=month: closed.append(closing(tx, month, now))))
        for moment, act in sorted(acts, key=lambda one: one[0]):
            act(moment)
        late = at(1, month=9)
        for found, (month, start, end) in zip(sorted(closed, key=lambda one: one.month), CLOSED, strict=True):
            reported = report(tx, "user", start, end, now=late).total.kernel_hours
            assert found.seconds / 3600 == pytest.approx(reported, abs=1e-6), month
        raise Undone

    def corrected(tx: Any, which: int, seconds: float, now: datetime) -> None:
        known = tx.scalars(select(LedgerEntry.id).where(LedgerEntry.kind == "interval")).all()
        if which < len(known):
            with contextlib.suppress(BadRequest):
                ledger.correct(tx, known[which], seconds, "wrong", "admin", now=now)

    def closing(tx: Any, month: str, now: datetime) -> ledger.Closed:
        return ledger.close_month(tx, month, "admin", now=now)

    @settings(max_examples=60, deadline=None)
    @given(KERNELS, CORRECTIONS, st.tuples(st.integers(0, 400), st.integers(0, 400)))
    def examples(lives: Any, wrong: Any, delays: Any) -> None:
        writing = quota_store.write(lambda tx: example(tx, lives, wrong, delays))
        with pytest.raises(Undone):
            asyncio.run_coroutine_threadsafe(writing, loop).result(60)

    await asyncio.to_thread(examples)


async def test_what_is_open_counts_for_limits_as_it_does_in_reports(quota_store: KernelStore) -> None:
    """Of each and of a group together, also where a kernel began before the window, or has not begun at its end."""
    for number, (owner, groups, start) in enumerate(
        (
            ("alice", ("lab",), at(1)),
            ("bob", ("lab", 'a"b'), at(2, 6.25)),
            ("carol", ("labs", "Lab"), at(2)),
            ("dora", (), at(9)),
        )
    ):
        resources = Resources(cpu=number + 1)
        await ran(quota_store, number, start, None, owner=owner, groups=groups, resources=resources)
    await ran(quota_store, 9, at(1), at(3), owner="alice", groups=("lab",), resources=Resources(cpu=0.5))
    bounds = {"start": at(2), "end": at(4)}
    for about, filters in (
        ({}, {}),
        ({"owner": "alice"}, {"owner": "alice"}),
        ({"group": "lab"}, {"groups": ["lab"]}),
        ({"group": 'a"b'}, {"groups": ['a"b']}),
        ({"group": "b"}, {"groups": ["b"]}),
    ):
        found = await made(quota_store, "user", **bounds, now=at(4), **filters)
        for resource, hours in (
            (Resource.KERNEL_HOURS, found.total.kernel_hours),
            (Resource.CORE_HOURS, found.total.core_hours),
        ):
            used = await quota_store.db.read(
                lambda tx, resource=resource, about=about: ledger.timed_use(tx, resource, at(2), at(4), **about).amount
            )
            assert used == pytest.approx(hours, abs=1e-6), (about, resource)


def test_names_cannot_be_formulas_in_a_spreadsheet() -> None:
    rows = tuple(Row(name, 1, 1, 0, 0, 0, 0) for name in ("=1+1", "+x", "-x", "@x", "\tx", 'a"b,c\nd', "bob"))
    found = Report("user", at(1), at(2), rows, Row("total", 7, 7, 0, 0, 0, 0), "units")
    read = list(csv.reader(io.StringIO(found.to_csv())))
    assert [line[0] for line in read[1:]] == ["'=1+1", "'+x", "'-x", "'@x", "'\tx", 'a"b,c\nd', "bob", "total"]
    assert all(line.isprintable() for line in found.to_table().splitlines())


async def test_an_entry_is_moved_to_another_cost_centre(quota_store: KernelStore) -> None:
    """As a whole, with what was corrected before, and again; the month that was reported stays as it was."""
    await quota_store.write(lambda tx: prices.set_prices(tx, "admin", kernel_hour=2))
    await ran(quota_store, 1, at(1), at(1, 10))
    (entry,) = await quota_store.db.read(lambda tx: tx.scalars(select(LedgerEntry.id)).all())

    async def corrected(seconds: float, centre: str | None, day: int) -> None:
        when = at(day, month=3)
        await quota_store.write(
            lambda tx: ledger.correct(tx, entry, seconds, "the Hub was away", "admin", cost_center=centre, now=when)
        )

    async def billed(start: datetime) -> dict[str, tuple[float, float]]:
        rows = (await made(quota_store, "cost_center", start, at(1, month=5))).rows
        return {row.key: (row.kernel_hours, row.cost) for row in rows if row.kernel_hours}

    await corrected(-3600, None, 2)
    await corrected(0, "4711", 3)
    assert await billed(at(1)) == {"4711": (9, 18)}
    assert await billed(at(1, month=3)) == {"(none)": (-10, -20), "4711": (9, 18)}
    await corrected(1800, "4712", 4)
    await corrected(1800, None, 5)
    assert await billed(at(1)) == {"4712": (10, 20)}
    for seconds, centre, said in ((-36001, None, "less than none"), (0, "4712", "already"), (0, None, "already")):
        with pytest.raises(BadRequest, match=said):
            await corrected(seconds, centre, 6)
    await corrected(0, "", 7)
    assert await billed(at(1)) == {"(none)": (10, 20)}


async def test_the_facade_writes_its_lines(quota_store: KernelStore) -> None:
    reports = Reports(currency="EUR")
    await quota_store.write(lambda tx: reports.set_prices(tx, "admin", core_hour=0.05) and None)
    assert [one.version for one in await quota_store.db.read(reports.prices)] == [1, 0]
    found = await quota_store.db.read(lambda tx: reports.report(tx, "user", utcnow(), at(1)))
    assert found.to_json()["currency"] == "EUR"


async def test_days_and_users_agree(quota_store: KernelStore) -> None:
    """Entries of minutes, days and weeks, that begin and end at any time, midnight too, cut at any bounds."""
    spans = [(0, 1), (5, 24), (24, 48), (23, 49), (13, 200), (47.5, 72), (60, 60), (10, 500.25)]
    for number, (start, stop) in enumerate(spans):
        await ran(quota_store, number, at(1, start), at(1, stop))
    await ran(quota_store, 99, at(2, 3), None)
    for first, last in ((0, 600), (12, 60), (24, 48), (30, 31), (47, 73.5)):
        bounds = {"start": at(1, first), "end": at(1, last), "now": at(5)}
        users, days = await made(quota_store, "user", **bounds), await made(quota_store, "day", **bounds)
        assert days.total.kernel_hours == pytest.approx(users.total.kernel_hours)
        assert sum(row.kernel_hours for row in days.rows) == pytest.approx(days.total.kernel_hours)
        # The one that runs still began at 27 h.
        lived = [(max(begin, first), min(end, last)) for begin, end in (*spans, (27, 96))]
        shares = {
            f"2028-02-{day + 1:02}": sum(max(0, min(end, day * 24 + 24) - max(begin, day * 24)) for begin, end in lived)
            for day in range(25)
        }
        found = {row.key: row.kernel_hours for row in days.rows if row.kernel_hours}
        assert found == pytest.approx({day: hours for day, hours in shares.items() if hours})
