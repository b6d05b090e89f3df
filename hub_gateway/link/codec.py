"""The link's frames: what an agent sends, taken apart, and what it is sent, put together.

Pure functions of bytes; the other end is launchers/agent.py, the layout is in docs/explanation/link-protocol.md.
An agent runs on a user's node and is not trusted: anything malformed raises ValueError, nothing else.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = [
    "CHANNELS",
    "MAX_BUFFERS",
    "MAX_MESSAGE_BYTES",
    "MAX_PARTS",
    "Batch",
    "Buffer",
    "Event",
    "Large",
    "decode",
    "decode_batch",
    "decode_event",
    "decode_large",
    "encode_ack",
    "encode_call",
    "encode_request",
]

Buffer: TypeAlias = Any
"""Anything that `bytes.join` takes: bytes, memoryview, zmq.Frame."""

CHANNELS = (b"shell", b"control", b"stdin", b"iopub")
BATCH, LARGE, EVENT = 1, 2, 3
TO_KERNEL, ACK, CALL = b"\x10", b"\x11", b"\x12"
REPLAY = 1
MAX_BUFFERS = 250
MAX_PARTS = 4 + MAX_BUFFERS
"""Of one message, both ways: the count is one byte."""
MAX_MESSAGE_BYTES = 512 * 2**20
"""Of one message from a kernel: the agent passes on no more."""
HEAD = struct.Struct("<BBQH")
U64 = struct.Struct("<Q")
MAX_SEQ = 2**63


@dataclass(frozen=True, slots=True)
class Batch:
    """Many small messages for one receiver: lengths in `head` from `HEAD.size` on, bytes in `payload`.

    They are numbered consecutively; the last is `last`. `to` is empty for every live session.
    Whether lengths and payload agree is found out by who walks them (`messages`, the encoders in `wire`).
    """

    to: bytes
    last: int
    count: int
    head: bytes
    payload: bytes
    replay: bool = False

    @property
    def first(self) -> int:
        """The number of the first message."""
        return self.last - self.count + 1

    def messages(self) -> Iterator[tuple[int, int, list[bytes]]]:
        """(number, channel, parts) of each; ValueError, possibly after some of them, where lengths do not agree."""
        head, payload = self.head, self.payload
        offset, position = HEAD.size, 0
        for number in range(self.first, self.last + 1):
            channel, lengths = message_lengths(head, offset)
            offset += 2 + 4 * len(lengths)
            parts = []
            for length in lengths:
                parts.append(payload[position : position + length])
                position += length
            if position > len(payload):
                raise ValueError("the payload is shorter than its lengths say")
            yield number, channel, parts
        if offset != len(head) or position != len(payload):
            raise ValueError("the frame is longer than its lengths say")


@dataclass(frozen=True, slots=True)
class Large:
    """One large message, as its own parts."""

    to: bytes
    seq: int
    channel: int
    parts: Sequence[Buffer]
    size: int
    replay: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the agent says of itself, its kernel or a session."""

    to: bytes
    data: Mapping[str, Any]


def message_lengths(head: bytes, offset: int) -> tuple[int, tuple[int, ...]]:
    """Channel and part lengths of the message whose description starts at `offset`."""
    if offset + 2 > len(head):
        raise ValueError("the frame ends within a message")
    channel, count = head[offset], head[offset + 1]
    if channel >= len(CHANNELS) or count < 4 or offset + 2 + 4 * count > len(head):
        raise ValueError("a message's description is malformed")
    return channel, struct.unpack_from(f"<{count}I", head, offset + 2)


def decode(frames: Sequence[Buffer]) -> Batch | Large | Event:
    """What an agent sent: [to, head, payload...]. Raises ValueError for anything malformed."""
    if len(frames) < 2:
        raise ValueError("no head")
    to, head = bytes(frames[0]), bytes(frames[1])
    kind = head[0] if head else 0
    if kind == BATCH and len(frames) == 3:
        return decode_batch(to, head, bytes(frames[2]))
    if kind == LARGE:
        return decode_large(to, head, frames[2:])
    if kind == EVENT and len(frames) == 2:
        return decode_event(to, head)
    raise ValueError("unknown kind of frame")


def decode_batch(to: bytes, head: bytes, payload: bytes) -> Batch:
    """A batch, of which only the fixed head is looked at."""
    if len(head) < HEAD.size:
        raise ValueError("the head is too short")
    _, flags, last, count = HEAD.unpack_from(head)
    if not 0 < count <= last < MAX_SEQ:
        raise ValueError("a batch has impossible numbers")
    return Batch(to, last, count, head, payload, bool(flags & REPLAY))


def decode_large(to: bytes, head: bytes, parts: Sequence[Buffer]) -> Large:
    """A large message; its lengths are compared with its parts."""
    if len(head) < HEAD.size:
        raise ValueError("the head is too short")
    _, flags, seq, count = HEAD.unpack_from(head)
    channel, lengths = message_lengths(head, HEAD.size)
    if count != 1 or not 0 < seq < MAX_SEQ or lengths != tuple(map(len, parts)):
        raise ValueError("a large message does not agree with its head")
    return Large(to, seq, channel, parts, sum(lengths), bool(flags & REPLAY))


def decode_event(to: bytes, head: bytes) -> Event:
    """An event: a JSON object with a member `event`."""
    try:
        data = json.loads(head[1:])
    except RecursionError:
        raise ValueError("an event is nested too deeply") from None
    if not isinstance(data, dict) or not isinstance(data.get("event"), str):
        raise ValueError("an event must be an object that says which")
    return Event(to, data)


def encode_request(session: bytes, channel: int, origin: bytes, parts: Sequence[bytes]) -> list[bytes]:
    """A client's message for the kernel. `origin` is the session in its header, to which the kernel will reply."""
    return [TO_KERNEL, session, bytes((channel,)), origin, *parts]


def encode_ack(processed: int, cursors: Iterable[tuple[bytes, int]]) -> list[bytes]:
    """Bytes of payload worked off on this connection, and how far sessions have been served."""
    frames = [ACK, U64.pack(processed)]
    for session, cursor in cursors:
        frames += (session, U64.pack(cursor))
    return frames


def encode_call(op: str, **fields: Any) -> list[bytes]:
    """A control operation."""
    return [CALL, json.dumps({"op": op, **fields}).encode()]
