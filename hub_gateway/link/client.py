"""The gateway's end of one link: a CURVE socket to one agent."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import zmq

from hub_gateway.deadlines import within
from hub_gateway.errors import Conflict, LaunchFailed, PayloadTooLarge, Unavailable
from hub_gateway.kernels.types import Registration
from hub_gateway.link import codec
from hub_gateway.link.codec import Batch, Event, Large

__all__ = ["AgentLink", "LinkHandler"]

LOG = logging.getLogger("hub_gateway.link")
Count = Callable[[str, int], None]
MESSAGES_PER_TURN = 400
LARGE_COST = 40
"""A large message counts as this many small ones for fairness between kernels."""
MARKS = 64
"""How often in `request_bytes` the agent is asked whether it has taken what it was sent."""


class LinkHandler(Protocol):
    """What a link tells its owner. Called on the event loop, in the order of arrival."""

    def on_batch(self, batch: Batch) -> None:
        """Small messages. May raise ValueError for a malformed batch."""

    def on_large(self, message: Large) -> None:
        """One large message."""

    def on_agent_event(self, event: Event) -> None:
        """An event other than those that the link itself consumes."""

    def on_greeted(self, welcome: Mapping[str, Any]) -> None:
        """The agent knows us: at first, and again after every new connection."""

    def on_lost(self) -> None:
        """Nothing came from the agent for too long. `on_back` or `on_greeted` follows if it comes back."""

    def on_back(self) -> None:
        """Something came again, over the connection that there was."""


class AgentLink:
    """A DEALER on the event loop, drained fairly; control calls with futures; pings. Reconnects by itself.

    `count` is called with names of counters and amounts: `bad_frames`, `messages`, `bytes`, `link_errors`.
    `request_bytes` is how much of clients' requests may be on its way to an agent that has not said that it took them.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        registration: Registration,
        *,
        client_public: str,
        client_secret: str,
        replica: str,
        epoch: int,
        handler: LinkHandler,
        count: Count,
        ping_seconds: float = 10.0,
        lost_seconds: float = 30.0,
        request_bytes: int = 64 * 2**20,
    ) -> None:
        self._context = context
        self.registration = registration
        self._keys = (client_public.encode(), client_secret.encode(), registration.public_key.encode())
        self._replica = replica
        self.epoch = epoch
        self._handler = handler
        self._count = count
        self._ping_seconds = ping_seconds
        self._lost_seconds = lost_seconds
        self._socket: zmq.Socket[bytes] | None = None
        self._calls: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._idents = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._drain_handle: asyncio.Handle | None = None
        self._greeting: asyncio.Future[Mapping[str, Any]] | None = None
        self._heard = 0.0
        self._processed = 0
        self._request_bytes = request_bytes
        self._asked = 0
        """Bytes of requests in all. After it: up to the last mark, up to the last `hello`, and taken by the agent."""
        self._marked = self._helloed = self._taken = 0
        self._marks: deque[tuple[int, int]] = deque()
        """(id, bytes) of pings: what was sent before one has been taken when its pong comes."""
        self.greeted = False
        self.lost = False

    # -- life

    def open(self) -> None:
        """Connect, which goes on in the background for as long as it takes."""
        self._loop = asyncio.get_running_loop()
        public, secret, server = self._keys
        sock = self._socket = self._context.socket(zmq.DEALER)
        sock.linger = 0
        sock.rcvhwm = sock.sndhwm = 0  # what is sent is bounded in bytes, see `request`
        # Not for honest agents: they cut what is larger, or the connection would break at it again and again.
        sock.maxmsgsize = codec.MAX_MESSAGE_BYTES + 2**20
        sock.curve_publickey, sock.curve_secretkey, sock.curve_serverkey = public, secret, server
        # Tells the agent of every new connection, which it answers with `greet`.
        sock.setsockopt(zmq.PROBE_ROUTER, 1)
        sock.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 30_000)
        sock.setsockopt(zmq.HANDSHAKE_IVL, 10_000)
        sock.reconnect_ivl, sock.reconnect_ivl_max = 100, 2_000
        host = self.registration.host
        if ":" in host:
            sock.ipv6 = True
            host = f"[{host}]"
        sock.connect(f"tcp://{host}:{self.registration.port}")
        self._heard = self._loop.time()
        self._greeting = self._loop.create_future()
        self._loop.add_reader(sock.fileno(), self._drain)
        self._timer = self._loop.call_later(self._ping_seconds, self._tick)
        self._again()

    def close(self) -> None:
        """Disconnect. What was sent is not waited for; pending calls fail."""
        sock, self._socket = self._socket, None
        if sock is None:
            return
        self._loop.remove_reader(sock.fileno())
        sock.close(0)
        for handle in (self._timer, self._drain_handle):
            if handle is not None:
                handle.cancel()
        self.greeted = False
        self._fail_calls("the link to the kernel was closed")
        if self._greeting is not None and not self._greeting.done():
            self._greeting.cancel()

    def _fail_calls(self, why: str) -> None:
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done():
                future.set_exception(Unavailable(f"The kernel's agent did not answer: {why}. Try again."))

    async def wait_greeted(self, timeout: float) -> Mapping[str, Any]:
        """The agent's welcome. Raises Unavailable after `timeout` seconds, Conflict for a stale epoch."""
        assert self._greeting is not None
        try:
            return await within(asyncio.shield(self._greeting), timeout)
        except asyncio.TimeoutError:
            where = f"{self.registration.host}:{self.registration.port}"
            raise Unavailable(
                f"The kernel's agent did not answer within {timeout:.0f} seconds. Try again.",
                hint=f"no answer from {where}",
            ) from None

    # -- out

    def send(self, frames: list[bytes]) -> None:
        """Send one message. Without a connection it waits for the next one."""
        if self._socket is not None:
            self._socket.send_multipart(frames, copy=False)
            # Sending may swallow the descriptor's signal for what has arrived meanwhile.
            self._again()

    def request(self, frames: list[bytes], *, bounded: bool = True) -> None:
        """Send a client's request. Raises PayloadTooLarge where the agent has not taken those before (`bounded`)."""
        size = sum(map(len, frames))
        waiting = self._asked - self._taken
        if bounded and waiting and waiting + size > self._request_bytes:
            raise PayloadTooLarge(
                f"The kernel's node takes nothing at the moment, and {waiting / 1e6:.0f} MB wait for it already. "
                "Wait a little, then send this again."
            )
        self._asked += size
        self.send(frames)
        if self._asked - self._marked >= self._request_bytes // MARKS:
            self._ping()

    def _ping(self) -> None:
        ident = next(self._idents)
        self._marks.append((ident, self._asked))
        self._marked = self._asked
        self.tell("ping", id=ident)

    def _took(self, taken: int) -> None:
        self._taken = max(self._taken, taken)
        while self._marks and self._marks[0][1] <= self._taken:
            self._marks.popleft()

    def acknowledge(self, cursors: list[tuple[bytes, int]]) -> None:
        """Report bytes worked off on this connection, and how far sessions have been served."""
        if self.greeted:
            self.send(codec.encode_ack(self._processed, cursors))

    def tell(self, op: str, **fields: Any) -> None:
        """A control operation without an answer."""
        self.send(codec.encode_call(op, **fields))

    async def call(self, op: str, timeout: float, **fields: Any) -> Mapping[str, Any]:
        """A control operation.

        Raises Unavailable where nothing comes, Conflict where the agent refuses, LaunchFailed where the kernel failed.
        """
        if self._socket is None:
            raise Unavailable("The link to the kernel is closed. Try again.")
        ident = next(self._idents)
        future: asyncio.Future[Mapping[str, Any]] = self._loop.create_future()
        self._calls[ident] = future
        try:
            self.tell(op, id=ident, **fields)
            answer = await within(future, timeout)
        except asyncio.TimeoutError:
            raise Unavailable(
                f"The kernel's agent did not answer to {op} within {timeout:.0f} seconds. Try again."
            ) from None
        finally:
            self._calls.pop(ident, None)
        if answer.get("ok", True):
            return answer
        error = str(answer.get("error") or "no reason given")
        if answer.get("code") == "stale_epoch":
            raise Conflict("Another gateway has taken this kernel over meanwhile. Try again.", hint="stale epoch")
        if answer.get("code") == "failed":
            raise LaunchFailed(error)
        raise Conflict(error)

    # -- in

    def _again(self) -> None:
        if self._drain_handle is None:
            self._drain_handle = self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        """Work off what has arrived, a fair amount; the rest in the loop's next turn."""
        if self._drain_handle is not None:
            self._drain_handle.cancel()
            self._drain_handle = None
        work = 0
        while self._socket is not None:
            try:
                work += self._receive(self._socket)
            except zmq.Again:
                return
            except ValueError:
                self._count("bad_frames", 1)
                work += 1
            except zmq.ZMQError as error:
                # Of the socket itself: trying again at once would do nothing else for ever.
                self._count("link_errors", 1)
                LOG.error("The link to a kernel cannot be read: %s", error)
                return
            except Exception:
                # One message must not keep all that follow it: the descriptor has signalled for all of them.
                self._count("link_errors", 1)
                LOG.exception("A message of a kernel's agent could not be handled")
                work += 1
            if work >= MESSAGES_PER_TURN:
                self._again()
                return

    def _receive(self, sock: zmq.Socket[bytes]) -> int:
        """Receive one multipart message and hand it on; its cost in small messages."""
        to = sock.recv(zmq.NOBLOCK)
        if not sock.getsockopt(zmq.RCVMORE):
            raise ValueError("no head")
        head = sock.recv()
        kind = head[0] if head else 0
        frames: list[Any] = []
        while sock.getsockopt(zmq.RCVMORE):
            # A large message's parts stay where ZeroMQ received them.
            frames.append(sock.recv(copy=kind != codec.LARGE))
        self._heard = self._loop.time()
        if kind == codec.BATCH and len(frames) == 1:
            size = len(frames[0])
            self._processed += size
            batch = codec.decode_batch(to, head, frames[0])
            self._count("messages", batch.count)
            self._count("bytes", size)
            self._handler.on_batch(batch)
            return batch.count
        if kind == codec.LARGE:
            self._processed += sum(map(len, frames))
            message = codec.decode_large(to, head, frames)
            self._count("messages", 1)
            self._count("bytes", message.size)
            self._handler.on_large(message)
            return LARGE_COST
        if kind == codec.EVENT and not frames:
            self._on_event(codec.decode_event(to, head))
            return 1
        raise ValueError("unknown kind of frame")

    def _on_event(self, event: Event) -> None:
        name = event.data["event"]
        if name == "greet":
            self.greeted = False
            self._helloed = self._asked
            self.tell("hello", replica=self._replica, epoch=self.epoch)
        elif name == "welcome":
            self._processed = 0
            self._took(self._helloed)  # or it was lost with the connection before
            self.greeted = True
            self.lost = False
            if self._greeting is not None and not self._greeting.done():
                self._greeting.set_result(event.data)
            self._handler.on_greeted(event.data)
        elif name == "refused":
            refusal = Conflict("Another gateway has taken this kernel over meanwhile. Try again.", hint="stale epoch")
            if self._greeting is not None and not self._greeting.done():
                self._greeting.set_exception(refusal)
            self._handler.on_agent_event(event)
        elif name in ("done", "pong"):
            ident = event.data.get("id")
            future = self._calls.get(ident) if isinstance(ident, int) else None
            if future is not None and not future.done():
                future.set_result(event.data)
            if name == "pong":
                if self.lost and self.greeted:
                    # Nothing else proves that it still knows us: it may have forgotten us, and be about to say so.
                    self.lost = False
                    self._handler.on_back()
                if isinstance(ident, int):
                    self._took(max([sent for mark, sent in self._marks if mark <= ident], default=0))
                self._handler.on_agent_event(event)
        else:
            self._handler.on_agent_event(event)

    def _tick(self) -> None:
        """Ping, and notice silence."""
        self._timer = self._loop.call_later(self._ping_seconds, self._tick)
        if self.greeted and not (self.lost and self._marks):
            self._ping()
        if not self.lost and self._loop.time() - self._heard > self._lost_seconds:
            self.lost = True
            self._handler.on_lost()
