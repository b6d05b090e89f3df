"""Admission while something else happens: policies change, databases go, a kernel is started again twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.engine import Database
from hub_gateway.db.lock import LOCK
from hub_gateway.db.models import Kernel, Reservation, Setting, utcnow
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.errors import Conflict, LaunchRefused, Unavailable
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas.policies import MAINTENANCE
from hub_gateway.quotas.queue import Dispatched, dispatch
from hub_gateway.quotas.types import Action, Counts, Policy, Resource, SubjectKind
from tests.harness.quotas import drift, new, put, release
from tests.harness.waiting import eventually

EVERYONE = SubjectKind.EVERYONE
POOL = Policy("pool", EVERYONE, counts=Counts.TOGETHER, hard=1, action=Action.QUEUE)


async def fail(store: KernelStore, kernel_id: str) -> None:
    """The kernel has ended by itself."""

    def failed(tx: Transaction) -> None:
        store.admission.release(tx, kernel_id, utcnow())
        tx.get_one(Kernel, kernel_id).status = KernelStatus.FAILED.value

    await store.write(failed)


async def move(store: KernelStore) -> Dispatched:
    return await store.write(lambda tx: dispatch(tx, store.admitter, utcnow(), half_life=86400.0))


async def left(db: Database) -> tuple[int, int, int]:
    """How many kernels, reservations, and ledger entries there are."""
    tables = (Kernel, Reservation, LedgerEntry)
    return await db.read(lambda tx: tuple(tx.scalar(select(func.count()).select_from(table)) for table in tables))  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def held_up(db: Database, waiting: int) -> AsyncIterator[None]:
    """Holds the lock of all admissions until that many wait for it. PostgreSQL: SQLite has none to hold."""
    if db.sqlite:
        pytest.skip("not applicable: SQLite has one writer at a time, whatever is done")
    connection = db.engine.connect()
    await asyncio.to_thread(connection.execute, text(f"SELECT pg_advisory_xact_lock({LOCK})"))
    yield
    await eventually(lambda: waiters(db, waiting), f"{waiting} to wait for the lock", timeout=5)
    await asyncio.to_thread(connection.rollback)
    connection.close()


async def waiters(db: Database, number: int) -> bool:
    wait = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    return await db.read(lambda tx: tx.execute(wait).scalar_one()) >= number


async def test_a_failed_kernel_may_wait_for_its_next_life(quota_store: KernelStore, tenancy_db: Database) -> None:
    await put(quota_store, POOL)
    await quota_store.admit(new(1))
    await fail(quota_store, "k1")
    await quota_store.admit(new(2))
    assert (await quota_store.revive("k1")).record.status is KernelStatus.QUEUED
    await release(quota_store, "k2")
    assert (await move(quota_store)).admitted == ("k1",)
    assert await drift(quota_store) == 0
    await release(quota_store, "k1")
    assert await left(tenancy_db) == (2, 2, 3)


async def test_a_kernel_that_is_started_again_twice_is_held_once(
    quota_store: KernelStore, tenancy_db: Database
) -> None:
    await quota_store.admit(new(1))
    await fail(quota_store, "k1")
    async with held_up(tenancy_db, 2):
        both = [asyncio.ensure_future(quota_store.revive("k1")) for _ in range(2)]
    found = await asyncio.gather(*both, return_exceptions=True)
    assert sum(isinstance(one, Conflict) for one in found) == 1, found
    assert await drift(quota_store) == 0


async def test_a_launch_that_waited_for_a_policy_is_held_to_it(quota_store: KernelStore, tenancy_db: Database) -> None:
    five = await put(quota_store, replace(POOL, hard=5, action=Action.REJECT))
    await quota_store.admit(new(1))
    async with held_up(tenancy_db, 2):
        lowered = asyncio.ensure_future(put(quota_store, replace(five, hard=1)))
        await eventually(lambda: waiters(tenancy_db, 1), "the policy to be first")
        launch = asyncio.ensure_future(quota_store.admit(new(2)))
    await lowered
    with pytest.raises(LaunchRefused):
        await launch


async def test_a_queued_kernel_is_deleted_while_it_is_admitted(quota_store: KernelStore, tenancy_db: Database) -> None:
    """Whichever comes first, it ends stopped, or is admitted and to be stopped; never listed as failed."""
    await put(quota_store, replace(POOL, queue_seconds=0))
    await quota_store.admit(new(1))
    await quota_store.admit(new(2))
    async with held_up(tenancy_db, 2):
        stopped = asyncio.ensure_future(quota_store.ask_to_stop("k2"))
        await eventually(lambda: waiters(tenancy_db, 1), "the end to be first")
        moved = asyncio.ensure_future(move(quota_store))
    assert (await stopped).status is KernelStatus.STOPPED  # type: ignore[union-attr]
    assert await moved == Dispatched()
    assert (await quota_store.get("k2")).status is KernelStatus.STOPPED  # type: ignore[union-attr]


async def test_what_waits_goes_on_waiting_during_maintenance(quota_store: KernelStore) -> None:
    await put(quota_store, POOL)
    await quota_store.admit(new(1))
    await quota_store.admit(new(2))
    await release(quota_store, "k1")
    await quota_store.write(lambda tx: tx.add(Setting(key=MAINTENANCE, value="The cluster is upgraded until noon.")))
    with pytest.raises(LaunchRefused, match="upgraded until noon"):
        await quota_store.admit(new(3))
    assert await move(quota_store) == Dispatched()
    waits = await quota_store.get("k2")
    assert waits is not None and waits.status is KernelStatus.QUEUED and waits.queue_policy == "pool"
    assert "upgraded until noon" in waits.queue_reason
    await quota_store.write(lambda tx: tx.delete(tx.get_one(Setting, MAINTENANCE)))
    assert (await move(quota_store)).admitted == ("k2",)


async def test_limits_of_one_kernel_hold_for_what_was_made_before(quota_store: KernelStore) -> None:
    await put(quota_store, replace(POOL, hard=2))
    for number in (1, 2, 3):
        await quota_store.admit(new(number, resources=Resources(cpu=8)))
    await fail(quota_store, "k1")
    await put(quota_store, Policy("small", EVERYONE, resource=Resource.CPU, counts=Counts.KERNEL, hard=2))
    found = await move(quota_store)
    assert found.expired == ("k3",)
    assert "policy small" in (await quota_store.get("k3")).message  # type: ignore[union-attr]
    with pytest.raises(LaunchRefused, match="policy small"):
        await quota_store.revive("k1")


async def test_a_limit_of_no_cores_is_not_taken_for_no_limit(quota_store: KernelStore) -> None:
    await put(quota_store, Policy("no-gpu", EVERYONE, resource=Resource.GPU, counts=Counts.KERNEL, hard=0))
    assert (await quota_store.admit(new(2, resources=Resources(gpu=1)))).record.resources.gpu == 0
    await put(quota_store, Policy("none", EVERYONE, resource=Resource.CPU, counts=Counts.KERNEL, hard=0))
    for stated in (Resources(cpu=1), Resources()):
        with pytest.raises(LaunchRefused, match="policy none"):
            await quota_store.admit(new(1, resources=stated))


class Gone:
    """Has the database go away at the n-th statement from now on."""

    def __init__(self, db: Database) -> None:
        self.engine = db.engine
        self.left = 0

    def at(self, number: int) -> None:
        self.left = number
        event.listen(self.engine, "before_cursor_execute", self._statement)

    def back(self) -> None:
        event.remove(self.engine, "before_cursor_execute", self._statement)

    def _statement(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("BEGIN"):
            return
        self.left -= 1
        if self.left <= 0:
            raise OperationalError(statement, {}, Exception("the server closed the connection"))


async def test_a_database_that_goes_at_any_statement_leaves_nothing(
    quota_store: KernelStore, tenancy_db: Database
) -> None:
    await put(quota_store, Policy("few", EVERYONE, hard=3))
    await quota_store.admit(new(0))
    before = await left(tenancy_db)
    gone = Gone(tenancy_db)
    for number in range(1, 60):
        gone.at(number)
        try:
            await quota_store.admit(new(1))
        except Unavailable as error:
            assert "cannot reach its database" in error.message
        else:
            break
        finally:
            gone.back()
        assert await left(tenancy_db) == before
        assert await drift(quota_store) == 0
    else:
        pytest.fail("it never worked")
    assert number > 5
    assert await left(tenancy_db) == (before[0] + 1, before[1] + 1, before[2])


async def test_a_database_that_goes_at_a_release_keeps_what_is_held(
    quota_store: KernelStore, tenancy_db: Database
) -> None:
    await quota_store.admit(new(1))
    gone = Gone(tenancy_db)
    for number in range(1, 60):
        gone.at(number)
        with contextlib.suppress(Unavailable):
            await release(quota_store, "k1")
            break
        gone.back()
        assert await tenancy_db.read(lambda tx: tx.get_one(Reservation, "k1").released_at) is None
        assert await left(tenancy_db) == (1, 1, 0)
        assert await drift(quota_store) == 0
    gone.back()
    assert number > 3 and await left(tenancy_db) == (1, 1, 1)


# What PostgreSQL says where it cannot extend a table, for the last of the tables that an admission writes.
FULL = """
CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) FROM reservations) > 20 THEN
        RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON quota_use FOR EACH ROW EXECUTE FUNCTION full_disk();
"""


@contextlib.asynccontextmanager
async def full_disk(db: Database) -> AsyncIterator[None]:
    """Leaves the database room for some launches, and not for 200."""
    if not db.sqlite:
        await db.write(lambda tx: tx.execute(text(FULL)) and None)
        yield
        await db.write(lambda tx: tx.execute(text("DROP FUNCTION full_disk CASCADE")) and None)
        return
    pages = await db.read(lambda tx: tx.execute(text("PRAGMA page_count")).scalar_one())

    def limit(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    db.engine.dispose()
    event.listen(db.engine, "connect", limit)
    yield
    event.remove(db.engine, "connect", limit)
    db.engine.dispose()


async def test_a_full_disk_refuses_launches_in_a_sentence(quota_store: KernelStore, tenancy_db: Database) -> None:
    admitted = 0
    async with full_disk(tenancy_db):
        with pytest.raises(Unavailable, match="database"):
            for number in range(200):
                await quota_store.admit(new(number))
                admitted += 1
    assert admitted > 0 and await left(tenancy_db) == (admitted, admitted, 0)
    assert await drift(quota_store) == 0


async def test_a_connection_that_is_lost_while_it_waits(quota_store: KernelStore, tenancy_db: Database) -> None:
    end = text("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
    async with held_up(tenancy_db, 0):
        launch = asyncio.ensure_future(quota_store.admit(new(1)))
        await eventually(lambda: waiters(tenancy_db, 1), "it waits")
        await tenancy_db.read(lambda tx: tx.execute(end).all())
        with pytest.raises(Unavailable, match="Try again in a moment"):
            await launch
    assert await left(tenancy_db) == (0, 0, 0)
    await quota_store.admit(new(1))
    assert await drift(quota_store) == 0


async def test_who_waits_too_long_is_told_so(quota_store: KernelStore, tenancy_db: Database) -> None:
    async with held_up(tenancy_db, 0):
        hasty = Database(tenancy_db.url.render_as_string(hide_password=False), timeout=0.3)
        with pytest.raises(Unavailable):
            await KernelStore(hasty, quota_store.vault, instance="hasty").admit(new(1))
        await hasty.close()
    assert await left(tenancy_db) == (0, 0, 0)
