"""A notebook's side of the channels websocket, for tests: legacy JSON or v1 binary."""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import websocket

__all__ = ["Message", "Notebook", "Result"]

V1 = "v1.kernel.websocket.jupyter.org"
Message = dict[str, Any]


@dataclass
class Result:
    """What one execute_request brought."""

    reply: Message = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All `stream` text, in order."""
        return "".join(m["content"]["text"] for m in self.messages if m["header"]["msg_type"] == "stream")

    @property
    def status(self) -> str:
        return str(self.reply.get("content", {}).get("status", ""))

    def of_type(self, msg_type: str) -> list[Message]:
        return [m for m in self.messages if m["header"]["msg_type"] == msg_type]


class Notebook:
    """One open websocket to one kernel, as one client session."""

    def __init__(
        self,
        ws_url: str,
        kernel_id: str,
        headers: dict[str, str],
        *,
        session: str | None = None,
        v1: bool = False,
        user_agent: str | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.session = session or uuid.uuid4().hex
        self.v1 = v1
        extra = dict(headers)
        if user_agent is not None:
            extra["User-Agent"] = user_agent
        self.timeout = timeout
        self.socket = websocket.create_connection(
            f"{ws_url}/api/kernels/{kernel_id}/channels?session_id={self.session}",
            header=extra,
            subprotocols=[V1] if v1 else None,
            timeout=timeout,
            suppress_origin=True,
        )
        self.seen: list[Message] = []
        self._others: list[Message] = []

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, msg_type: str, content: dict[str, Any], channel: str = "shell", **header: Any) -> str:
        """Send one message; its msg_id."""
        msg_id = uuid.uuid4().hex
        full = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "session": self.session,
            "username": "",
            "date": "2026-01-01T00:00:00.000000Z",
            "version": "5.4",
            **header,
        }
        parts: list[dict[str, Any]] = [full, {}, {}, content]
        if self.v1:
            blobs = [channel.encode(), *(json.dumps(p).encode() for p in parts)]
            offsets = [8 * (len(blobs) + 2)]
            for blob in blobs:
                offsets.append(offsets[-1] + len(blob))
            self.socket.send_binary(struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(blobs))
        else:
            names = ("header", "parent_header", "metadata", "content")
            self.socket.send(json.dumps({"channel": channel, **dict(zip(names, parts, strict=True)), "buffers": []}))
        return msg_id

    def receive(self, timeout: float | None = None) -> Message:
        """The next message of any channel."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            self.socket.settimeout(max(0.01, deadline - time.monotonic()))
            # recv() would answer pings by itself, each of which gives the wait its whole timeout anew.
            opcode, data = self.socket.recv_data(control_frame=True)
            if opcode in (websocket.ABNF.OPCODE_TEXT, websocket.ABNF.OPCODE_BINARY):
                break
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise websocket.WebSocketConnectionClosedException(f"the server closed the websocket: {data!r}")
        if opcode == websocket.ABNF.OPCODE_TEXT:
            data = data.decode()
        message = self.decode(data)
        self.seen.append(message)
        return message

    def decode(self, data: str | bytes) -> Message:
        if isinstance(data, str):
            parsed: Message = json.loads(data)
            return parsed
        if self.v1:
            (count,) = struct.unpack_from("<Q", data)
            offsets = struct.unpack_from(f"<{count}Q", data, 8)
            parts = [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
            names = ("header", "parent_header", "metadata", "content")
            message: Message = {n: json.loads(p) for n, p in zip(names, parts[1:5], strict=True)}
            return message | {"channel": parts[0].decode(), "buffers": parts[5:]}
        (count,) = struct.unpack_from("!I", data)
        offsets = [*struct.unpack_from(f"!{count}I", data, 4), len(data)]
        parts = [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
        legacy: Message = json.loads(parts[0])
        return legacy | {"buffers": parts[1:]}

    def collect(
        self,
        msg_id: str,
        *,
        until_idle: bool = True,
        answer: Callable[[Message], str] | None = None,
        timeout: float = 60,
    ) -> Result:
        """Everything that the request `msg_id` brings, up to its reply and its idle."""
        result, deadline = Result(), time.monotonic() + timeout
        idle = not until_idle
        # What belongs to other requests is for whoever collects those: replies and output overtake each other.
        came, self._others = deque(self._others), []
        while not (idle and result.reply):
            message = came.popleft() if came else self.receive(max(0.01, deadline - time.monotonic()))
            if message["parent_header"].get("msg_id") != msg_id:
                self._others.append(message)
                continue
            kind = message["header"]["msg_type"]
            if kind.endswith("_reply"):
                result.reply = message
                continue
            if kind == "input_request":
                assert answer is not None, "the cell asks for input"
                self.send("input_reply", {"value": answer(message), "status": "ok"}, channel="stdin")
            result.messages.append(message)
            idle = idle or (kind == "status" and message["content"]["execution_state"] == "idle")
        self._others += came
        return result

    def execute(self, code: str, *, answer: Callable[[Message], str] | None = None, timeout: float = 60) -> Result:
        """Run a cell to its end."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": answer is not None,
            "stop_on_error": True,
        }
        return self.collect(self.send("execute_request", content), answer=answer, timeout=timeout)
