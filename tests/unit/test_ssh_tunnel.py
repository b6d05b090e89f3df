"""What whoever finds the local port of a tunnel can do to the gateway."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

from hub_gateway.proxies.ssh_tunnel import PAIRS, Tunnels
from tests.harness.waiting import until


def test_a_port_takes_a_bounded_number_of_connections() -> None:
    """Each costs a thread while its channel is opened, and a channel of the connection that all users share."""
    asked, answer = threading.Semaphore(0), threading.Event()

    def open_channel() -> Any:
        asked.release()
        answer.wait(20)
        raise EOFError("the host is away")

    tunnels = Tunnels()
    try:
        with contextlib.ExitStack() as each:
            address = ("127.0.0.1", tunnels.port("k1", open_channel))
            taken = [each.enter_context(socket.create_connection(address, 20)) for _ in range(PAIRS)]
            for _ in taken:
                assert asked.acquire(timeout=20)
            with socket.create_connection(address, 20) as one_too_many:
                assert one_too_many.recv(1) == b""
            assert not asked.acquire(blocking=False)
            answer.set()
            assert [one.recv(1) for one in taken] == [b""] * PAIRS

            def taken_again() -> bool:
                with socket.create_connection(address, 20) as again:
                    again.recv(1)
                return asked.acquire(blocking=False)

            until(taken_again, "those that failed do not count for ever")
    finally:
        answer.set()
        tunnels.close()
