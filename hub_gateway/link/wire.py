"""Messages as they go over a client's websocket, both ways, by bytes.

v1 is https://jupyter-server.readthedocs.io/en/latest/developers/websocket-protocols.html
(v1.kernel.websocket.jupyter.org); JSON is the form before it, which jupyter_server's gateway client speaks.
Nothing of a message is parsed on its way to a client: JSON is spliced from the bytes as they came.
Encoders return complete websocket frames (RFC 6455, unmasked), any number of them joined.
"""

from __future__ import annotations

import enum
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hub_gateway.link import messages
from hub_gateway.link.codec import CHANNELS, HEAD, MAX_BUFFERS, Batch, Buffer, message_lengths

__all__ = ["V1_SUBPROTOCOL", "ClientMessage", "Dialect", "Notes", "OverLimit", "decode", "encode", "encode_batch"]

V1_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
TEXT_LIMIT = 10 * 2**20 - 64 * 2**10
"""tornado's websocket client refuses more than 10 MiB in one message and closes the connection."""
JSON_LIMIT = 10 * 2**20
"""Of a client's message in the old form, which has to be parsed while everybody waits. Buffers do not count."""
HEADER_LIMIT = 64 * 2**10

_BINARY, _TEXT = 0x82, 0x81
_CLIENT_CHANNELS = frozenset(("shell", "control", "stdin"))
_IDENT = re.compile(rb'\{"msg_id": ?"[^"\\{}]*", ?"msg_type": ?"[^"\\{}]*"')
_U64 = struct.Struct("<Q")


class Dialect(enum.Enum):
    """How a websocket speaks."""

    V1 = "v1"
    JSON = "json"
    JSON_TEXT_ONLY = "json-text-only"
    """JSON for jupyter_server's own gateway client, which dies of a binary frame and of more than 10 MiB."""
    NUMBERED = "numbered"
    """v1, each message prefixed by its number as `<Q` (0 for what has none), with the agent's mark: the companion."""


@dataclass
class Notes:
    """What a dialect could not say, for the notice to the user."""

    buffers: int = 0
    too_large: int = 0


# -- to the client


@lru_cache(maxsize=8192)
def _frame_head(opcode: int, length: int) -> bytes:
    if length < 126:
        return bytes((opcode, length))
    if length < 65536:
        return struct.pack("!BBH", opcode, 126, length)
    return struct.pack("!BBQ", opcode, 127, length)


def _v1_head(channel: int, lengths: Sequence[int]) -> bytes:
    """Offsets and channel: all of a v1 message that is not the kernel's own bytes."""
    name = CHANNELS[channel]
    offset = 8 * (len(lengths) + 3)
    offsets = [offset, offset + len(name)]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + name


@lru_cache(maxsize=8192)
def _v1_prefix(description: bytes, numbered: bool) -> tuple[bytes, bytes, int]:
    """Websocket head, v1 head and body length of a message with this description in a batch's head.

    Messages of a flood are alike: the same few descriptions come again and again.
    """
    channel, lengths = message_lengths(description, 0)
    head, size = _v1_head(channel, lengths), sum(lengths)
    return _frame_head(_BINARY, len(head) + size + (8 if numbered else 0)), head, size


def _v1_batch(batch: Batch, skip: int, numbered: bool, mark: int) -> bytes:
    head, payload = batch.head, batch.payload
    offset, position, end = HEAD.size, 0, len(head)
    out: list[bytes] = []
    append = out.append
    first = mark + batch.first
    start = first + skip
    for number in range(first, mark + batch.last + 1):
        if offset + 2 > end:
            raise ValueError("the frame ends within a message")
        stop = offset + 2 + 4 * head[offset + 1]
        frame_head, v1_head, size = _v1_prefix(head[offset:stop], numbered)
        if number >= start:
            append(frame_head)
            if numbered:
                append(_U64.pack(number))
            append(v1_head)
            append(payload[position : position + size])
        offset = stop
        position += size
    if offset != end or position != len(payload):
        raise ValueError("the frame does not agree with its lengths")
    return b"".join(out)


def _ident(header: bytes) -> bytes:
    """`"msg_id": ..., "msg_type": ...` of a header, which clients of the old form want at the top too."""
    found = _IDENT.match(header)
    if found is not None:
        return found[0][1:]
    try:
        value = json.loads(header)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        value = {}
    both = {"msg_id": value.get("msg_id"), "msg_type": value.get("msg_type")}
    return json.dumps(both).encode()[1:-1]


def _json_pieces(channel: int, parts: Sequence[Buffer]) -> list[Buffer]:
    header = bytes(parts[0])
    return [
        b'{"header":',
        header,
        b",",
        _ident(header),
        b',"parent_header":',
        parts[1],
        b',"metadata":',
        parts[2],
        b',"content":',
        parts[3],
        b',"channel":"%b","buffers":[]}' % CHANNELS[channel],
    ]


def _text_frame(pieces: list[Buffer]) -> bytes:
    """A text frame; what is not UTF-8 is replaced, since a client must close the connection over it."""
    length = sum(map(len, pieces))
    frame = b"".join([_frame_head(_TEXT, length), *pieces])
    start = len(frame) - length
    if not frame.isascii():
        body = memoryview(frame)[start:]
        try:
            str(body, "utf-8")
        except UnicodeDecodeError:
            text = bytes(body).decode("utf-8", "replace").encode()
            return _frame_head(_TEXT, len(text)) + text
    return frame


def _json_message(channel: int, parts: Sequence[Buffer]) -> bytes:
    pieces = _json_pieces(channel, parts)
    if len(parts) == 4:
        return _text_frame(pieces)
    # The old form's way with buffers: a binary frame, !I count and offsets, the JSON first.
    lengths = [sum(map(len, pieces)), *map(len, parts[4:])]
    offset = 4 * (len(lengths) + 1)
    offsets = []
    for length in lengths:
        offsets.append(offset)
        offset += length
    if offset >= 2**32:
        raise ValueError("a message is too large for the JSON form")
    table = struct.pack(f"!{len(lengths) + 1}I", len(lengths), *offsets)
    return b"".join([_frame_head(_BINARY, offset), table, *pieces, *parts[4:]])


def _text_only_message(channel: int, parts: Sequence[Buffer], notes: Notes) -> bytes:
    """JSON text whatever it takes: without buffers, long output in pieces, other long messages as a notice."""
    if len(parts) > 4:
        notes.buffers += 1
        parts = parts[:4]
    if sum(map(len, parts)) <= TEXT_LIMIT:
        return _json_message(channel, parts)
    content = _object(bytes(parts[3]))
    if content.keys() == {"name", "text"} and isinstance(content["text"], str):
        text, step = content["text"], TEXT_LIMIT // 8
        frames = []
        for start in range(0, len(text), step):
            piece = json.dumps({"name": content["name"], "text": text[start : start + step]}).encode()
            frames.append(_json_message(channel, [*parts[:3], piece]))
        return b"".join(frames)
    notes.too_large += 1
    size = sum(map(len, parts)) / 1e6
    notice = (
        f"\n[A message of {size:.1f} MB was left out: the notebook server's gateway client takes no more than 10 MiB. "
        "The gateway's companion connection class lifts this limit.]\n"
    )
    if len(parts[1]) > TEXT_LIMIT:
        return b""
    return _json_message(CHANNELS.index(b"iopub"), messages.stream(notice, bytes(parts[1])))


def _json_batch(batch: Batch, skip: int, notes: Notes | None) -> bytes:
    out: list[bytes] = []
    start = batch.first + skip
    ascii_only = batch.payload.isascii()
    tails = _JSON_TAILS
    for number, channel, parts in batch.messages():
        if number < start:
            continue
        if len(parts) == 4 and ascii_only:
            header, parent, metadata, content = parts
            found = _IDENT.match(header)
            ident = found[0][1:] if found is not None else _ident(header)
            text = b'{"header":%b,%b,"parent_header":%b,"metadata":%b,"content":%b%b' % (
                header,
                ident,
                parent,
                metadata,
                content,
                tails[channel],
            )
            out.append(_frame_head(_TEXT, len(text)))
            out.append(text)
        elif notes is None:
            out.append(_json_message(channel, parts))
        else:
            out.append(_text_only_message(channel, parts, notes))
    return b"".join(out)


_JSON_TAILS = tuple(b',"channel":"%b","buffers":[]}' % name for name in CHANNELS)


def encode_batch(dialect: Dialect, batch: Batch, skip: int = 0, notes: Notes | None = None, mark: int = 0) -> bytes:
    """All messages of a batch but the first `skip`, as joined websocket frames. ValueError for a malformed batch.

    `mark` is added to their numbers, where the dialect has them.
    """
    if dialect is Dialect.V1 or dialect is Dialect.NUMBERED:
        return _v1_batch(batch, skip, dialect is Dialect.NUMBERED, mark)
    return _json_batch(batch, skip, (notes or Notes()) if dialect is Dialect.JSON_TEXT_ONLY else None)


def encode(
    dialect: Dialect, channel: int, parts: Sequence[Buffer], seq: int | None = None, notes: Notes | None = None
) -> bytes:
    """One message as websocket frames. `parts` is [header, parent_header, metadata, content, *buffers]."""
    if dialect is Dialect.JSON:
        return _json_message(channel, parts)
    if dialect is Dialect.JSON_TEXT_ONLY:
        return _text_only_message(channel, parts, notes or Notes())
    head = _v1_head(channel, [len(part) for part in parts])
    if dialect is Dialect.NUMBERED:
        head = _U64.pack(seq or 0) + head
    length = len(head) + sum(map(len, parts))
    return b"".join([_frame_head(_BINARY, length), head, *parts])


# -- from the client


@dataclass(frozen=True, slots=True)
class ClientMessage:
    """What a client sent: its channel, [header, parent_header, metadata, content, *buffers], and the header parsed."""

    channel: str
    parts: list[bytes]
    header: dict[str, Any]

    @property
    def session(self) -> str:
        """The session in the header, which the kernel's replies will carry."""
        return str(self.header.get("session") or "")

    @property
    def msg_type(self) -> str:
        """The message's type."""
        return str(self.header.get("msg_type") or "")


class OverLimit(ValueError):
    """A message that is one, but exceeds a limit; its text is a sentence.

    `head` is the message without content and buffers, so that it can be answered, where that much was read.
    """

    def __init__(self, sentence: str, head: ClientMessage | None = None) -> None:
        super().__init__(sentence)
        self.head = head


def _object(data: bytes | str) -> dict[str, Any]:
    """A JSON object, or {}."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def decode(data: bytes | str, dialect: Dialect) -> ClientMessage:
    """A client's message; ValueError, with a sentence, for anything that is not one, OverLimit for what is too much."""
    if dialect is Dialect.V1 or dialect is Dialect.NUMBERED:
        if isinstance(data, str):
            raise ValueError("a text frame came where the protocol has binary ones")
        channel, parts, buffers = _decode_v1(data)
    else:
        channel, parts, buffers = _decode_json(data)
    if channel not in _CLIENT_CHANNELS:
        raise ValueError("a client may use the channels shell, control and stdin only")
    if len(parts[0]) > HEADER_LIMIT or len(parts[1]) > HEADER_LIMIT:
        raise OverLimit(f"A message was refused: its headers may have {HEADER_LIMIT >> 10} KiB each.")
    header = _object(parts[0])
    if not isinstance(header.get("msg_id"), str) or not isinstance(header.get("msg_type"), str):
        raise ValueError("the message's header has no msg_id or no msg_type")
    message = ClientMessage(channel, parts, header)
    if buffers > MAX_BUFFERS:
        sentence = f"A message was refused: it has {buffers} binary buffers, and may have {MAX_BUFFERS}."
        raise OverLimit(sentence, message)
    return message


def _decode_v1(data: bytes) -> tuple[str, list[bytes], int]:
    """Channel, parts and number of buffers; the buffers are left out where they are too many."""
    if len(data) < 8:
        raise ValueError("the frame is too short for a message")
    count = _U64.unpack_from(data)[0]
    if count < 6 or 8 * (count + 1) > len(data):
        raise ValueError("the frame's table of offsets is malformed")
    buffers = count - 6
    read = 6 if buffers > MAX_BUFFERS else count
    offsets = struct.unpack_from(f"<{read}Q", data, 8)
    end = _U64.unpack_from(data, 8 * count)[0]
    if offsets[0] != 8 * (count + 1) or end != len(data) or any(map(int.__gt__, offsets, (*offsets[1:], end))):
        raise ValueError("the frame's offsets do not agree with its length")
    parts = [data[offsets[i] : offsets[i + 1]] for i in range(read - 1)]
    return parts[0].decode("utf-8", "replace"), parts[1:], buffers


def _decode_json(data: bytes | str) -> tuple[str, list[bytes], int]:
    """Channel, parts and number of buffers; the buffers are left out where they are too many."""
    buffers: list[bytes] = []
    count = 0
    if isinstance(data, bytes):
        data, buffers, count = _split_buffers(data)
    if len(data) > JSON_LIMIT:
        raise OverLimit(
            f"A message of {len(data) / 1e6:.1f} MB was refused: in the old JSON form of the websocket it may have "
            f"{JSON_LIMIT >> 20} MiB. Use {V1_SUBPROTOCOL}."
        )
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("the frame is not JSON") from None
    if not isinstance(message, dict):
        raise ValueError("the frame is not a JSON object")
    parts = []
    for name in ("header", "parent_header", "metadata", "content"):
        value = message.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"the message's {name} is not an object")
        parts.append(_dump(value))
    channel = message.get("channel")
    return channel if isinstance(channel, str) else "shell", parts + buffers, count


def _dump(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None


def _split_buffers(data: bytes) -> tuple[bytes, list[bytes], int]:
    """The old form's binary frame: !I count, offsets, the JSON, the buffers. Too many of them are only counted."""
    if len(data) < 8:
        raise ValueError("the frame is too short for a message")
    count = struct.unpack_from("!I", data)[0]
    if count < 1 or 4 * (count + 1) > len(data):
        raise ValueError("the frame's table of offsets is malformed")
    read = count if count - 1 <= MAX_BUFFERS else 1
    offsets = [*struct.unpack_from(f"!{min(count, read + 1)}I", data, 4), len(data)]
    if offsets[0] < 4 * (count + 1) or any(map(int.__gt__, offsets, offsets[1:])):
        raise ValueError("the frame's offsets do not agree with its length")
    pieces = [data[offsets[i] : offsets[i + 1]] for i in range(read)]
    return pieces[0], pieces[1:], count - 1
