"""One user's clients, however many and however large their messages, leave room for the others."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tornado.httpclient import HTTPClientError

from hub_gateway.link.progress import Progress
from tests.harness.rawsocket import RawWebSocket
from tests.harness.waiting import eventually
from tests.harness.web import WebServer, settings
from tests.unit.test_web_channels import CHANNELS, StubKernels, StubRelay, message

MIB = 2**20
TEXT, CONTINUED, FINAL = 1, 0, 0x80


@pytest.fixture
def kernels() -> StubKernels:
    return StubKernels()


@pytest.fixture
async def server(kernels: StubKernels) -> AsyncIterator[WebServer]:
    web = settings(
        max_message_bytes=2 * MIB, incoming_bytes_per_user=3 * MIB, websockets_per_kernel=3, ws_ping_interval=0.2
    )
    async with WebServer(kernels, web=web) as made:
        yield made


async def opened(server: WebServer, relay: StubRelay, user: str = "alice") -> RawWebSocket:
    before = len(relay.sinks)
    client = await RawWebSocket.connect(server.port, CHANNELS, {"Authorization": f"token {user}-token"})
    await eventually(lambda: len(relay.sinks) > before, "the attachment")
    return client


def head(size: int, opcode: int = FINAL | TEXT) -> bytes:
    """The head of a frame of that size, masked with zeros."""
    return struct.pack("!BBQ", opcode, 0x80 | 127, size) + bytes(4)


def text(size: int) -> bytes:
    """A message that is as long as that."""
    given = message(metadata={"x": ""})
    given["metadata"]["x"] = "x" * (size - len(json.dumps(given)))
    return json.dumps(given).encode()


def buffered(server: WebServer) -> int:
    """What the process holds of messages that are not complete."""
    incoming: Any = server.application.incoming
    return sum(use.bytes for use in incoming._users.values())


async def test_messages_of_one_user_wait_for_room(server: WebServer, kernels: StubKernels) -> None:
    relay = kernels.one
    first, second = [await opened(server, relay) for _ in range(2)]
    body = text(2 * MIB)
    first.writer.write(head(len(body)) + body[:MIB])
    await eventually(lambda: buffered(server) == 2 * MIB, "the first to be let in")
    second.writer.write(head(len(body)) + body)
    # Neither is taken for dead meanwhile: one is slow, and the other one is kept waiting by us.
    for at in range(MIB, 2 * MIB, MIB // 16):
        assert buffered(server) == 2 * MIB and not relay.received
        first.writer.write(body[at : at + MIB // 16])
        await asyncio.sleep(0.05)  # a slow line, not a wait for something
    await eventually(lambda: len(relay.received) == 2, "both messages")
    await eventually(lambda: buffered(server) == 0, "the room to be free again")
    for client in (first, second):
        client.close()


async def test_what_is_left_of_a_closed_websocket_is_given_back(server: WebServer, kernels: StubKernels) -> None:
    relay = kernels.one
    first, second = [await opened(server, relay) for _ in range(2)]
    body = text(2 * MIB)
    first.writer.write(head(len(body)) + body[:MIB])
    await eventually(lambda: buffered(server) == 2 * MIB, "the first to be let in")
    second.writer.write(head(len(body)) + body)
    first.close()
    await eventually(lambda: relay.received, "the second message")
    second.close()
    await eventually(lambda: buffered(server) == 0, "the room to be free again")


async def test_messages_in_fragments_count_as_well(server: WebServer, kernels: StubKernels) -> None:
    relay = kernels.one
    first, second = [await opened(server, relay) for _ in range(2)]
    piece = bytes(MIB // 2)
    for client in (first, second):
        client.writer.write(head(len(piece), TEXT) + piece)
    for _ in range(3):
        for client in (first, second):
            client.writer.write(head(len(piece), CONTINUED) + piece)
    await eventually(lambda: len(relay.sinks) == 1, "one of them to be refused")
    assert buffered(server) <= 3 * MIB
    for client in (first, second):
        client.close()
    await eventually(lambda: buffered(server) == 0, "the room to be free again")


async def test_a_message_in_fragments_arrives(server: WebServer, kernels: StubKernels) -> None:
    client = await opened(server, kernels.one)
    body = text(MIB)
    client.writer.write(head(MIB // 2, TEXT) + body[: MIB // 2] + head(MIB // 2, FINAL | CONTINUED) + body[MIB // 2 :])
    await eventually(lambda: kernels.one.received, "the message")
    assert buffered(server) == 0
    client.close()


async def test_websockets_are_limited_with_a_sentence(server: WebServer, kernels: StubKernels) -> None:
    clients = [await opened(server, kernels.one) for _ in range(3)]
    with pytest.raises(HTTPClientError) as refused:
        await server.websocket(CHANNELS)
    assert refused.value.code == 429 and refused.value.response is not None
    assert "This kernel has 3 websockets open" in json.loads(refused.value.response.body)["message"]
    clients.pop().close()
    await eventually(lambda: len(kernels.one.sinks) == 2, "one to be gone")
    again = await server.websocket(CHANNELS)
    again.close()
    for client in clients:
        client.close()


async def test_a_users_websockets_are_limited(kernels: StubKernels) -> None:
    async with WebServer(kernels, web=settings(websockets_per_user=1)) as server:
        client = await opened(server, kernels.one)
        with pytest.raises(HTTPClientError) as refused:
            await server.websocket(CHANNELS)
        assert refused.value.code == 429
        client.close()


def test_what_waits_for_a_kernel_takes_little_memory() -> None:
    """Whatever a client puts into its headers; and it knows its request by what comes back."""
    said: list[list[bytes]] = []
    progress = Progress(lambda session, channel, parts: not said.append(parts))
    for number in range(20):
        header = {"msg_id": f"m{number}", "msg_type": "execute_request", "session": "s", "more": "x" * 60_000}
        progress.add("s", "shell", json.dumps(header).encode())
    assert sum(len(request.header) for request in progress._waiting.values()) < 20 * 1000
    progress.fail("KernelStartError", "There is none.", [])
    replies = [json.loads(parts[1]) for parts in said if b"execute_reply" in parts[0]]
    assert [(parent["msg_id"], parent["session"]) for parent in replies] == [(f"m{n}", "s") for n in range(20)]
