"""The client's side of a relay: what a websocket offers, and what a relay keeps of each."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from typing import Protocol

from hub_gateway.link.wire import Dialect, Notes

__all__ = ["Client", "Delivery", "Notice", "Sink", "Standby", "mark_of", "number_of"]

_SEQ = 2**40 - 1
_MARKS = 2**19 - 1
"""With the 40 bits of a number these are 59: 18 decimal digits, what `last_seq` may have."""


def mark_of(public_key: str) -> int:
    """What is added to an agent's numbers on their way to a client, so that they are told from another agent's.

    An agent has a key pair of its own and numbers from 1. To a client the sum is opaque.
    """
    digest = int.from_bytes(hashlib.sha256(public_key.encode()).digest()[:8], "big")
    return (1 + digest % _MARKS) * (_SEQ + 1)


class Sink(Protocol):
    """One client's websocket, as the relay sees it. Numbers are those of the agent with its mark (`mark_of`).

    `session` is the client's session id, `after` the last number that the client says it saw (None: go by what
    was recorded), `keep` whether its place is kept when it goes away; `arrived` grows from one request for a websocket
    to the next. The relay sets `on_flushed`, and `heard` when a message came.
    """

    session: str
    arrived: int
    heard: bool
    keep: bool
    after: int | None
    dialect: Dialect
    on_flushed: Callable[[int], None] | None
    """To be called with the highest `seq` up to which the client has everything that was written."""

    def write(self, data: bytes, seq: int | None) -> None:
        """Send complete websocket frames; `seq` is the last number in them, None for our own. Never raises."""

    def confirm(self) -> None:
        """Find out at once whether the client has what was written, to call `on_flushed`."""

    def dismiss(self) -> None:
        """Close the websocket: its session is served at another one."""

    async def answers(self) -> bool:
        """Whether the client is still there: it answers within some seconds."""

    @property
    def backlog(self) -> int:
        """Bytes accepted by `write` that still wait in this process."""


class Standby:
    """Open websockets of sessions that are served at another one."""

    def __init__(self) -> None:
        self._sinks: dict[bytes, list[Sink]] = {}

    def add(self, sink: Sink) -> None:
        """Keep it until it is removed, or wanted."""
        self._sinks.setdefault(_key(sink), []).append(sink)

    def remove(self, sink: Sink) -> bool:
        """Forget it; whether it was here."""
        sinks = self._sinks.get(_key(sink), [])
        if sink not in sinks:
            return False
        sinks.remove(sink)
        if not sinks:
            del self._sinks[_key(sink)]
        return True

    def youngest(self, key: bytes) -> Sink | None:
        """Take out the one of a session that arrived last."""
        found = max(self._sinks.get(key, []), key=lambda sink: sink.arrived, default=None)
        if found is not None:
            self.remove(found)
        return found


def _key(sink: Sink) -> bytes:
    return sink.session.encode("utf-8", "replace")


class Delivery(enum.Enum):
    """Where a client is in the life of its attachment to the agent."""

    WAITING = "waiting"  # the link is not there yet, or gone
    ASKED = "asked"  # attach was sent; what still comes belongs to an earlier attachment
    REPLAY = "replay"  # gets what is addressed to it
    LIVE = "live"  # gets everything
    PAUSED = "paused"  # too slow: waits for its websocket to drain
    MOVED = "moved"  # its session is served by another replica: this websocket is a remnant


class Notice:
    """A sentence for every notebook; `on_shown` is called when the first of them gets to show it."""

    __slots__ = ("_on_shown", "shown", "text")

    def __init__(self, text: str, on_shown: Callable[[], None] | None = None) -> None:
        self.text = text
        self.shown = False
        self._on_shown = on_shown

    def show(self) -> str:
        """What a notebook is to show, which it does now."""
        if not self.shown and self._on_shown is not None:
            self._on_shown()
        self.shown = True
        return self.text


class Client:
    """A relay's record of one sink."""

    __slots__ = (
        *("acked", "attachment", "cell", "delivered", "key", "noted", "notes", "notices", "served", "sink", "state"),
    )

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.key = _key(sink)
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
        self.notices: list[Notice] = []

    def after(self, mark: int) -> int | None:
        """From where it is to be served: what it got from us counts for more than what it said at the start.

        What it said of another agent's numbers counts for nothing.
        """
        if self.delivered is not None:
            return self.delivered
        return None if self.sink.after is None else number_of(self.sink.after, mark)

    def begin_anew(self) -> None:
        """Another agent, with numbers of its own, will serve it."""
        self.delivered = None
        self.served = self.acked = 0


def number_of(marked: int, mark: int) -> int | None:
    """The agent's own number, or None for one with another mark."""
    return marked & _SEQ if marked & ~_SEQ == mark else None
