"""The cache of look-ups."""

from __future__ import annotations

import asyncio

import pytest

from hub_gateway.auth.cache import LookupCache


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_answers_hold_for_their_lifetime() -> None:
    clock = Clock()
    cache: LookupCache[str | None] = LookupCache(10, lambda value: 1 if value is None else 30, clock)

    async def good() -> str:
        return "alice"

    async def bad() -> None:
        return None

    assert await cache.ask("a", good) == "alice" and await cache.ask("b", bad) is None
    assert cache.fresh("a") == ("alice",) and cache.fresh("b") == (None,) and cache.fresh("c") is None
    clock.now += 2
    assert cache.fresh("a") == ("alice",) and cache.fresh("b") is None
    clock.now += 30
    assert cache.fresh("a") is None and cache.peek("a") == (32, "alice")


async def test_it_is_bounded_and_keeps_what_is_used() -> None:
    cache: LookupCache[int] = LookupCache(3, lambda _: 1000)

    async def one() -> int:
        return 1

    for key in ("a", "b", "c"):
        await cache.ask(key, one)
    assert cache.fresh("a")
    await cache.ask("d", one)
    assert len(cache) == 3 and cache.fresh("a") and cache.fresh("b") is None


async def test_one_question_however_many_ask() -> None:
    cache: LookupCache[int] = LookupCache(3, lambda _: 1000)
    asked = 0
    go = asyncio.Event()

    async def slow() -> int:
        nonlocal asked
        asked += 1
        await go.wait()
        return 7

    waiting = [asyncio.ensure_future(cache.ask("a", slow)) for _ in range(40)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    go.set()
    assert await asyncio.gather(*waiting[1:]) == [7] * 39, "one who leaves takes nothing from the others"
    assert asked == 1


async def test_an_answer_that_is_asked_for_anew_is_not_an_older_one() -> None:
    """Nor is it lost where the older question is answered after it."""
    cache: LookupCache[str] = LookupCache(3, lambda _: 1000)
    go = asyncio.Event()

    async def before() -> str:
        await go.wait()
        return "may"

    async def after() -> str:
        return "may not any more"

    older = cache.begin("a", before)
    await asyncio.sleep(0)
    assert await cache.ask_anew("a", after) == "may not any more"
    go.set()
    assert await older == "may"
    assert cache.fresh("a") == ("may not any more",)


async def test_errors_are_not_kept() -> None:
    cache: LookupCache[int] = LookupCache(3, lambda _: 1000)

    async def broken() -> int:
        raise ValueError("no")

    async def works() -> int:
        return 1

    with pytest.raises(ValueError, match="no"):
        await cache.ask("a", broken)
    assert await cache.ask("a", works) == 1
