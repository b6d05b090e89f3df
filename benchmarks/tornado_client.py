"""A cross-check with another client: tornado's websocket client, v1 framing."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import struct
import time
import uuid
from dataclasses import dataclass

from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, websocket_connect

from benchmarks.client import V1, Endpoint, Transfer, execute_content, new_header

__all__ = ["CrossCheck", "cross_check"]

NUMBER = re.compile(rb'"text": ?"(\d{8})')


@dataclass(frozen=True)
class CrossCheck:
    """Seconds of each `pass`, and one flood of 20,000."""

    passes: list[float]
    flood: Transfer


async def opened(endpoint: Endpoint, kernel_id: str) -> WebSocketClientConnection:
    url = f"ws://{endpoint.host}:{endpoint.port}/api/kernels/{kernel_id}/channels?session_id={uuid.uuid4().hex}"
    request = HTTPRequest(url, headers=dict(endpoint.headers))
    return await websocket_connect(request, subprotocols=[V1], max_message_size=2**30)


async def request(connection: WebSocketClientConnection, msg_type: str, content: dict[str, object]) -> bytes:
    header = new_header(msg_type, uuid.uuid4().hex)
    blobs = [b"shell", *(json.dumps(part).encode() for part in (header, {}, {}, content))]
    offsets = [8 * (len(blobs) + 2)]
    for blob in blobs:
        offsets.append(offsets[-1] + len(blob))
    data = struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(blobs)
    await connection.write_message(data, binary=True)
    return str(header["msg_id"]).encode()


async def received(connection: WebSocketClientConnection) -> list[bytes]:
    """Channel, header, parent header, metadata and content of the next message."""
    data = await connection.read_message()
    if not isinstance(data, bytes):
        raise ConnectionError(f"not a v1 message: {data!r}")
    (count,) = struct.unpack_from("<Q", data)
    offsets = struct.unpack_from(f"<{count}Q", data, 8)
    return [data[a:b] for a, b in itertools.pairwise(offsets)]


async def run(connection: WebSocketClientConnection, code: str) -> tuple[float, Transfer]:
    """Seconds to the reply, and what the cell sent until `idle`."""
    started = time.perf_counter()
    msg_id = await request(connection, "execute_request", execute_content(code))
    replied = idle = 0.0
    numbers: list[int] = []
    while not (replied and idle):
        _, header, parent, _, content, *_ = await received(connection)
        found = NUMBER.search(content)
        if found:
            numbers.append(int(found[1]))
        elif msg_id not in parent:
            continue
        elif b"execute_reply" in header:
            replied = time.perf_counter() - started
        elif b'idle"' in content:
            idle = time.perf_counter() - started
    return replied, Transfer(idle, numbers)


async def check(endpoint: Endpoint, python: str, flood: str, count: int) -> CrossCheck:
    connection = await opened(endpoint, python)
    passes = [(await run(connection, "pass"))[0] for _ in range(count)]
    connection.close()
    connection = await opened(endpoint, flood)
    await run(connection, "stream 100")
    _, transfer = await run(connection, "stream 20000")
    connection.close()
    return CrossCheck(passes, transfer)


def cross_check(endpoint: Endpoint, python: str, flood: str, count: int) -> CrossCheck:
    """Measure with tornado's client on two live kernels."""
    return asyncio.run(check(endpoint, python, flood, count))
