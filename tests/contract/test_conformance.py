"""What every process proxy must do, whatever the cluster."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from dataclasses import replace

import pytest
from sqlalchemy import select

from hub_gateway.db.models import Reservation
from hub_gateway.errors import NotFound
from hub_gateway.kernels import failpoints
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from tests.contract.conftest import Bench
from tests.contract.mini import MiniGateway, Setup, arguments
from tests.contract.suite import CASES, marks_of, params
from tests.harness.gateway import ROOT
from tests.harness.waiting import eventually


async def reserved(gateway: MiniGateway) -> set[str]:
    """The kernels that hold a reservation."""
    statement = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
    return set(await gateway.db.read(lambda tx: tx.execute(statement).scalars().all()))


@pytest.mark.parametrize("bench", params(partly=True), indirect=True)
async def test_life(bench: Bench) -> None:
    """Launch, execute, interrupt, restart, logs, shut down; then nothing is left."""
    async with bench.gateway() as gateway:
        created = await gateway.service.create(bench.alice, CreateKernel(name="python"))
        assert created.status is KernelStatus.STARTING
        client = await gateway.connect(bench.alice, created.id)
        # Sent before the kernel is up, and answered when it is.
        assert (
            await client.execute("import os; x = 41; print(os.environ['KERNEL_USERNAME'])") == f"{bench.alice.name}\n"
        )
        record = await gateway.settled(created.id)
        assert record.status is KernelStatus.RUNNING, record.message
        assert await reserved(gateway) == {record.id}

        busy = client.run("import time\nprint('begun')\nwhile True: time.sleep(0.01)")
        await client.receive(lambda m: "begun" in str(m["content"].get("text")))
        await gateway.service.interrupt(bench.alice, record.id)
        _, reply = await client.result(busy)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert await client.execute("print(x)") == "41\n"

        # Line by line: a kernel's own output before its streams are redirected goes to the log.
        await client.execute("os.write(2, b'to the log\\n')")
        state = {**(await gateway.service.get(bench.alice, record.id)).proxy_state}

        async def logged() -> bool:
            return "to the log" in await gateway.proxies.get(record.proxy).logs(state)

        await eventually(logged, "the line in the kernel's log")

        restarted = await gateway.service.restart(bench.alice, record.id)
        assert restarted.status is KernelStatus.RUNNING
        _, reply = await client.result(client.run("x"))
        assert reply["content"]["ename"] == "NameError"
        assert await reserved(gateway) == {record.id}

        await gateway.service.shutdown(bench.alice, record.id)
        with pytest.raises(NotFound):
            await gateway.service.get(bench.alice, record.id)
        assert await gateway.service.list(bench.alice) == []
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_interrupt_by_message(bench: Bench) -> None:
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice, "message")
        client = await gateway.connect(bench.alice, record.id)
        busy = client.run("import time; print('begun'); time.sleep(60)")
        await client.receive(lambda m: "begun" in str(m["content"].get("text")))
        await gateway.service.interrupt(bench.alice, record.id)
        _, reply = await client.result(busy)
        assert reply["content"]["status"] == "error"
        await gateway.service.shutdown(bench.alice, record.id)


async def test_a_kernel_that_cannot_use_ipc(bench: Bench) -> None:
    """It is reached by loopback, and encrypted: others may be on the node."""
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice, "loopback")
        assert record.status is KernelStatus.RUNNING, record.message
        client = await gateway.connect(bench.alice, record.id)
        code = (
            "import json; from ipykernel.connect import get_connection_file\n"
            "facts = json.load(open(get_connection_file()))\n"
            "print(facts['transport'], facts['ip'], 'curve_secretkey' in facts)"
        )
        assert await client.execute(code) == "tcp 127.0.0.1 True\n"
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_two_users_at_once(bench: Bench) -> None:
    """Neither sees nor can touch the other's; each runs as who they are."""
    async with bench.gateway() as gateway:
        ours, theirs = await asyncio.gather(gateway.start(bench.alice), gateway.start(bench.bob))
        for caller, mine, foreign in ((bench.alice, ours, theirs), (bench.bob, theirs, ours)):
            assert [record.id for record in await gateway.service.list(caller)] == [mine.id]
            for call in (gateway.service.get, gateway.service.shutdown, gateway.service.restart, gateway.service.relay):
                with pytest.raises(NotFound):
                    await call(caller, foreign.id)
            client = await gateway.connect(caller, mine.id)
            name, user = (
                await client.execute("import os, getpass; print(os.environ['KERNEL_USERNAME'], getpass.getuser())")
            ).split()
            assert name == caller.name
            if bench.case.impersonates:
                assert user == caller.name
        await asyncio.gather(
            gateway.service.shutdown(bench.alice, ours.id), gateway.service.shutdown(bench.bob, theirs.id)
        )
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


async def test_a_killed_kernel_comes_back(bench: Bench) -> None:
    """kill -9 of the kernel: the user hears it, the kernel is restarted in place, the websocket stays."""
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice)
        client = await gateway.connect(bench.alice, record.id)
        running = client.run("import os, time; time.sleep(1); os.kill(os.getpid(), 9)")
        _, reply = await client.result(running)
        assert reply["content"]["status"] == "error"
        assert "SIGKILL" in str(reply["content"])
        assert await client.execute("print('again')") == "again\n"
        assert (await gateway.service.get(bench.alice, record.id)).status is KernelStatus.RUNNING
        await gateway.service.shutdown(bench.alice, record.id)


@pytest.mark.parametrize("bench", params(partly=True), indirect=True)
async def test_a_killed_agent_is_noticed(bench: Bench) -> None:
    """kill -9 of agent and kernel: the kernel is dead, says so, and holds nothing; a restart starts it anew."""
    async with bench.gateway() as gateway:
        gateway.controller.poll_seconds = 0.5
        record = await gateway.start(bench.alice)
        bench.case.kill_agent(record)
        ended = await gateway.controller.wait(record.id, lambda row: row is not None and not row.live, 90)
        assert ended is not None and ended.status is KernelStatus.FAILED
        assert "ended" in ended.message
        assert await reserved(gateway) == set()
        assert [r.execution_state.value for r in await gateway.service.list(bench.alice)] == ["dead"]
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")
        again = await gateway.service.restart(bench.alice, record.id)
        assert again.status is KernelStatus.RUNNING and again.id == record.id
        assert await reserved(gateway) == {record.id}
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("print(1)") == "1\n"
        await gateway.service.shutdown(bench.alice, record.id)


async def test_refused_launch(bench: Bench) -> None:
    """The engine's own reason reaches the user, and nothing is left."""
    async with bench.gateway() as gateway:
        for spec, words in bench.case.refusals.items():
            record = await gateway.start(bench.alice, spec)
            assert record.status is KernelStatus.FAILED
            assert words in record.message
            assert await reserved(gateway) == set()
            await eventually(lambda: not bench.leftovers(gateway), "nothing left")


async def test_kernel_that_dies_at_start(bench: Bench) -> None:
    """Exit code and last stderr lines, in the record and in the cell that waits."""
    async with bench.gateway() as gateway:
        created = await gateway.service.create(bench.alice, CreateKernel(name="dies"))
        client = await gateway.connect(bench.alice, created.id)
        _, reply = await client.result(client.run("1"))
        assert "libcudart.so.12" in str(reply["content"])
        record = await gateway.settled(created.id)
        assert record.status is KernelStatus.FAILED
        assert record.exit_code == 3
        assert "exit code 3" in record.message and "libcudart.so.12: cannot open" in record.message
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")
        assert [r.execution_state.value for r in await gateway.service.list(bench.alice)] == ["dead"]
        await gateway.service.shutdown(bench.alice, record.id)
        assert await gateway.service.list(bench.alice) == []


async def test_kernel_that_never_answers(bench: Bench) -> None:
    """The start-up limit ends it; nothing is left."""
    bench = Bench(bench.case, _with(bench, Controller={"start_seconds": 3.0}), bench.state_dir, bench.gateway_ids)
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice, "silent")
        assert record.status is KernelStatus.FAILED
        assert record.message
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


async def test_stopped_while_it_starts(bench: Bench) -> None:
    async with bench.gateway() as gateway:
        for delay in (0, 0.02, 0.1, 0.3):
            created = await gateway.service.create(bench.alice, CreateKernel(name="python"))
            await asyncio.sleep(delay)  # at different instructions, not to wait for something
            await gateway.service.shutdown(bench.alice, created.id)
            assert await gateway.service.list(bench.alice) == []
            assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


async def test_kernels_outlive_the_gateway(bench: Bench) -> None:
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice)
        client = await gateway.connect(bench.alice, record.id)
        await client.execute("x = 42")
    async with bench.gateway() as gateway:
        assert [r.id for r in await gateway.service.list(bench.alice)] == [record.id]
        assert gateway.controller.links.relay(record.id).linked
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("print(x)") == "42\n"
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


def crash_points() -> list[object]:
    """Every place at which a launch can be interrupted, for every proxy."""
    points: list[object] = []
    for case in CASES:
        steps = [f"launch.{n}.{what}" for n in range(1, case.yields + 1) for what in ("yielded", "recorded")]
        every = ("admit.before_commit", "admit.after_commit", *steps, "ready.before", "ready.after")
        marks = marks_of(*case.needs)
        points += [pytest.param(case.name, point, id=f"{case.name}-{point}", marks=marks) for point in every]
    return points


@pytest.mark.parametrize(("bench", "point"), crash_points(), indirect=["bench"])
async def test_gateway_killed_during_launch(bench: Bench, point: str) -> None:
    """kill -9 at each yield: the next gateway has the kernel up, one of it, or nothing at all."""
    assert killed_at(bench, point)
    async with bench.gateway() as gateway:
        kernels = await gateway.service.list(bench.alice)
        if point == "admit.before_commit":
            assert not kernels
            assert await reserved(gateway) == set()
        else:
            (record,) = kernels
            record = await gateway.settled(record.id)
            assert record.status is KernelStatus.RUNNING, record.message
            client = await gateway.connect(bench.alice, record.id)
            assert await client.execute("print(6 * 7)") == "42\n"
            assert await reserved(gateway) == {record.id}
            assert len(bench.agents(gateway)) == 1
            await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@pytest.mark.parametrize("point", ["launch.1.recorded", "launch.2.yielded"])
async def test_stopped_after_the_gateway_was_killed_during_launch(bench: Bench, point: str) -> None:
    """What the dead gateway started is found and ended, though it was never recorded."""
    assert killed_at(bench, point)
    gateway = bench.gateway()
    (record,) = await gateway.service.list(bench.alice)
    await gateway.service.store.ask_to_stop(record.id)
    async with gateway:
        await gateway.controller.wait(record.id, lambda row: row is not None and not row.live, 30)
        assert await gateway.service.list(bench.alice) == []
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


@pytest.mark.parametrize("point", ["stop.recorded", "stop.terminated", "stop.released"])
async def test_gateway_killed_during_stop(bench: Bench, point: str) -> None:
    assert killed_at(bench, point, stop=True)
    async with bench.gateway() as gateway:

        async def gone() -> bool:
            return not await gateway.service.list(bench.alice)

        await eventually(gone, "the kernel not to be listed")
        assert await reserved(gateway) == set()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_leftovers_without_a_row_are_reaped(bench: Bench) -> None:
    """A database restored from an old backup knows nothing of younger kernels: they are ended."""
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice)
        assert bench.leftovers(gateway)
    async with bench.gateway() as gateway:
        await forget(gateway, record)
        reaper = gateway.controller._reaper
        assert reaper is not None
        reaper.grace = 0.0
        await reaper.sweep()
        await reaper.sweep()
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def forget(gateway: MiniGateway, record: KernelRecord) -> None:
    from sqlalchemy import delete

    from hub_gateway.db.models import Kernel

    gateway.controller.links.drop(record.id)
    await gateway.service.store.write(lambda tx: tx.execute(delete(Kernel).where(Kernel.id == record.id)) and None)


def killed_at(bench: Bench, point: str, *, stop: bool = False) -> bool:
    """Run a gateway process that starts a kernel (and stops it) and dies at a failpoint."""
    environment = {**os.environ, failpoints.ENV: point, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        arguments(bench.setup, bench.alice.name, "python"),
        env=environment,
        cwd=bench.state_dir,
        input="stop\n" if stop else "",
        text=True,
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, f"it did not come by {point}: {done.stdout}\n{done.stderr}"
    return True


def _with(bench: Bench, **config: dict[str, object]) -> Setup:
    return replace(bench.setup, config={**bench.setup.config, **config})
