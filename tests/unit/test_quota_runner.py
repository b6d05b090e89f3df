"""The loops of quotas on a gateway with real processes: what notebooks see of the queue, and of limits over time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import zmq
from sqlalchemy import select

from hub_gateway import audit
from hub_gateway.auth.base import Caller
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import Notice
from hub_gateway.kernels import notices
from hub_gateway.kernels.notices import NoticeBoard
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus
from hub_gateway.link import KernelRelay
from hub_gateway.quotas.enforce import enforce
from hub_gateway.quotas.notices import Notifier
from hub_gateway.quotas.queue import entries
from hub_gateway.quotas.runner import ABANDONED, QuotaRunner
from hub_gateway.quotas.types import Action, Counts, Policy, SubjectKind
from tests.contract.mini import MiniGateway, Setup
from tests.harness.link import Collector
from tests.harness.quotas import drift, new, put, release
from tests.harness.waiting import eventually

ALICE, BOB, CAROL = Caller("alice"), Caller("bob"), Caller("carol")
ONE = Policy("one", SubjectKind.EVERYONE, counts=Counts.TOGETHER, hard=1, action=Action.QUEUE)
Life = Callable[[], AbstractAsyncContextManager[MiniGateway]]


@pytest.fixture
async def life(db_url: Callable[[], str | None]) -> AsyncIterator[Life]:
    """Gateways on one database and one state directory: lives of the same gateway, one after the other."""
    state_dir = Path(tempfile.mkdtemp(prefix="hgt-"))
    spec = {"argv": ["/bin/sh", "-c", "sleep 600", "{connection_file}"], "display_name": "Sleep", "language": "none"}
    (state_dir / "kernels" / "sleep").mkdir(parents=True)
    (state_dir / "kernels" / "sleep" / "kernel.json").write_text(json.dumps(spec))
    config = {"LocalProxy": {"shutdown_seconds": 0.5}, "Controller": {"shutdown_seconds": 0.2, "scan_seconds": 0.1}}
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"
    setup = Setup(str(state_dir), url, (str(state_dir / "kernels"),), config)

    @contextlib.asynccontextmanager
    async def start() -> AsyncIterator[MiniGateway]:
        async with MiniGateway(setup) as made:
            yield made

    yield start
    async with start() as last:
        local = last.proxies.get("local")
        await asyncio.gather(*(local.terminate(one.state) for one in await local.owned(last.gateway_id)))
    shutil.rmtree(state_dir, ignore_errors=True)


def runner_of(gateway: MiniGateway, **traits: Any) -> QuotaRunner:
    return QuotaRunner(service=gateway.service, notifier=Notifier(), **traits)


async def create(gateway: MiniGateway, caller: Caller, path: str = "n.ipynb") -> KernelRecord:
    return await gateway.service.create(caller, CreateKernel(name="sleep", path=path))


async def opened(gateway: MiniGateway, caller: Caller, record: KernelRecord) -> Collector:
    """A notebook with one cell that waits."""
    sink = Collector()
    relay = await gateway.service.relay(caller, record.id)
    relay.attach(sink)
    header = {"msg_id": "cell", "msg_type": "execute_request", "session": sink.session, "username": "", "version": "5"}
    parts = [json.dumps(header).encode(), b"{}", b"{}", b'{"code": "1"}']
    relay.receive(sink, "shell", parts, sink.session)
    return sink


def shown(sink: Collector) -> list[str]:
    """What stood under the cell, one after the other."""
    wanted = ("display_data", "update_display_data")
    found = [m for m in sink.messages if m["header"]["msg_type"] in wanted]
    assert len({m["content"]["transient"]["display_id"] for m in found}) <= 1, "it is updated in place"
    return [m["content"]["data"]["text/plain"] for m in found]


async def status(gateway: MiniGateway, record: KernelRecord) -> KernelRecord:
    found = await gateway.service.store.get(record.id)
    assert found is not None
    return found


async def line(gateway: MiniGateway) -> list[str]:
    admitter = gateway.service.store.admitter
    found = await gateway.db.read(lambda tx: entries(tx, admitter, utcnow(), half_life=86400.0))
    return [entry.owner for entry in found]


async def test_a_notebook_shows_its_place_until_the_kernel_starts(life: Life) -> None:
    async with life() as gateway:
        runner = runner_of(gateway)
        await put(gateway.service.store, ONE)
        first = await create(gateway, ALICE, "train.ipynb")
        second, third = await create(gateway, BOB), await create(gateway, CAROL)
        assert second.execution_state.value == "starting" and second.status is KernelStatus.QUEUED
        sink = await opened(gateway, CAROL, third)
        await runner.move()
        await runner.move()
        [said] = shown(sink)
        assert "2nd in the queue of one: alice holds 1 of 1 kernel" in said
        await gateway.service.shutdown(BOB, second.id)  # DELETE
        assert [record.id for record in await gateway.service.list(BOB)] == []
        await runner.move()
        assert "1st in the queue" in shown(sink)[-1]
        await gateway.service.shutdown(ALICE, first.id)
        assert (await runner.move()).admitted == (third.id,)
        assert (await status(gateway, third)).status is KernelStatus.STARTING
        assert await line(gateway) == [] and await drift(gateway.service.store) == 0
        await gateway.service.shutdown(CAROL, third.id)


async def test_the_queue_outlives_the_gateway(life: Life) -> None:
    async with life() as gateway:
        await put(gateway.service.store, ONE)
        first = await create(gateway, ALICE)
        waiting = [await create(gateway, caller) for caller in (BOB, CAROL)]
    async with life() as gateway:
        runner = runner_of(gateway)
        assert await line(gateway) == ["bob", "carol"]
        sink = await opened(gateway, CAROL, waiting[1])
        await runner.move()
        assert "2nd in the queue" in shown(sink)[-1]
        await gateway.service.shutdown(ALICE, first.id)
        assert (await runner.move()).admitted == (waiting[0].id,)
        assert await line(gateway) == ["carol"]


async def test_what_nobody_waits_for_leaves_the_queue(life: Life) -> None:
    """Closed notebooks, also ones that were closed while the gateway was away; not what a program asked for."""
    async with life() as gateway:
        runner = runner_of(gateway, queue_abandon_seconds=0.3)
        await put(gateway.service.store, ONE)
        await create(gateway, ALICE)
        closed, left, stays, program = [await create(gateway, BOB) for _ in range(4)]
        sinks = {record.id: await opened(gateway, BOB, record) for record in (closed, left, stays)}
        await runner.move()
        (await gateway.service.relay(BOB, closed.id)).detach(sinks[closed.id])
        await eventually(lambda: _moved(runner, gateway, closed), "the closed one to leave the queue")
        ended = await status(gateway, closed)
        assert (ended.status, ended.message) == (KernelStatus.FAILED, ABANDONED)
        for record in (left, stays, program):
            assert (await status(gateway, record)).status is KernelStatus.QUEUED
    async with life() as gateway:
        runner = runner_of(gateway, queue_abandon_seconds=0.3)
        await opened(gateway, BOB, stays)  # its websocket comes back, the other one's does not
        await eventually(lambda: _moved(runner, gateway, left), "the one that was left to leave the queue")
        assert (await status(gateway, left)).message == ABANDONED
        for record in (stays, program):
            assert (await status(gateway, record)).status is KernelStatus.QUEUED


async def _moved(runner: QuotaRunner, gateway: MiniGateway, record: KernelRecord) -> bool:
    await runner.move()
    return (await status(gateway, record)).status is not KernelStatus.QUEUED


async def test_a_notebook_hears_why_its_kernel_is_stopped(life: Life) -> None:
    async with life() as gateway:
        runner, store = runner_of(gateway), gateway.service.store
        made = await put(store, Policy("two", SubjectKind.EVERYONE, hard=2, grace_seconds=0))
        older, newer = await create(gateway, BOB), await create(gateway, BOB)
        sink = await opened(gateway, BOB, newer)
        await put(store, Policy(**{**vars(made), "hard": 1.0}))
        await runner.enforce()
        assert (await status(gateway, newer)).target.value == "running"
        await runner.enforce()
        ended = await gateway.settled(newer.id)
        assert ended.status is KernelStatus.FAILED and ended.message.startswith("This kernel was stopped: 2 kernels")
        assert (await status(gateway, older)).target.value == "running"
        errors = [m["content"]["evalue"] for m in sink.messages if m["header"]["msg_type"] == "error"]
        assert len(errors) == 1 and "the policy two allows 1 kernel" in errors[0]
        stops = await gateway.db.read(lambda tx: [one.detail for one in audit.query(tx, action="kernel.stop")])
        assert [(one["kernel"], one["policy"]) for one in stops] == [(newer.id, "two")]
        assert await drift(store) == 0


async def test_a_notice_reaches_the_notebook_whoever_decided_it_and_died(life: Life) -> None:
    """It is a row until a notebook has shown it; then nobody shows it again."""
    async with life() as gateway:
        runner, store = runner_of(gateway), gateway.service.store
        await put(store, Policy("few", SubjectKind.EVERYONE, hard=9, soft=1))
        first, second = await create(gateway, BOB), await create(gateway, BOB)
        await runner.enforce()
    async with life() as gateway:
        board = gateway.service.notices
        for record, many in ((first, 1), (second, 2)):  # the second launch was told of the soft limit itself
            sink = await opened(gateway, BOB, record)
            relay = await gateway.service.relay(BOB, record.id)
            await board.deliver()
            run(relay, sink, "next")
            assert len(heard(sink)) == many and all("the soft limit" in text for _, text in heard(sink))
            await board.deliver()
            late = Collector()
            relay.attach(late)
            run(relay, late, "late")
            assert heard(late) == []
    async with life() as gateway:
        sink = await opened(gateway, BOB, first)
        await gateway.service.notices.deliver()
        run(await gateway.service.relay(BOB, first.id), sink, "again")
        assert heard(sink) == []
        assert (await gateway.db.read(lambda tx: tx.scalars(select(Notice.id)).all())) == []


class Relays(dict[str, KernelRelay]):
    """The relays of one process."""

    def relay(self, kernel_id: str) -> KernelRelay:
        return self[kernel_id]

    def __iter__(self) -> Any:
        return iter(list(self.items()))


async def test_a_notice_is_shown_by_the_replica_that_has_the_notebook(quota_store: KernelStore) -> None:
    """Whoever has told it, all that have a notebook open show it; those that come after that have nothing to show."""
    await quota_store.admit(new(1))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    relays = [KernelRelay("k1", zmq_context=context) for _ in range(3)]
    boards = [NoticeBoard(quota_store.db, Relays(k1=relay)) for relay in relays]  # type: ignore[arg-type]
    sinks = [Collector() for _ in relays]
    for relay, sink in zip(relays[:2], sinks, strict=False):
        relay.attach(sink)
    await quota_store.write(lambda tx: notices.add(tx, ["k1"], ["Too many."]))
    await boards[2].give("k1")
    for board in boards:
        await board.deliver()
    run(relays[0], sinks[0], "cell")
    for board in boards:
        await board.deliver()
    run(relays[1], sinks[1], "cell")
    relays[2].attach(sinks[2])
    run(relays[2], sinks[2], "cell")
    assert [len(heard(sink)) for sink in sinks] == [1, 1, 0]
    await quota_store.write(lambda tx: notices.add(tx, ["k1"], [f"{number}." for number in range(9)]))
    kept = select(Notice.sentence).order_by(Notice.id)
    assert (await quota_store.db.read(lambda tx: tx.scalars(kept).all())) == [f"{number}." for number in range(4, 9)]
    await release(quota_store, "k1")
    await quota_store.write(notices.purge)
    assert (await quota_store.db.read(lambda tx: tx.scalars(kept).all())) == []
    context.destroy(linger=0)


async def test_a_stop_that_was_decided_happens_whoever_dies(life: Life) -> None:
    """Deciding and the kernel's target are one transaction; a gateway that dies after it has nothing to remember."""
    async with life() as gateway:
        store = gateway.service.store
        made = await put(store, Policy("two", SubjectKind.EVERYONE, hard=2, grace_seconds=0))
        record = await create(gateway, BOB)
        await put(store, Policy(**{**vars(made), "hard": 0.0}))
        for _ in range(2):
            await store.write(lambda tx: enforce(tx, store.admission, utcnow()))
    async with life() as gateway:
        ended = await gateway.settled(record.id)
        assert ended.status is KernelStatus.FAILED and "policy two" in ended.message
        assert await drift(gateway.service.store) == 0


# Notices


@pytest.fixture
def relay() -> Iterator[KernelRelay]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield KernelRelay("k", zmq_context=context)
    context.destroy(linger=0)


def run(relay: KernelRelay, sink: Collector, msg_id: str) -> None:
    header = {"msg_id": msg_id, "msg_type": "execute_request", "session": sink.session, "username": "", "version": "5"}
    relay.receive(sink, "shell", [json.dumps(header).encode(), b"{}", b"{}", b'{"code": "1"}'], sink.session)


def heard(sink: Collector) -> list[tuple[str, str]]:
    """Under which cell which notice stands."""
    found = [message for message in sink.messages if message["header"]["msg_type"] == "stream"]
    assert all(message["content"]["name"] == "stderr" for message in found)
    return [(message["parent_header"]["msg_id"], message["content"]["text"]) for message in found]


def test_a_notice_stands_once_under_the_next_cell_of_every_notebook(relay: KernelRelay) -> None:
    one, two = Collector(), Collector()
    relay.attach(one)
    relay.attach(two)
    relay.notify("Too many.")
    assert heard(one) == heard(two) == []
    run(relay, one, "first")
    run(relay, one, "second")
    assert heard(one) == [("first", "[Too many.]\n")] and heard(two) == []
    run(relay, two, "other")
    assert heard(two) == [("other", "[Too many.]\n")]


def test_a_notice_stands_under_the_cell_that_runs(relay: KernelRelay) -> None:
    sink = Collector()
    relay.attach(sink)
    run(relay, sink, "long")
    relay.execution_state = ExecutionState.BUSY
    relay.notify("Too many.")
    run(relay, sink, "next")
    assert heard(sink) == [("long", "[Too many.]\n")]


def test_notices_wait_for_a_notebook_and_do_not_pile_up(relay: KernelRelay) -> None:
    for number in range(20):
        relay.notify(f"{number}.")
    late = Collector()
    relay.attach(late)
    for number in range(20, 40):
        relay.notify(f"{number}.")
    run(relay, late, "cell")
    assert [text for _, text in heard(late)] == [f"[{number}.]\n" for number in range(35, 40)]
