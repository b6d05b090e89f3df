"""Waiting for a condition, with a deadline, in place of sleeping and hoping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

__all__ = ["eventually", "until"]


def until(condition: Callable[[], T | None], what: str, *, timeout: float = 30.0, interval: float = 0.02) -> T:
    """The first true value of `condition`; fails after `timeout` seconds, saying what was awaited."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what} (last value: {value!r})")
        time.sleep(interval)


async def eventually(
    condition: Callable[[], object | Awaitable[object]], what: str, *, timeout: float = 30.0, interval: float = 0.02
) -> None:
    """Wait on an event loop for a condition, which may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        value = await found if isinstance(found, Awaitable) else found
        if value:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what}")
        await asyncio.sleep(interval)
