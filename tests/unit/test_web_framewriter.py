"""Frames to a websocket: what is pinned of tornado, and what counts as having arrived."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable

import pytest
import tornado
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler

from hub_gateway.web import framewriter
from hub_gateway.web.framewriter import FrameWriter, Window
from tests.harness.rawsocket import RawWebSocket
from tests.harness.waiting import eventually

SMALL = Window(messages=4, bytes=1000)
DATA, PING, PONG = 2, 9, 10


class Handler(WebSocketHandler):
    """Only opens."""

    opened: asyncio.Future[Handler]
    writer: FrameWriter | None = None

    def initialize(self, opened: asyncio.Future[Handler]) -> None:
        self.opened = opened

    def check_origin(self, origin: str) -> bool:
        return True

    def open(self, *args: str, **kwargs: str) -> None:
        self.opened.set_result(self)

    def on_pong(self, data: bytes) -> None:
        if self.writer is not None:
            self.writer.pong(data)


class Pair:
    """Both ends of one websocket."""

    def __init__(self, handler: Handler, client: RawWebSocket, window: Window) -> None:
        self.handler, self.client = handler, client
        self.writer = handler.writer = FrameWriter(handler, window)
        self.flushed: list[int] = []
        self.writer.on_flushed = self.flushed.append

    def write(self, seq: int, size: int = 10) -> None:
        self.writer.write(frame(seq, size), seq)

    async def answer(self) -> int:
        """Read up to the next ping and answer it; how many messages came before."""
        count = 0
        while True:
            opcode, payload = await self.client.read()
            if opcode == PING:
                self.client.send(PONG, payload)
                return count
            count += 1


def frame(seq: int, size: int) -> bytes:
    body = struct.pack("<Q", seq).ljust(size, b".")
    head = bytes((0x82, size)) if size < 126 else struct.pack("!BBQ", 0x82, 127, size)
    return head + body


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., object]]:
    pairs: list[Pair] = []
    servers: list[HTTPServer] = []

    async def make(window: Window = SMALL) -> Pair:
        opened: asyncio.Future[Handler] = asyncio.get_running_loop().create_future()
        sockets = bind_sockets(0, "127.0.0.1")
        server = HTTPServer(Application([("/", Handler, {"opened": opened})], websocket_ping_interval=0))
        server.add_sockets(sockets)
        servers.append(server)
        client = await RawWebSocket.connect(sockets[0].getsockname()[1], "/", {})
        pairs.append(Pair(await opened, client, window))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.client.close()
        pair.writer.close()
    for server in servers:
        server.stop()


async def test_what_is_relied_on_in_tornado(connect: Callable[..., object]) -> None:
    """A tornado in which one of these is different needs a look at framewriter.py."""
    assert tornado.version_info[0] == 6
    pair: Pair = await connect()  # type: ignore[misc]
    connection = pair.handler.ws_connection
    assert connection is not None
    stream = connection.stream
    assert isinstance(stream, IOStream)
    # A write is not done before the operating system has all of it, and writes keep their order.
    futures = [stream.write(bytes(2**20)) for _ in range(64)]
    assert not futures[-1].done() and stream.writing()
    assert pair.writer._stream is stream
    done = [future for future in futures if future.done()]
    assert done == futures[: len(done)]
    for future in futures:
        future.add_done_callback(lambda f: f.exception())


async def test_messages_arrive_in_order_and_count_when_their_ping_is_answered(connect: Callable[..., object]) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    for seq in (1, 2, 3):
        pair.write(seq)
    seen = [await pair.client.read() for _ in range(4)]
    assert [opcode for opcode, _ in seen] == [DATA, DATA, DATA, PING]
    assert [struct.unpack_from("<Q", payload)[0] for _, payload in seen[:3]] == [1, 2, 3]
    assert pair.flushed == [], "the operating system has it; the client has not said that it has"
    pair.client.send(PONG, seen[3][1])
    await eventually(lambda: pair.flushed == [3], "the pong")


async def test_what_has_arrived_is_reported_before_more_is_sent(connect: Callable[..., object]) -> None:
    """Or else a kill in between would let more than the window come twice."""
    pair: Pair = await connect()  # type: ignore[misc]
    waiting: list[int] = []
    pair.writer.on_flushed = lambda seq: waiting.append(pair.writer.backlog)
    for seq in range(1, 6):
        pair.write(seq)
    assert pair.writer.backlog == len(frame(5, 10))
    assert await pair.answer() == 4
    await eventually(lambda: waiting == [len(frame(5, 10))], "the pong")
    assert await pair.answer() == 1


async def test_whether_a_client_is_there(connect: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    asked = asyncio.ensure_future(pair.writer.answers())
    assert await pair.answer() == 0
    assert await asked
    monkeypatch.setattr(framewriter, "ANSWER_SECONDS", 0.05)
    assert not await pair.writer.answers()


async def test_a_client_is_asked_at_once_where_that_is_wanted(
    connect: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, not before some messages are together; what waits for the window is asked for when it is sent."""
    monkeypatch.setattr(framewriter, "PING_SECONDS", 3600.0)
    pair: Pair = await connect()  # type: ignore[misc]
    pair.write(1)
    pair.writer.confirm()
    assert await pair.answer() == 1
    await eventually(lambda: pair.flushed == [1], "the pong")
    pair.writer.confirm()  # nothing to be asked for
    for seq in range(2, 8):
        pair.write(seq)
    pair.writer.confirm()
    assert await pair.answer() == 4 and await pair.answer() == 2
    await eventually(lambda: pair.flushed == [1, 5, 7], "the rest")


async def test_no_more_than_the_window_is_on_its_way(connect: Callable[..., object]) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    for seq in range(1, 11):
        pair.write(seq)
    assert pair.writer.backlog == 6 * len(frame(1, 10))
    counts = []
    while sum(counts) < 10:
        counts.append(await pair.answer())
    assert max(counts) <= SMALL.messages
    await eventually(lambda: pair.flushed[-1:] == [10] and pair.writer.backlog == 0, "all of them")


async def test_a_message_larger_than_the_window_passes_alone(connect: Callable[..., object]) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    pair.write(1, size=100_000)
    pair.write(2, size=100_000)
    assert pair.writer.backlog > 100_000
    assert await pair.answer() == 1
    assert await pair.answer() == 1
    await eventually(lambda: pair.flushed == [1, 2], "both")


async def test_a_pong_of_somebody_else_means_nothing(connect: Callable[..., object]) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    pair.write(1)
    for payload in (b"", b"hello", b"hgw", b"xgw" + bytes(8)):
        pair.client.send(PONG, payload)
    pair.client.send(PONG, b"hgw" + struct.pack("!Q", 0))
    opcodes = [(await pair.client.read())[0] for _ in range(2)]
    assert opcodes == [DATA, PING] and pair.flushed == []


async def test_pongs_of_a_client_that_does_not_read_do_not_fill_memory(connect: Callable[..., object]) -> None:
    """It claims to have everything, and takes nothing."""
    pair: Pair = await connect(Window(16, 2**20))  # type: ignore[misc]
    for seq in range(1, 101):
        pair.write(seq, size=2**20)
    claims = 0

    def sent() -> bool:
        nonlocal claims
        claims += 1
        pair.client.send(PONG, b"hgw" + struct.pack("!Q", 2**60))
        return claims > 200

    await eventually(sent, "the claims", interval=0.002)
    stream = pair.writer._stream
    # What is on its way is what the sockets hold, and one more message.
    assert len(stream._write_buffer) <= 3 * 2**20
    assert pair.writer.backlog > 60 * 2**20


async def test_a_client_that_never_answers_pings_is_served_by_what_it_reads(
    connect: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framewriter, "PATIENCE_SECONDS", 0.1)
    pair: Pair = await connect()  # type: ignore[misc]
    for seq in range(1, 41):
        pair.write(seq)
    seen = 0
    while seen < 40:
        opcode, _ = await pair.client.read()
        seen += opcode == DATA
    await eventually(lambda: pair.flushed[-1:] == [40] and pair.writer.backlog == 0, "all of them")
    # And when it stops to read, it is held up as anybody else.
    for seq in range(41, 141):
        pair.write(seq, size=2**20)
    await eventually(lambda: pair.writer._stream.writing(), "the sockets to be full")
    assert pair.writer.backlog > 60 * 2**20
    assert pair.flushed[-1] < 80


async def test_nothing_is_written_to_a_closed_websocket(connect: Callable[..., object]) -> None:
    pair: Pair = await connect()  # type: ignore[misc]
    pair.write(1)
    pair.client.close()
    await eventually(lambda: pair.writer._stream.closed(), "the end of the websocket")
    pair.write(2)
    pair.writer.close()
    assert pair.writer.backlog == 0 and pair.flushed == []
