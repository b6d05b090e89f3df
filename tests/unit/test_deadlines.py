"""A time that is over, and a cancellation, are always heard of: else a gateway that is stopped would never end."""

from __future__ import annotations

import asyncio

import pytest

from hub_gateway import deadlines
from hub_gateway.deadlines import end, within


async def test_within() -> None:
    assert await within(asyncio.sleep(0, "result"), 5) == "result"
    with pytest.raises(KeyError):
        await within(_fails(), 5)
    hung = asyncio.ensure_future(asyncio.Event().wait())
    with pytest.raises(asyncio.TimeoutError):
        await within(hung, 0.01)
    assert hung.cancelled()


async def _fails() -> None:
    raise KeyError("x")


async def test_a_cancellation_that_comes_with_the_result_is_not_lost() -> None:
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(within(answer, 5))
    await asyncio.sleep(0)
    answer.set_result(1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_loop_that_misses_a_cancellation_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "AGAIN_SECONDS", 0.01)
    missed = asyncio.Event()

    async def loop() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            missed.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(loop())
    await asyncio.sleep(0)
    await asyncio.wait_for(end([task]), 5)
    assert missed.is_set() and task.cancelled()
