"""Kernel websockets: who may open one, how it speaks, and what the relay gets to see of it."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError
from tornado.websocket import WebSocketClientConnection

from hub_gateway.auth.base import Caller
from hub_gateway.errors import NotFound, PayloadTooLarge, Unavailable
from hub_gateway.kernels.types import ExecutionState, KernelStatus
from hub_gateway.link import Dialect, Sink
from hub_gateway.link import messages as notices
from hub_gateway.link.wire import V1_SUBPROTOCOL, encode
from hub_gateway.metrics import METRICS
from hub_gateway.web import framewriter
from hub_gateway.web.channels import NUMBERED_SUBPROTOCOL, ClientSink
from tests.contract.mini import MiniGateway, Setup
from tests.harness.link import IPYTHON
from tests.harness.rawsocket import RawWebSocket
from tests.harness.waiting import eventually
from tests.harness.web import WebServer, read_json, settings

CHANNELS = "/api/kernels/k1/channels"
STOCK = {"User-Agent": "Tornado/6.6.1"}


class StubRelay:
    """Remembers what it is told."""

    kernel_id = "k1"
    execution_state = ExecutionState.IDLE

    def __init__(self) -> None:
        self.sinks: list[Sink] = []
        self.received: list[tuple[str, list[bytes], str]] = []
        self.full = False

    @property
    def sink(self) -> ClientSink:
        found = self.sinks[-1]
        assert isinstance(found, ClientSink)
        return found

    def attach(self, sink: Sink) -> None:
        self.sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        self.sinks.remove(sink)

    def receive(self, sink: Sink, channel: str, parts: list[bytes], session: str) -> None:
        assert sink in self.sinks
        if self.full:
            raise PayloadTooLarge("Too much waits for the kernel already.")
        self.received.append((channel, parts, session))


class StubKernels:
    """Alice has the kernel k1."""

    def __init__(self) -> None:
        self.one = StubRelay()
        self.unsure = False
        self.held: list[asyncio.Event] = []

    async def relay(self, caller: Caller, kernel_id: str) -> StubRelay:
        if self.held:
            await self.held.pop().wait()
        if self.unsure:
            raise Unavailable("The database cannot be reached at the moment; try again in a few seconds.")
        if (caller.name, kernel_id) != ("alice", "k1"):
            raise NotFound(f"Kernel {kernel_id} does not exist, or has ended.")
        return self.one


@pytest.fixture
def kernels() -> StubKernels:
    return StubKernels()


@pytest.fixture
def relay(kernels: StubKernels) -> StubRelay:
    return kernels.one


@pytest.fixture
async def server(kernels: StubKernels) -> AsyncIterator[WebServer]:
    async with WebServer(kernels, web=settings(max_message_bytes=200_000)) as made:
        yield made


async def opened(server: WebServer, relay: StubRelay, path: str = CHANNELS, **more: Any) -> WebSocketClientConnection:
    before = len(relay.sinks)
    ws = await server.websocket(path, **more)
    await eventually(lambda: len(relay.sinks) > before, "the attachment")
    return ws


def message(msg_type: str = "execute_request", **more: Any) -> dict[str, Any]:
    return {
        "header": {"msg_id": "m1", "msg_type": msg_type, "session": "s1", "username": "", "version": "5.3"},
        "parent_header": {},
        "metadata": {},
        "content": {"code": "pass"},
        "channel": "shell",
        **more,
    }


def v1(channel: str, *parts: bytes) -> bytes:
    pieces = [channel.encode(), *parts]
    offsets = [8 * (len(pieces) + 2)]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(pieces)


async def test_websockets_are_told_apart_by_when_they_arrived(
    server: WebServer, kernels: StubKernels, relay: StubRelay
) -> None:
    """The first of two may be the last to be ready: who is served is who came last."""
    held = asyncio.Event()
    kernels.held.append(held)
    first = asyncio.ensure_future(server.websocket(f"{CHANNELS}?session_id=s"))
    await eventually(lambda: not kernels.held, "the first one to be looked at")
    second = await opened(server, relay, f"{CHANNELS}?session_id=s")
    held.set()
    late = await first
    await eventually(lambda: len(relay.sinks) == 2, "both to be there")
    assert relay.sinks[0].arrived > relay.sinks[1].arrived
    for websocket in (second, late):
        websocket.close()


# -- who may open one


@pytest.mark.parametrize(
    ("path", "user", "headers", "status"),
    [
        (CHANNELS, None, {}, 401),
        (CHANNELS, None, {"Cookie": "service-hub-gateway=alice-token; _xsrf=x", "Sec-Fetch-Mode": "websocket"}, 401),
        (f"{CHANNELS}?token=alice-token", None, {"Sec-Fetch-Mode": "websocket"}, 401),
        (CHANNELS, None, {"Authorization": "token "}, 401),
        (CHANNELS, None, {"Authorization": "token nobody"}, 401),
        (CHANNELS, "bob", {}, 404),
        ("/api/kernels/k2/channels", "alice", {}, 404),
    ],
)
async def test_only_the_owners_token_opens_one(
    server: WebServer, relay: StubRelay, path: str, user: str | None, headers: dict[str, str], status: int
) -> None:
    with pytest.raises(HTTPClientError) as refused:
        await server.websocket(path, user, headers=headers)
    assert refused.value.code == status
    assert refused.value.response is not None
    assert set(json.loads(refused.value.response.body)) == {"reason", "message", "code"}
    assert relay.sinks == []


async def test_unsure_is_503(server: WebServer, kernels: StubKernels) -> None:
    kernels.unsure = True
    with pytest.raises(HTTPClientError) as refused:
        await server.websocket(CHANNELS)
    assert refused.value.code == 503


async def test_any_origin_with_a_token(server: WebServer, relay: StubRelay) -> None:
    ws = await opened(server, relay, headers={"Origin": "https://elsewhere.example", "Sec-Fetch-Site": "cross-site"})
    ws.close()


# -- how it speaks


@pytest.mark.parametrize(
    ("offered", "headers", "dialect", "selected"),
    [
        (None, {}, Dialect.JSON, None),
        (None, STOCK, Dialect.JSON_TEXT_ONLY, None),
        ([V1_SUBPROTOCOL], {}, Dialect.V1, V1_SUBPROTOCOL),
        ([V1_SUBPROTOCOL], STOCK, Dialect.V1, V1_SUBPROTOCOL),
        ([V1_SUBPROTOCOL, NUMBERED_SUBPROTOCOL], {}, Dialect.NUMBERED, NUMBERED_SUBPROTOCOL),
    ],
)
async def test_the_form_follows_the_client(
    server: WebServer,
    relay: StubRelay,
    offered: list[str] | None,
    headers: dict[str, str],
    dialect: Dialect,
    selected: str | None,
) -> None:
    ws = await opened(server, relay, subprotocols=offered, headers=headers)
    assert relay.sink.dialect is dialect and ws.selected_subprotocol == selected
    ws.close()


async def test_unknown_subprotocols_get_the_old_form(server: WebServer, relay: StubRelay) -> None:
    client = await RawWebSocket.connect(
        server.port, CHANNELS, {"Authorization": "token alice-token", "Sec-WebSocket-Protocol": "soap"}
    )
    await eventually(lambda: relay.sinks, "the attachment")
    assert relay.sink.dialect is Dialect.JSON
    client.close()


async def test_sessions_and_places(server: WebServer, relay: StubRelay) -> None:
    ws = await opened(server, relay, f"{CHANNELS}?session_id=s1&last_seq=17")
    assert (relay.sink.session, relay.sink.keep, relay.sink.after) == ("s1", True, 17)
    ws.close()
    await eventually(lambda: not relay.sinks, "the end")
    names = set()
    for _ in range(2):
        ws = await opened(server, relay)
        assert not relay.sink.keep and relay.sink.after is None
        names.add(relay.sink.session)
        ws.close()
        await eventually(lambda: not relay.sinks, "the end")
    assert len(names) == 2, "clients without a session must not meet in one"
    for query in ("last_seq=-1", "last_seq=x", "last_seq=" + "9" * 30, f"session_id={'x' * 5000}"):
        ws = await opened(server, relay, f"{CHANNELS}?{query}")
        assert relay.sink.after is None and len(relay.sink.session) <= 200
        ws.close()
        await eventually(lambda: not relay.sinks, "the end")


async def test_small_messages_do_not_wait_for_company(server: WebServer, relay: StubRelay) -> None:
    """Nagle's algorithm costs 40 ms a cell with a client that delays its acknowledgements."""
    ws = await opened(server, relay)
    stream = relay.sink._stream
    assert stream.socket is not None
    assert stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    ws.close()


# -- both ways


async def test_messages_of_the_old_form(server: WebServer, relay: StubRelay) -> None:
    ws = await opened(server, relay, f"{CHANNELS}?session_id=s1")
    await ws.write_message(json.dumps(message()))
    await eventually(lambda: relay.received, "the message")
    channel, parts, session = relay.received[0]
    assert (channel, session) == ("shell", "s1")
    assert [json.loads(part) for part in parts] == [
        message()[n] for n in ("header", "parent_header", "metadata", "content")
    ]
    out = notices.stream("hello")
    relay.sink.write(encode(Dialect.JSON, 3, out, 1), 1)
    got = await read_json(ws)
    assert got["channel"] == "iopub" and got["content"]["text"] == "hello" and got["msg_type"] == "stream"
    ws.close()


async def test_messages_of_the_binary_form(server: WebServer, relay: StubRelay) -> None:
    ws = await opened(server, relay, subprotocols=[V1_SUBPROTOCOL])
    header = json.dumps({"msg_id": "m", "msg_type": "comm_msg", "session": "s"}).encode()
    await ws.write_message(v1("control", header, b"{}", b"{}", b'{"a":1}', b"\0\1", b""), binary=True)
    await eventually(lambda: relay.received, "the message")
    assert relay.received[0] == ("control", [header, b"{}", b"{}", b'{"a":1}', b"\0\1", b""], "s")
    ws.close()


@pytest.mark.parametrize("offered", [None, [V1_SUBPROTOCOL]])
async def test_what_is_no_message_is_said_and_counted(
    server: WebServer, relay: StubRelay, offered: list[str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ws = await opened(server, relay, subprotocols=offered)
    before = METRICS.frames_refused._value.get()
    frames: list[tuple[str | bytes, bool]] = [
        ("hello", False),
        ("[]", False),
        ("[" * 100_000, False),
        (json.dumps(message(channel="iopub")), False),
        (json.dumps({"header": {}}), False),
        (json.dumps({"header": "x", "channel": "shell"}), False),
        (b"", True),
        (b"\xff" * 64, True),
        (struct.pack("<Q", 2**63), True),
        (v1("shell", b"{}"), True),
        (v1("nowhere", b"{}", b"{}", b"{}", b"{}"), True),
    ]
    for data, binary in frames:
        await ws.write_message(data, binary=binary)
    await eventually(lambda: METRICS.frames_refused._value.get() - before == len(frames), "the count")
    said = await ws.read_message()
    assert isinstance(said, bytes if offered else str)
    assert b"not a Jupyter message" in (said if isinstance(said, bytes) else said.encode())
    # And the websocket goes on.
    if not offered:
        await ws.write_message(json.dumps(message()))
        await eventually(lambda: relay.received, "a good message")
    assert relay.sinks and caplog.text.count("not a Jupyter message") == 1, "said once, not at every frame"
    ws.close()


async def test_too_much_for_a_kernel_that_is_not_ready(server: WebServer, relay: StubRelay) -> None:
    relay.full = True
    ws = await opened(server, relay)
    await ws.write_message(json.dumps(message()))
    error, reply, idle = [await read_json(ws) for _ in range(3)]
    assert "Too much waits" in error["content"]["traceback"][0]
    assert (reply["msg_type"], reply["content"]["status"]) == ("execute_reply", "error")
    assert idle["content"]["execution_state"] == "idle" and idle["parent_header"]["msg_id"] == "m1"
    await ws.write_message(json.dumps(message("comm_msg")))
    assert "Too much waits" in (await read_json(ws))["content"]["text"]
    ws.close()


async def test_too_many_buffers_end_the_request_with_a_sentence(server: WebServer, relay: StubRelay) -> None:
    before = METRICS.frames_refused._value.get()
    ws = await opened(server, relay, subprotocols=[V1_SUBPROTOCOL])
    header = json.dumps(message()["header"]).encode()
    await ws.write_message(v1("shell", header, b"{}", b"{}", b"{}", *[b"x"] * 300), binary=True)
    error, reply, idle = [await ws.read_message() for _ in range(3)]
    assert isinstance(error, bytes) and b"300 binary buffers, and may have 250" in error and b'"m1"' in error
    assert isinstance(reply, bytes) and b"execute_reply" in reply and b"300 binary buffers" in reply
    assert isinstance(idle, bytes) and b"idle" in idle
    assert not relay.received and METRICS.frames_refused._value.get() == before + 1
    ws.close()


async def test_a_frame_over_the_limit_ends_this_websocket_only(server: WebServer, relay: StubRelay) -> None:
    ws = await opened(server, relay)
    other = await opened(server, relay)
    await ws.write_message("x" * 200_001)
    assert await ws.read_message() is None
    assert ws.close_code == 1009
    await eventually(lambda: len(relay.sinks) == 1, "the end of one")
    await other.write_message(json.dumps(message()))
    await eventually(lambda: relay.received, "the other's message")
    other.close()


async def test_leaving_is_noticed(server: WebServer, relay: StubRelay) -> None:
    before = METRICS.websockets._value.get()
    client = await RawWebSocket.connect(server.port, CHANNELS, {"Authorization": "token alice-token"})
    await eventually(lambda: relay.sinks, "the attachment")
    assert METRICS.websockets._value.get() == before + 1
    client.close()
    await eventually(lambda: not relay.sinks, "the detachment")
    assert METRICS.websockets._value.get() == before


async def test_silent_connections_are_pinged_and_dead_ones_closed(kernels: StubKernels, relay: StubRelay) -> None:
    async with WebServer(kernels, web=settings(ws_ping_interval=0.1)) as server:
        client = await RawWebSocket.connect(server.port, CHANNELS, {"Authorization": "token alice-token"})
        for _ in range(3):
            opcode, payload = await client.read()
            assert opcode == 9
            client.send(10, payload)
        # No answer from now on.
        await eventually(lambda: not relay.sinks, "the end of a dead connection")
        client.close()


async def test_a_large_message_reaches_a_client_for_which_it_takes_long(kernels: StubKernels, relay: StubRelay) -> None:
    """Its pongs stand behind the message; closed for want of them, it would come back for the same one for ever."""
    async with WebServer(kernels, web=settings(ws_ping_interval=0.05)) as server:
        client = await RawWebSocket.connect(server.port, CHANNELS, {"Authorization": "token alice-token"})
        await eventually(lambda: relay.sinks, "the attachment")
        data = encode(Dialect.V1, 3, [b"{}", b"{}", b"{}", bytes(12 * 2**20)], 1)
        relay.sink.write(data, 1)
        taken, begun = 0, time.monotonic()
        while taken < len(data):
            # 20 MB a second at most: several times as long as a client that has nothing to take may be silent.
            pause = taken / 20e6 - (time.monotonic() - begun)
            if pause > 0:
                await asyncio.sleep(pause)
            taken += len(await client.reader.readexactly(min(2**16, len(data) - taken)))
        for _ in range(4):
            opcode, payload = await client.read()
            assert opcode == 9, f"not a ping: {payload!r}"
            client.send(10, payload)
        assert relay.sinks
        client.close()


async def test_a_client_that_stops_to_take_a_large_message_is_dead(
    kernels: StubKernels, relay: StubRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(framewriter, "SLOWEST_BYTES", 100e6)
    async with WebServer(kernels, web=settings(ws_ping_interval=0.05)) as server:
        client = await RawWebSocket.connect(server.port, CHANNELS, {"Authorization": "token alice-token"})
        await eventually(lambda: relay.sinks, "the attachment")
        relay.sink.write(encode(Dialect.V1, 3, [b"{}", b"{}", b"{}", bytes(64 * 2**20)], 1), 1)
        await eventually(lambda: not relay.sinks, "the end of a dead connection")
        client.close()


# -- with real kernels


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
async def mini(state_dir: Path, db_url: Callable[[], str | None]) -> AsyncIterator[MiniGateway]:
    for name, argv in {
        "sleep": ["/bin/sleep", "600", "{connection_file}"],
        "dies": ["/bin/sh", "-c", "echo 'no libcuda.so' >&2; exit 3", "{connection_file}"],
    }.items():
        (state_dir / "kernels" / name).mkdir(parents=True)
        spec = {"argv": argv, "display_name": name, "language": "none"}
        (state_dir / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    config = {"LocalProxy": {"shutdown_seconds": 1.0}, "Controller": {"shutdown_seconds": 0.5}}
    url = db_url() or f"sqlite:///{state_dir}/g.sqlite"
    setup = Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)
    async with MiniGateway(setup) as made:
        yield made
        local = made.proxies.get("local")
        await asyncio.gather(*(local.terminate(found.state) for found in await local.owned(made.gateway_id)))


async def test_it_opens_at_once_while_the_kernel_starts(mini: MiniGateway) -> None:
    async with WebServer(mini.service) as server, server.client("alice") as alice:
        kernel = (await alice.post("/api/kernels", json={"name": "sleep"})).json()["id"]
        ws = await asyncio.wait_for(server.websocket(f"/api/kernels/{kernel}/channels?session_id=s"), 2)
        first = await asyncio.wait_for(read_json(ws), 5)
        assert first["msg_type"] == "status" and first["content"]["execution_state"] == "starting"
        model = (await alice.get(f"/api/kernels/{kernel}")).json()
        assert model["execution_state"] == "starting"
        ws.close()
        assert (await alice.delete(f"/api/kernels/{kernel}")).status_code == 204


async def test_it_opens_for_a_kernel_that_failed_and_says_why(mini: MiniGateway) -> None:
    async with WebServer(mini.service) as server, server.client("alice") as alice:
        kernel = (await alice.post("/api/kernels", json={"name": "dies"})).json()["id"]
        record = await mini.settled(kernel)
        assert record.status is KernelStatus.FAILED
        ws = await asyncio.wait_for(server.websocket(f"/api/kernels/{kernel}/channels?session_id=s"), 2)
        await ws.write_message(json.dumps(message()))
        said = ""
        while "execute_reply" not in said:
            said += json.dumps(await asyncio.wait_for(read_json(ws), 5))
        assert "no libcuda.so" in said and "exit code 3" in said
        model = (await alice.get(f"/api/kernels/{kernel}")).json()
        assert model["execution_state"] == "dead" and "exit code 3" in model["reason"]
        ws.close()


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "leaves"])
@pytest.mark.parametrize("offered", [None, [NUMBERED_SUBPROTOCOL]], ids=["stock", "companion"])
async def test_a_kernels_death_is_told_once_to_a_client_that_comes_back_at_once(
    mini: MiniGateway, state_dir: Path, offered: list[str] | None, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JupyterLab does at each `restarting`, with the same session; and at each it tells the user so.

    On a slow machine it leaves before it has answered the question whether it has what it was sent.
    """
    monkeypatch.setattr(framewriter, "PING_SECONDS", 3600.0)  # the only ping is the one for the status
    if not answers:
        monkeypatch.setattr(framewriter.FrameWriter, "_ping", lambda self: None)
    (state_dir / "kernels" / "python").mkdir()
    spec = {"argv": IPYTHON, "display_name": "Python", "language": "python"}
    (state_dir / "kernels" / "python" / "kernel.json").write_text(json.dumps(spec))

    def cell(msg_id: str, code: str) -> str | bytes:
        given = message(content={"code": code, "silent": False})
        given["header"]["msg_id"] = msg_id
        if not offered:
            return json.dumps(given)
        return v1("shell", *(json.dumps(given[n]).encode() for n in ("header", "parent_header", "metadata", "content")))

    async with WebServer(mini.service) as server:
        path = f"/api/kernels/{(await mini.start(Caller('alice'))).id}/channels?session_id=s1"

        pinged: list[bytes] = []

        async def opened_again(code: bytes | str) -> WebSocketClientConnection:
            ws = await server.websocket(path, headers=STOCK, subprotocols=offered)
            pinged.clear()
            ws.on_ping = pinged.append
            await ws.write_message(code, binary=isinstance(code, bytes))
            return ws

        # What ZeroMQ had not handed to the system yet would die with the kernel.
        now = state_dir / "now"
        wait = f"while not os.path.exists({str(now)!r}): pass"
        code = f"import os; print('last' + ' words')\n{wait}\nos.kill(os.getpid(), 9)"
        ws = await opened_again(cell("m1", code))
        said: list[bytes] = []
        told = 0
        while not (told and b"execute_reply" in said[-1] and b'"m2"' in said[-1]):
            got = await asyncio.wait_for(ws.read_message(), 60)
            assert got is not None
            said.append(got if isinstance(got, bytes) else got.encode())
            if b"last words" in said[-1]:
                now.touch()
            if b'"restarting"' in said[-1]:
                told += 1
                # A browser has answered what came with a message by the time that its scripts hear of that.
                await eventually(lambda: pinged or not answers, "the question whether the status has come")
                ws.close()
                ws = await opened_again(cell("m2", "pass"))
        assert told == 1
        if not answers:
            return  # what was on its way comes twice: all but the one that it has acted upon
        assert sum(b"last words" in one for one in said) == 1
        errors = [one for one in said if b"execute_reply" not in one and b"exit code 137" in one]
        assert len(errors) == 1, "the cell says it, once"
        ws.close()
