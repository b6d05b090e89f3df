"""What one user's clients may have this process hold: websockets, and messages that are still coming in."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tornado.websocket import WebSocketProtocol13

from hub_gateway.errors import TooManyRequests

if TYPE_CHECKING:
    from hub_gateway.services import WebSettings

__all__ = ["BoundedProtocol", "Incoming", "Room"]

SMALL_BYTES = 64 * 2**10
"""Frames up to this size are not counted: how many of them there can be is limited by the number of websockets."""


@dataclass
class _Use:
    """What one user's clients hold."""

    sockets: int = 0
    bytes: int = 0
    waiting: deque[tuple[int, asyncio.Future[None]]] = field(default_factory=deque)


class Incoming:
    """The limits of one process, as `WebSettings` has them."""

    def __init__(self, web: WebSettings) -> None:
        self.web = web
        self.limit = max(web.incoming_bytes_per_user, web.max_message_bytes)
        self._users: dict[str, _Use] = {}
        self._kernels: Counter[str] = Counter()

    @contextmanager
    def websocket(self, user: str, kernel_id: str) -> Iterator[None]:
        """Around the life of a websocket. Raises `TooManyRequests` where there are enough."""
        use = self._users.setdefault(user, _Use())
        of_user, of_kernel = self.web.websockets_per_user, self.web.websockets_per_kernel
        if use.sockets >= of_user or self._kernels[kernel_id] >= of_kernel:
            what = f"You have {of_user}" if use.sockets >= of_user else f"This kernel has {of_kernel}"
            raise TooManyRequests(
                f"{what} websockets open, which is the limit. Close notebooks that you do not need, then try again."
            )
        use.sockets += 1
        self._kernels[kernel_id] += 1
        try:
            yield
        finally:
            use.sockets -= 1
            self._kernels[kernel_id] -= 1
            if not self._kernels[kernel_id]:
                del self._kernels[kernel_id]
            if not use.sockets:
                self._users.pop(user, None)

    def take(self, user: str, size: int) -> bool:
        """Take room for `size` bytes that are about to come; False where there is none."""
        use = self._users.setdefault(user, _Use())
        if use.waiting or use.bytes + size > self.limit:
            return False
        use.bytes += size
        return True

    async def wait(self, user: str, size: int) -> None:
        """Take room when there is some, in turn."""
        use = self._users.setdefault(user, _Use())
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        use.waiting.append((size, turn))
        await turn

    def give(self, user: str, size: int) -> None:
        """Give room back."""
        use = self._users.get(user)
        if use is None:
            return
        use.bytes -= size
        while use.waiting:
            wanted, turn = use.waiting[0]
            if not turn.done() and use.bytes + wanted > self.limit:
                return
            use.waiting.popleft()
            if not turn.done():
                use.bytes += wanted
                turn.set_result(None)


class Room:
    """What one websocket holds of its user's room."""

    def __init__(self, incoming: Incoming, user: str) -> None:
        self._incoming = incoming
        self._user = user
        self.held = 0

    async def take(self, size: int) -> bool:
        """Room for more; False for a message in fragments for which there is none.

        Those that wait for each other's end would wait for ever.
        """
        if not self._incoming.take(self._user, size):
            if self.held:
                return False
            await self._incoming.wait(self._user, size)
        self.held += size
        return True

    def give(self) -> None:
        """Give all of it back."""
        held, self.held = self.held, 0
        if held:
            self._incoming.give(self._user, held)


class BoundedProtocol(WebSocketProtocol13):
    """tornado's, which reads a large frame only when its user has room for it.

    What it relies on (`_read_bytes` reads everything, `_receive_frame` one frame, and `_fragmented_message_buffer` is
    None between messages) is pinned by tests/unit/test_web_incoming.py. `on_progress(moving)` is told of every piece
    that comes, and with False that it has to wait.
    """

    def __init__(self, handler: Any, params: Any, room: Room, on_progress: Callable[[bool], None]) -> None:
        super().__init__(handler, False, params)
        self._room = room
        self._on_progress = on_progress

    async def _read_bytes(self, n: int) -> bytes:
        if n <= SMALL_BYTES and self._fragmented_message_buffer is None:
            return await super()._read_bytes(n)
        self._on_progress(False)
        try:
            if not await self._room.take(n):
                self.close(1013, "too much on its way")
                self._abort()
        finally:
            self._on_progress(True)
        data = bytearray()
        while len(data) < n:
            data += await self.stream.read_bytes(n - len(data), partial=True)
            self._on_progress(True)
        self._wire_bytes_in += n
        return bytes(data)

    async def _receive_frame(self) -> None:
        await super()._receive_frame()
        if self._fragmented_message_buffer is None:
            self._room.give()
