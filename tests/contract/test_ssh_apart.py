"""What one user of a host cannot do to the others there: hold them up, by whatever hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from hub_gateway.proxies import distributed, ssh_pool
from hub_gateway.proxies.base import Phase
from hub_gateway.proxies.ssh_pool import SESSIONS, Lane, Problem, SshError, SshPool
from tests.contract.conftest import Bench
from tests.contract.mini import MiniGateway
from tests.contract.ssh_case import SSH_SUDO, USERS
from tests.contract.suite import marks_of
from tests.contract.test_conformance_ssh import gateway_with, nodes_of, proxy_of
from tests.engines.ssh import LOGIN
from tests.harness.waiting import eventually

pytestmark = [
    *marks_of(*SSH_SUDO.needs),
    pytest.mark.parametrize("bench", [SSH_SUDO.name], indirect=True),
]

HANG = 'user=$1; shift; [ $user = {user} ] && [ -p {gate} ] && cat {gate}; exec sudo -n -H -u $user -- "$@"'


class Gate:
    """Where commands on a host hang until it is opened, as they do at a directory on a server that is away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        path.chmod(0o644)

    def hanging(self) -> list[int]:
        """The processes that wait at it."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cmdline() == ["cat", str(self.path)]:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found

    def open(self) -> None:
        """Let go whoever waits, and nobody wait any more."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            fd = None  # nobody waits, or it is open
        self.path.unlink(missing_ok=True)
        if fd is not None:
            os.close(fd)


@pytest.fixture
def gate(bench: Bench) -> Iterator[Gate]:
    made = Gate(bench.state_dir / "gate")
    yield made
    made.open()


@pytest.fixture
def pool(bench: Bench) -> Iterator[SshPool]:
    options = distributed.DistributedProxy(**bench.setup.config["DistributedProxy"]).ssh_options()
    made = SshPool(options)
    yield made
    made.close()


def peers(record: KernelRecord) -> set[int]:
    """The far ends of the links to a kernel's agent."""
    agent = psutil.Process(int(str(record.proxy_state["pid"])))
    assert record.registration is not None
    port = record.registration.port
    return {one.raddr.port for one in agent.net_connections("tcp") if one.raddr and one.laddr.port == port}


async def failed(gateway: MiniGateway, ids: list[str]) -> dict[str, str]:
    """The kernels that have failed, and what their owner is told."""
    rows = await gateway.service.store.some(set(ids))
    return {key: row.message for key, row in rows.items() if row.status is KernelStatus.FAILED}


async def test_a_hung_launcher_holds_up_its_owner_alone(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One user's directory is on a server that is away. Tunnels, launches and polls of others go on, on one host."""
    monkeypatch.setattr(distributed, "LAUNCH_SECONDS", 8.0)
    sudo = ["sh", "-c", HANG.format(user=USERS[0], gate=gate.path), "sh", "{user}"]
    traits: dict[str, Any] = {"network": "tunnel", "sudo_command": sudo, "calls_per_user": 2}
    async with gateway_with(bench, hosts=nodes_of(bench).hosts[:1], **traits) as gateway:
        first = await gateway.start(bench.bob)
        assert first.status is KernelStatus.RUNNING, first.message
        client = await gateway.connect(bench.bob, first.id)
        assert await client.execute("print(1)") == "1\n"
        link = peers(first)

        hung = [(await gateway.service.create(bench.alice, CreateKernel(name="python"))).id for _ in range(6)]
        await eventually(lambda: len(gate.hanging()) == 2, "as many launches hang as one user may have")
        second = await gateway.start(bench.bob)
        assert second.status is KernelStatus.RUNNING, second.message

        async def told() -> bool:
            return len(await failed(gateway, hung)) == 4

        await eventually(told, "those that could not begin are told why", timeout=60)
        for message in (await failed(gateway, hung)).values():
            assert "2 earlier calls for the same user hang there" in message
        assert len(gate.hanging()) == 2  # the gateway does not heap up more
        third = await gateway.start(bench.bob)
        assert third.status is KernelStatus.RUNNING, third.message
        states = {one.id: {**one.proxy_state, "gateway_id": gateway.gateway_id} for one in (first, second, third)}
        assert {report.phase for report in (await proxy_of(gateway).poll(states)).values()} == {Phase.RUNNING}
        assert await client.execute("print(2)") == "2\n"
        assert peers(first) == link, "the tunnel of another user was cut"

        gate.open()
        for one in set(hung) - set(await failed(gateway, hung)):
            record = await gateway.settled(one)
            assert record.status is KernelStatus.RUNNING, record.message
            await gateway.service.shutdown(bench.alice, one)
        for record in (first, second, third):
            await gateway.service.shutdown(bench.bob, record.id)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_a_connection_that_hangs_is_left_to_who_uses_it(bench: Bench, gate: Gate, pool: SshPool) -> None:
    """New commands go by another; one that was under way ends well when the host comes to life again."""
    node, host = nodes_of(bench).nodes[0], host_of(bench)
    under_way = pool.run(host, lambda: pool.command(host, LOGIN, ["cat", str(gate.path)], b"", 60), who="bob")
    waiting = asyncio.ensure_future(under_way)
    await eventually(lambda: gate.hanging() != [], "a command is under way")
    assert node.process is not None
    serving = [one for one in psutil.Process(node.process.pid).children(recursive=True) if one.name() == "sshd"]
    for one in serving:
        one.send_signal(signal.SIGSTOP)
    try:
        done = await pool.run(host, lambda: pool.command(host, LOGIN, ["echo", "new"], b"", 5), who="alice")
        assert done.out == b"new\n"
        assert not waiting.done()
    finally:
        for one in serving:
            one.send_signal(signal.SIGCONT)
    gate.open()
    assert (await waiting).code == 0


async def test_commands_that_hang_leave_room_for_others(bench: Bench, gate: Gate, pool: SshPool) -> None:
    """More of them than a connection may have sessions; looking after the host has a connection of its own."""
    host = host_of(bench)

    def hang() -> None:
        pool.command(host, LOGIN, ["cat", str(gate.path)], b"", 0.5)

    users = [f"user{number}" for number in range(SESSIONS + 4)]
    errors = await asyncio.gather(*(pool.run(host, hang, who=one) for one in users), return_exceptions=True)
    assert {error.problem for error in errors if isinstance(error, SshError)} == {Problem.UNFINISHED}
    assert len(errors) == len(gate.hanging()) == len(users)
    for lane in (Lane.CALL, Lane.LOOK):
        done = await pool.run(
            host, lambda lane=lane: pool.command(host, LOGIN, ["echo", "ok"], b"", 20, lane), who="bob", lane=lane
        )
        assert done.out == b"ok\n"
    gate.open()
    await eventually(lambda: not gate.hanging(), "they have ended")
    await pool.run(host, lambda: pool.command(host, LOGIN, ["true"], b"", 20), who=users[0])


async def test_a_search_waits_for_no_launch(bench: Bench, gate: Gate, pool: SshPool) -> None:
    """Every thread for launches hangs; what the gateway asks of the host for everybody has its own."""
    host, release = host_of(bench), threading.Event()
    users = [f"user{number}" for number in range(40)]
    blocked = [asyncio.ensure_future(pool.run(host, release.wait, who=one)) for one in users]
    try:
        done = await asyncio.wait_for(
            pool.run(host, lambda: pool.command(host, LOGIN, ["true"], b"", 20, Lane.LOOK), lane=Lane.LOOK), 20
        )
        assert done.code == 0 and not any(one.done() for one in blocked)
    finally:
        release.set()
        await asyncio.gather(*blocked)


async def test_a_port_that_does_not_answer_cuts_no_tunnel(
    bench: Bench, pool: SshPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent of one user takes no connections; those to the agents of others are channels of the same."""
    monkeypatch.setattr(ssh_pool, "CHANNEL_SECONDS", 1.0)
    host = host_of(bench)
    with contextlib.ExitStack() as each:
        good = each.enter_context(socket.create_server(("127.0.0.1", 0)))
        silent = each.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # Linux answers no more than it may keep for who listens
            waiting = each.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(silent.getsockname())
        channel = await asyncio.to_thread(pool.tunnel, host, LOGIN, good.getsockname())
        agent = each.enter_context(good.accept()[0])
        with pytest.raises(SshError) as caught:
            await asyncio.to_thread(pool.tunnel, host, LOGIN, silent.getsockname())
        assert caught.value.problem is Problem.UNFINISHED
        channel.sendall(b"alive")
        assert agent.recv(5) == b"alive"


async def test_a_login_that_is_refused_to_one_user_closes_the_host_to_no_other(bench: Bench) -> None:
    nodes = nodes_of(bench)
    nodes.let_in(USERS[1])
    async with gateway_with(bench, hosts=nodes.hosts[:1], login_as_owner=True) as gateway:
        assert "does not let hgt-ada log in" in (await gateway.start(bench.alice)).message
        assert not proxy_of(gateway).known.of(nodes.hosts[0]).why
        record = await gateway.start(bench.bob)
        assert record.status is KernelStatus.RUNNING, record.message
        await gateway.service.shutdown(bench.bob, record.id)


def host_of(bench: Bench) -> Any:
    proxy = distributed.DistributedProxy(**bench.setup.config["DistributedProxy"])
    return next(iter(proxy.configured_hosts().values()))
