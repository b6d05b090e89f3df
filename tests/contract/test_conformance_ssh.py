"""What only hosts that are reached by SSH can do to a gateway: be wrong, be down, be half set up, be full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from hub_gateway.errors import GatewayError
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.proxies.base import Finding, Phase
from hub_gateway.proxies.distributed import DistributedProxy
from tests.contract.conftest import PYTHON, Bench
from tests.contract.mini import MiniGateway
from tests.contract.ssh_case import NODES, SSH_SUDO, USERS
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.engines.ssh import LOGIN, SshNodes
from tests.harness.waiting import eventually

pytestmark = [
    *marks_of(*SSH_SUDO.needs),
    pytest.mark.parametrize("bench", [SSH_SUDO.name], indirect=True),
]


def gateway_with(bench: Bench, **traits: Any) -> MiniGateway:
    """A gateway whose DistributedProxy is configured otherwise."""
    config = dict(bench.setup.config)
    config["DistributedProxy"] = {**config["DistributedProxy"], **traits}
    return MiniGateway(replace(bench.setup, config=config))


def ended(process: psutil.Process) -> bool:
    """Whether it runs no more, though perhaps nobody has waited for it."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def answers(gateway: MiniGateway, kernel_id: str) -> bool:
    """Whether the agent of a kernel answers through the link that there is."""
    try:
        await gateway.controller.links.relay(kernel_id).ping(timeout=2.0)
    except GatewayError:
        return False
    return True


def nodes_of(bench: Bench) -> SshNodes:
    return NODES[bench.state_dir]


def proxy_of(gateway: MiniGateway) -> DistributedProxy:
    proxy = gateway.proxies.get("distributed")
    assert isinstance(proxy, DistributedProxy)
    return proxy


async def trouble(gateway: MiniGateway) -> list[Finding]:
    """What check says of the hosts, beside that all is well and that limits are not enforced."""
    found = await proxy_of(gateway).check()
    return [finding for finding in found if finding.level != "ok" and finding.what != "limits"]


async def refused(bench: Bench, gateway: MiniGateway) -> str:
    """What the owner of a kernel that cannot be launched is told; nothing is held and nothing left then."""
    record = await gateway.start(bench.alice)
    assert record.status is KernelStatus.FAILED, record
    assert await reserved(gateway) == set()
    await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")
    return record.message


async def test_wrong_and_unknown_host_keys(bench: Bench) -> None:
    """No host with another key, or one that nobody vouches for, is ever told anything."""
    nodes = nodes_of(bench)
    lines = nodes.known_hosts.read_text().splitlines()
    first, second, third = (line.split() for line in lines)
    wrong = " ".join([first[0], *second[1:]])
    nodes.known_hosts.write_text("\n".join([wrong, " ".join(third)]) + "\n")
    async with gateway_with(bench, hosts=nodes.hosts[:2]) as gateway:
        message = await refused(bench, gateway)
        assert "its host key is not the one in" in message and "its host key is not in" in message
        said = {finding.what: finding for finding in await trouble(gateway)}
        assert "somebody is in between" in said[nodes.hosts[0]].message
        assert "ssh-keyscan" in said[nodes.hosts[1]].hint
    async with bench.gateway() as gateway:  # the third host is good, and takes what the others cannot
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
        assert record.proxy_state["host"] == nodes.hosts[2]
        await gateway.service.shutdown(bench.alice, record.id)


async def test_host_down_and_back(bench: Bench) -> None:
    """Its kernels are unknown, and nobody else's are delayed; they go on where the connection is all that was lost."""
    nodes = nodes_of(bench)
    async with gateway_with(bench, connect_seconds=2.0, ask_seconds=1.0, retry_seconds=60.0) as gateway:
        proxy, first = proxy_of(gateway), nodes.nodes[0]
        record = await gateway.start(bench.alice)
        while record.proxy_state["host"] != nodes.hosts[0]:
            await gateway.service.shutdown(bench.alice, record.id)
            record = await gateway.start(bench.alice)
        other = await gateway.start(bench.bob)
        states = {one.id: {**one.proxy_state, "gateway_id": gateway.gateway_id} for one in (record, other)}

        first.freeze()
        began = time.monotonic()
        reports = await proxy.poll(states)
        assert reports[record.id].phase is Phase.UNKNOWN and "does not answer" in reports[record.id].reason
        assert reports[other.id].phase is Phase.RUNNING
        assert time.monotonic() - began < 3
        again = await gateway.start(bench.bob)  # on one of the hosts that answer
        assert again.status is KernelStatus.RUNNING and again.proxy_state["host"] != nodes.hosts[0]
        first.freeze(frozen=False)

        first.stop()
        reports = await proxy.poll(states)
        assert reports[record.id].phase is Phase.UNKNOWN
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("print(6 * 7)") == "42\n"  # its link does not go by SSH
        await gateway.service.store.ask_to_stop(record.id)
        gateway.controller.changed(record.id, stop=True)
        ending = await gateway.controller.wait(
            record.id, lambda row: row is not None and row.status is KernelStatus.STOPPING, 30
        )
        assert ending is not None and record.id in await reserved(gateway)  # not before it is proven gone
        first.start()
        await gateway.controller.wait(record.id, lambda row: row is not None and not row.live, 60)
        assert await reserved(gateway) == {other.id, again.id}
        for one in (other, again):
            await gateway.service.shutdown(bench.bob, one.id)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_no_host_answers(bench: Bench) -> None:
    nodes = nodes_of(bench)
    for node in nodes.nodes:
        node.stop()
    async with bench.gateway() as gateway:
        message = await refused(bench, gateway)
        assert "none of its hosts is to be had" in message and "Connection refused" in message
        assert all("does sshd run there" in finding.hint for finding in await trouble(gateway))


async def test_drained_hosts(bench: Bench) -> None:
    """By configuration or by a file on the host: new kernels go elsewhere, or are refused with the reason."""
    nodes = nodes_of(bench)
    async with gateway_with(bench, drained_hosts=nodes.hosts[:2]) as gateway:
        records = await asyncio.gather(gateway.start(bench.alice), gateway.start(bench.bob))
        assert {record.proxy_state["host"] for record in records} == {nodes.hosts[2]}
        (bench.state_dir / "drain").write_text("new memory on Friday\n")
        message = (await gateway.start(bench.alice)).message
        assert "new memory on Friday" in message and "its administrator is draining it" in message
        assert await reserved(gateway) == {record.id for record in records}  # those that run go on
        (bench.state_dir / "drain").unlink()
        for caller, record in zip((bench.alice, bench.bob), records, strict=True):
            await gateway.service.shutdown(caller, record.id)


async def test_no_sudo_rule(bench: Bench) -> None:
    nodes_of(bench).drop_sudo_rule()
    async with gateway_with(bench, check_user=USERS[0]) as gateway:
        message = await refused(bench, gateway)
        assert f"may not act as the unix user {USERS[0]}" in message
        assert all("sudo rule" in finding.hint for finding in await trouble(gateway))


async def test_login_is_refused(bench: Bench) -> None:
    nodes = nodes_of(bench)
    (nodes.directory / "authorized_keys" / LOGIN).unlink()
    async with bench.gateway() as gateway:
        assert f"does not let {LOGIN} log in" in await refused(bench, gateway)
        assert all("authorized_keys" in finding.hint for finding in await trouble(gateway))


async def test_node_without_python_or_pyzmq(bench: Bench) -> None:
    nodes, python = nodes_of(bench), bench.setup.config["DistributedProxy"]["python"]
    async with gateway_with(bench, python="/opt/nowhere/python3") as gateway:
        assert "has no usable Python" in await refused(bench, gateway)
        assert all("DistributedProxy.python" in finding.hint for finding in await trouble(gateway))
    bare = bench.state_dir / "bare"
    subprocess.run([python, "-m", "venv", "--without-pip", str(bare)], check=True)
    nodes.sudo_rule(f"{bare}/bin/python", f"{bench.state_dir}/shelves/{LOGIN}/[0-9a-f]{{64}}/node\\.py", *USERS)
    async with gateway_with(bench, python=f"{bare}/bin/python", check_user=USERS[0]) as gateway:
        assert "its Python has no pyzmq" in await refused(bench, gateway)
        assert all("pip install pyzmq" in finding.hint for finding in await trouble(gateway))


@pytest.fixture
def small_disk(bench: Bench) -> Iterator[Path]:
    """A file system that is full, for users' directories."""
    place = bench.state_dir / "full"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    with contextlib.suppress(OSError), (place / "ballast").open("wb") as file:
        file.write(bytes(2**20))
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


async def test_disk_full(bench: Bench, small_disk: Path) -> None:
    async with gateway_with(bench, runtime_root=str(small_disk)) as gateway:
        assert "its disk is full" in await refused(bench, gateway)
        assert all("is full" in finding.message for finding in await trouble(gateway))


async def test_all_is_well(bench: Bench) -> None:
    async with gateway_with(bench, check_user=USERS[0], limit_command=["prlimit", "--as={memory}"]) as gateway:
        assert await trouble(gateway) == []
        assert proxy_of(gateway).enforces == {"memory"}
    async with gateway_with(bench, check_user=USERS[0], limit_command=["nolimit", "{memory}"]) as gateway:
        assert all("limits cannot be enforced" in finding.message for finding in await trouble(gateway))


async def test_users_are_apart(bench: Bench) -> None:
    """Neither files, nor environment, nor what stands in command lines tells one user of another's kernel."""
    async with bench.gateway() as gateway:
        ours, theirs = await asyncio.gather(gateway.start(bench.alice), gateway.start(bench.bob))
        client = await gateway.connect(bench.alice, ours.id)
        agent = psutil.Process(int(str(theirs.proxy_state["pid"])))
        kernel = agent.children()[0]
        places = [
            f"/proc/{kernel.pid}/environ",
            f"/proc/{agent.pid}/environ",
            str(theirs.proxy_state["runtime_dir"]),
            f"{theirs.proxy_state['runtime_dir']}/agent.json",
        ]
        code = f"import os; print([os.access(place, os.R_OK) for place in {places!r}])"
        assert await client.execute(code) == f"{[False] * 4}\n"
        shelf = await client.execute("import sys; print(next(w for w in sys.orig_argv if w.endswith('launcher.py')))")
        changeable = await client.execute(f"print(os.access({str(Path(shelf.strip()).parent)!r}, os.W_OK))")
        assert changeable == "False\n"
        client = await gateway.connect(bench.alice, ours.id)
        with pytest.raises(psutil.AccessDenied) if os.geteuid() else contextlib.nullcontext():
            assert "CURVE" not in str(agent.environ()) and gateway.gateway_id not in str(agent.environ())
        for caller, record in ((bench.alice, ours), (bench.bob, theirs)):
            await gateway.service.shutdown(caller, record.id)


async def test_tunnel(bench: Bench) -> None:
    """Through the SSH connection, in both directions, with large messages; and again after that was lost."""
    nodes = nodes_of(bench)
    async with gateway_with(bench, network="tunnel", hosts=nodes.hosts[:1]) as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
        assert record.registration is not None and record.registration.host == "127.0.0.1"
        agent = psutil.Process(int(str(record.proxy_state["pid"])))
        peers = [
            one.raddr.port
            for one in agent.net_connections("tcp")
            if one.raddr and one.laddr.port == record.registration.port
        ]
        assert peers and not {one.laddr.port for one in psutil.Process().net_connections("tcp")} & set(peers)
        client = await gateway.connect(bench.alice, record.id)
        assert len(await client.execute("print('x' * 5_000_000)")) == 5_000_001
        assert await client.execute(f"text = {'y' * 3_000_000!r}; print(len(text))") == "3000000\n"
        nodes.nodes[0].stop()
        nodes.nodes[0].start()
        # What is sent while a connection breaks may be lost, whichever way it goes.
        await eventually(partial(answers, gateway, record.id), "the tunnel is there again")
        assert await client.execute("print(text[:3])") == "yyy\n"
    async with gateway_with(bench, network="tunnel", hosts=nodes.hosts[:1]) as gateway:
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("print(text[:4])") == "yyyy\n"
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_ports_and_addresses(bench: Bench) -> None:
    """Agents listen where they may: in a range of ports, at a node's other address, over IPv6."""
    nodes = nodes_of(bench)
    with socket.socket() as found:
        found.bind(("127.0.0.5", 0))
        port = found.getsockname()[1]
    name, _, ssh_port = nodes.hosts[0].partition(":")
    multihomed = {"host": name, "port": int(ssh_port), "name": "node1", "listen": "127.0.0.5"}
    async with gateway_with(bench, hosts=[multihomed], port_range=f"{port}..{port}") as gateway:
        record = await gateway.start(bench.alice)
        assert record.registration is not None, record.message
        assert (record.registration.host, record.registration.port) == ("127.0.0.5", port)
        full = await gateway.start(bench.bob)
        assert f"no port of {port} to {port} is free" in full.message
        await gateway.service.shutdown(bench.alice, record.id)
    six = SshNodes(bench.state_dir / "six", "::1")
    try:
        with six.known_hosts.open("a") as file:
            file.write(nodes.known_hosts.read_text())
        keys = {"key_file": str(six.key), "known_hosts": [str(six.known_hosts)]}
        async with gateway_with(bench, hosts=six.hosts, **keys) as gateway:
            record = await gateway.start(bench.alice)
            assert record.registration is not None, record.message
            assert record.registration.host == "::1"
            client = await gateway.connect(bench.alice, record.id)
            assert await client.execute("print(1)") == "1\n"
            await gateway.service.shutdown(bench.alice, record.id)
    finally:
        six.stop()


async def test_placement_and_choice(bench: Bench) -> None:
    """Round-robin visits all hosts, the fewest kernels evens out, and a kernelspec has its own list."""
    nodes = nodes_of(bench)
    async with bench.gateway() as gateway:
        records = [await gateway.start(bench.alice) for _ in nodes.hosts]
        assert {record.proxy_state["host"] for record in records} == set(nodes.hosts)
        stopped = records.pop()
        await gateway.service.shutdown(bench.alice, stopped.id)
    async with gateway_with(bench, placement="least-connection") as gateway:
        record = await gateway.start(bench.alice)
        assert record.proxy_state["host"] == stopped.proxy_state["host"]
        chosen = await gateway.start(bench.alice, env={"KERNEL_REMOTE_HOST": nodes.hosts[1]})
        assert chosen.proxy_state["host"] == nodes.hosts[1], chosen.message
        nowhere = await gateway.start(bench.alice, env={"KERNEL_REMOTE_HOST": "elsewhere"})
        assert "choose one of" in nowhere.message
        for one in (*records, record, chosen):
            await gateway.service.shutdown(bench.alice, one.id)


async def test_memory_limit_is_in_force(bench: Bench) -> None:
    bounds = {"metadata": {"hub_gateway": {"resources": {"memory": "2G"}}}}
    spec = {"argv": PYTHON, "display_name": "Small", "language": "python", **bounds}
    folder = bench.state_dir / "kernels" / "small"
    folder.mkdir()
    (folder / "kernel.json").write_text(json.dumps(spec))
    async with gateway_with(bench, limit_command=["prlimit", "--as={memory}"]) as gateway:
        record = await gateway.start(bench.alice, "small")
        assert record.status is KernelStatus.RUNNING, record.message
        assert record.resources.memory
        client = await gateway.connect(bench.alice, record.id)
        _, reply = await client.result(client.run(f"bytearray({record.resources.memory})"))
        assert reply["content"]["ename"] == "MemoryError"
        assert await client.execute("print('alive')") == "alive\n"
        await gateway.service.shutdown(bench.alice, record.id)


async def test_grandchildren_end_with_the_kernel(bench: Bench) -> None:
    """The whole process group, and what left it: also where agent and kernel were killed."""
    async with bench.gateway() as gateway:
        for kill in (False, True):
            record = await gateway.start(bench.alice)
            client = await gateway.connect(bench.alice, record.id)
            code = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid)"
            child = psutil.Process(int(await client.execute(code)))
            if kill:
                agent = psutil.Process(int(str(record.proxy_state["pid"])))
                kernel = agent.children()[0]
                agent.kill()
                kernel.kill()
                await gateway.controller.wait(record.id, lambda row: row is not None and not row.live, 60)
            await gateway.service.shutdown(bench.alice, record.id)
            assert ended(child)
        await eventually(lambda: not bench.leftovers(gateway), f"nothing left: {bench.leftovers(gateway)}")


async def test_a_lost_host(bench: Bench) -> None:
    """An administrator says that a host is gone for good: its kernels hold nothing any more."""
    nodes = nodes_of(bench)
    async with gateway_with(bench, hosts=nodes.hosts[:1]) as gateway:
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.RUNNING, record.message
    bench.case.kill_agent(record)
    nodes.nodes[0].stop()
    async with gateway_with(bench, hosts=nodes.hosts[1:], lost_hosts=nodes.hosts[:1]) as gateway:
        ended = await gateway.controller.wait(record.id, lambda row: row is not None and not row.live, 60)
        assert ended is not None and "is lost" in ended.message
        assert await reserved(gateway) == set()


async def test_launchers_are_brought_again(bench: Bench) -> None:
    """Where somebody has cleaned up, or has changed what lies there."""
    shelves = bench.state_dir / "shelves" / LOGIN
    for change in ("removed", "changed"):
        async with gateway_with(bench, hosts=nodes_of(bench).hosts[:1]) as gateway:
            record = await gateway.start(bench.alice)
            assert record.status is KernelStatus.RUNNING, record.message
            await gateway.service.shutdown(bench.alice, record.id)
            if change == "removed":
                shutil.rmtree(shelves)
                record = await gateway.start(bench.alice)
                assert record.status is KernelStatus.RUNNING, record.message
                await gateway.service.shutdown(bench.alice, record.id)
                (agent,) = shelves.glob("*/agent.py")
                agent.write_text("raise SystemExit('not ours')\n")


async def test_many_at_once(bench: Bench) -> None:
    """More launches than a host takes sessions (MaxSessions 10): they take turns, and none fails."""
    async with gateway_with(bench, hosts=nodes_of(bench).hosts[:1]) as gateway:
        proxy = proxy_of(gateway)
        host = next(iter(proxy.known.hosts.values()))
        calls = [
            proxy.pool.run(host, lambda: proxy.pool.command(host, LOGIN, ["true"], b"", 60), who=f"user{number % 5}")
            for number in range(40)
        ]
        assert {done.code for done in await asyncio.gather(*calls)} == {0}


async def test_nothing_of_a_kernel_is_in_a_command_line(bench: Bench) -> None:
    """Words with quotes, blanks and dollars reach the kernel as they are, and other users do not see them."""
    odd = 'it\'s "odd" $HOME `id`; & \n *'
    async with bench.gateway() as gateway:
        created = await gateway.service.create(bench.alice, CreateKernel(name="python", env={"KERNEL_ODD": odd}))
        record = await gateway.settled(created.id)
        assert record.status is KernelStatus.RUNNING, record.message
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("import os; print(ascii(os.environ['KERNEL_ODD']))") == f"{odd!a}\n"
        agent = psutil.Process(int(str(record.proxy_state["pid"])))
        assert not any("odd" in word for word in (*agent.cmdline(), *agent.children()[0].cmdline()))
        await gateway.service.shutdown(bench.alice, record.id)
