"""A websocket client that does nothing by itself: it reads, pings and pongs when it is told to."""

from __future__ import annotations

import asyncio
import base64
import os
import struct
from collections.abc import Mapping

__all__ = ["RawWebSocket"]


class RawWebSocket:
    """RFC 6455 by hand, on an asyncio stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int, path: str, headers: Mapping[str, str]) -> RawWebSocket:
        """Open one. `limit` is small, so that what is not read stays in the sockets."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        lines = {
            "Host": f"127.0.0.1:{port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            **headers,
        }
        head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(head.encode() + b"\r\n")
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 101 " in answer.split(b"\r\n")[0], answer
        return cls(reader, writer)

    async def read(self, timeout: float = 10.0) -> tuple[int, bytes]:
        """The next frame: opcode and payload."""

        async def frame() -> tuple[int, bytes]:
            first, length = await self.reader.readexactly(2)
            if length == 126:
                (length,) = struct.unpack("!H", await self.reader.readexactly(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", await self.reader.readexactly(8))
            return first & 0x0F, await self.reader.readexactly(length)

        return await asyncio.wait_for(frame(), timeout)

    def send(self, opcode: int, payload: bytes) -> None:
        """Send a frame, masked with zeros."""
        assert len(payload) < 126
        self.writer.write(bytes((0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0)) + payload)

    def close(self) -> None:
        self.writer.transport.abort()
