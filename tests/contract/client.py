"""A Jupyter client at a relay: what a websocket would be given, decoded."""

from __future__ import annotations

import asyncio
import itertools
import json
import struct
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any

from hub_gateway.link.relay import KernelRelay
from hub_gateway.link.wire import Dialect

__all__ = ["KernelClient", "Message"]

Message = dict[str, Any]


def frames(data: bytes) -> Iterator[bytes]:
    """The payloads of unmasked, unfragmented websocket frames (RFC 6455, section 5.2)."""
    at = 0
    while at < len(data):
        length, at = data[at + 1], at + 2
        if length == 126:
            (length,) = struct.unpack_from("!H", data, at)
            at += 2
        elif length == 127:
            (length,) = struct.unpack_from("!Q", data, at)
            at += 8
        yield bytes(data[at : at + length])
        at += length


def decode(payload: bytes) -> list[bytes]:
    """The parts of a v1.kernel.websocket.jupyter.org message, the channel's name first."""
    (count,) = struct.unpack_from("<Q", payload)
    offsets = struct.unpack_from(f"<{count}Q", payload, 8)
    return [payload[a:b] for a, b in itertools.pairwise(offsets)]


class KernelClient:
    """One session at one kernel. Implements the relay's `Sink`; what is written counts as flushed at once."""

    dialect = Dialect.V1
    keep = True
    after: int | None = None
    backlog = 0
    arrived = 0
    heard = False

    def __init__(self, relay: KernelRelay, session: str) -> None:
        self.relay = relay
        self.session = session
        self.on_flushed: Callable[[int], None] | None = None
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        relay.attach(self)

    def write(self, data: bytes, seq: int | None) -> None:
        for payload in frames(data):
            channel, *parts = decode(payload)
            header, parent, metadata, content = map(json.loads, parts[:4])
            self.inbox.put_nowait(
                {
                    "channel": channel.decode(),
                    "msg_type": header["msg_type"],
                    "header": header,
                    "parent_header": parent,
                    "metadata": metadata,
                    "content": content,
                }
            )
        if seq is not None and self.on_flushed is not None:
            asyncio.get_running_loop().call_soon(self.on_flushed, seq)

    def confirm(self) -> None:
        """It is at once."""

    def dismiss(self) -> None:
        """No session of these tests has two."""

    async def answers(self) -> bool:
        return True

    def close(self) -> None:
        self.relay.detach(self)

    def send(self, msg_type: str, content: dict[str, Any], channel: str = "shell") -> str:
        msg_id = uuid.uuid4().hex
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": self.session,
            "username": "",
            "date": datetime.now(timezone.utc).isoformat(),
            "version": "5.3",
        }
        parts = [json.dumps(part).encode() for part in (header, {}, {}, content)]
        self.relay.receive(self, channel, parts, self.session)
        return msg_id

    def run(self, code: str) -> str:
        """Send a cell; its message id."""
        return self.send(
            "execute_request",
            {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False},
        )

    async def receive(self, until: Callable[[Message], bool], timeout: float = 60) -> Message:
        """The next message for which `until` holds."""

        async def find() -> Message:
            while True:
                message = await self.inbox.get()
                if until(message):
                    return message

        return await asyncio.wait_for(find(), timeout)

    async def result(self, msg_id: str, timeout: float = 60) -> tuple[str, Message]:
        """Everything a cell printed, and its reply."""
        text, reply, idle = "", None, False

        async def collect() -> tuple[str, Message]:
            nonlocal text, reply, idle
            while reply is None or not idle:
                message = await self.inbox.get()
                if message["parent_header"].get("msg_id") != msg_id:
                    continue
                if message["msg_type"] == "execute_reply":
                    reply = message
                elif message["msg_type"] == "stream":
                    text += message["content"]["text"]
                elif message["msg_type"] == "status":
                    idle = idle or message["content"]["execution_state"] == "idle"
            return text, reply

        return await asyncio.wait_for(collect(), timeout)

    async def execute(self, code: str, timeout: float = 60) -> str:
        """Run a cell to its end; what it printed. Fails where the cell does."""
        text, reply = await self.result(self.run(code), timeout)
        assert reply["content"]["status"] == "ok", reply["content"]
        return text
