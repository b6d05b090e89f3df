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


async def test_a_kernel_that_is_another_replicas_by_now_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was the last one: nobody else is polled then."""
    monkeypatch.setattr(ssh_tickets, "FORGET_SECONDS", 0.3)
    forgotten: list[str] = []

    async def ended(kernel_id: str) -> None:
        forgotten.append(kernel_id)

    async def read(kernel_id: str) -> bytes:
        return b"tickets"

    async def deliver(state: Any, text: str) -> None:
        pass

    ends = time.time() + 3600
    credentials: Any = SimpleNamespace(ended=ended, store=SimpleNamespace(ends=lambda kernel_id: ends, read=read))
    keeper = KernelTickets(IdentityNeed.SERVICE_TICKET, deliver, logging.getLogger("test"))
    state: Any = {"tickets": IdentityNeed.SERVICE_TICKET.value, "pid": 1}
    began = time.monotonic()
    for kernel_id in ("k1", "k2"):
        keeper.tend(credentials, kernel_id, state)
    await eventually(lambda: time.monotonic() > began + 0.2, "some time to pass")
    keeper.tend(credentials, "k2", state)
    await eventually(lambda: len(forgotten) == 2, "both to be forgotten")
    assert forgotten == ["k1", "k2"] and time.monotonic() > began + 0.5
