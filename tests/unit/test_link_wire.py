"""Websocket framing: every dialect says what the kernel said, and nothing that a client sends does any harm."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_gateway.link import codec, wire
from hub_gateway.link.wire import Dialect
from tests.harness.link import load_agent, read_v1, websocket_frames

agent = load_agent()
json_objects = st.dictionaries(
    st.text(max_size=6),
    st.text(max_size=12) | st.integers() | st.none() | st.lists(st.integers(), max_size=3),
    max_size=4,
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[int, list[bytes]]:
    header = {"msg_id": draw(st.text(max_size=12)), "msg_type": draw(st.text(max_size=8)), **draw(json_objects)}
    ascii_only = draw(st.booleans())
    objects = [header, draw(json_objects), draw(json_objects), draw(json_objects)]
    parts = [json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "replace") for value in objects]
    return draw(st.integers(0, 3)), parts + draw(st.lists(st.binary(max_size=20), max_size=3))


def make_batch(found: list[tuple[int, list[bytes]]], first: int = 1) -> codec.Batch:
    entry = agent.make_entry(first, b"", found)
    batch = codec.decode([b"", entry.head, *entry.payload])
    assert isinstance(batch, codec.Batch)
    return batch


def read_json(opcode: int, frame: bytes) -> dict[str, Any]:
    """A message of the old form, with its buffers where it is binary."""
    if opcode == 1:
        text: dict[str, Any] = json.loads(frame.decode())
        return text
    (count,) = struct.unpack_from("!I", frame)
    offsets = [*struct.unpack_from(f"!{count}I", frame, 4), len(frame)]
    pieces = [frame[offsets[i] : offsets[i + 1]] for i in range(count)]
    return {**json.loads(pieces[0]), "buffers": pieces[1:]}


def expected(channel: int, parts: list[bytes]) -> dict[str, Any]:
    names = ("header", "parent_header", "metadata", "content")
    told: dict[str, Any] = {name: json.loads(part) for name, part in zip(names, parts[:4], strict=True)}
    return {**told, "channel": codec.CHANNELS[channel].decode(), "buffers": parts[4:]}


@given(st.lists(messages(), min_size=1, max_size=12), st.integers(0, 11))
def test_a_batch_says_the_same_in_every_dialect(found: list[tuple[int, list[bytes]]], skip: int) -> None:
    skip = min(skip, len(found))
    batch = make_batch(found, first=7)
    wanted = [expected(channel, parts) for channel, parts in found[skip:]]
    v1 = [read_v1(frame) for _, frame in websocket_frames(wire.encode_batch(Dialect.V1, batch, skip))]
    assert v1 == wanted
    numbered = [frame for _, frame in websocket_frames(wire.encode_batch(Dialect.NUMBERED, batch, skip))]
    assert [struct.unpack_from("<Q", frame)[0] for frame in numbered] == list(range(7 + skip, 7 + len(found)))
    assert [read_v1(frame[8:]) for frame in numbered] == wanted
    old = [read_json(*frame) for frame in websocket_frames(wire.encode_batch(Dialect.JSON, batch, skip))]
    for message, want in zip(old, wanted, strict=True):
        assert message.pop("msg_id") == want["header"]["msg_id"]
        assert message.pop("msg_type") == want["header"]["msg_type"]
        assert message == want
    notes = wire.Notes()
    stock = list(websocket_frames(wire.encode_batch(Dialect.JSON_TEXT_ONLY, batch, skip, notes)))
    assert all(opcode == 1 for opcode, _ in stock)
    assert [json.loads(frame)["content"] for _, frame in stock] == [want["content"] for want in wanted]
    assert notes.buffers == sum(1 for want in wanted if want["buffers"])


@given(messages(), st.integers(1, 2**50))
def test_a_single_message_is_framed_as_in_a_batch(message: tuple[int, list[bytes]], seq: int) -> None:
    batch = make_batch([message], first=seq)
    for dialect in Dialect:
        assert wire.encode(dialect, *message, seq) == wire.encode_batch(dialect, batch)


def test_text_that_is_not_utf8_does_not_break_the_websocket() -> None:
    parts = [b'{"msg_id": "1", "msg_type": "stream"}', b"{}", b"{}", b'{"text": "\xff\xfe"}']
    for data in (wire.encode(Dialect.JSON, 3, parts), wire.encode_batch(Dialect.JSON, make_batch([(3, parts)]))):
        [(opcode, frame)] = websocket_frames(data)
        assert opcode == 1 and json.loads(frame.decode())["content"] == {"text": "\ufffd\ufffd"}


def test_the_stock_client_gets_long_output_in_pieces_and_a_notice_for_the_rest() -> None:
    header = b'{"msg_id": "1", "msg_type": "stream"}'
    text = "\u20ac\x00x" * 5_000_000
    content = json.dumps({"name": "stdout", "text": text}).encode()
    frames = list(websocket_frames(wire.encode(Dialect.JSON_TEXT_ONLY, 3, [header, b"{}", b"{}", content])))
    assert all(len(frame) < 10 * 2**20 for _, frame in frames)
    assert "".join(json.loads(frame)["content"]["text"] for _, frame in frames) == text
    notes = wire.Notes()
    picture = json.dumps({"data": {"image/png": "x" * 11 * 2**20}}).encode()
    told = wire.encode(Dialect.JSON_TEXT_ONLY, 3, [header, b'{"msg_id": "p"}', b"{}", picture], None, notes)
    [(_, frame)] = websocket_frames(told)
    notice = json.loads(frame)
    assert notice["parent_header"] == {"msg_id": "p"} and "11.5 MB was left out" in notice["content"]["text"]
    assert notes.too_large == 1


@settings(max_examples=300)
@given(st.binary(max_size=120), st.binary(max_size=200), st.integers(1, 5))
def test_a_malformed_batch_is_one_value_error(descriptions: bytes, payload: bytes, count: int) -> None:
    batch = codec.Batch(b"", 10, count, codec.HEAD.pack(1, 0, 10, count) + descriptions, payload)
    for dialect in Dialect:
        with contextlib.suppress(ValueError):
            list(websocket_frames(wire.encode_batch(dialect, batch)))


@settings(max_examples=500)
@given(
    st.one_of(st.binary(max_size=200), st.text(max_size=200), json_objects.map(json.dumps)), st.sampled_from(Dialect)
)
def test_anything_from_a_client_is_a_message_or_one_value_error(data: bytes | str, dialect: Dialect) -> None:
    try:
        message = wire.decode(data, dialect)
        assert len(message.parts) >= 4
    except ValueError:
        pass


@pytest.mark.parametrize(
    "data", ["[" * 100_000, '{"header":' * 50_000, b"\x01" + b"\x00" * 7 + b"\xff" * 8, b"\xff" * 64]
)
def test_hostile_frames_are_one_value_error(data: bytes | str) -> None:
    for dialect in Dialect:
        with pytest.raises(ValueError):
            wire.decode(data, dialect)


@given(messages())
def test_what_a_client_sends_is_read(message: tuple[int, list[bytes]]) -> None:
    _, parts = message
    [(_, frame)] = websocket_frames(wire.encode(Dialect.V1, 0, parts))
    read = wire.decode(frame, Dialect.V1)
    assert read.channel == "shell" and read.parts == parts
    [(opcode, frame)] = websocket_frames(wire.encode(Dialect.JSON, 2, parts))
    read = wire.decode(frame.decode() if opcode == 1 else frame, Dialect.JSON)
    assert read.channel == "stdin" and read.parts[4:] == parts[4:]
    assert [json.loads(part) for part in read.parts[:4]] == [json.loads(part) for part in parts[:4]]


@pytest.mark.parametrize("dialect", [Dialect.V1, Dialect.JSON])
@pytest.mark.parametrize("buffers", [250, 251, 5000])
def test_too_many_buffers_are_refused_with_a_sentence(dialect: Dialect, buffers: int) -> None:
    parts = [b'{"msg_id": "1", "msg_type": "comm_msg"}', b"{}", b"{}", b"{}", *[b"x"] * buffers]
    [(_, frame)] = websocket_frames(wire.encode(dialect, 0, parts))
    if buffers <= codec.MAX_BUFFERS:
        assert wire.decode(frame, dialect).parts == parts
        return
    with pytest.raises(wire.OverLimit, match=f"it has {buffers} binary buffers, and may have 250") as refused:
        wire.decode(frame, dialect)
    assert refused.value.head is not None and refused.value.head.msg_type == "comm_msg"


def test_what_must_be_parsed_is_limited() -> None:
    """While one client's message is parsed, everybody waits."""
    header = {"msg_id": "1", "msg_type": "execute_request"}
    large = json.dumps({"header": header, "channel": "shell", "content": {"code": "x" * 11 * 2**20}})
    binary = struct.pack("!II", 1, 8) + large.encode()
    for data in (large, binary):
        with pytest.raises(wire.OverLimit, match=r"11\.5 MB was refused: .* it may have 10 MiB\. Use v1\."):
            wire.decode(data, Dialect.JSON)
    [(_, frame)] = websocket_frames(
        wire.encode(Dialect.V1, 0, [json.dumps(header).encode(), b"{}", b"{}", b"x" * 2**24])
    )
    assert len(wire.decode(frame, Dialect.V1).parts[3]) == 2**24, "content is not parsed in this form"
    for name in ("header", "parent_header"):
        message = {"header": header, "parent_header": {}, name: {**header, "x": "y" * 2**16}}
        parts = [json.dumps(part).encode() for part in message.values()]
        [(_, frame)] = websocket_frames(wire.encode(Dialect.V1, 0, [*parts, b"{}", b"{}"]))
        for dialect, sent in ((Dialect.V1, frame), (Dialect.JSON, json.dumps(message))):
            with pytest.raises(wire.OverLimit, match="64 KiB"):
                wire.decode(sent, dialect)


def test_a_client_may_not_publish() -> None:
    [(_, frame)] = websocket_frames(wire.encode(Dialect.V1, 3, [b'{"msg_id":"1","msg_type":"x"}', b"{}", b"{}", b"{}"]))
    with pytest.raises(ValueError, match="shell, control and stdin only"):
        wire.decode(frame, Dialect.V1)
