"""The reaper on clusters that misbehave: one object, or one cluster, never keeps another from being cleaned up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import update
from traitlets.config import Config, Configurable

from hub_gateway.db.models import Kernel
from hub_gateway.errors import LaunchFailed
from hub_gateway.kernels.reaper import Reaper
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.proxies.base import ClusterObject, State
from hub_gateway.proxies.local import LocalProxy
from hub_gateway.proxies.registry import Proxies
from tests.harness.quotas import new
from tests.harness.waiting import eventually


class Cluster(LocalProxy):
    """A cluster with leftovers, some of which cannot be ended."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names: list[str] = []
        self.stubborn: dict[str, BaseException | None] = {}
        """How `terminate` fails; None: it does not answer."""
        self.silent = False
        self.users: dict[str, str] = {}
        """As which unix users they run."""
        self.principals: dict[str, object] = {}
        """With whose principals they were ended."""

    async def owned(self, gateway_id: str) -> Sequence[ClusterObject]:
        if self.silent:
            await asyncio.Event().wait()
        return [
            ClusterObject(name, gateway_id, 1, {"kernel_id": name, "user": self.users.get(name)}, f"job {name}")
            for name in self.names
        ]

    async def terminate(self, state: State) -> None:
        name = str(state["kernel_id"])
        self.principals[name] = state.get("principal")
        if name in self.stubborn:
            error = self.stubborn[name]
            if error is None:
                await asyncio.Event().wait()
            else:
                raise error
        self.names.remove(name)


@pytest.fixture
def proxies() -> Proxies:
    config = Config({"Proxies": {"extra_proxies": {"first": Cluster, "second": Cluster}}})
    made = Proxies(parent=Configurable(config=config))
    made._made["local"] = Cluster()
    return made


@pytest.fixture
def swallowed() -> list[str]:
    return []


@pytest.fixture
def reaper(quota_store: KernelStore, proxies: Proxies, swallowed: list[str]) -> Reaper:
    log = logging.getLogger("tests.reaper")
    return Reaper(quota_store, proxies, "g", 0.0, log, timeout=0.1, on_swallowed=swallowed.append)


def cluster(proxies: Proxies, name: str, *leftovers: str) -> Cluster:
    found = proxies.get(name)
    assert isinstance(found, Cluster)
    found.names = list(leftovers)
    return found


@pytest.mark.parametrize("how", [LaunchFailed("The job cannot be deleted."), None, KeyError("a defect")])
async def test_a_leftover_that_cannot_be_ended_keeps_no_other(
    reaper: Reaper, proxies: Proxies, swallowed: list[str], how: BaseException | None, caplog: pytest.LogCaptureFixture
) -> None:
    first = cluster(proxies, "first", "a", "b", "c")
    first.stubborn = {"a": how}
    await reaper.sweep()
    assert first.names == ["a"] and swallowed == ["reaper"]
    assert "kernel a (job a) is not ended" in caplog.text
    first.stubborn = {}
    await reaper.sweep()
    assert first.names == []


async def test_a_leftover_is_ended_as_the_principal_of_its_kernel(
    reaper: Reaper, proxies: Proxies, quota_store: KernelStore
) -> None:
    """To log in where it is may take a ticket of its owner, whose name is not always that of the unix user."""
    for number, user in enumerate(("ada", "ada", None), 1):
        await quota_store.admit(new(number, proxy="first", principal="a.lovelace@EXAMPLE.TEST", unix_user=user))
    await quota_store.write(lambda tx: tx.execute(update(Kernel).values(status=KernelStatus.FAILED.value)))
    first = cluster(proxies, "first", "k1", "k2", "k3", "unknown")
    first.users = {"k1": "ada", "k2": "somebody else"}
    await reaper.sweep()
    hers = "a.lovelace@EXAMPLE.TEST"
    assert first.principals == {"k1": hers, "k2": None, "k3": hers, "unknown": None}


async def test_a_cluster_that_does_not_answer_keeps_no_other(
    reaper: Reaper, proxies: Proxies, swallowed: list[str]
) -> None:
    cluster(proxies, "first").silent = True
    second = cluster(proxies, "second", "a")
    reaper.timeout = 30.0
    sweeping = asyncio.ensure_future(reaper.sweep())
    await eventually(lambda: not second.names, "the other cluster is clean", timeout=10)
    sweeping.cancel()
    reaper.timeout = 0.01
    await reaper.sweep()
    assert swallowed == ["reaper"]
