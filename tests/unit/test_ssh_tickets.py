"""Who sees to the tickets of kernels on hosts, and for how long."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from hub_gateway.proxies import ssh_tickets
from hub_gateway.proxies.base import IdentityNeed
from hub_gateway.proxies.ssh_tickets import KernelTickets
from tests.harness.waiting import eventually


def stand_in() -> tuple[Any, list[str]]:
    """Credentials of an hour, and which kernels they were thrown away of."""
    forgotten: list[str] = []
    found = SimpleNamespace(ends=time.time() + 3600, life=3600.0, renew_till=None)

    async def ended(kernel_id: str) -> None:
        forgotten.append(kernel_id)

    async def read(kernel_id: str) -> bytes:
        return b"tickets"

    async def obtain(*_: Any) -> Any:
        return found

    store = SimpleNamespace(ends=lambda kernel_id: found.ends, read=read)
    return SimpleNamespace(ended=ended, obtain=obtain, store=store), forgotten


async def deliver(state: Any, text: str) -> None:
    pass


async def test_a_kernel_that_is_another_replicas_by_now_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was the last one: nobody else is polled then."""
    monkeypatch.setattr(ssh_tickets, "FORGET_SECONDS", 0.3)
    credentials, forgotten = stand_in()
    keeper = KernelTickets(IdentityNeed.SERVICE_TICKET, deliver, logging.getLogger("test"))
    state: Any = {"tickets": IdentityNeed.SERVICE_TICKET.value, "pid": 1}
    for kernel_id in ("k1", "k2"):
        keeper.tend(credentials, kernel_id, state)

    def gone() -> bool:
        keeper.tend(credentials, "k2", state)  # as whoever polls it does
        return "k1" in forgotten

    await eventually(gone, "the other one to be forgotten")
    assert forgotten == ["k1"]
    await eventually(lambda: len(forgotten) == 2, "this one to be forgotten, which nobody polls any more")


async def test_a_launch_that_is_tried_again_does_not_end_what_the_second_try_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ssh_tickets, "FORGET_SECONDS", 0.3)
    credentials, forgotten = stand_in()
    keeper = KernelTickets(IdentityNeed.SERVICE_TICKET, deliver, logging.getLogger("test"))
    request: Any = SimpleNamespace(kernel_id="k1", owner="ada", principal="ada@X", unix_user="ada", tickets="")
    began = time.monotonic()
    for _ in range(2):
        await keeper.first(credentials, request)

    def late() -> bool:
        keeper.tend(credentials, "k1", {"tickets": IdentityNeed.SERVICE_TICKET.value, "pid": 1})
        return time.monotonic() > began + 0.5

    await eventually(late, "the first try to be forgotten, if it were")
    assert forgotten == []
    keeper.close()
