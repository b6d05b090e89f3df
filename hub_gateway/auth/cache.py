"""A bounded cache of look-ups, each of which is made once however many ask at the same time."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["LookupCache"]

V = TypeVar("V")


class LookupCache(Generic[V]):
    """At most `size` answers, the least recently used given up first.

    `lifetime(value)` says for how many seconds an answer holds.
    """

    def __init__(self, size: int, lifetime: Callable[[V], float], clock: Callable[[], float] = time.monotonic) -> None:
        self.size = size
        self._lifetime = lifetime
        self._clock = clock
        self._entries: OrderedDict[str, tuple[float, V]] = OrderedDict()
        self._asking: dict[str, asyncio.Task[V]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self, key: str) -> tuple[float, V] | None:
        """(age in seconds, answer), however old."""
        found = self._entries.get(key)
        return None if found is None else (self._clock() - found[0], found[1])

    def fresh(self, key: str) -> tuple[V] | None:
        """The answer, in a tuple (it may be None), if it still holds."""
        found = self.peek(key)
        if found is None or found[0] > self._lifetime(found[1]):
            return None
        self._entries.move_to_end(key)
        return (found[1],)

    def begin(self, key: str, ask: Callable[[], Awaitable[V]]) -> asyncio.Task[V]:
        """Ask the source, unless it is being asked the same already; errors are not kept."""
        task = self._asking.get(key)
        if task is None:
            task = asyncio.ensure_future(self._ask(key, ask))
            # Also where everybody who asked has left meanwhile, an error is nobody's surprise.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._asking[key] = task
        return task

    async def ask(self, key: str, ask: Callable[[], Awaitable[V]]) -> V:
        """The answer of `begin`."""
        # One impatient caller must not take the answer from the others.
        return await asyncio.shield(self.begin(key, ask))

    async def _ask(self, key: str, ask: Callable[[], Awaitable[V]]) -> V:
        try:
            value = await ask()
            self._entries[key] = (self._clock(), value)
            self._entries.move_to_end(key)
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)
            return value
        finally:
            del self._asking[key]
