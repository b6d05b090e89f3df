"""Meters: straight lines that say what the ledger and the open reservations say."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import func, select, update

from hub_gateway.db.lock import lock
from hub_gateway.db.models import Reservation
from hub_gateway.db.tenancy import LedgerEntry, Meter
from hub_gateway.kernels import admissions
from hub_gateway.kernels.admissions import demand_of
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas import ledger, meters, prices
from hub_gateway.quotas.resolve import window_bounds
from hub_gateway.quotas.types import Counts, ObjectKind, Period, Policy, Resource, SubjectKind, WindowKind
from hub_gateway.quotas.use import EVERYONE, Holder
from tests.harness.quotas import drift, new, put, release

MONTH = {"window": WindowKind.CALENDAR, "period": Period.MONTH, "hard": 1e6}
TOGETHER = {**MONTH, "counts": Counts.TOGETHER}
WEEK = {"window": WindowKind.ROLLING, "window_seconds": 7 * 86400, "hard": 1e6, "counts": Counts.TOGETHER}
TAKEN = Resources(cpu=2.0, memory=2**30, gpu=1, gpu_model="a100")
LAB, ALICE, ALL = (SubjectKind.GROUP.value, "lab"), (SubjectKind.USER.value, "alice"), ("everyone", EVERYONE)


def at(day: float, month: int = 3) -> datetime:
    return datetime(2028, month, 1, tzinfo=timezone.utc) + timedelta(days=day - 1)


class Clock:
    """The time at which kernels are admitted."""

    now = at(1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(admissions, "utcnow", lambda: made.now)
    return made


async def admit(store: KernelStore, clock: Clock, number: int, when: datetime, **more: Any) -> None:
    clock.now = when
    usual = {"owner": "alice", "groups": ("lab",), "resources": TAKEN}
    await store.admit(new(number, **{**usual, **more}))


async def told(
    store: KernelStore,
    policy: Policy,
    scope: Holder,
    now: datetime,
    *,
    admitting: bool = False,
    enough: float | None = None,
) -> float:
    def ask(tx: Any) -> float:
        if admitting:
            lock(tx)
        return meters.used(tx, policy, scope, now, enough=enough)

    return await (store.write if admitting else store.db.read)(ask)


async def right(store: KernelStore, policy: Policy, scope: Holder, now: datetime) -> float:
    begin, _ = window_bounds(policy, now)
    return (await store.db.read(lambda tx: meters.timed_use(tx, policy, scope, begin, now))).amount


async def kept(store: KernelStore) -> int:
    return await store.db.read(lambda tx: tx.execute(select(func.count()).select_from(Meter)).scalar_one())


@pytest.mark.parametrize("resource", [Resource.KERNEL_HOURS, Resource.CORE_HOURS, Resource.GPU_HOURS, Resource.COST])
async def test_a_meter_says_what_the_ledger_says(quota_store: KernelStore, clock: Clock, resource: Resource) -> None:
    """Of a group, an owner and everybody, whatever began or ended in whatever order, before the window and in it."""
    model = {"gpu_model": "a100"} if resource is Resource.GPU_HOURS else {}
    made = [
        (await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=resource, **TOGETHER, **model)), LAB),
        (await put(quota_store, Policy("each", SubjectKind.EVERYONE, resource=resource, **MONTH, **model)), ALICE),
        (
            await put(
                quota_store,
                Policy("r", SubjectKind.EVERYONE, "*", ObjectKind.KERNELSPEC, "r*", resource, **TOGETHER, **model),
            ),
            ALL,
        ),
    ]
    await admit(quota_store, clock, 0, at(20, month=2))
    for policy, scope in made:
        await told(quota_store, policy, scope, at(1), admitting=True)
    assert await kept(quota_store) == 3

    async def agree(now: datetime) -> None:
        for policy, scope in made:
            found = await told(quota_store, policy, scope, now)
            assert found == pytest.approx(await right(quota_store, policy, scope, now), abs=1e-6), (policy.name, now)

    await agree(at(2))
    await admit(quota_store, clock, 1, at(2), kernelspec="r")
    await admit(quota_store, clock, 2, at(2.5), owner="bob", kernelspec="r", resources=Resources(cpu=1.0))
    await agree(at(3))
    # The clock of another gateway is a little behind.
    await admit(quota_store, clock, 3, at(2.5) - timedelta(milliseconds=300), owner="carol", groups=("Lab",))
    await release(quota_store, "k1", at(3))
    await agree(at(3))
    await agree(at(2.75))
    await quota_store.write(lambda tx: prices.set_prices(tx, "admin", kernel_hour=2, gpu_hour=3))
    await release(quota_store, "k0", at(4))
    await agree(at(5))
    await agree(at(2, month=4))
    await admit(quota_store, clock, 4, at(3, month=4))
    await release(quota_store, "k2", at(4, month=4))
    await agree(at(5, month=4))
    await release(quota_store, "k4", at(6, month=4))
    await agree(at(6, month=4))
    assert await kept(quota_store) == 5, "bob and carol have one of their own"


async def test_a_price_counts_from_the_launch_on(quota_store: KernelStore, clock: Clock) -> None:
    policy = await put(quota_store, Policy("money", SubjectKind.EVERYONE, resource=Resource.COST, **TOGETHER))
    made = await quota_store.write(lambda tx: prices.set_prices(tx, "admin", kernel_hour=2))
    start = (made.valid_from or at(1)) + timedelta(minutes=1)
    start = start.replace(day=2) if start.day == 1 else start
    await told(quota_store, policy, ALL, start, admitting=True)
    await admit(quota_store, clock, 1, start)
    assert await told(quota_store, policy, ALL, start + timedelta(hours=3)) == pytest.approx(6.0)
    await release(quota_store, "k1", start + timedelta(hours=4))
    assert await told(quota_store, policy, ALL, start + timedelta(hours=9)) == pytest.approx(8.0)


async def test_a_changed_policy_is_read_anew(quota_store: KernelStore, clock: Clock) -> None:
    """What it is about may have changed; and one of the same number that was deleted is another one."""
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **TOGETHER))
    await admit(quota_store, clock, 1, at(2))
    assert await told(quota_store, policy, LAB, at(3), admitting=True) == pytest.approx(24.0)
    changed = await put(quota_store, Policy(**{**vars(policy), "resource": Resource.CORE_HOURS}))
    assert await told(quota_store, changed, LAB, at(3)) == pytest.approx(48.0)
    await release(quota_store, "k1", at(4))
    assert await told(quota_store, changed, LAB, at(5), admitting=True) == pytest.approx(96.0)
    await quota_store.write(lambda tx: quota_store.admission.policies.delete(tx, "lab", "admin"))
    assert await kept(quota_store) == 0


async def test_a_correction_counts_at_once(quota_store: KernelStore, clock: Clock) -> None:
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **TOGETHER))
    await told(quota_store, policy, LAB, at(1), admitting=True)
    await admit(quota_store, clock, 1, at(2))
    await release(quota_store, "k1", at(3))
    [entry] = await quota_store.db.read(lambda tx: tx.scalars(select(LedgerEntry.id)).all())
    await quota_store.write(lambda tx: ledger.correct(tx, entry, -3600, "the Hub was away", "admin", now=at(4)))
    assert await told(quota_store, policy, LAB, at(5)) == pytest.approx(23.0)
    assert await told(quota_store, policy, LAB, at(5), admitting=True) == pytest.approx(23.0)


async def test_a_clock_that_was_put_back_is_told_the_truth(quota_store: KernelStore, clock: Clock) -> None:
    """The line begins where the last kernel did; before that, and in the month before, the ledger is read."""
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **TOGETHER))
    await told(quota_store, policy, LAB, at(1), admitting=True)
    await admit(quota_store, clock, 1, at(2))
    await admit(quota_store, clock, 2, at(4))
    for now, hours in ((at(3), 24.0), (at(5), 96.0), (at(20, month=2), 0.0)):
        for admitting in (False, True):
            assert await told(quota_store, policy, LAB, now, admitting=admitting) == pytest.approx(hours)
    # A kernel that was given back before it began, by such a clock, took nothing.
    await release(quota_store, "k2", at(3))
    assert await told(quota_store, policy, LAB, at(5)) == pytest.approx(72.0)


async def test_what_a_faster_clock_has_written_into_the_next_month_counts_there(
    quota_store: KernelStore, clock: Clock
) -> None:
    """A line that is read anew by a clock that is still in the old month would not know of it."""
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **TOGETHER))
    midnight = at(1, month=4)
    await admit(quota_store, clock, 1, midnight + timedelta(milliseconds=200))
    await admit(quota_store, clock, 2, at(1))
    await release(quota_store, "k2", at(2))
    [entry] = await quota_store.db.read(lambda tx: tx.scalars(select(LedgerEntry.id)).all())
    await quota_store.write(
        lambda tx: ledger.correct(tx, entry, 36000, "late", "admin", now=midnight + timedelta(milliseconds=300))
    )
    behind = midnight - timedelta(milliseconds=100)
    assert await told(quota_store, policy, LAB, behind, admitting=True) == pytest.approx(24.0)
    assert await kept(quota_store) == 0
    noon = at(1.5, month=4)
    assert await told(quota_store, policy, LAB, noon, admitting=True) == pytest.approx(22.0, abs=1e-3)
    assert await kept(quota_store) == 1


async def test_less_than_nothing_is_not_shown(quota_store: KernelStore, clock: Clock) -> None:
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **TOGETHER))
    await admit(quota_store, clock, 1, at(1, month=2))
    await release(quota_store, "k1", at(2, month=2))
    [entry] = await quota_store.db.read(lambda tx: tx.scalars(select(LedgerEntry.id)).all())
    await quota_store.write(lambda tx: ledger.correct(tx, entry, -3600, "the Hub was away", "admin", now=at(4)))
    for admitting in (False, True, False):
        assert await told(quota_store, policy, LAB, at(5), admitting=admitting) == 0.0


@pytest.mark.parametrize("admitting", [False, True])
async def test_a_rolling_window_is_never_told_as_less_than_it_is(
    quota_store: KernelStore, clock: Clock, admitting: bool
) -> None:
    """And as enough only where it is: whatever was read before, and also where the clock was put back."""
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **WEEK))
    steps = [
        (at(1), "admit", 1),
        (at(2), "admit", 2),
        (at(4), "release", 1),
        (at(9.5), "release", 2),
        (at(9.75), "admit", 3),
        (at(9.25), "admit", 4),  # by a clock that is behind
        (at(20), "release", 3),
        (at(30), "release", 4),
    ]
    for when, what, number in steps:
        if what == "admit":
            await admit(quota_store, clock, number, when)
        else:
            await release(quota_store, f"k{number}", when)
        for now in (when, when + timedelta(days=0.3), when + timedelta(days=8), when - timedelta(days=2)):
            exact = await right(quota_store, policy, LAB, now)
            for enough in (1.0, 20.0, 100.0, 170.0, 400.0):
                found = await told(quota_store, policy, LAB, now, admitting=admitting, enough=enough)
                assert found >= exact - 1e-6 and (found < enough) == (exact < enough), (when, now, enough)
            assert await told(quota_store, policy, LAB, now) == pytest.approx(exact, abs=1e-6)


async def test_what_is_shown_of_a_rolling_window_is_exact(quota_store: KernelStore, clock: Clock) -> None:
    """Also where a launch would be told that there is room without reading the ledger."""
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **WEEK))
    await admit(quota_store, clock, 1, at(1))
    await told(quota_store, policy, LAB, at(2), admitting=True, enough=1e6)
    await release(quota_store, "k1", at(3))
    assert await told(quota_store, policy, LAB, at(12), enough=1e6) > 24
    demand = demand_of(new(2, owner="alice", groups=("lab",), resources=TAKEN))

    def explained(tx: Any) -> float:
        index = quota_store.admission.policies.index(tx)
        [fit] = quota_store.admission.fits(tx, index, demand, at(12))
        return fit.used

    assert await quota_store.db.read(explained) == 0.0


async def test_a_start_reads_meters_anew(quota_store: KernelStore, clock: Clock) -> None:
    """Whatever has made them wrong: a table that was restored, or a hand."""
    policy = await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **TOGETHER))
    await admit(quota_store, clock, 1, at(2))
    await quota_store.write(lambda tx: tx.execute(update(Meter).values(slope=7.0)) and None)
    assert await told(quota_store, policy, LAB, at(3), admitting=True) != pytest.approx(24.0)
    await drift(quota_store)
    assert await told(quota_store, policy, LAB, at(3), admitting=True) == pytest.approx(24.0)


@pytest.mark.parametrize("window", [TOGETHER, WEEK], ids=["month", "week"])
async def test_launches_do_not_read_the_ledger_each_time(
    quota_store: KernelStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, window: dict[str, Any]
) -> None:
    """Once for each line, and never again: neither launches nor ends of other kernels make it be read anew."""
    await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.KERNEL_HOURS, **window))
    read = []
    known = ledger.timed_use
    monkeypatch.setattr(ledger, "timed_use", lambda *args, **more: read.append(args) or known(*args, **more))
    for number in range(5):
        await admit(quota_store, clock, number, at(2 + number))
        await release(quota_store, f"k{number}", at(2.5 + number))
    assert len(read) == (2 if window is TOGETHER else 1), "what is in this window, and whether anything is in the next"
    held = await quota_store.db.read(
        lambda tx: tx.scalars(select(Reservation.kernel_id).where(Reservation.released_at.is_(None))).all()
    )
    assert held == []
