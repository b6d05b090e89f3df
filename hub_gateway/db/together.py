"""Writes that come at the same time, in one transaction: for those that would wait for one lock anyway."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.engine import overloaded
from hub_gateway.errors import Unavailable

__all__ = ["Together"]

T = TypeVar("T")
Write = Callable[[Callable[[Transaction], list[Any]]], Awaitable[list[Any]]]
MOST = 8
"""How many writes make one transaction at most: who waits for the lock in another process waits for all of them."""


class Together:
    """Runs writes in the order in which they come; those that come while others are written, at once afterwards.

    They share what a transaction costs: its begin, the lock, what is read once, and the wait for the disk. Each is
    written or not by itself all the same: where one raises, nothing is written, and each is run again alone. So they
    must do nothing but talk to their transaction. For one event loop.
    """

    def __init__(self, write: Write, *, max_waiting: int) -> None:
        self._write = write
        self._max_waiting = max_waiting
        self._waiting: deque[tuple[Callable[[Transaction], Any], asyncio.Future[Any]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def run(self, fn: Callable[[Transaction], T]) -> T:
        """Have it written; what it returns. Raises what it raises, and `Unavailable`, at once where too many wait.

        One that is cancelled while others are written is not begun; else it is written all the same.
        """
        if len(self._waiting) >= self._max_waiting:
            raise overloaded()
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((fn, future))
        if self._working is None or self._working.done():
            self._working = asyncio.ensure_future(self._work())
        return cast(T, await future)

    async def _work(self) -> None:
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
            wanted = [(fn, future) for fn, future in some if not future.done()]
            if wanted:
                await self._all(wanted)

    async def _all(self, some: list[tuple[Callable[[Transaction], Any], asyncio.Future[Any]]]) -> None:
        fns = [fn for fn, _ in some]
        try:
            made = await self._write(lambda tx: [fn(tx) for fn in fns])
        except Exception as error:  # noqa: BLE001 - who waits for it hears of it
            if len(some) > 1 and not isinstance(error, Unavailable):
                for fn, future in some:
                    if not future.done():
                        await self._all([(fn, future)])
                return
            for _, future in some:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in zip(some, made, strict=True):
                if not future.done():
                    future.set_result(result)
