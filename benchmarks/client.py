"""A minimal blocking HTTP and websocket client, so that the client is never the limit.

During a flood it only receives; that every message came, once and in order, is checked on the received bytes after the
clock was stopped.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["V1", "Channels", "Endpoint", "Http", "Message", "Transfer", "execute_content", "new_header"]

V1 = "v1.kernel.websocket.jupyter.org"
Message = dict[str, Any]
STREAM_NUMBER = re.compile(rb'"text": ?"(\d{8})')
DISPLAY_NUMBER = re.compile(rb'"text/plain": ?"(\d{8})')
STATUS_SIZE = 1500  # no status message is longer
HEAD = 4096  # the number of a large message stands within its first bytes
TIMEOUT = 300


@dataclass(frozen=True)
class Endpoint:
    """Where a gateway listens, and the headers that let the caller in."""

    host: str
    port: int
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Transfer:
    """One run of the flood kernel: seconds from request to `idle`, and the numbers of the messages that came."""

    seconds: float
    numbers: list[int]
    connection_bytes: int = 0

    def complete(self, count: int) -> bool:
        """Whether exactly the messages 0 to count - 1 came, in order."""
        return self.numbers == list(range(count))


def new_header(msg_type: str, session: str) -> Message:
    """A Jupyter message header."""
    return {
        "msg_id": uuid.uuid4().hex,
        "msg_type": msg_type,
        "session": session,
        "username": "bench",
        "date": "2026-01-01T00:00:00.000000Z",
        "version": "5.3",
    }


def execute_content(code: str) -> Message:
    """The content of an execute_request that leaves nothing in the history."""
    return {
        "code": code,
        "silent": False,
        "store_history": False,
        "user_expressions": {},
        "allow_stdin": False,
        "stop_on_error": True,
    }


def connect(endpoint: Endpoint, receive_buffer: int | None = None) -> socket.socket:
    """A blocking TCP connection whose reads end after TIMEOUT."""
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", TIMEOUT, 0))
    sock.connect((endpoint.host, endpoint.port))
    return sock


def request_head(endpoint: Endpoint, method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {endpoint.host}:{endpoint.port}"]
    lines += [f"{name}: {value}" for name, value in {**endpoint.headers, **headers}.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def response_head(data: bytes) -> tuple[int, dict[str, str]]:
    status, *lines = data.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return int(status.split()[1]), {name.strip().lower(): value.strip() for name, value in pairs}


class Http:
    """One keep-alive connection."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.sock = connect(endpoint)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Http:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and body of one request."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data))} if method != "GET" else {}
        self.sock.sendall(request_head(self.endpoint, method, path, headers) + data)
        return self.response()

    def response(self) -> tuple[int, bytes]:
        buffer = b""
        while b"\r\n\r\n" not in buffer:
            buffer += self.more()
        head, _, rest = buffer.partition(b"\r\n\r\n")
        status, headers = response_head(head)
        if headers.get("transfer-encoding", "") == "chunked":
            raise ValueError("a chunked answer was not expected")
        length = 0 if status == 204 else int(headers.get("content-length", 0))
        while len(rest) < length:
            rest += self.more()
        return status, rest

    def more(self) -> bytes:
        data = self.sock.recv(1 << 16)
        if not data:
            raise ConnectionError("the gateway closed the connection")
        return data


class Channels:
    """One kernel websocket. `v1`: the binary subprotocol; otherwise the legacy JSON framing."""

    def __init__(self, endpoint: Endpoint, kernel_id: str, *, v1: bool, receive_buffer: int | None = None) -> None:
        self.v1 = v1
        self.session = uuid.uuid4().hex
        self.sock = connect(endpoint, receive_buffer)
        headers = {
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        }
        if v1:
            headers["Sec-WebSocket-Protocol"] = V1
        path = f"/api/kernels/{kernel_id}/channels?session_id={self.session}"
        self.sock.sendall(request_head(endpoint, "GET", path, headers))
        data = b""
        while b"\r\n\r\n" not in data:
            data += self.some()
        head, _, rest = data.partition(b"\r\n\r\n")
        status, answered = response_head(head)
        if status != 101 or (v1 and answered.get("sec-websocket-protocol") != V1):
            raise ConnectionError(f"no websocket: {data[:500]!r}")
        self.pending = bytearray(rest)
        self.scratch = bytearray(1 << 21)

    def __enter__(self) -> Channels:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def some(self, size: int = 1 << 18) -> bytes:
        data = self.sock.recv(size)
        if not data:
            raise ConnectionError("the gateway closed the websocket")
        return data

    def frame(self, opcode: int, payload: bytes) -> None:
        """Send one frame, masked with zeros: as valid as any other mask, and without cost to the client."""
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 128 | opcode, 128 | size)
        elif size < 65536:
            head = struct.pack("!BBH", 128 | opcode, 128 | 126, size)
        else:
            head = struct.pack("!BBQ", 128 | opcode, 128 | 127, size)
        self.sock.sendall(head + bytes(4) + payload)

    def send(self, msg_type: str, content: Message, channel: str = "shell") -> str:
        """Send one message; its msg_id."""
        header = new_header(msg_type, self.session)
        parts: list[Message] = [header, {}, {}, content]
        if self.v1:
            blobs = [channel.encode(), *(json.dumps(part).encode() for part in parts)]
            offsets = [8 * (len(blobs) + 2)]
            for blob in blobs:
                offsets.append(offsets[-1] + len(blob))
            self.frame(2, struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(blobs))
        else:
            names = ("header", "parent_header", "metadata", "content")
            message = {"channel": channel, **dict(zip(names, parts, strict=True)), "buffers": []}
            self.frame(1, json.dumps(message).encode())
        return str(header["msg_id"])

    def exactly(self, size: int) -> memoryview:
        """The next `size` bytes, in a buffer that the next call overwrites."""
        if size > len(self.scratch):
            self.scratch = bytearray(size)
        view = memoryview(self.scratch)[:size]
        have = min(size, len(self.pending))
        if have:
            view[:have] = self.pending[:have]
            del self.pending[:have]
        while have < size:
            got = self.sock.recv_into(view[have:], size - have, socket.MSG_WAITALL)
            if not got:
                raise ConnectionError("the gateway closed the websocket")
            have += got
        return view

    def receive(self) -> memoryview:
        """The payload of the next data frame; valid until the next call."""
        while True:
            first, second = self.exactly(2)
            size = second & 127
            if size == 126:
                (size,) = struct.unpack("!H", self.exactly(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self.exactly(8))
            payload = self.exactly(size)
            if not first & 128 or first & 15 == 0:
                raise ValueError("fragmented frames are not expected")
            if first & 15 in (1, 2):
                return payload
            if first & 15 == 8:
                raise ConnectionError(f"the gateway closed the websocket: {bytes(payload)!r}")
            if first & 15 == 9:
                self.frame(10, bytes(payload))

    def message(self) -> Message:
        """The next message, parsed."""
        data = bytes(self.receive())
        if not self.v1:
            parsed: Message = json.loads(data)
            return parsed
        (count,) = struct.unpack_from("<Q", data)
        offsets = struct.unpack_from(f"<{count}Q", data, 8)
        parts = [data[a:b] for a, b in itertools.pairwise(offsets)]
        names = ("header", "parent_header", "metadata", "content")
        message: Message = {name: json.loads(part) for name, part in zip(names, parts[1:5], strict=True)}
        message["channel"] = parts[0].decode()
        return message

    def execute(self, code: str) -> float:
        """Run a cell; seconds from the request to its reply. Returns when `idle` came too."""
        started = time.perf_counter()
        msg_id = self.send("execute_request", execute_content(code))
        replied, idle = 0.0, False
        while not (replied and idle):
            message = self.message()
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["header"]["msg_type"] == "execute_reply":
                replied = time.perf_counter() - started
            elif message["content"].get("execution_state") == "idle":
                idle = True
        return replied

    def kernel_info(self) -> None:
        """Ask for kernel_info and wait for the reply."""
        msg_id = self.send("kernel_info_request", {}).encode()
        while True:
            payload = bytes(self.receive())
            if b"kernel_info_reply" in payload and msg_id in payload:
                return

    def flood(self, code: str) -> Transfer:
        """Run a flood of small messages: pings are answered at once, the rest is kept and looked at afterwards."""
        started = time.perf_counter()
        msg_id = self.send("execute_request", execute_content(code)).encode()
        frames: list[bytes] = []
        rest = bytes(self.pending)
        self.pending.clear()
        seconds, replied, tail = 0.0, False, b""
        while not (seconds and replied):
            data = self.some()
            near = tail + data
            at = near.find(b'idle"') if not seconds else -1
            if at >= 0 and near.find(msg_id, max(0, at - STATUS_SIZE), at) >= 0:  # not that of an earlier request
                seconds = time.perf_counter() - started
            replied = replied or near.find(b"execute_reply") >= 0
            tail = near[-STATUS_SIZE:]
            rest += data
            end = self.walk(rest)
            frames.append(rest[:end])
            rest = rest[end:]
        self.pending += rest
        received = b"".join(frames)
        numbers = [int(found) for found in STREAM_NUMBER.findall(received)]
        return Transfer(seconds, numbers, len(received))

    def walk(self, data: bytes) -> int:
        """Follow the frames through `data` and answer pings; the end of the last whole frame."""
        at, size = 0, len(data)
        while at + 2 <= size:
            length, head = data[at + 1], 2
            if length == 126:
                length, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
            elif length == 127:
                length, head = int.from_bytes(data[at + 2 : at + 10], "big"), 10
            end = at + head + length
            if end > size:
                break
            if data[at] == 0x89:
                self.frame(10, data[at + head : end])
            elif data[at] not in (0x81, 0x82):
                raise ValueError(f"not a message: {data[at : at + 20]!r}")
            at = end
        return at

    def large(self, code: str) -> Transfer:
        """Run a flood of large messages; each is received whole and let go."""
        started = time.perf_counter()
        msg_id = self.send("execute_request", execute_content(code)).encode()
        numbers: list[int] = []
        seconds, replied, total = 0.0, False, 0
        while not (seconds and replied):
            payload = self.receive()
            total += len(payload)
            head = bytes(payload[:HEAD])
            found = DISPLAY_NUMBER.search(head)
            if found:
                numbers.append(int(found[1]))
            elif head.find(b'idle"') >= 0 and head.find(msg_id) >= 0:
                seconds = time.perf_counter() - started
            elif head.find(b"execute_reply") >= 0:
                replied = True
        return Transfer(seconds, numbers, total)
