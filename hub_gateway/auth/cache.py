"""A bounded cache of look-ups: who asks at the same time shares one, unless theirs has to begin after they asked."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from itertools import count
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
        self._entries: OrderedDict[str, tuple[float, V, int]] = OrderedDict()
        """When each was answered, the answer, and the number of its question."""
        self._questions = count()
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
            task = asyncio.ensure_future(self.ask_anew(key, ask))
            # Also where everybody who asked has left meanwhile, an error is nobody's surprise.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            task.add_done_callback(lambda _: self._asking.pop(key))
            self._asking[key] = task
        return task

    async def ask(self, key: str, ask: Callable[[], Awaitable[V]]) -> V:
        """The answer of `begin`."""
        # One impatient caller must not take the answer from the others.
        return await asyncio.shield(self.begin(key, ask))

    async def ask_anew(self, key: str, ask: Callable[[], Awaitable[V]]) -> V:
        """An answer to a question that begins now: not to one that is under way already, and may know less.

        It is kept, unless a question that began later has been answered meanwhile.
        """
        number = next(self._questions)
        value = await ask()
        known = self._entries.get(key)
        if known is None or known[2] < number:
            self._entries[key] = (self._clock(), value, number)
            self._entries.move_to_end(key)
            while len(self._entries) > self.size:
                self._entries.popitem(last=False)
        return value
