"""The link's frames: what one end writes the other reads, and nothing that arrives does any harm."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_gateway.link import codec
from tests.harness.link import load_agent

agent = load_agent()
small = st.binary(max_size=40)
parts_lists = st.tuples(st.integers(0, 3), st.lists(small, min_size=4, max_size=9))
batches = st.lists(parts_lists, min_size=1, max_size=30)


@given(batches, st.integers(1, 2**40), st.binary(max_size=8))
def test_a_batch_of_the_agent_is_read_by_the_gateway(
    messages: list[tuple[int, list[bytes]]], first: int, to: bytes
) -> None:
    entry = agent.make_entry(first, to, messages)
    decoded = codec.decode([to, entry.head, *entry.payload])
    assert isinstance(decoded, codec.Batch)
    assert decoded.to == to and decoded.first == first
    assert [(channel, parts) for _, channel, parts in decoded.messages()] == messages
    assert [number for number, _, _ in decoded.messages()] == list(range(first, first + len(messages)))
    # and by the agent itself, when it makes room
    assert [(channel, parts) for _, channel, parts in entry.messages()] == messages


@given(parts_lists, st.integers(1, 2**40), st.booleans())
def test_a_large_message_arrives_as_its_own_parts(message: tuple[int, list[bytes]], seq: int, replay: bool) -> None:
    channel, parts = message
    sent = []
    configuration = agent.Settings(
        {
            "version": 1,
            "kernel_id": "k",
            "gateway_id": "g",
            "argv": ["k"],
            "runtime_dir": "/tmp",
            "agent": {"client_public_key": "x", "launch_token": "y"},
        }
    )
    outlet = agent.Outlet(configuration, lambda frames: sent.append(frames) or True, "own")
    outlet.ring.tail.last = seq - 1
    peer = outlet.greet(b"peer", 1)
    outlet.attach(peer, b"session", None, True)
    outlet.large(b"", channel, parts, sum(map(len, parts)))
    decoded = codec.decode(sent[-1][1:])
    assert isinstance(decoded, codec.Large)
    assert (decoded.seq, decoded.channel, list(decoded.parts)) == (seq, channel, parts)


def test_both_ends_have_the_same_limits() -> None:
    assert agent.MAX_PARTS == codec.MAX_PARTS <= 255
    assert agent.MESSAGE_BYTES == codec.MAX_MESSAGE_BYTES
    for parts in (codec.MAX_PARTS, codec.MAX_PARTS + 1):
        frames = codec.encode_request(b"s", 0, b"o", [b"{}"] * parts)
        if parts == codec.MAX_PARTS:
            assert agent.parse_command(frames)[0] == "kernel"
        else:
            with pytest.raises(ValueError):
                agent.parse_command(frames)


anything = st.lists(st.binary(max_size=60), max_size=8)
nearly = st.tuples(
    st.binary(max_size=4),
    st.sampled_from([1, 2, 3]).flatmap(lambda kind: st.binary(max_size=80).map(lambda rest: bytes((kind,)) + rest)),
    st.binary(max_size=200),
).map(list)


@settings(max_examples=500)
@given(st.one_of(anything, nearly))
def test_anything_from_an_agent_is_a_value_or_one_value_error(frames: list[bytes]) -> None:
    try:
        decoded = codec.decode(frames)
        if isinstance(decoded, codec.Batch):
            list(decoded.messages())
    except ValueError:
        pass


commands = st.tuples(
    st.sampled_from([b"\x10", b"\x11", b"\x12", b"", b"\x13"]), st.lists(st.binary(max_size=20), max_size=12)
).map(lambda both: [both[0], *both[1]])


@settings(max_examples=500)
@given(st.one_of(anything, commands))
def test_anything_from_a_gateway_is_a_value_or_one_value_error(frames: list[bytes]) -> None:
    try:
        kind, _ = agent.parse_command(frames)
        assert kind in ("probe", "kernel", "ack", "call")
    except ValueError:
        pass


def test_deeply_nested_json_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        codec.decode([b"", b"\x03" + b"[" * 100_000])
    with pytest.raises(ValueError):
        agent.parse_command([b"\x12", b"[" * 100_000])


@given(small, st.integers(0, 2), small, st.lists(small, min_size=4, max_size=9))
def test_requests_reach_the_agent(session: bytes, channel: int, origin: bytes, parts: list[bytes]) -> None:
    kind, value = agent.parse_command(codec.encode_request(session, channel, origin, parts))
    assert kind == "kernel" and value == (session, channel, origin, parts)


@given(st.integers(0, 2**63), st.lists(st.tuples(small, st.integers(0, 2**63)), max_size=5))
def test_acknowledgements_reach_the_agent(processed: int, cursors: list[tuple[bytes, int]]) -> None:
    kind, value = agent.parse_command(codec.encode_ack(processed, cursors))
    assert kind == "ack" and value == (processed, cursors)


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "op"), st.integers() | st.text(max_size=8), max_size=4
    )
)
def test_calls_reach_the_agent(fields: dict[str, object]) -> None:
    kind, value = agent.parse_command([codec.CALL, json.dumps({"op": "ping", **fields}).encode()])
    assert kind == "call" and value == {"op": "ping", **fields}
