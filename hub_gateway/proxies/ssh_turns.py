"""Whose turn it is: how many calls of one user a host carries out at once, those that hang there included.

A login shell, PAM or a home directory can hang for one user alone. Whoever has too much under way waits for their own
calls, and for nobody else's; who has nothing under way but what hangs is told so at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field
from typing import Any

from hub_gateway.proxies.ssh_connect import Problem, SshError

__all__ = ["Line", "Turns"]


@dataclass
class Line:
    """The calls of one user on one host."""

    inside: int = 0
    """Who waits, was woken just now, or runs: as long as there is anybody, the line is the one that all go by."""
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    hanging: list[Any] = field(default_factory=list)
    """Channels of calls that were given up. They count until the host says that the command has ended."""

    def full(self, at_once: int) -> bool:
        """Whether no further call may begin."""
        self.hanging = [channel for channel in self.hanging if not channel.closed and not channel.exit_status_ready()]
        return self.running + len(self.hanging) >= at_once

    def wake(self) -> None:
        """Have all that wait look again, in their order: any of them may have been cancelled meanwhile."""
        while self.waiting:
            one = self.waiting.popleft()
            if not one.done():
                one.set_result(None)


class Turns:
    """The lines, by whatever tells them apart. Used on the event loop."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, Line] = {}
        self._closed = False

    def close(self) -> None:
        """Let nobody begin any more."""
        self._closed = True
        for line in self._lines.values():
            line.wake()

    @contextlib.asynccontextmanager
    async def take(self, key: Hashable, at_once: int) -> AsyncIterator[Line]:
        """Wait for one's turn, and have it. Raises `SshError` where nothing but what hangs would be waited for."""
        line = self._lines.setdefault(key, Line())
        line.inside += 1
        try:
            while not self._closed and line.full(at_once):
                if not line.running:
                    raise SshError(Problem.BUSY, f"{at_once} earlier calls for the same user hang there")
                turn = asyncio.get_running_loop().create_future()
                line.waiting.append(turn)
                await turn
            if self._closed:
                raise SshError(Problem.UNREACHABLE, "the gateway is ending")
            line.running += 1
            try:
                yield line
            finally:
                line.running -= 1
                line.wake()
        finally:
            line.inside -= 1
            if not line.inside and not line.full(1) and self._lines.get(key) is line:
                del self._lines[key]
