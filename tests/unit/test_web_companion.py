"""The connection class for single-user servers, between a browser's websocket and a gateway that comes and goes."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from jupyter_client.session import Session
from jupyter_server.gateway.gateway_client import GatewayClient
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketHandler
from traitlets.config import Configurable

from hub_gateway.companion import NUMBERED_SUBPROTOCOL, V1_SUBPROTOCOL, NumberedGatewayConnection
from tests.harness.waiting import eventually


class Browser(WebSocketHandler):
    """As much of jupyter_server's websocket handler as a connection uses; there is no request behind it."""

    selected_subprotocol = None

    def __init__(self, subprotocol: str | None = V1_SUBPROTOCOL) -> None:
        self.selected_subprotocol = subprotocol
        self.got: list[str | bytes] = []
        self.nodelay = False
        self.closed: tuple[int | None, str | None] | None = None

    def set_nodelay(self, value: bool) -> None:
        self.nodelay = value

    def write_message(self, message: Any, binary: bool = False) -> asyncio.Future[None]:
        assert binary is isinstance(message, bytes)
        self.got.append(message)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        self.closed = (code, reason)


class KernelManager(Configurable):
    kernel_id = "k1"


class Channels(WebSocketHandler):
    gateway: Gateway

    def initialize(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def prepare(self) -> None:
        self.gateway.asked += 1
        if self.gateway.status != 101:
            raise HTTPError(self.gateway.status)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return subprotocols[0] if subprotocols else None

    def open(self, *args: str, **kwargs: str) -> None:
        self.gateway.sockets.append(self)
        if self.gateway.closes_at_once:
            self.close()

    def on_message(self, message: str | bytes) -> None:
        self.gateway.received.append(message)

    def on_close(self) -> None:
        self.gateway.sockets.remove(self)


class Gateway:
    """Takes websockets, on the same port in each of its lives."""

    def __init__(self) -> None:
        self.sockets: list[Channels] = []
        self.received: list[str | bytes] = []
        self.status = 101
        self.closes_at_once = False
        self.asked = 0
        self.port = 0
        self.server: HTTPServer | None = None

    def start(self) -> None:
        sockets = bind_sockets(self.port, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self.server = HTTPServer(
            Application(
                [("/api/kernels/([^/]+)/channels", Channels, {"gateway": self})],
                websocket_max_message_size=2**30,
                log_function=lambda _: None,
            )
        )
        self.server.add_sockets(sockets)

    async def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
        for socket in list(self.sockets):
            if socket.ws_connection is not None:  # one that is closing has none any more
                socket.ws_connection.stream.close()
        await eventually(lambda: not self.sockets, "the end of all websockets")


def numbered(number: int, data: bytes) -> bytes:
    return struct.pack("<Q", number) + data


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    made = Gateway()
    made.start()
    GatewayClient.clear_instance()
    GatewayClient.instance(url=f"http://127.0.0.1:{made.port}", auth_token="t0ken")
    yield made
    await made.stop()
    GatewayClient.clear_instance()


@pytest.fixture
async def connect(gateway: Gateway) -> AsyncIterator[Any]:
    connections: list[NumberedGatewayConnection] = []

    async def make(browser: Browser, **traits: Any) -> NumberedGatewayConnection:
        made = NumberedGatewayConnection(
            parent=KernelManager(), session=Session(session="s1"), websocket_handler=browser, **traits
        )
        connections.append(made)
        await made.connect()
        return made

    yield make
    for connection in connections:
        connection.disconnect()


async def test_messages_pass_as_they_are(gateway: Gateway, connect: Any) -> None:
    browser = Browser()
    connection = await connect(browser)
    assert browser.nodelay
    await eventually(lambda: gateway.sockets, "the websocket")
    request = gateway.sockets[0].request
    assert request.headers["Authorization"] == "token t0ken"
    assert request.headers["Sec-WebSocket-Protocol"] == NUMBERED_SUBPROTOCOL
    assert not request.headers["User-Agent"].startswith("Tornado"), "the gateway would take it for the stock class"
    assert request.arguments == {"session_id": [b"s1"]}
    # What kills the stock class: a binary message, and one over its 10 MiB.
    large = b"x" * (11 * 2**20)
    await gateway.sockets[0].write_message(numbered(1, b"\xff\xfe"), binary=True)
    await gateway.sockets[0].write_message(numbered(2, large), binary=True)
    await eventually(lambda: len(browser.got) == 2, "both")
    assert browser.got == [b"\xff\xfe", large]
    connection.handle_incoming_message(b"\x01\x02")
    await eventually(lambda: gateway.received == [b"\x01\x02"], "the browser's message")


async def test_the_old_form_for_a_browser_that_speaks_no_other(gateway: Gateway, connect: Any) -> None:
    browser = Browser(None)
    connection = await connect(browser)
    await eventually(lambda: gateway.sockets, "the websocket")
    assert gateway.sockets[0].selected_subprotocol is None
    await gateway.sockets[0].write_message("text")
    await gateway.sockets[0].write_message(b"buffers", binary=True)
    connection.handle_incoming_message("{}")
    await eventually(lambda: browser.got == ["text", b"buffers"] and gateway.received == ["{}"], "all of it")


async def test_a_gateway_that_restarts_is_found_again_and_told_the_last_number(gateway: Gateway, connect: Any) -> None:
    browser = Browser()
    connection = await connect(browser)
    await eventually(lambda: gateway.sockets, "the websocket")
    for number in (7, 8):
        await gateway.sockets[0].write_message(numbered(number, b"m%d" % number), binary=True)
    # Number 0 is what the gateway itself says; it is not of the kernel's counting.
    await gateway.sockets[0].write_message(numbered(0, b"notice"), binary=True)
    await eventually(lambda: len(browser.got) == 3, "all of it")
    await gateway.stop()
    connection.handle_incoming_message(b"sent while away 1")
    connection.handle_incoming_message(b"sent while away 2")
    gateway.start()
    await eventually(lambda: gateway.sockets, "the new websocket")
    assert gateway.sockets[0].get_query_argument("last_seq") == "8"
    await eventually(lambda: len(gateway.received) == 2, "what was sent meanwhile")
    assert gateway.received == [b"sent while away 1", b"sent while away 2"], "in order, and nothing lost"
    assert browser.closed is None


async def test_a_kernel_that_is_gone(gateway: Gateway, connect: Any) -> None:
    gateway.status = 404
    browser = Browser()
    await connect(browser)
    await eventually(lambda: browser.closed, "the browser to be told")
    assert gateway.asked == 1


async def test_unsure_is_not_gone(gateway: Gateway, connect: Any) -> None:
    gateway.status = 503
    browser = Browser()
    await connect(browser)
    await eventually(lambda: gateway.asked >= 3, "some attempts")
    assert browser.closed is None
    gateway.status = 101
    await eventually(lambda: gateway.sockets, "the websocket")


async def test_a_gateway_that_stays_away(gateway: Gateway, connect: Any) -> None:
    gateway.status = 503
    browser = Browser()
    await connect(browser, give_up_seconds=0.3)
    await eventually(lambda: browser.closed, "the browser to be told")
    assert browser.closed is not None and browser.closed[0] == 1013


async def test_too_much_for_a_gateway_that_is_away(gateway: Gateway, connect: Any) -> None:
    gateway.status = 503
    browser = Browser()
    connection = await connect(browser, queue_bytes=1000)
    connection.handle_incoming_message(b"x" * 900)
    assert browser.closed is None
    connection.handle_incoming_message(b"x" * 900)
    assert browser.closed is not None


async def test_a_gateway_that_closes_every_websocket_is_not_hammered(gateway: Gateway, connect: Any) -> None:
    gateway.closes_at_once = True
    await connect(Browser())
    loop = asyncio.get_running_loop()
    began = loop.time()
    await eventually(lambda: gateway.asked >= 3, "some attempts")
    assert loop.time() - began > 0.4


async def test_leaving_closes_the_other_side_too(gateway: Gateway, connect: Any) -> None:
    browser = Browser()
    connection = await connect(browser)
    await eventually(lambda: gateway.sockets, "the websocket")
    connection.disconnect()
    await eventually(lambda: not gateway.sockets, "its end")
    early = await connect(Browser())
    early.disconnect()
    await eventually(lambda: not gateway.sockets, "the end of one that was on its way")
