"""Writes ready-made websocket frames to tornado's stream: one system call a batch, not one a message.

This is the only place that reaches past tornado's public `write_message`, which frames, masks and sends one
message at a time. What it relies on (`WebSocketHandler.ws_connection.stream` is an IOStream whose `write` returns a
future that is done once the bytes were handed to the operating system, and keeps the order) is pinned
by tests/unit/test_framewriter.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from tornado.iostream import IOStream, StreamClosedError
from tornado.websocket import WebSocketHandler

__all__ = ["FrameWriter"]


class FrameWriter:
    """The sending side of one open websocket.

    `backlog` is what was accepted and not yet handed to the operating system, in bytes. `on_flushed(seq)` is
    called when everything written with numbers up to `seq` was.
    """

    def __init__(self, handler: WebSocketHandler) -> None:
        connection = handler.ws_connection
        assert connection is not None, "the websocket is not open"
        stream = connection.stream
        assert isinstance(stream, IOStream)
        self._stream = stream
        self.backlog = 0
        self.on_flushed: Callable[[int], None] | None = None
        self._pending: deque[tuple[int, int | None]] = deque()

    def write(self, data: bytes, seq: int | None) -> None:
        """Send complete frames; does nothing on a closed websocket (its `on_close` says so to everybody)."""
        if self._stream.closed():
            return
        try:
            future = self._stream.write(data)
        except StreamClosedError:
            return
        if future.done() and not self._pending:
            if future.exception() is None:
                self._tell(seq)
            return
        self.backlog += len(data)
        self._pending.append((len(data), seq))
        future.add_done_callback(self._written)

    def _written(self, future: asyncio.Future[None]) -> None:
        # Futures of one stream are done in the order of the writes.
        size, seq = self._pending.popleft()
        self.backlog -= size
        if not future.cancelled() and future.exception() is None:
            self._tell(seq)

    def _tell(self, seq: int | None) -> None:
        if seq is not None and self.on_flushed is not None:
            self.on_flushed(seq)
