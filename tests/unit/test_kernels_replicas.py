"""Two gateways on one database: whoever does not drive a kernel serves it all the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from hub_gateway.auth.base import Caller
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.kernels.culler import Culler
from hub_gateway.kernels.reconcile import Exit
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from tests.contract.conftest import SPECS
from tests.contract.mini import MiniGateway, Setup
from tests.harness.waiting import eventually

ALICE = Caller("alice")
Replica = Callable[..., AbstractAsyncContextManager[MiniGateway]]


@pytest.fixture
async def replica(db_url: Callable[[], str | None]) -> AsyncIterator[Replica]:
    """Starts replicas by name; one that is started under a name that was in use takes over what that one drove."""
    state_dir = Path(tempfile.mkdtemp(prefix="hgt-"))
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"
    for name, spec in SPECS.items():
        (state_dir / "kernels" / name).mkdir(parents=True)
        (state_dir / "kernels" / name / "kernel.json").write_text(json.dumps(spec))
    config = {"Controller": {"scan_seconds": 0.1, "flush_seconds": 0.1, "shutdown_seconds": 0.5}}
    setup = Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)

    @contextlib.asynccontextmanager
    async def start(name: str) -> AsyncIterator[MiniGateway]:
        made = MiniGateway(setup)
        made.controller.leases.replica = name
        async with made:
            yield made

    yield start
    async with start("last") as gateway:
        local = gateway.proxies.get("local")
        await asyncio.gather(*(local.terminate(one.state) for one in await local.owned(gateway.gateway_id)))
    shutil.rmtree(state_dir, ignore_errors=True)


async def test_a_websocket_is_served_by_a_replica_that_does_not_drive_its_kernel(replica: Replica) -> None:
    """Also one that came before the kernel was up, and that hears of its end."""
    async with replica("one") as one, replica("two") as two:
        created = await one.service.create(ALICE, CreateKernel(name="python"))
        early = await two.connect(ALICE, created.id)
        assert await early.execute("print(1)", timeout=30) == "1\n"
        await one.service.shutdown(ALICE, created.id)
        await eventually(lambda: two.controller.links.existing(created.id) is None, "it is told of the end", timeout=10)
        _, reply = await early.result(early.run("1"), timeout=5)
        assert "shut down" in str(reply["content"])


async def test_a_websocket_elsewhere_is_served_when_its_kernel_is_started_again(replica: Replica) -> None:
    async with replica("one") as one, replica("two") as two:
        record = await one.start(ALICE, "dies")
        assert record.status is KernelStatus.FAILED
        client = await two.connect(ALICE, record.id)
        _, reply = await client.result(client.run("1"))
        assert "libcudart" in str(reply["content"])
        plan = json.loads(
            (Path(one.proxies.get("local").runtime_root).parent / "kernels/python/kernel.json").read_text()
        )
        launch = await asyncio.to_thread(_with_argv, one, record.id, plan["argv"])
        await one.db.write(
            lambda tx: tx.execute(update(Kernel).where(Kernel.id == record.id).values(**launch)) and None
        )
        await one.service.restart(ALICE, record.id)
        await eventually(lambda: client.relay.ready, "linked again")
        assert await client.execute("print(2)") == "2\n"
        await one.service.shutdown(ALICE, record.id)


async def _nothing() -> None:
    pass


def _with_argv(gateway: MiniGateway, kernel_id: str, argv: list[str]) -> dict[str, object]:
    store = gateway.service.store
    sealed = store.db.read_sync(lambda tx: tx.get(Kernel, kernel_id).launch)  # type: ignore[union-attr]
    return {"launch": store.vault.encrypt_json({**store.vault.decrypt_json(sealed), "argv": argv})}


async def test_a_restart_through_another_replica_after_the_epoch_rose(replica: Replica) -> None:
    async with contextlib.AsyncExitStack() as later:
        async with replica("one") as one:
            record = await one.start(ALICE)
            two = await later.enter_async_context(replica("two"))
            client = await two.connect(ALICE, record.id)
            assert await client.execute("x = 1; print(x)") == "1\n"
            # A lease that is let go would be taken by the other replica.
            one.controller.leases.close = _nothing  # type: ignore[method-assign]
        async with replica("one") as one:
            row = await one.service.store.get(record.id)
            assert row is not None and row.epoch == record.epoch + 1
            await eventually(lambda: one.controller.links.existing(record.id) is not None, "linked")
            await two.service.restart(ALICE, record.id)
            _, reply = await client.result(client.run("x"))
            assert reply["content"]["ename"] == "NameError"
            await one.service.shutdown(ALICE, record.id)


async def test_a_kernel_that_is_open_at_another_replica_is_not_culled(replica: Replica) -> None:
    async with replica("one") as one, replica("two") as two:
        record = await one.start(ALICE)
        client = await two.connect(ALICE, record.id)
        await client.execute("1")
        idle = await one.connect(ALICE, record.id)
        await one.controller.flush()
        await eventually(lambda: two.controller.links.existing(record.id).linked, "linked")  # type: ignore[union-attr]
        await two.controller.flush()
        row = await one.service.store.get(record.id)
        assert row is not None and row.connections == 1, "what its holder counts"
        assert two.service.overlaid(row).connections == 2
        idle.close()
        await one.controller.flush()
        culler = Culler(service=one.service, cull_idle_timeout=60.0)
        # Nothing has happened for an hour, as the agent would say.
        long_ago = utcnow() - timedelta(hours=1)
        for gateway in (one, two):
            relay = gateway.controller.links.existing(record.id)
            assert relay is not None
            relay.last_activity = long_ago
        await one.db.write(lambda tx: tx.execute(update(Kernel).values(last_activity=long_ago)) and None)
        two.controller._tell_open_at = 0.0
        await two.controller.flush()
        assert await culler.cull() == []
        client.close()
        await two.controller.flush()
        one.service.stop_wait_seconds = 30.0
        # Soon enough nothing has happened for this long, as the agent itself says.
        culler.cull_idle_timeout = 0.2
        await eventually(culler.cull, "culled")
        row = await one.service.store.get(record.id)
        assert row is None or not row.live


async def test_a_relay_that_is_made_while_the_rows_are_read_is_kept(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica("one") as one:
        store, links = one.service.store, one.controller.links
        links.relay("gone")
        admitted: list[str] = []

        async def some(_ids: Iterable[str]) -> dict[str, KernelRecord]:
            admitted.append(f"admitted meanwhile {len(admitted)}")
            links.relay(admitted[-1])
            return {}

        monkeypatch.setattr(store, "some", some)
        await one.controller._tidy()
        assert links.existing("gone") is None
        assert links.existing(admitted[-1]) is not None


async def test_what_a_replica_heard_of_a_kernel_that_it_does_not_drive_is_forgotten(replica: Replica) -> None:
    """It would end the kernel's next life, should this replica come to drive that."""
    async with replica("one") as one, replica("two") as two:
        record = await one.start(ALICE)
        reconciler = two.controller._reconciler
        reconciler.ended(record.id, Exit("It died."))
        await reconciler.step(record.id)
        assert record.id not in reconciler._memory
        await one.service.shutdown(ALICE, record.id)
