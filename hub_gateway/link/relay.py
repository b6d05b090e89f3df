"""One kernel's relay: from its link to the websockets of its clients, and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import zmq

from hub_gateway.errors import Unavailable
from hub_gateway.kernels.types import ExecutionState, Registration
from hub_gateway.link import codec, messages, wire
from hub_gateway.link.acknowledging import Acknowledging
from hub_gateway.link.client import AgentLink
from hub_gateway.link.codec import Batch, Event, Large
from hub_gateway.link.pending import Pending, PendingRequests, key_of
from hub_gateway.link.progress import Progress, Request, msg_id_of
from hub_gateway.link.sinks import Client, Delivery, Notice, Sink, Standby, mark_of, number_of
from hub_gateway.link.wire import Dialect

__all__ = ["KernelRelay"]

_CHANNEL = {name.decode(): number for number, name in enumerate(codec.CHANNELS)}
_IOPUB = _CHANNEL["iopub"]
_REPLIES = (_CHANNEL["shell"], _CHANNEL["control"])
STANDBY_SECONDS = 30.0
MAX_NOTICES = 5
LOST_SECONDS = 600.0
"""For so long clients come back to a kernel that was lost: some retry for minutes."""

_BUFFERS_NOTICE = (
    "\n[Binary buffers of a message were left out, so a widget or plot may stay empty: the notebook server's gateway "
    "client cannot take binary frames. Ask the administrator to configure the gateway's companion connection class.]\n"
)


def _ignore(name: str, amount: int) -> None:
    """No metrics."""


def _no_event(event: Mapping[str, Any]) -> None:
    """Nobody listens."""


def _tells_death(channel: int, parts: Sequence[bytes]) -> bool:
    return channel == _IOPUB and b'"restarting"' in parts[3] and b'"status"' in parts[0]


def _deaths(batch: Batch) -> list[int]:
    """The numbers of the messages that say that the kernel died and is started again."""
    if b'"restarting"' not in batch.payload:
        return []
    return [number for number, channel, parts in batch.messages() if _tells_death(channel, parts)]


class KernelRelay:
    """All websockets of one kernel in this process, over one link. Everything happens on the event loop.

    It exists before the link does: what clients send is kept (`queue_bytes`), and progress or failure is
    shown to them. No more than `request_bytes` are sent to an agent that does not take them. A client whose
    `backlog` exceeds `backlog_bytes` is paused at the agent and goes on, after the last number that it got, once
    its websocket has drained; the others are not held up.

    `count(name, amount)` is told: messages, bytes, bad_frames (from the agent), requests, paused (slow
    clients), replaced (sinks), lost_messages, buffers_left_out, too_large, link_errors.
    """

    def __init__(
        self,
        kernel_id: str,
        *,
        zmq_context: zmq.Context[zmq.Socket[bytes]],
        replica: str = "",
        backlog_bytes: int = 4 * 2**20,
        queue_bytes: int = 16 * 2**20,
        request_bytes: int = 64 * 2**20,
        count: Callable[[str, int], None] = _ignore,
        on_event: Callable[[dict[str, Any]], None] = _no_event,
        ping_seconds: float = 10.0,
        lost_seconds: float = 30.0,
    ) -> None:
        self.kernel_id = kernel_id
        self.on_event = on_event
        self.pending = PendingRequests(queue_bytes)
        self.execution_state = ExecutionState.STARTING
        self.last_activity = datetime.now(timezone.utc)
        self.ready = False
        self.attached_once = False
        """Whether a websocket has ever been here."""
        self.welcome: Mapping[str, Any] = {}
        self._context = zmq_context
        self._replica = replica
        self._backlog_bytes = backlog_bytes
        self._request_bytes = request_bytes
        self._count = count
        self._timing = (ping_seconds, lost_seconds)
        self._link: AgentLink | None = None
        self._mark = 0
        self._clients: dict[bytes, Client] = {}
        self._standby = Standby()
        self._doubts: set[asyncio.Task[None]] = set()
        self._progress = Progress(self._say, self._refused)
        self._lost_until = 0.0
        self._ran = False
        self._attachments = 0
        self._told: dict[bytes, int] = {}
        """The last message by which each session was told that the kernel died."""
        self._notices: list[Notice] = []
        """What no notebook has shown yet; whoever comes gets it."""
        self._acknowledging = Acknowledging(self._acknowledge)

    # -- clients

    @property
    def connections(self) -> int:
        """How many websockets are attached."""
        return len(self._clients)

    @property
    def linked(self) -> bool:
        """Whether the agent is in touch."""
        return self._link is not None and self._link.greeted and not self._link.lost

    def attach(self, sink: Sink) -> None:
        """Serve a websocket, in place of another one of the same session: the client has reconnected.

        Except where the other one came later, or has been heard and is there: JupyterLab opens one, closes it and
        opens the next at once, and jupyter_server's gateway client finishes the first all the same, sooner or later
        than the second, and never closes it. Nobody speaks or listens there.
        """
        served = self._clients.get(sink.session.encode("utf-8", "replace"))
        if served is not None:
            later = sink.arrived >= served.sink.arrived
            if not later or served.sink.heard:
                self._stand_by(sink)
                if later:
                    self._doubt(served)
                return
        self._serve(sink)

    def _stand_by(self, sink: Sink) -> None:
        """Keep a websocket for the case that its session's other one goes away; it is closed if nobody speaks there."""
        self._standby.add(sink)
        asyncio.get_running_loop().call_later(STANDBY_SECONDS, self._dismiss, sink)

    def _dismiss(self, sink: Sink) -> None:
        served = self._clients.get(sink.session.encode("utf-8", "replace"))
        if self._standby.remove(sink) or (served is not None and served.sink is sink and not sink.heard):
            sink.dismiss()

    def _serve(self, sink: Sink) -> None:
        client = Client(sink)
        client.notices = list(self._notices)
        served = self._clients.get(client.key)
        if served is not None:
            served.sink.on_flushed = None
            self._stand_by(served.sink)
            self._count("replaced", 1)
            self._acknowledge()  # what the one before has is not for this one
        self._clients[client.key] = client
        self.attached_once = True
        sink.on_flushed = lambda seq: self._on_flushed(client, seq)
        if self._progress.came(sink.session) or self._lost_until > asyncio.get_running_loop().time():
            self._tell_dead(sink.session)
        elif not self.ready:
            # Not `dead`, see `fail`; and not `restarting`, at which JupyterLab opens its websocket once more.
            gone = self._progress.failed or self.execution_state is ExecutionState.RESTARTING
            state = ExecutionState.STARTING if gone else self.execution_state
            self._tell(client, _IOPUB, messages.status(state.value))
        self._attach(client)

    def _doubt(self, client: Client) -> None:
        """Find out whether a websocket is still there; if not, its session goes on at the youngest other one."""

        async def ask() -> None:
            if not await client.sink.answers() and self._clients.get(client.key) is client:
                heir = self._standby.youngest(client.key)
                if heir is not None:
                    heir.heard = True  # it came in the place of one that is gone: not to be closed for its silence
                    self._serve(heir)

        task = asyncio.ensure_future(ask())
        self._doubts.add(task)
        task.add_done_callback(self._doubts.discard)

    def detach(self, sink: Sink) -> None:
        """The websocket is closed. Its session goes on at the youngest one that is still open, if any."""
        client = self._clients.get(sink.session.encode("utf-8", "replace"))
        if client is None or client.sink is not sink:
            self._standby.remove(sink)
            return
        sink.on_flushed = None
        self._acknowledge()
        del self._clients[client.key]
        # A session that has moved is not fetched back by what nobody speaks at.
        heir = None if client.state is Delivery.MOVED else self._standby.youngest(client.key)
        if heir is not None:
            self._serve(heir)
            return
        if not sink.keep:
            self._progress.left(sink.session)
        if self._link is not None and self._link.greeted and client.state is not Delivery.MOVED:
            self._link.tell("detach", session=sink.session, forget=not sink.keep)

    def receive(self, sink: Sink, channel: str, parts: list[bytes], session_of_header: str) -> None:
        """A client's message for the kernel. Raises PayloadTooLarge when too much waits for the kernel already."""
        self._count("requests", 1)
        sink.heard = True
        if self._standby.remove(sink):
            self._serve(sink)
        served = self._clients.get(sink.session.encode("utf-8", "replace"))
        if served is not None and served.sink is sink and served.state is Delivery.MOVED:
            served.state = Delivery.WAITING  # somebody speaks here: it is no remnant
            self._attach(served)
        if b'"execute_request"' in parts[0]:
            client = self._clients.get(sink.session.encode("utf-8", "replace"))
            if client is not None:
                self._cell_begins(client, parts[0])
        if self._progress.failed:
            self._progress.add(sink.session, channel, parts[0])
            if b'"execute_request"' in parts[0]:
                self._tell_dead(sink.session)
            return
        self._send(sink, _CHANNEL[channel], session_of_header, parts)
        self._progress.add(sink.session, channel, parts[0])

    def _send(self, sink: Sink, channel: int, origin: str, parts: list[bytes]) -> None:
        """Pass a message on to the agent, or keep it for then."""
        session = sink.session.encode("utf-8", "replace")
        frames = codec.encode_request(session, channel, origin.encode("utf-8", "replace"), parts)
        if self._link is not None and self.linked:
            self._link.request(frames)
            return
        # A client without a session of its own cannot come back for the answer.
        msg_id = msg_id_of(parts[0]) if sink.keep else ""
        key = key_of(sink.session, msg_id) if msg_id else ""
        self.pending.add(Pending(key, frames))

    def restore(self, requests: Sequence[tuple[str, Sequence[bytes]]]) -> None:
        """Requests (key, frames) that another gateway was given and has not passed on, as far as is known.

        They go before those that came since. The agent passes over what it has had already.
        """
        for one in self.pending.restore(requests, failed=self._progress.failed):
            session, channel = one.frames[1].decode("utf-8", "replace"), codec.CHANNELS[one.frames[2][0]].decode()
            # What a kernel that is there has printed under a cell is not to be cleared like progress.
            self._progress.add(session, channel, one.frames[4], shown=not self.ready)
        if self.linked:
            self._send_pending()

    def _refused(self, request: Request) -> None:
        self.pending.settle([key_of(request.session, request.msg_id)])

    def _attach(self, client: Client) -> None:
        link = self._link
        if client.state is Delivery.MOVED:
            return
        if link is None or not link.greeted:
            client.state = Delivery.WAITING
            return
        self._attachments += 1
        client.attachment = self._attachments
        client.state = Delivery.ASKED
        sink = client.sink
        link.tell("attach", session=sink.session, after=client.after(self._mark), keep=sink.keep, id=client.attachment)

    # -- the link

    async def connect(
        self,
        registration: Registration,
        client_secret: str,
        client_public: str,
        epoch: int,
        *,
        timeout: float = 10.0,
    ) -> Mapping[str, Any]:
        """Link to the agent, in place of an earlier link; its welcome.

        Raises Unavailable where it does not answer in time (the attempt goes on in the background until
        `disconnect`), Conflict where a gateway with a higher epoch has been there.
        """
        self._close_link()
        mark = mark_of(registration.public_key)
        if mark != self._mark:
            self._mark = mark
            self._told.clear()
            for client in self._clients.values():
                client.begin_anew()
        link = self._link = AgentLink(
            self._context,
            registration,
            client_public=client_public,
            client_secret=client_secret,
            replica=self._replica,
            epoch=epoch,
            handler=self,
            count=self._count,
            ping_seconds=self._timing[0],
            lost_seconds=self._timing[1],
            request_bytes=self._request_bytes,
        )
        link.open()
        return await link.wait_greeted(timeout)

    def disconnect(self) -> None:
        """Close the link. Websockets stay, and wait for the next one."""
        self._close_link()

    def _close_link(self) -> None:
        self._acknowledging.cancel()
        if self._link is not None:
            self._acknowledge()
            self._link.close()
            self._link = None
        for client in self._clients.values():
            if client.state is not Delivery.MOVED:
                client.state = Delivery.WAITING

    def _require_link(self) -> AgentLink:
        if self._link is None or not self.linked:
            raise Unavailable("The kernel's agent is not connected at the moment. Try again in a few seconds.")
        return self._link

    async def interrupt(self, timeout: float = 10.0) -> None:
        """Interrupt the kernel, by signal or message as its kernelspec says."""
        await self._require_link().call("interrupt", timeout)

    async def restart(self, timeout: float = 90.0) -> None:
        """Restart the kernel in place; returns when the new one is ready. Raises what `AgentLink.call` raises."""
        await self._require_link().call("restart", timeout)

    async def shutdown(self, timeout: float = 20.0) -> None:
        """End kernel and agent; returns when the kernel is gone."""
        await self._require_link().call("shutdown", timeout)

    async def signal(self, signum: int, timeout: float = 10.0) -> None:
        """Send a signal to the kernel's process group."""
        await self._require_link().call("signal", timeout, signum=signum)

    async def ping(self, timeout: float = 10.0) -> Mapping[str, Any]:
        """The agent's counters and the kernel's state."""
        return await self._require_link().call("ping", timeout)

    # -- progress and failure

    def announce(self, text: str) -> None:
        """Show how the start goes, under every cell that waits for it."""
        if not self.ready:
            self._progress.announce(text)

    def notify(self, text: str, on_shown: Callable[[], None] | None = None) -> Notice:
        """Show a sentence once in every notebook: under the cell that runs, or else under the next that is run.

        Notebooks that come later get it, too, until one has shown it; then `on_shown` is called.
        """
        notice = Notice(f"[{text}]\n", on_shown)
        for client in self._clients.values():
            if client.cell is not None and self.execution_state is ExecutionState.BUSY:
                self._show(client, notice, client.cell)
            else:
                client.notices.append(notice)
                del client.notices[:-MAX_NOTICES]
        if not notice.shown:
            self._notices.append(notice)
            del self._notices[:-MAX_NOTICES]
        return notice

    def withdraw(self, notice: Notice) -> None:
        """Give a notice to nobody who comes from now on: it was shown elsewhere."""
        if notice in self._notices:
            self._notices.remove(notice)

    def _show(self, client: Client, notice: Notice, header: bytes) -> None:
        self._tell(client, _IOPUB, messages.stream(notice.show(), header))
        self.withdraw(notice)

    def _cell_begins(self, client: Client, header: bytes) -> None:
        client.cell = header
        waiting, client.notices = client.notices, []
        for notice in waiting:
            self._show(client, notice, header)

    @property
    def failed(self) -> bool:
        """Whether clients are told that there is no kernel."""
        return self._progress.failed

    def renew(self) -> None:
        """The kernel that failed is started again: what comes from now on waits for it."""
        self._progress.done()
        self._lost_until = 0.0
        self.execution_state = ExecutionState.STARTING

    def fail(self, text: str, stderr_lines: list[str], *, ran: bool = False) -> None:
        """There is no kernel: what has no reply yet, and what comes, gets the reason. A later `ready` lifts it.

        A client hears `dead` only after a cell of it has got the reason: JupyterLab sends nothing to a kernel that it
        knows to be dead, and the cell would stay empty for ever. But where a kernel `ran` and was lost, any client that
        is there may have sent a cell through an earlier gateway, of which nobody knows; and so may any that comes
        back, where it was lost while no gateway was there.
        """
        if ran and not self.welcome:
            self._lost_until = asyncio.get_running_loop().time() + LOST_SECONDS
        name = "DeadKernelError" if self._ran else "KernelStartError"
        self.ready = self._ran = False
        self.execution_state = ExecutionState.DEAD
        self.pending.give_up()
        told = self._progress.fail(name, text, stderr_lines)
        for session in {client.sink.session for client in self._clients.values()} if ran else told:
            self._tell_dead(session)

    def _tell_dead(self, session: str) -> None:
        client = self._clients.get(session.encode("utf-8", "replace"))
        if client is not None:
            self._tell(client, _IOPUB, messages.status("dead"))

    def _say(self, session: str, channel: str, parts: list[bytes]) -> bool:
        client = self._clients.get(session.encode("utf-8", "replace"))
        if client is not None:
            self._tell(client, _CHANNEL[channel], parts)
        return client is not None

    @staticmethod
    def _tell(client: Client, channel: int, parts: list[bytes]) -> None:
        """Write a message of the gateway's own."""
        client.sink.write(wire.encode(client.sink.dialect, channel, parts), None)

    # -- from the agent (LinkHandler)

    def _targets(self, to: bytes) -> list[Client]:
        if to:
            client = self._clients.get(to)
            good = client is not None and client.state in (Delivery.LIVE, Delivery.REPLAY)
            return [client] if client is not None and good else []
        return [client for client in self._clients.values() if client.state is Delivery.LIVE]

    def on_batch(self, batch: Batch) -> None:
        """Hand a batch to every client that it is for, encoded once per dialect."""
        encoded: dict[Dialect, bytes] = {}
        try:
            deaths = _deaths(batch) if batch.replay or not self.ready else []
            if batch.to and self._progress.waiting:
                for _, channel, parts in batch.messages():
                    self._replied(channel, parts)
            for client in self._targets(batch.to):
                delivered = client.delivered or 0
                if delivered >= batch.last:
                    continue
                dialect = client.sink.dialect
                skip = max(0, delivered - batch.first + 1)
                if deaths and deaths[0] <= self._told.get(client.key, 0):
                    data = self._untold(client, batch, batch.first + skip)
                elif skip or dialect is Dialect.JSON_TEXT_ONLY:
                    data = wire.encode_batch(dialect, batch, skip, client.notes, self._mark)
                else:
                    known = encoded.get(dialect)
                    data = known if known is not None else wire.encode_batch(dialect, batch, mark=self._mark)
                    encoded[dialect] = data
                self._write(client, data, batch.last)
                if deaths:
                    self._told[client.key] = deaths[-1]
                    client.sink.confirm()
        finally:
            self._worked_off(batch.to, batch.last, batch.count, len(batch.payload))

    def _untold(self, client: Client, batch: Batch, start: int) -> bytes:
        """A batch from a number on, without the deaths of the kernel that its session was told of.

        JupyterLab opens its websocket once more as soon as it hears of one, perhaps before it is known here that it
        has; told again, it would do all of that again, and tell the user so.
        """
        told = self._told[client.key]
        messages = [
            one for one in batch.messages() if one[0] >= start and not (one[0] <= told and _tells_death(*one[1:]))
        ]
        dialect, notes, mark = client.sink.dialect, client.notes, self._mark
        return b"".join(
            wire.encode(dialect, channel, parts, mark + number, notes) for number, channel, parts in messages
        )

    def on_large(self, message: Large) -> None:
        """Hand a large message to every client that it is for, encoded once per dialect."""
        encoded: dict[Dialect, bytes] = {}
        try:
            if message.to and self._progress.waiting:
                self._replied(message.channel, message.parts)
            for client in self._targets(message.to):
                if (client.delivered or 0) >= message.seq:
                    continue
                dialect = client.sink.dialect
                data = None if dialect is Dialect.JSON_TEXT_ONLY else encoded.get(dialect)
                if data is None:
                    number = self._mark + message.seq
                    data = wire.encode(dialect, message.channel, message.parts, number, client.notes)
                    encoded[dialect] = data
                self._write(client, data, message.seq)
        finally:
            self._worked_off(message.to, message.seq, 1, message.size)

    def _replied(self, channel: int, parts: Sequence[codec.Buffer]) -> None:
        if channel in _REPLIES:
            self._progress.answered(bytes(parts[1]))

    def _write(self, client: Client, data: bytes, seq: int) -> None:
        client.delivered = seq
        sink = client.sink
        sink.write(data, self._mark + seq)
        notes = client.notes
        if notes.buffers or notes.too_large:
            self._note(client)
        if sink.backlog > self._backlog_bytes and self._link is not None:
            client.state = Delivery.PAUSED
            self._count("paused", 1)
            self._link.tell("pause", session=sink.session)

    def _note(self, client: Client) -> None:
        """Say once what the stock gateway client could not be given."""
        notes = client.notes
        self._count("buffers_left_out", notes.buffers)
        self._count("too_large", notes.too_large)
        if notes.buffers and not client.noted[0]:
            client.noted = (True, client.noted[1])
            self._tell(client, _IOPUB, messages.stream(_BUFFERS_NOTICE))
        notes.buffers = notes.too_large = 0

    def _worked_off(self, to: bytes, last: int, count: int, size: int) -> None:
        if to:
            # Others are not concerned: they have been served up to here, too.
            for client in self._clients.values():
                if client.state is Delivery.LIVE and client.served == client.delivered and client.key != to:
                    client.served = client.delivered = max(last, client.served)
        self._acknowledging.add(count, size)

    def _on_flushed(self, client: Client, marked: int) -> None:
        if self._clients.get(client.key) is not client:
            return
        seq = number_of(marked, self._mark)
        if seq is not None and seq > client.served:
            client.served = seq
            self._acknowledge()
        if client.state is Delivery.PAUSED and client.sink.backlog <= self._backlog_bytes // 4:
            self._attach(client)

    def _acknowledge(self) -> None:
        self._acknowledging.cancel()
        cursors = []
        for client in self._clients.values():
            if client.served > client.acked and client.state is not Delivery.WAITING:
                client.acked = client.served
                cursors.append((client.key, client.served))
        if self._link is not None and (cursors or self._acknowledging.due):
            self._acknowledging.sent()
            self._link.acknowledge(cursors)

    def on_greeted(self, welcome: Mapping[str, Any]) -> None:
        """Attach everybody again, and let go what has waited for the link."""
        assert self._link is not None
        self.welcome = welcome
        self._acknowledging.sent()
        self._on_state(welcome)
        for client in self._clients.values():
            client.acked = 0  # what was said on an earlier connection may not have arrived
            self._attach(client)
        self._send_pending()
        if welcome.get("phase") == "running":
            self._on_ready()
        self.on_event(dict(welcome))

    def _send_pending(self) -> None:
        assert self._link is not None
        self.pending.send(self._link, self._clients.keys())

    def on_lost(self) -> None:
        """Tell the owner; the link goes on trying. What clients send is kept meanwhile."""
        self.on_event({"event": "lost"})

    def on_back(self) -> None:
        """Let go what has waited; nothing else was lost."""
        self._send_pending()
        self.on_event({"event": "back"})

    def on_agent_event(self, event: Event) -> None:
        """Sessions' events are dealt with here; the kernel's are the owner's business, too."""
        data = event.data
        name = data["event"]
        if name in ("attaching", "attached"):
            self._on_attachment(name, event)
            return
        if name == "moved":
            client = self._clients.get(event.to)
            if client is not None:
                client.state = Delivery.MOVED
                asyncio.get_running_loop().call_later(STANDBY_SECONDS, self._dismiss, client.sink)
                self._progress.left(client.sink.session)
        elif name == "ready":
            self._on_state(data)
            self._on_ready()
        elif name == "restarting":
            self.ready = False
            self.execution_state = ExecutionState.RESTARTING
            self._told.clear()  # the next one is another death
            if self._link is not None:
                # What was sent before was meant for the kernel that died.
                self._link.tell("noted")
        elif name in ("state", "pong"):
            self._on_state(data)
        elif name == "exited" and not data.get("will_restart"):
            self.ready = False
        if name not in ("pong", "moved"):
            self.on_event(dict(data))

    def _on_attachment(self, name: str, event: Event) -> None:
        client = self._clients.get(event.to)
        if client is None or client.attachment != event.data.get("id"):
            return
        if name == "attached":
            if client.state is Delivery.REPLAY:
                client.state = Delivery.LIVE
            return
        if client.state is not Delivery.ASKED:
            return
        start, lost = event.data.get("from"), event.data.get("lost")
        client.state = Delivery.REPLAY
        if client.delivered is None and isinstance(start, int):
            # A client that named its last number has all up to there, of which the agent need not know yet.
            client.delivered = client.served = max(0, start)
            client.acked = 0
            self._acknowledging.later()
        if isinstance(lost, int) and lost > 0:
            self._count("lost_messages", lost)
            text = f"\n[{lost} messages of this kernel were given up while this notebook was away.]\n"
            self._tell(client, _IOPUB, messages.stream(text))

    def _on_ready(self) -> None:
        self.ready = self._ran = True
        self._lost_until = 0.0
        self._progress.done()

    def _on_state(self, data: Mapping[str, Any]) -> None:
        state, age = data.get("execution_state"), data.get("age")
        if isinstance(state, str) and state in ExecutionState._value2member_map_:
            self.execution_state = ExecutionState(state)
        if isinstance(age, int | float) and 0 <= age < 1e9:
            self.last_activity = datetime.now(timezone.utc) - timedelta(seconds=age)
