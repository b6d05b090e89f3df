"""For single-user servers: the kernel websocket to the gateway, without the limits of jupyter_server's own class.

    jupyter lab --ServerApp.kernel_websocket_connection_class=hub_gateway.companion.NumberedGatewayConnection

jupyter_server's `GatewayWebSocketConnection` speaks the old JSON form only, loses its reader to the first binary
message (a widget with buffers), takes no message over 10 MiB, drops what is sent while it reconnects, gives up
after five attempts without telling anybody, and leaves Nagle's algorithm on, which costs 40 ms a cell. This class
passes v1 messages through as they are, counts them, and on reconnecting names the last number that it has passed on, so
that nothing is lost and nothing comes twice.

It needs jupyter_server and tornado, and nothing else of this package.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Any
from urllib.parse import quote, urlencode

from jupyter_server.gateway.connections import GatewayWebSocketConnection
from jupyter_server.gateway.gateway_client import GatewayClient
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, WebSocketError, websocket_connect
from traitlets import Float, Integer, Unicode

__all__ = ["NumberedGatewayConnection"]

NUMBERED_SUBPROTOCOL = "numbered.v1.kernel.websocket.hub-gateway"
V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
NUMBER_BYTES = 8
FIRST_PAUSE = 0.2
MAX_PAUSE = 5.0
STEADY_SECONDS = 1.0


class NumberedGatewayConnection(GatewayWebSocketConnection):
    """One browser websocket and its counterpart at the gateway, which may come and go."""

    kernel_ws_protocol = Unicode(
        None, allow_none=True, config=True, help="The form spoken with the browser: None is v1 where it offers that."
    )
    max_message_bytes = Integer(
        512 * 2**20, config=True, help="Largest message (bytes) that is taken from the gateway."
    )
    give_up_seconds = Float(
        600.0,
        config=True,
        help="After how long (seconds) without the gateway the browser is told, by closing its websocket.",
    )
    queue_bytes = Integer(
        16 * 2**20, config=True, help="How much (bytes) from the browser is kept while the gateway is away."
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._last: int | None = None
        self._queue: deque[str | bytes] = deque()
        self._queued = 0
        self._task: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Connect in the background, and stay connected."""
        self.websocket_handler.set_nodelay(True)
        self._task = asyncio.ensure_future(self._run())

    def disconnect(self) -> None:  # type: ignore[override]  # as in the class above; its base has it async
        """The browser has left."""
        self.disconnected = True
        if self._task is not None:
            self._task.cancel()
        if self.ws is not None:
            self.ws.close()

    def handle_incoming_message(self, message: str | bytes) -> None:
        """A message of the browser; kept while there is no gateway to take it."""
        if self.ws is not None and not self._queue:
            try:
                self._send(self.ws, message)
                return
            except WebSocketClosedError:
                self.log.debug("The gateway's websocket is closed; the message waits for the next one")
        if self._queued + len(message) > self.queue_bytes:
            self.log.error("Kernel %s: too much waits for the gateway; the browser is disconnected", self.kernel_id)
            self.websocket_handler.close(1013, "The gateway is away")
            return
        self._queue.append(message)
        self._queued += len(message)

    @staticmethod
    def _send(ws: WebSocketClientConnection, message: str | bytes) -> None:
        ws.write_message(message, binary=isinstance(message, bytes))

    @property
    def _v1(self) -> bool:
        return bool(self.websocket_handler.selected_subprotocol == V1_SUBPROTOCOL)

    def _request(self) -> HTTPRequest:
        client = GatewayClient.instance()
        query = {"session_id": self.session_id or ""}
        if self._last is not None:
            query["last_seq"] = str(self._last)
        url = f"{client.ws_url}{client.kernels_endpoint}/{quote(self.kernel_id)}/channels?{urlencode(query)}"
        arguments = client.load_connection_args()
        # The gateway takes tornado's own name for the stock class, which it has to handle with care.
        arguments.setdefault("headers", {})["User-Agent"] = "hub-gateway-companion"
        return HTTPRequest(url, **arguments)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        since, pause = loop.time(), FIRST_PAUSE
        while not self.disconnected:
            try:
                ws = await self._connected()
            except (OSError, HTTPClientError, WebSocketError) as error:
                if isinstance(error, HTTPClientError) and error.code == 404:
                    self.log.warning("Kernel %s is gone", self.kernel_id)
                    self.websocket_handler.close(1001, "The kernel is gone")
                    return
                if loop.time() - since > self.give_up_seconds:
                    self.log.error("No gateway for %.0f s: %s", self.give_up_seconds, error)
                    self.websocket_handler.close(1013, "The gateway is away")
                    return
                self.log.warning("No gateway for kernel %s yet: %s", self.kernel_id, error)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311  # nothing secret about it
                pause = min(2 * pause, MAX_PAUSE)
                continue
            self.ws = ws
            opened = loop.time()
            try:
                self._send_queued(ws)
                await self._pass_on(ws)
            except WebSocketClosedError:
                self.log.debug("The browser's or the gateway's websocket closed")
            finally:
                self.ws = None
                ws.close()
            since = loop.time()
            if since - opened > STEADY_SECONDS:
                pause = FIRST_PAUSE
            else:
                # A gateway that takes websockets only to close them is not to be asked without a pause.
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)

    async def _connected(self) -> WebSocketClientConnection:
        """A new websocket to the gateway; one that comes when nobody waits for it any more is closed."""
        connecting = asyncio.ensure_future(
            websocket_connect(
                self._request(),
                max_message_size=self.max_message_bytes,
                subprotocols=[NUMBERED_SUBPROTOCOL] if self._v1 else None,
            )
        )
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_late)
            raise

    def _send_queued(self, ws: WebSocketClientConnection) -> None:
        while self._queue:
            self._send(ws, self._queue[0])
            self._queued -= len(self._queue.popleft())

    async def _pass_on(self, ws: WebSocketClientConnection) -> None:
        """Pass on messages to the browser until the gateway's websocket closes."""
        numbered = ws.selected_subprotocol == NUMBERED_SUBPROTOCOL
        write = self.websocket_handler.write_message
        while True:
            message = await ws.read_message()
            if message is None:
                return
            if numbered:
                assert isinstance(message, bytes)
                written = write(message[NUMBER_BYTES:], binary=True)
                self._last = int.from_bytes(message[:NUMBER_BYTES], "little") or self._last
            else:
                written = write(message, binary=isinstance(message, bytes))
            if not written.done():
                await written


def _close_late(connecting: asyncio.Future[WebSocketClientConnection]) -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
