"""Resource managers that fail on purpose, at every stage: nothing is lost, nothing is left, the user is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from traitlets import Int, Unicode

from hub_gateway.auth.base import Caller
from hub_gateway.db.models import Reservation
from hub_gateway.errors import Conflict, LaunchFailed, LaunchRefused, NotFound, Unavailable
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus, KernelTarget
from hub_gateway.metrics import METRICS
from hub_gateway.proxies.base import ClusterObject, LaunchRequest, PhaseReport, State
from hub_gateway.proxies.local import LocalProxy
from hub_gateway.quotas.types import Action, Counts, Policy, SubjectKind
from tests.contract.conftest import SPECS
from tests.contract.mini import MiniGateway, Setup
from tests.harness.quotas import put
from tests.harness.waiting import eventually

ALICE, BOB = Caller("alice"), Caller("bob")


class FailingProxy(LocalProxy):
    """The local proxy, with a resource manager that refuses, breaks off, or does not answer."""

    stage = Int(-1).tag(config=True)
    """How many states `launch` yields before it fails."""
    how = Unicode("refused").tag(config=True)
    dead_calls = Int(0).tag(config=True)
    """How often `terminate` and `poll` fail before they work."""
    dead_stops = Int(0).tag(config=True)
    """The same of `terminate` alone."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.go_on = asyncio.Event()
        self.never_ends = False

    async def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        number = 0
        async for state in super().launch(request):
            await self._hang(number)
            self._fail(number)
            yield {**state, "progress": f"step {number}"}
            number += 1
        await self._hang(number)
        self._fail(number)

    async def _hang(self, number: int) -> None:
        if number == self.stage and self.how == "hangs":
            await asyncio.Event().wait()
        if number == self.stage and self.how == "stuck":  # as what runs in a thread
            while not self.go_on.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self.go_on.wait()

    def _fail(self, number: int) -> None:
        if number != self.stage or self.how in ("hangs", "stuck"):
            return
        if self.how == "refused":
            raise LaunchRefused("The queue research does not exist; choose another.")
        if self.how == "failed":
            raise LaunchFailed("ImagePullBackOff: no such image.")
        if self.how == "hiccup":  # once
            self.stage = -1
            raise Unavailable("The cluster does not answer.")
        raise KeyError("a defect in the proxy")

    def _dead(self) -> None:
        if self.dead_calls > 0:
            self.dead_calls -= 1
            raise Unavailable("The cluster does not answer.")

    async def terminate(self, state: State) -> None:
        self._dead()
        if self.never_ends:
            await asyncio.Event().wait()
        if self.dead_stops > 0:
            self.dead_stops -= 1
            raise Unavailable("The cluster does not answer.")
        await super().terminate(state)

    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        self._dead()
        return await super().poll(states)

    async def owned(self, gateway_id: str) -> Sequence[ClusterObject]:
        self._dead()
        return await super().owned(gateway_id)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="hgt-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def make_gateway(state_dir: Path, db_url: Callable[[], str | None]) -> Callable[..., MiniGateway]:
    url = db_url() or f"sqlite:///{state_dir}/gateway.sqlite"

    def make(*, start_seconds: float = 4.0, **failing: Any) -> MiniGateway:
        waits = {**SPECS["silent"], "argv": ["/bin/sh", "-c", "exec sleep 600", "{connection_file}"]}
        for name, spec in {**SPECS, "waits": waits, "elsewhere": SPECS["python"]}.items():
            (state_dir / "kernels" / name).mkdir(parents=True, exist_ok=True)
            stanza = {"metadata": {"process_proxy": {"name": "local" if name == "elsewhere" else "failing"}}}
            (state_dir / "kernels" / name / "kernel.json").write_text(json.dumps({**spec, **stanza}))
        config = {
            "Proxies": {"extra_proxies": {"failing": FailingProxy}},
            "FailingProxy": failing,
            "Controller": {"start_seconds": start_seconds, "shutdown_seconds": 0.5},
        }
        return MiniGateway(Setup(str(state_dir), url, (str(state_dir / "kernels"),), config))

    return make


async def assert_nothing_left(gateway: MiniGateway, state_dir: Path) -> None:
    held = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
    assert await gateway.db.read(lambda tx: tx.execute(held).all()) == []
    local = LocalProxy()
    local.runtime_root = str(state_dir / "run")

    async def clean() -> bool:
        return not await local.owned(gateway.gateway_id)

    await eventually(clean, "nothing left", timeout=10)
    await local.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("how", "words"), [("refused", "queue research"), ("failed", "ImagePullBackOff")])
async def test_a_launch_that_fails(
    make_gateway: Callable[..., MiniGateway], state_dir: Path, stage: int, how: str, words: str
) -> None:
    async with make_gateway(stage=stage, how=how) as gateway:
        created = await gateway.service.create(ALICE, CreateKernel(name="python"))
        client = await gateway.connect(ALICE, created.id)
        _, reply = await client.result(client.run("1"))
        assert words in str(reply["content"])
        record = await gateway.settled(created.id)
        assert record.status is KernelStatus.FAILED and words in record.message
        (listed,) = await gateway.service.list(ALICE)
        assert listed.execution_state is ExecutionState.DEAD
        assert words in str(gateway.service.kernel_model(listed)["reason"])
        await assert_nothing_left(gateway, state_dir)


@pytest.mark.parametrize("stage", [0, 1, 2])
async def test_a_cluster_that_hiccups_is_asked_again(
    make_gateway: Callable[..., MiniGateway], state_dir: Path, stage: int
) -> None:
    """The second attempt finds what the first one left: there is one agent."""
    async with make_gateway(stage=stage, how="hiccup") as gateway:
        record = await gateway.start(ALICE)
        assert record.status is KernelStatus.RUNNING, record.message
        assert len(await gateway.proxies.get("failing").owned(gateway.gateway_id)) == 1
        await gateway.service.shutdown(ALICE, record.id)
        await assert_nothing_left(gateway, state_dir)


@pytest.mark.parametrize("stage", [0, 1, 3])
async def test_a_launch_that_hangs_fails_in_time(
    make_gateway: Callable[..., MiniGateway], state_dir: Path, stage: int
) -> None:
    async with make_gateway(stage=stage, how="hangs", start_seconds=2.0) as gateway:
        record = await gateway.start(ALICE)
        assert record.status is KernelStatus.FAILED
        assert "did not finish the launch" in record.message and "administrator" in record.message
        assert ("It last said: step" in record.message) == (stage > 0)
        await assert_nothing_left(gateway, state_dir)


async def test_a_cluster_that_hangs_holds_up_no_other(make_gateway: Callable[..., MiniGateway]) -> None:
    """More kernels hang there than there are workers, in their launch and in their end; elsewhere all goes on."""
    async with make_gateway(stage=1, how="hangs", start_seconds=60.0) as gateway:
        assert gateway.controller.workers >= 3
        gateway.controller._queue._workers = 3
        hanging = [await gateway.service.create(ALICE, CreateKernel(name="python")) for _ in range(5)]
        proxy = gateway.proxies.get("failing")
        assert isinstance(proxy, FailingProxy)
        proxy.never_ends = True
        memory = gateway.controller._reconciler._memory
        await eventually(lambda: sum(one.launching is not None for one in memory.values()) == 3, "they hang")
        gateway.service.stop_wait_seconds = 0.0
        await gateway.service.shutdown(ALICE, hanging[0].id)
        record = await gateway.start(BOB, "elsewhere", timeout=30)
        assert record.status is KernelStatus.RUNNING
        gateway.service.stop_wait_seconds = 10.0
        await gateway.service.shutdown(BOB, record.id)
        assert await gateway.service.list(BOB) == []
        proxy.never_ends = False
        await asyncio.gather(*(gateway.service.shutdown(ALICE, one.id) for one in hanging[1:]))


async def test_a_launch_that_cannot_be_broken_off_fails_in_time_and_is_ended_later(
    make_gateway: Callable[..., MiniGateway], state_dir: Path
) -> None:
    """Its user is told at once; what it reserved is kept, since nobody knows yet what it will have started."""
    async with make_gateway(stage=1, how="stuck", start_seconds=2.0) as gateway:
        gateway.controller._reconciler.timing = replace(gateway.controller._reconciler.timing, break_off=0.1)
        created = await gateway.service.create(ALICE, CreateKernel(name="python"))
        await eventually(lambda: _status(gateway, created.id, KernelStatus.STOPPING), "it has failed")
        (listed,) = await gateway.service.list(ALICE)
        assert listed.execution_state is ExecutionState.DEAD and "did not finish the launch" in listed.message
        held = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
        assert await gateway.db.read(lambda tx: tx.execute(held).scalars().all()) == [created.id]
        proxy = gateway.proxies.get("failing")
        assert isinstance(proxy, FailingProxy)
        proxy.go_on.set()
        assert (await gateway.settled(created.id)).status is KernelStatus.FAILED
        await assert_nothing_left(gateway, state_dir)


async def test_a_stop_through_another_replica_breaks_a_launch_off(
    make_gateway: Callable[..., MiniGateway], state_dir: Path
) -> None:
    async with make_gateway(stage=1, how="hangs", start_seconds=60.0) as gateway:
        created = await gateway.service.create(ALICE, CreateKernel(name="python"))
        memory = gateway.controller._reconciler._memory
        await eventually(
            lambda: created.id in memory and memory[created.id].launching is not None, "it is being launched"
        )
        await gateway.service.store.ask_to_stop(created.id)  # nobody tells this process
        await eventually(lambda: _status(gateway, created.id, KernelStatus.STOPPED), "it is stopped", timeout=10)
        await assert_nothing_left(gateway, state_dir)


async def test_a_defect_in_a_proxy_ends_with_a_sentence(
    make_gateway: Callable[..., MiniGateway], state_dir: Path
) -> None:
    async with make_gateway(stage=1, how="defect") as gateway:
        record = await gateway.start(ALICE)
        assert record.status is KernelStatus.FAILED
        assert record.message and "KeyError" not in record.message
        await assert_nothing_left(gateway, state_dir)


async def test_a_reservation_is_held_until_the_kernel_is_proven_gone(
    make_gateway: Callable[..., MiniGateway], state_dir: Path
) -> None:
    async with make_gateway() as gateway:
        gateway.service.stop_wait_seconds = 0.0
        record = await gateway.start(ALICE)
        proxy = gateway.proxies.get("failing")
        assert isinstance(proxy, FailingProxy)
        proxy.dead_calls = 3
        await gateway.service.shutdown(ALICE, record.id)
        held = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
        while proxy.dead_calls:
            assert await gateway.db.read(lambda tx: tx.execute(held).scalars().all()) == [record.id]
            await asyncio.sleep(0.01)
        await gateway.controller.wait(record.id, lambda row: row is None or not row.live, 20)
        await assert_nothing_left(gateway, state_dir)


async def test_a_cluster_that_is_away_kills_no_kernel(make_gateway: Callable[..., MiniGateway]) -> None:
    """Unknown is not gone: a gateway that starts while the cluster is away keeps every kernel."""
    async with make_gateway() as gateway:
        record = await gateway.start(ALICE)
    async with make_gateway(dead_calls=3) as gateway:
        assert [r.id for r in await gateway.service.list(ALICE)] == [record.id]
        client = await gateway.connect(ALICE, record.id)
        assert await client.execute("print(1)") == "1\n"
        await gateway.service.shutdown(ALICE, record.id)


async def test_what_runs_in_a_thread_is_waited_for_however_often_it_is_cancelled() -> None:
    """Else a launch that is broken off twice ends before its process is there, and nobody would know of that."""
    local, begun, go_on, done = LocalProxy(), threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(10)
        done.set()

    task = asyncio.ensure_future(local._in_thread(local._launching, slow))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(3):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done.is_set()
    await local.close()


async def test_a_launch_that_is_stopped_twice_leaves_nothing(
    make_gateway: Callable[..., MiniGateway], state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawning, go_on = threading.Event(), threading.Event()
    spawn = LocalProxy._spawn

    def slowly(proxy: LocalProxy, request: LaunchRequest, directory: Path) -> Any:
        spawning.set()
        go_on.wait(10)
        return spawn(proxy, request, directory)

    monkeypatch.setattr(LocalProxy, "_spawn", slowly)
    async with make_gateway() as gateway:
        record = await gateway.service.create(ALICE, CreateKernel(name="python"))
        await asyncio.to_thread(spawning.wait, 10)
        both = [asyncio.ensure_future(gateway.service.shutdown(ALICE, record.id)) for _ in range(2)]
        memory = gateway.controller._reconciler._memory

        async def unwanted() -> bool:
            row = await gateway.service.store.get(record.id)
            return row is not None and row.target is KernelTarget.STOPPED and memory[record.id].broken_off

        await eventually(unwanted, "the launch is broken off")
        gateway.controller.changed(record.id, stop=True)  # what the second does, whenever it comes
        go_on.set()
        begun = time.monotonic()
        await asyncio.gather(*both)
        assert time.monotonic() - begun < 8
        ended = await gateway.service.store.get(record.id)
        assert ended is not None and ended.status is KernelStatus.STOPPED
        await assert_nothing_left(gateway, state_dir)


def agent_of(record: KernelRecord) -> psutil.Process:
    pid = record.proxy_state["pid"]
    assert isinstance(pid, int)
    return psutil.Process(pid)


async def test_an_agent_that_is_killed_is_noticed_at_once(make_gateway: Callable[..., MiniGateway]) -> None:
    """Not by the next poll, which may be far away; also by a gateway whose child it is not."""
    async with make_gateway() as gateway:
        record = await gateway.start(ALICE)
    async with make_gateway() as gateway:
        second = await gateway.start(ALICE)
        for task in gateway.controller._tasks:
            task.cancel()  # no scan and no poll: nothing else would notice before a link is silent for too long
        for one in (record, second):
            agent_of(one).kill()
            ended = await gateway.controller.wait(one.id, lambda row: row is None or not row.live, 20)
            assert ended is not None and ended.status is KernelStatus.FAILED
            assert "ended with its agent" in ended.message and "no gateway" not in ended.message


async def test_how_a_kernel_died_is_known_though_it_did_before_it_was_taken_over(
    make_gateway: Callable[..., MiniGateway], state_dir: Path
) -> None:
    """A websocket may link to its agent while the gateway is still starting."""
    async with make_gateway(start_seconds=6.0) as gateway:
        created = await gateway.service.create(ALICE, CreateKernel(name="waits"))
        record = await gateway.controller.wait(created.id, lambda row: row is None or row.registration is not None, 10)
        assert record is not None and record.status is KernelStatus.STARTING
        agent = agent_of(record)
        await eventually(lambda: agent.children(), "its kernel runs")
    later = make_gateway(start_seconds=6.0)
    relay = await later.service.relay(ALICE, created.id)
    await eventually(lambda: relay.linked, "it is linked")
    agent.children()[0].kill()
    heard = later.controller._reconciler._memory
    await eventually(lambda: created.id in heard and heard[created.id].exit is not None, "its end is heard of")
    async with later:
        record = await later.settled(created.id)
        assert record.status is KernelStatus.FAILED
        assert "died while it was starting (SIGKILL" in record.message and record.exit_code == 128 + 9
        await assert_nothing_left(later, state_dir)


async def test_what_a_kernel_wrote_is_its_users_and_not_in_the_log(
    make_gateway: Callable[..., MiniGateway], caplog: pytest.LogCaptureFixture
) -> None:
    async with make_gateway() as gateway:
        gateway.controller.log.propagate = True
        record = await gateway.start(ALICE, "dies")
        assert "libcudart" in record.message
    assert "libcudart" not in caplog.text
    (line,) = (one for one in caplog.records if "failed: The kernel died" in one.getMessage())
    named = {"kernel_id": record.id, "user": "alice", "proxy": "failing"}
    assert named.items() <= line.__dict__.items() and "exit code 3" in line.getMessage()


async def test_a_restart_just_after_a_failure_waits_for_its_end(make_gateway: Callable[..., MiniGateway]) -> None:
    async with make_gateway() as gateway:
        record = await gateway.start(ALICE)
        proxy = gateway.proxies.get("failing")
        assert isinstance(proxy, FailingProxy)
        proxy.dead_stops = 4
        agent_of(record).kill()
        await eventually(lambda: _status(gateway, record.id, KernelStatus.STOPPING), "it has failed")
        assert (await gateway.service.restart(ALICE, record.id)).status is KernelStatus.RUNNING
        proxy.dead_stops = 4
        stopping = asyncio.ensure_future(gateway.service.shutdown(ALICE, record.id))
        await eventually(lambda: _status(gateway, record.id, KernelStatus.STOPPING), "it is being stopped")
        with pytest.raises(Conflict, match="shut down; start a new one"):
            await gateway.service.restart(ALICE, record.id)
        await stopping


async def test_a_kernel_that_does_not_end_is_listed_as_dead_once_it_is_deleted(
    make_gateway: Callable[..., MiniGateway], caplog: pytest.LogCaptureFixture
) -> None:
    async with make_gateway() as gateway:
        record = await gateway.start(ALICE)
        gateway.service.stop_wait_seconds = 0.1
        gateway.controller.log.propagate = True
        agent_of(record).suspend()
        await gateway.service.shutdown(ALICE, record.id)
        (listed,) = await gateway.service.list(ALICE)
        assert listed.execution_state is ExecutionState.DEAD
        agent_of(record).kill()
        await gateway.controller.wait(record.id, lambda row: row is None or not row.live, 30)
    assert "()" not in caplog.text


async def _status(gateway: MiniGateway, kernel_id: str, wanted: KernelStatus) -> bool:
    record = await gateway.service.store.get(kernel_id)
    return record is not None and record.status is wanted


async def test_progress_is_shown_while_it_starts(make_gateway: Callable[..., MiniGateway]) -> None:
    async with make_gateway() as gateway:
        created = await gateway.service.create(ALICE, CreateKernel(name="python"))
        client = await gateway.connect(ALICE, created.id)
        client.run("1")
        shown = await client.receive(lambda m: m["msg_type"] in ("display_data", "update_display_data"))
        assert "step" in str(shown["content"]["data"])
        await gateway.settled(created.id)
        await gateway.service.shutdown(ALICE, created.id)


MOVES: tuple[tuple[str, dict[str, str], int], ...] = (
    *(("kernel_launches_total", {"outcome": outcome}, 1) for outcome in ("admitted", "refused", "queued", "failed")),
    ("admission_duration_seconds_count", {}, 3),
    ("quota_refusals_total", {"resource": "kernels"}, 1),
    ("kernel_launch_duration_seconds_count", {"proxy": "failing", "status": "success"}, 1),
)


def numbers() -> list[float]:
    return [METRICS.registry.get_sample_value(f"hubgateway_{name}", labels) or 0.0 for name, labels, _ in MOVES]


async def test_what_operators_watch_moves(make_gateway: Callable[..., MiniGateway]) -> None:
    """Launches by outcome, how long they take, and which limits refuse."""
    async with make_gateway() as gateway:
        before = numbers()
        one = Policy("one", SubjectKind.EVERYONE, counts=Counts.TOGETHER, hard=1, action=Action.QUEUE)
        for policy in (one, Policy("none", SubjectKind.USER, "carol", hard=0)):
            await put(gateway.service.store, policy)
        running = await gateway.start(ALICE)
        waiting = await gateway.service.create(BOB, CreateKernel(name="python"))
        assert waiting.status is KernelStatus.QUEUED
        with pytest.raises(LaunchRefused):
            await gateway.service.create(Caller("carol"), CreateKernel(name="python"))
        with pytest.raises(NotFound):
            await gateway.service.create(BOB, CreateKernel(name="nothing"))
        assert [after - was for was, after in zip(before, numbers(), strict=True)] == [move for *_, move in MOVES]
        # First the one that waits, which would be started in the other's place.
        await gateway.service.shutdown(BOB, waiting.id)
        await gateway.service.shutdown(ALICE, running.id)
