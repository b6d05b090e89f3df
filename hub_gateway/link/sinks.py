"""The client's side of a relay: what a websocket offers, and what a relay keeps of each."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol

from hub_gateway.link.wire import Dialect, Notes

__all__ = ["Client", "Delivery", "Sink"]


class Sink(Protocol):
    """One client's websocket, as the relay sees it.

    `session` is the client's session id, `after` the last number that the client says it saw (None: go by what
    was recorded), `keep` whether its place is kept when it goes away. The relay sets `on_flushed`.
    """

    session: str
    keep: bool
    after: int | None
    dialect: Dialect
    on_flushed: Callable[[int], None] | None
    """To be called with the highest `seq` up to which the client has everything that was written."""

    def write(self, data: bytes, seq: int | None) -> None:
        """Send complete websocket frames; `seq` is the last number in them, None for our own. Never raises."""

    @property
    def backlog(self) -> int:
        """Bytes accepted by `write` that still wait in this process."""


class Delivery(enum.Enum):
    """Where a client is in the life of its attachment to the agent."""

    WAITING = "waiting"  # the link is not there yet, or gone
    ASKED = "asked"  # attach was sent; what still comes belongs to an earlier attachment
    REPLAY = "replay"  # gets what is addressed to it
    LIVE = "live"  # gets everything
    PAUSED = "paused"  # too slow: waits for its websocket to drain
    MOVED = "moved"  # its session is served by another replica: this websocket is a remnant


class Client:
    """A relay's record of one sink."""

    __slots__ = (
        *("acked", "attachment", "cell", "delivered", "key", "noted", "notes", "notices", "served", "sink", "state"),
    )

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.key = sink.session.encode("utf-8", "replace")
        self.state = Delivery.WAITING
        self.attachment = 0
        self.delivered: int | None = None
        """The last number written to it; None before its first attachment."""
        self.served = 0
        """The last number that it is known to have."""
        self.acked = 0
        self.notes = Notes()
        self.noted = (False, False)
        self.cell: bytes | None = None
        """Header of the last cell that it ran."""
        self.notices: list[str] = []

    @property
    def after(self) -> int | None:
        """From where it is to be served: what it got from us counts for more than what it said at the start."""
        return self.sink.after if self.delivered is None else self.delivered
