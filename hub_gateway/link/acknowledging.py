"""When the agent is told what was worked off: at once where much was, a little later where it was little."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Acknowledging"]

ACK_MESSAGES = 32
ACK_BYTES = 64 * 2**10
ACK_SECONDS = 0.01


class Acknowledging:
    """Calls `acknowledge` once for what was worked off meanwhile; `due` until `sent` is called."""

    def __init__(self, acknowledge: Callable[[], None]) -> None:
        self._acknowledge = acknowledge
        self._handle: asyncio.Handle | None = None
        self._soon = False
        self._messages = self._bytes = 0

    @property
    def scheduled(self) -> bool:
        """Whether `acknowledge` is going to be called."""
        return self._handle is not None

    @property
    def due(self) -> bool:
        """Whether anything was worked off that the agent does not know of."""
        return self._bytes > 0

    def add(self, count: int, size: int) -> None:
        """Messages, and their bytes, were worked off."""
        self._messages += count
        self._bytes += size
        self.later()

    def later(self) -> None:
        """At the end of this turn of the loop, or, for a few messages only, a little later."""
        urgent = self._messages >= ACK_MESSAGES or self._bytes >= ACK_BYTES
        if self._handle is not None:
            if not urgent or self._soon:
                return
            self._handle.cancel()
        loop = asyncio.get_running_loop()
        self._soon = urgent
        self._handle = loop.call_soon(self._acknowledge) if urgent else loop.call_later(ACK_SECONDS, self._acknowledge)

    def cancel(self) -> None:
        """It is done now, or there is nobody to tell."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def sent(self) -> None:
        """The agent knows."""
        self._messages = self._bytes = 0
