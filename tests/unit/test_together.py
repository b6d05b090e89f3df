"""Writes that share a transaction, on the database under test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from hub_gateway.db.engine import Database
from hub_gateway.db.models import Setting
from hub_gateway.db.together import MOST, Together
from hub_gateway.errors import Unavailable


class Writes:
    """The database's, counted; they begin when they may."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.sizes: list[int] = []
        self.may_begin = asyncio.Event()
        self.may_begin.set()
        self.broken = False

    async def __call__(self, fn: Callable[[Any], list[Any]]) -> list[Any]:
        await self.may_begin.wait()
        if self.broken:
            self.sizes.append(0)
            raise Unavailable("The database is away.")
        made = await self.db.write(fn)
        self.sizes.append(len(made))
        return made


@pytest.fixture
def writes(tenancy_db: Database) -> Writes:
    return Writes(tenancy_db)


def put(key: str) -> Callable[[Any], str]:
    def write(tx: Any) -> str:
        tx.add(Setting(key=key, value="x"))
        return key

    return write


async def keys(db: Database) -> set[str]:
    return await db.read(lambda tx: set(tx.scalars(select(Setting.key).where(Setting.value == "x"))))


async def test_those_that_come_meanwhile_are_written_at_once(writes: Writes) -> None:
    together = Together(writes, max_waiting=99)
    names = [f"k{number}" for number in range(2 * MOST + 1)]
    assert await asyncio.gather(*(together.run(put(name)) for name in names)) == names
    assert writes.sizes == [MOST, MOST, 1] and await keys(writes.db) == set(names)
    assert await together.run(put("later")) == "later"


async def test_one_that_fails_is_alone_with_it(writes: Writes) -> None:
    together = Together(writes, max_waiting=99)
    await together.run(put("b"))
    made = await asyncio.gather(*(together.run(put(name)) for name in "abc"), return_exceptions=True)
    assert made[0] == "a" and made[2] == "c" and isinstance(made[1], IntegrityError)
    assert await keys(writes.db) == {"a", "b", "c"}


async def test_a_database_that_is_away_is_asked_once(writes: Writes) -> None:
    writes.broken = True
    together = Together(writes, max_waiting=99)
    made = await asyncio.gather(*(together.run(put(name)) for name in "abc"), return_exceptions=True)
    assert all(isinstance(one, Unavailable) for one in made) and writes.sizes == [0]
    writes.broken = False
    assert await together.run(put("a")) == "a"


async def test_one_that_was_given_up_before_it_began_is_not_written(writes: Writes) -> None:
    writes.may_begin.clear()
    together = Together(writes, max_waiting=99)
    first = asyncio.ensure_future(together.run(put("first")))
    await asyncio.sleep(0)
    second, third = (asyncio.ensure_future(together.run(put(name))) for name in ("second", "third"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second.cancel()
    writes.may_begin.set()
    assert await first == "first" and await third == "third"
    assert second.cancelled() and await keys(writes.db) == {"first", "third"}


async def test_one_that_was_given_up_is_not_written_after_another_has_failed(writes: Writes) -> None:
    together = Together(writes, max_waiting=99)
    await together.run(put("taken"))
    writes.may_begin.clear()
    given_up, failing = (asyncio.ensure_future(together.run(put(name))) for name in ("given up", "taken"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    given_up.cancel()
    writes.may_begin.set()
    with pytest.raises(IntegrityError):
        await failing
    assert given_up.cancelled() and await keys(writes.db) == {"taken"}


async def test_only_so_many_may_wait(writes: Writes) -> None:
    writes.may_begin.clear()
    together = Together(writes, max_waiting=2)
    first = asyncio.ensure_future(together.run(put("first")))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = [asyncio.ensure_future(together.run(put(name))) for name in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="does not keep up"):
        await together.run(put("c"))
    writes.may_begin.set()
    assert await asyncio.gather(first, *waiting) == ["first", "a", "b"]
