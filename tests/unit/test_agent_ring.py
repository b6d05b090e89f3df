"""The agent's buffer and who gets what from it, without a kernel."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub_gateway.link import codec
from tests.harness.link import load_agent

agent = load_agent()


def make_settings(**limits: Any) -> Any:
    section = {"client_public_key": "x", "launch_token": "y", **limits}
    document = {
        "version": 1,
        "kernel_id": "k",
        "gateway_id": "g",
        "argv": ["k"],
        "runtime_dir": "/tmp",
        "agent": section,
    }
    return agent.Settings(document)


def make_outlet(**limits: Any) -> tuple[Any, list[list[bytes]]]:
    sent: list[list[bytes]] = []

    def send(frames: list[bytes]) -> bool:
        sent.append(frames)
        return True

    return agent.Outlet(make_settings(**limits), send, "own"), sent


def say(outlet: Any, msg_type: str, content: dict[str, Any], parent: str = "p", to: bytes = b"") -> None:
    channel = 0 if to else 3
    outlet.message(
        channel, agent.make_message("kernel", msg_type, content, json.dumps({"msg_id": parent}).encode()), to
    )


def say_stream(outlet: Any, text: str, parent: str = "p") -> None:
    say(outlet, "stream", {"name": "stdout", "text": text}, parent)


def received(sent: list[list[bytes]], session: bytes) -> list[tuple[int, str, dict[str, Any]]]:
    """(number, type, content) of what a session is served, as a relay would pass it on."""
    found: list[tuple[int, str, dict[str, Any]]] = []
    live = replay = False
    for _, *frames in sent:
        value = codec.decode(frames)
        if isinstance(value, codec.Event):
            if value.to == session:
                replay, live = value.data["event"] == "attaching", value.data["event"] == "attached"
        elif (value.to == session and (live or replay)) or (not value.to and live):
            assert isinstance(value, codec.Batch)
            for number, _, parts in value.messages():
                if not found or number > found[-1][0]:
                    found.append((number, json.loads(parts[0])["msg_type"], json.loads(parts[3])))
    return found


def text_of(messages: list[tuple[int, str, dict[str, Any]]], name: str = "stdout") -> str:
    return "".join(content["text"] for _, kind, content in messages if kind == "stream" and content["name"] == name)


def test_a_session_that_was_away_gets_what_it_missed_and_then_goes_on_live() -> None:
    outlet, sent = make_outlet()
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, True)
    for number in range(10):
        say_stream(outlet, f"{number}\n")
    outlet.acknowledge(peer, peer.sent, [(b"s", 4)])
    outlet.forget_peer(peer)
    for number in range(10, 15):
        say_stream(outlet, f"{number}\n")
    del sent[:]
    outlet.attach(outlet.greet(b"two", 2), b"s", None, True)
    say_stream(outlet, "15\n")
    messages = received(sent, b"s")
    assert [number for number, _, _ in messages] == list(range(5, 17))
    assert text_of(messages) == "".join(f"{n}\n" for n in range(4, 16))


def test_a_client_that_names_its_last_number_overrides_the_record() -> None:
    outlet, sent = make_outlet()
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, True)
    for number in range(10):
        say_stream(outlet, f"{number}\n")
    del sent[:]
    outlet.attach(peer, b"s", 7, True)
    assert [number for number, _, _ in received(sent, b"s")] == [8, 9, 10]


def test_the_place_to_go_on_from_is_not_what_the_client_has() -> None:
    """A gateway that is killed after it resumed a slow client takes with it what that had not been sent."""
    outlet, sent = make_outlet()
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, True)
    for number in range(10):
        say_stream(outlet, f"{number}\n")
    outlet.acknowledge(peer, peer.sent, [(b"s", 4)])
    outlet.pause(peer, b"s")
    outlet.attach(peer, b"s", 10, True)
    outlet.forget_peer(peer)
    del sent[:]
    outlet.attach(outlet.greet(b"two", 2), b"s", None, True)
    assert [number for number, _, _ in received(sent, b"s")] == list(range(5, 11))


def test_a_number_that_was_never_given_is_passed_over() -> None:
    outlet, sent = make_outlet()
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, True)
    say_stream(outlet, "x")
    del sent[:]
    for number in (17, -1):
        outlet.attach(peer, b"s", number, True)
        assert [number for number, _, _ in received(sent, b"s")] == [1]


def test_replies_go_to_the_session_that_asked_only() -> None:
    outlet, sent = make_outlet()
    for name, session in ((b"one", b"a"), (b"two", b"b")):
        outlet.attach(outlet.greet(name, 1), session, None, True)
    say(outlet, "execute_reply", {"status": "ok"}, to=b"a")
    say_stream(outlet, "for both")
    assert [kind for _, kind, _ in received(sent, b"a")] == ["execute_reply", "stream"]
    assert [kind for _, kind, _ in received(sent, b"b")] == ["stream"]
    assert [frames[0] for frames in sent if frames[1] == b"a" and frames[2][0] == 1] == [b"one"]


def test_nothing_is_kept_for_nobody() -> None:
    outlet, _ = make_outlet()
    for _ in range(10):
        say_stream(outlet, "x")
    assert outlet.ring.size == 0 and outlet.ring.seq == 10
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, False)
    say_stream(outlet, "x")
    assert outlet.ring.messages == 1
    outlet.forget_peer(peer)  # it did not ask for its place to be kept
    assert outlet.ring.messages == 0 and not outlet.sessions


def test_a_peer_that_does_not_acknowledge_is_sent_one_window_and_the_rest_later() -> None:
    outlet, sent = make_outlet(window_bytes=1000)
    slow, fast = outlet.greet(b"slow", 1), outlet.greet(b"fast", 1)
    outlet.attach(slow, b"a", None, True)
    outlet.attach(fast, b"b", None, True)
    for number in range(100):
        say_stream(outlet, f"{number}\n")
        outlet.acknowledge(fast, fast.sent, [(b"b", outlet.ring.seq)])
    assert len(received(sent, b"b")) == 100
    to_slow = [frames for frames in sent if frames[0] == b"slow"]
    assert 0 < len(received(to_slow, b"a")) < 10
    while slow.sent > slow.acked:
        outlet.acknowledge(slow, slow.sent, [])
    assert len(received([frames for frames in sent if frames[0] == b"slow"], b"a")) == 100


def test_when_the_buffer_is_full_output_is_joined_and_nothing_is_lost() -> None:
    outlet, sent = make_outlet(ring_messages=100)
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, True)
    outlet.forget_peer(peer)
    for number in range(1000):
        say_stream(outlet, f"{number}\n", parent=f"cell{number // 300}")
    assert outlet.ring.messages <= 120 and outlet.ring.joined_messages > 800 and not outlet.ring.dropped_messages
    outlet.attach(outlet.greet(b"two", 1), b"s", None, True)
    messages = received(sent, b"s")
    assert text_of(messages) == "".join(f"{n}\n" for n in range(1000))
    assert [number for number, _, _ in messages] == sorted({number for number, _, _ in messages})


KEPT = ("status", "error", "comm_open", "comm_msg", "execute_reply")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["stream", "display_data", "clear_output", *KEPT]), st.integers(0, 3000)),
        min_size=50,
        max_size=300,
    ),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_overflow_drops_output_with_a_notice_and_never_anything_else(
    script: list[tuple[str, int]], acknowledged: list[int]
) -> None:
    outlet, sent = make_outlet(ring_bytes=60_000)
    peer = outlet.greet(b"one", 1)
    for session in (b"s", b"t"):
        outlet.attach(peer, session, None, True)
    wanted, size = [], 0
    for position, (kind, length) in enumerate(script):
        content = {"name": "stdout", "text": "x" * length} if kind == "stream" else {"position": position}
        if kind in ("display_data", "clear_output"):
            content = {"data": "y" * length}
        say(outlet, kind, content, parent=f"cell{position // 20}", to=b"s" if kind == "execute_reply" else b"")
        size += length
        if kind in KEPT:
            wanted.append((kind, content))
        if position in acknowledged:
            outlet.acknowledge(peer, peer.sent, [(b"t", outlet.ring.seq)])
        if position == 10:
            outlet.forget_peer(peer)
    # what is never dropped may go beyond the limit, output may not
    kept_size = sum(400 for _ in wanted)
    assert outlet.ring.size <= 60_000 * 9 // 8 + kept_size + 4000
    outlet.forget_peer(peer)
    del sent[:]
    outlet.attach(outlet.greet(b"two", 1), b"s", 0, True)
    messages = received(sent, b"s")
    assert [(kind, content) for _, kind, content in messages if kind in KEPT] == wanted
    numbers = [number for number, _, _ in messages]
    assert numbers == sorted(set(numbers)) and (not numbers or numbers[-1] <= len(script))
    if outlet.ring.dropped_messages:
        assert "dropped here" in text_of(messages, "stderr")
    elif not outlet.ring.joined_messages:
        assert len(messages) == len(script)


def test_one_notice_stands_for_a_whole_gap() -> None:
    outlet, sent = make_outlet(ring_bytes=20_000)
    outlet.attach(peer := outlet.greet(b"one", 1), b"s", None, True)
    outlet.forget_peer(peer)
    for number in range(200):
        say(outlet, "display_data", {"data": "y" * 1000, "n": number}, parent=f"cell{number}")
    outlet.attach(outlet.greet(b"two", 1), b"s", None, True)
    messages = received(sent, b"s")
    notices = [content["text"] for _, kind, content in messages if kind == "stream"]
    assert len(notices) == 1 and f"[{200 - len(messages) + 1} output messages" in notices[0]
    assert [content["n"] for _, kind, content in messages if kind == "display_data"][-1] == 199


def test_a_fast_burst_to_a_connected_client_is_not_dropped() -> None:
    outlet, sent = make_outlet(ring_bytes=100_000, window_bytes=10_000)
    peer = outlet.greet(b"one", 1)
    outlet.attach(peer, b"s", None, True)
    for number in range(140):
        say(outlet, "display_data", {"data": "y" * 1000, "n": number})
    assert outlet.ring.size > 150_000
    while peer.sent > peer.acked:
        outlet.acknowledge(peer, peer.sent, [(b"s", 0)])
    assert [content["n"] for _, _, content in received(sent, b"s")] == list(range(140))


def test_what_exceeds_the_link_is_passed_on_as_far_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MESSAGE_BYTES", 2000)
    one = agent.Agent(make_settings(), "/tmp")
    one.outlet, sent = make_outlet()
    one.outlet.attach(one.outlet.greet(b"one", 1), b"s", None, True)
    parent = b'{"msg_id": "cell"}'
    small = agent.make_message("k", "display_data", {"data": {}}, parent)
    large = agent.make_message("k", "execute_reply", {"status": "ok", "payload": "x" * 3000}, parent)
    for _ in range(2):
        assert one.cut(3, [*small, b"y" * 3000]) == small
    [(_, kind, content)] = received(sent, b"s")
    assert kind == "stream" and "A message (display_data) of 0 MB was left out, or its buffers were" in content["text"]
    header, found, _, error = one.cut(0, large)
    assert json.loads(header)["msg_type"] == "execute_reply" and found == parent
    assert json.loads(error)["status"] == "error"
    header, _, _, text = one.cut(3, large)
    assert json.loads(header)["msg_type"] == "stream" and b"execute_reply" in text


def test_the_session_that_moved_is_told_where_it_was() -> None:
    outlet, sent = make_outlet()
    outlet.attach(outlet.greet(b"one", 1), b"s", None, True)
    outlet.attach(outlet.greet(b"two", 1), b"s", None, True)
    moved = [frames for frames in sent if frames[0] == b"one" and b'"moved"' in frames[2]]
    assert len(moved) == 1
    say_stream(outlet, "x")
    assert sent[-1][0] == b"two" and struct.unpack_from("<BBQH", sent[-1][2])[3] == 1
