"""Calls in threads that are seen through to their end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TypeVar

__all__ = ["to_its_end"]

T = TypeVar("T")


async def to_its_end(future: asyncio.Future[T]) -> T:
    """Await what a thread does, to its end: one that is cancelled has still done what it was doing."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait({future})  # which cancels nothing, however often it is cancelled itself
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        with contextlib.suppress(Exception):
            future.result()  # nobody asks for it any more
        raise asyncio.CancelledError
    return future.result()
