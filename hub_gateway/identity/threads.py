"""Threads for calls that may block for long: name services, files on a network, Kerberos libraries."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from hub_gateway.deadlines import within
from hub_gateway.errors import Unavailable

__all__ = ["BlockingCalls"]

T = TypeVar("T")


class BlockingCalls:
    """Runs blocking calls, at most `limit` at once, and waits `timeout` seconds for each, turn included.

    A thread that hangs cannot be ended; it holds its place until it comes back, and does not keep the process from
    ending. `what` is the subject of the sentence that a user reads: "The directory of unix users".
    """

    def __init__(self, what: str, *, limit: int = 4, timeout: float = 10.0) -> None:
        self.what = what
        self.timeout = timeout
        self._limit = limit
        self._turns: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """The result of `call`. Raises what it raises, and `Unavailable` where it takes too long."""
        loop = asyncio.get_running_loop()
        if self._turns is None or self._loop is not loop:
            self._turns, self._loop = asyncio.Semaphore(self._limit), loop
        turns, result = self._turns, loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            turns.release()
            if not result.done():
                if error is None:
                    result.set_result(value)
                else:
                    result.set_exception(error)

        def work() -> None:
            value: T | None = None
            failed: BaseException | None = None
            try:
                value = call()
            except BaseException as error:  # noqa: BLE001 (it is raised where the result is awaited)
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                loop.call_soon_threadsafe(settle, value, failed)

        async def in_turn() -> T:
            await turns.acquire()
            try:
                threading.Thread(target=work, name="identity", daemon=True).start()
            except BaseException:
                turns.release()
                raise
            found: T = await result
            return found

        try:
            return await within(in_turn(), self.timeout)
        except asyncio.TimeoutError as error:
            raise Unavailable(
                f"{self.what} cannot be asked at the moment (no answer within {self.timeout:g} seconds); "
                "try again in a minute."
            ) from error
