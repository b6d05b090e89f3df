"""Writes ready-made websocket frames to tornado's stream, and learns what the client has taken.

One system call a batch in place of one a message. This is the only place that reaches past tornado's public
`write_message`; what it relies on (`WebSocketHandler.ws_connection.stream` is an IOStream, whose `write` keeps the
order and answers with a future that is done when all up to there was handed to the operating system) is pinned
by tests/unit/test_web_framewriter.py.

That bytes were handed to the operating system does not mean that the client has them: when this process is killed,
a client that has not read them yet may lose them (tornado's client throws its read buffer away when the connection
ends). So every so often a ping is put between the messages; its pong (RFC 6455, section 5.5.3) says that the client
has taken everything before it. No more than `Window` is on its way at a time: that much may come twice after a kill.

Whether a client lives is told by what moves, and not by whether a pong comes in time: a pong stands in line behind a
large message, which may take minutes.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tornado.iostream import IOStream, StreamClosedError
from tornado.websocket import WebSocketHandler

__all__ = ["ONE_BATCH", "FrameWriter", "Window"]

PING_MESSAGES = 256
PING_BYTES = 128 * 1024
PING_SECONDS = 0.02
PATIENCE_SECONDS = 5.0
"""A client that has answered no ping for this long does not answer pings."""

ANSWER_SECONDS = 5.0
"""How long a client may take to say that it is there."""

CHUNK_BYTES = 2**20
"""In pieces of this size a large message is handed over, so that it can be seen to move."""
UNSEEN_BYTES = 16 * 2**20
"""What the buffers on the way to a client (the system's, those of proxies, its own) hold at most."""
SLOWEST_BYTES = 64 * 2**10
"""In a second: so fast those buffers empty at least, which nobody here can see."""

LOG = logging.getLogger("hub_gateway.web")
_MARK = b"hgw"
_PING = struct.Struct("!BB3sQ")
_PONG = struct.Struct("!3sQ")


@dataclass(frozen=True)
class Window:
    """How much may be on its way to a client without its having said that it is there."""

    messages: int
    bytes: int


ONE_BATCH = Window(512, 2 * 2**20)
"""For clients that cannot name the last number they saw: one batch of the link, or two large messages."""


@dataclass
class _Group:
    """What one pong stands for."""

    number: int
    seq: int | None = None
    messages: int = 0
    bytes: int = 0
    written: asyncio.Future[None] | None = None
    """Done when its ping was handed to the operating system: no honest pong comes before that."""


class FrameWriter:
    """The sending side of one open websocket. `on_flushed(seq)` says that the client has everything up to `seq`.

    A websocket that gives no sign of life for `silence` seconds is closed (0: never). Signs are what comes from the
    client (`alive`), and that it takes what is sent. While something is on its way to it, for which no pong has
    come yet, there is more time: as much as it takes at `SLOWEST_BYTES` a second.
    """

    def __init__(self, handler: WebSocketHandler, window: Window = ONE_BATCH, silence: float = 0.0) -> None:
        connection = handler.ws_connection
        assert connection is not None, "the websocket is not open"
        stream = connection.stream
        assert isinstance(stream, IOStream)
        self._stream = stream
        self._window = window
        self.on_flushed: Callable[[int], None] | None = None
        self.backlog = 0
        """Bytes accepted and not yet written."""
        self._queue: deque[tuple[bytes, int | None, int]] = deque()
        self._newest = 0
        self._group = _Group(1)
        self._flying: deque[_Group] = deque()
        self._messages = 0
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._answers = False
        self._silent = False
        self._confirm = False
        self._answered: asyncio.Future[None] | None = None
        self._silence = silence
        self.held_up = False
        """Whether it is us who do not read what it sends."""
        self._watch: asyncio.TimerHandle | None = None
        self.alive()
        if silence:
            self._watch = asyncio.get_running_loop().call_later(silence, self._look)

    def alive(self) -> None:
        """A sign of life of the client."""
        self._sign = asyncio.get_running_loop().time()

    def _look(self) -> None:
        """Close a websocket whose client is gone; or look again, when it may be."""
        loop = asyncio.get_running_loop()
        due = self._sign + self._silence + min(self._bytes, UNSEEN_BYTES) / SLOWEST_BYTES
        if self._stream.closed():
            return
        if self.held_up:
            due = loop.time() + self._silence
        if loop.time() < due:
            self._watch = loop.call_at(due, self._look)
            return
        LOG.info("A websocket gave no sign of life for %.0f s and is closed", loop.time() - self._sign)
        self._stream.close()

    def write(self, data: bytes, seq: int | None) -> None:
        """Send complete frames; does nothing on a closed websocket (its `on_close` says so to everybody)."""
        if self._stream.closed():
            return
        count = 0 if seq is None else max(1, seq - self._newest) if self._newest else 1
        if seq is not None:
            self._newest = seq
        if self._queue or not self._fits(len(data), count):
            self._queue.append((data, seq, count))
            self.backlog += len(data)
            self._ping()
        else:
            self._send(data, seq, count)

    def confirm(self) -> None:
        """Ask the client at once whether it has what was written so far, and not only when more is together."""
        self._confirm = bool(self._queue)
        self._ping()

    async def answers(self) -> bool:
        """Whether the client answers a ping, or anything, within `ANSWER_SECONDS`."""
        if self._stream.closed():
            return False
        answered = self._answered = self._answered or asyncio.get_running_loop().create_future()
        self._write(_PING.pack(0x89, _PONG.size, _MARK, 0))  # no group has this number
        done, _ = await asyncio.wait({answered}, timeout=ANSWER_SECONDS)
        return bool(done) and not self._stream.closed()

    def _fits(self, size: int, count: int) -> bool:
        if self._messages == 0:
            return True
        return self._messages + count <= self._window.messages and self._bytes + size <= self._window.bytes

    def _send(self, data: bytes, seq: int | None, count: int) -> None:
        group = self._group
        group.messages += count
        group.bytes += len(data)
        group.seq = group.seq if seq is None else seq
        self._messages += count
        self._bytes += len(data)
        self._write(data)
        if group.messages >= PING_MESSAGES or group.bytes >= PING_BYTES:
            self._ping()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PING_SECONDS, self._ping)

    def _write(self, data: bytes) -> asyncio.Future[None] | None:
        future = None
        try:
            if len(data) <= CHUNK_BYTES:
                future = self._stream.write(data)
                future.add_done_callback(self._moved)
                return future
            view = memoryview(data)
            for start in range(0, len(data), CHUNK_BYTES):
                future = self._stream.write(view[start : start + CHUNK_BYTES])
                future.add_done_callback(self._moved)
        except StreamClosedError:
            return None
        return future

    def _moved(self, future: asyncio.Future[None]) -> None:
        """A write that failed is a closed websocket, of which everybody hears by `on_close`."""
        if not future.cancelled() and future.exception() is None:
            self.alive()

    def _ping(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        group = self._group
        if not group.bytes or self._stream.closed():
            return
        self._group = _Group(group.number + 1)
        self._flying.append(group)
        group.written = self._write(_PING.pack(0x89, _PONG.size, _MARK, group.number))
        if self._silent:
            if group.written is not None:
                group.written.add_done_callback(partial(self._handed_over, group.number))
        elif not self._answers and self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._give_up_pongs)

    def pong(self, data: bytes) -> None:
        """A pong of the client: ours, or somebody else's, which says no more than that it lives."""
        self.alive()
        if self._answered is not None:
            self._answered.set_result(None)
            self._answered = None
        if len(data) == _PONG.size and data.startswith(_MARK):
            self._answers, self._silent = True, False
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
            self._arrived(_PONG.unpack(data)[1])

    def _handed_over(self, number: int, written: asyncio.Future[None]) -> None:
        if not written.cancelled() and written.exception() is None:
            self._arrived(number)

    def _arrived(self, number: int) -> None:
        seq = None
        while self._flying and self._flying[0].number <= number:
            written = self._flying[0].written
            if written is None or not written.done():
                break
            group = self._flying.popleft()
            self._messages -= group.messages
            self._bytes -= group.bytes
            seq = seq if group.seq is None else group.seq
        if seq is not None and self.on_flushed is not None:
            # Before anything else is sent: what is not yet reported comes again after a kill, on top of the window.
            self.on_flushed(seq)
        while self._queue and self._fits(len(self._queue[0][0]), self._queue[0][2]):
            data, queued, count = self._queue.popleft()
            self.backlog -= len(data)
            self._send(data, queued, count)
        if self._queue or self._confirm:
            self._confirm = self._confirm and bool(self._queue)
            self._ping()

    def _give_up_pongs(self) -> None:
        """A client that reads and never answers a ping breaks the standard; it is served as well as can be.

        For it, what was handed to the operating system counts as arrived.
        """
        self._patience = None
        if self._stream.closed() or self._answers:
            return
        if self._stream.writing():
            # It does not read at all: slow, not silent.
            self._patience = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._give_up_pongs)
            return
        self._silent = True
        if self._flying:
            self._arrived(self._flying[-1].number)

    def close(self) -> None:
        """The websocket is closed."""
        for timer in (self._timer, self._patience, self._watch):
            if timer is not None:
                timer.cancel()
        self._queue.clear()
        self.backlog = 0
