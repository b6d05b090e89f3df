"""The kernel websocket: `/api/kernels/<id>/channels`."""

from __future__ import annotations

import itertools
import logging
import time
import uuid

from tornado.websocket import WebSocketHandler, WebSocketProtocol

from hub_gateway.errors import BadRequest, GatewayError
from hub_gateway.link import Dialect, KernelRelay, decode
from hub_gateway.link import messages as notices
from hub_gateway.link.codec import CHANNELS
from hub_gateway.link.wire import V1_SUBPROTOCOL, ClientMessage, OverLimit, encode
from hub_gateway.metrics import METRICS
from hub_gateway.web.base import APIHandler, of_notebook_server
from hub_gateway.web.framewriter import ONE_BATCH, FrameWriter, Window
from hub_gateway.web.incoming import BoundedProtocol, Incoming, Room

__all__ = ["NUMBERED_SUBPROTOCOL", "ChannelsHandler"]

LOG = logging.getLogger("hub_gateway.web")
NUMBERED_SUBPROTOCOL = "numbered.v1.kernel.websocket.hub-gateway"
"""v1 with each message's number before it (`<Q`); what the companion class for single-user servers speaks."""

_DIALECTS = {NUMBERED_SUBPROTOCOL: Dialect.NUMBERED, V1_SUBPROTOCOL: Dialect.V1}
NUMBERED_WINDOW = Window(16_384, 4 * 2**20)
_IOPUB = CHANNELS.index(b"iopub")
_ARRIVALS = itertools.count()
_MAX_SESSION = 200
_NOTICE_SECONDS = 10.0


class ClientSink(FrameWriter):
    """One websocket as the relay sees it (`hub_gateway.link.Sink`)."""

    def __init__(
        self,
        handler: WebSocketHandler,
        *,
        session: str,
        arrived: int,
        keep: bool,
        after: int | None,
        dialect: Dialect,
        silence: float = 0.0,
    ) -> None:
        # A client that names the last number it saw gets nothing twice, however much was on its way.
        super().__init__(handler, NUMBERED_WINDOW if dialect is Dialect.NUMBERED else ONE_BATCH, silence)
        self._handler = handler
        self.session = session
        self.arrived = arrived
        self.heard = False
        self.keep = keep
        self.after = after
        self.dialect = dialect

    def dismiss(self) -> None:
        """Close the websocket: its session is served at another one."""
        self._handler.close(1000, "this session has another websocket")


class ChannelsHandler(APIHandler, WebSocketHandler):
    """One client of one kernel. It opens at once, whatever state the kernel is in.

    Only a token opens it: a page in a browser that merely has cookies cannot.
    """

    relay: KernelRelay
    arrived: int
    sink: ClientSink | None = None
    room: Room
    refused = 0
    told = float("-inf")

    async def enter(self) -> None:
        """Find the caller's kernel before the handshake: what is not theirs answers 404, and nothing opens."""
        self.arrived = next(_ARRIVALS)  # before anything is waited for, which may take longer for the first of two
        await super().enter()
        self.relay = await self.services.kernels.relay(self.caller, self.path_args[0])

    async def get(self, *args: str) -> None:
        """The handshake. Raises `BadRequest` for a request that is none."""
        if self.request.headers.get("Upgrade", "").lower() != "websocket":
            raise BadRequest("This is the address of a kernel's websocket; open it with a websocket client.")
        incoming: Incoming = self.application.incoming  # type: ignore[attr-defined]
        self.room = Room(incoming, self.caller.name)
        try:
            with incoming.websocket(self.caller.name, self.path_args[0]):
                await super().get(*args)  # until it is closed
        finally:
            self.room.give()

    def get_websocket_protocol(self) -> WebSocketProtocol | None:
        """tornado's, with bounds on what it reads."""
        made = super().get_websocket_protocol()
        return None if made is None else BoundedProtocol(self, made.params, self.room, self._reading)  # type: ignore[attr-defined]

    def _reading(self, moving: bool) -> None:
        if self.sink is not None:
            self.sink.alive()
            self.sink.held_up = not moving

    def check_origin(self, origin: str) -> bool:
        """Any: no cookie is ever believed here, and a page cannot send somebody's token."""
        return True

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """The companion's form, else v1, else the old one."""
        for known in _DIALECTS:
            if known in subprotocols:
                return known
        return None

    def open(self, *args: str, **kwargs: str) -> None:
        """Attach to the kernel's relay."""
        self.set_nodelay(True)
        given = self.get_query_argument("session_id", "")[:_MAX_SESSION]
        seen = self.get_query_argument("last_seq", "")
        self.sink = ClientSink(
            self,
            # A client without a session of its own cannot come back to one, so nothing is kept for it.
            session=given or f"anonymous-{uuid.uuid4().hex}",
            arrived=self.arrived,
            keep=bool(given),
            after=int(seen) if seen.isdecimal() and len(seen) < 19 else None,
            dialect=self._dialect(),
            silence=2 * self.services.web.ws_ping_interval,
        )
        METRICS.websockets.inc()
        self.relay.attach(self.sink)

    def _dialect(self) -> Dialect:
        if self.selected_subprotocol is not None:
            return _DIALECTS[self.selected_subprotocol]
        # jupyter_server's own gateway client: its reader dies of the first binary frame.
        return Dialect.JSON_TEXT_ONLY if of_notebook_server(self.request) else Dialect.JSON

    def on_message(self, message: str | bytes) -> None:
        """Hand a message to the kernel; say so if it is none."""
        sink = self.sink
        assert sink is not None
        sink.alive()
        decoded = None
        try:
            decoded = decode(message, sink.dialect)
            self.relay.receive(sink, decoded.channel, decoded.parts, decoded.session)
        except OverLimit as error:
            METRICS.frames_refused.inc()
            self.refused += 1
            self._refuse(sink, str(error), error.head)
        except ValueError as error:
            METRICS.frames_refused.inc()
            self.refused += 1
            self._tell(sink, f"The gateway ignored a websocket frame that is not a Jupyter message: {error}.")
        except GatewayError as error:
            self._refuse(sink, error.message, decoded)

    def _refuse(self, sink: ClientSink, sentence: str, message: ClientMessage | None) -> None:
        """Say why a message was not passed on: to a request, as its end; or else as a line of output."""
        if message is None or not message.msg_type.endswith("_request"):
            self._tell(sink, sentence)
            return
        name, header = "GatewayError", message.parts[0]
        if message.msg_type == "execute_request":
            sink.write(encode(sink.dialect, _IOPUB, notices.error(name, sentence, [sentence], header)), None)
        reply = notices.reply(message.msg_type, name, sentence, [sentence], header)
        sink.write(encode(sink.dialect, CHANNELS.index(message.channel.encode()), reply), None)
        sink.write(encode(sink.dialect, _IOPUB, notices.status("idle", header)), None)

    def _tell(self, sink: ClientSink, sentence: str) -> None:
        """A line on stderr of the kernel's output, now and then at most."""
        now = time.monotonic()
        if now - self.told < _NOTICE_SECONDS:
            return
        self.told = now
        LOG.info("%s (%d so far)", sentence, self.refused, extra={"kernel_id": self.relay.kernel_id})
        sink.write(encode(sink.dialect, _IOPUB, notices.stream(f"{sentence}\n")), None)

    def on_pong(self, data: bytes) -> None:
        """The client has everything before the ping that this answers."""
        if self.sink is not None:
            self.sink.pong(data)

    def on_close(self) -> None:
        """Leave the relay; what comes from now on waits at the agent."""
        if self.sink is not None:
            METRICS.websockets.dec()
            self.relay.detach(self.sink)
            self.sink.close()
