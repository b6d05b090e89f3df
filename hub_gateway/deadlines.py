"""Waiting no longer than a given time, and ending what waits, so that neither can hang."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

__all__ = ["end", "within"]

T = TypeVar("T")
AGAIN_SECONDS = 1.0


async def within(call: Awaitable[T], seconds: float) -> T:
    """What `call` returns, within so many seconds. Raises `asyncio.TimeoutError` once it is cancelled and has ended.

    Before Python 3.12 `asyncio.wait_for` swallows a cancellation that comes at the moment when `call` is done
    (python/cpython#86296): a loop that uses it then goes on for ever, and whoever ends it waits as long.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        over = not task.done()
        if over:
            task.cancel()
            await asyncio.wait({task})
    if over and task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel loops and wait for their end; one that something in it kept from hearing of that is told again."""
    all_of_them = pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    await asyncio.gather(*all_of_them, return_exceptions=True)
