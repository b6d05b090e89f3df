"""How hosts are written down, and which one takes the next kernel."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError
from traitlets.config import Config

from hub_gateway.kernels.types import Resources
from hub_gateway.proxies import ssh_pool
from hub_gateway.proxies.base import AgentSettings, LaunchRequest, Phase, State
from hub_gateway.proxies.distributed import DistributedProxy
from hub_gateway.proxies.registry import Proxies
from hub_gateway.proxies.ssh_hosts import Host, Hosts, Placement, host_of, listed
from hub_gateway.proxies.ssh_node import Nodes
from hub_gateway.proxies.ssh_pool import Lane, Problem, SshError, _Connection, _Place
from hub_gateway.proxies.ssh_reports import phase_of
from tests.harness.waiting import eventually


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("node1", Host("node1", "node1")),
        ("node1:2222", Host("node1:2222", "node1", 2222)),
        ("2001:db8::7", Host("2001:db8::7", "2001:db8::7")),
        ("[2001:db8::7]:2222", Host("[2001:db8::7]:2222", "2001:db8::7", 2222)),
        ({"host": "node1", "port": 2222, "name": "big"}, Host("big", "node1", 2222)),
        ({"host": "node1", "listen": "10.1.0.7", "reach": "data1"}, Host("node1", "node1", 22, "10.1.0.7", "data1")),
    ],
)
def test_hosts_are_read(written: object, expected: Host) -> None:
    assert host_of(written) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["", "a b", "-oProxyCommand=x", "node:0", "node:99999", "node;id", {"port": 22}])
def test_what_is_no_host(written: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        found = host_of(written)  # type: ignore[arg-type]
        assert not found.address.startswith("-")
        raise AssertionError(found)


def test_lists_of_kernelspecs() -> None:
    assert listed("a, b,,c ") == ["a", "b", "c"] == listed(["a", "b", "c"])
    assert listed(None) == []


def test_a_configuration_that_is_wrong_is_refused() -> None:
    for traits in (
        {"hosts": ["a", "a"]},
        {"hosts": ["a b"]},
        {"port_range": "5..1"},
        {"limit_command": ["nice"]},
        {"gss_principal": "gw/host"},
    ):
        with pytest.raises(TraitError):
            DistributedProxy(config=Config(DistributedProxy=traits))


def test_placement() -> None:
    names = ["a", "b", "c"]
    hosts = Hosts({name: Host(name, name) for name in names})
    assert {hosts.order(names)[0] for _ in names} == set(names)
    hosts.failed("b", "down")
    assert all(hosts.order(names)[-1] == "b" for _ in names)  # the last resort
    hosts.answered("b", {})
    assert {hosts.order(names)[0] for _ in names} == set(names)
    hosts.answered("a", {"drained": "new disks"})
    assert set(hosts.order(names)) == {"b", "c"} and hosts.why_not("a") == "new disks"

    hosts = Hosts(hosts.hosts, Placement.LEAST_CONNECTION)
    assert set(hosts.stale(names, 10)) == set(names)
    for name, kernels in (("a", 3), ("b", 1), ("c", 2)):
        hosts.answered(name, {"agents": [{}] * kernels})
    assert hosts.order(names) == ["b", "c", "a"]
    hosts.of("b").launched += 3  # since it told
    assert hosts.order(names)[0] == "c"

    hosts = Hosts(hosts.hosts, Placement.LEAST_LOAD)
    for name, load, cpus in (("a", 2.0, 2), ("b", 4.0, 16), ("c", 1.0, 1)):
        hosts.answered(name, {"load": load, "cpus": cpus})
    assert hosts.order(names)[0] == "b"


def test_limits_are_what_a_kernel_asks_for() -> None:
    words = ["systemd-run", "--scope", "-p", "MemoryMax={memory}", "-pCPUQuota={cpu_percent}%", "--"]
    proxy = DistributedProxy(config=Config(DistributedProxy={"limit_command": words}))
    assert proxy.enforces == {"memory", "cpu"}
    both = ["systemd-run", "--scope", "-p", "MemoryMax=1024", "-pCPUQuota=150%", "--"]
    assert proxy.limits(Resources(cpu=1.5, memory=1024)) == both
    assert proxy.limits(Resources()) == []
    assert DistributedProxy().enforces == frozenset()


def test_enterprise_gateways_name() -> None:
    name = "enterprise_gateway.services.processproxies.distributed.DistributedProcessProxy"
    assert Proxies().resolve(name) == "distributed"


async def test_a_check_leaves_the_connections_of_kernels_alone() -> None:
    """It neither waits for one that is just being made, nor cuts one that kernels use."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    proxy = DistributedProxy(config=Config(DistributedProxy={"hosts": [f"127.0.0.1:{port}"], "user": "hub"}))
    used = _Connection(object())
    place = proxy.pool._places["127.0.0.1", port, "hub", Lane.LOOK] = _Place(connections=[used])
    with place.lock:
        (finding,) = [one for one in await asyncio.wait_for(proxy.check(), 10) if one.what != "limits"]
    assert finding.level == "error" and "cannot be reached" in finding.message
    assert place.connections == [used]
    place.connections.clear()
    await proxy.close()


async def test_a_check_tries_the_limits_that_kernels_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is in the command: a brace that is none of ours stays as it is."""
    words = ["prlimit", "--as={memory}", "--", "env", "NOTE=${UID}{"]
    traits = {"hosts": ["a"], "user": "hub", "check_user": "ada", "limit_command": words}
    asked: list[Any] = []

    def call(self: Nodes, host: Host, login: str, action: str, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        asked.append(request.get("limit_command"))
        return {"python": "3.11.2", "time": time.time(), "zmq": "26.0 curve", "writable": True, "free": 2**40}

    monkeypatch.setattr(Nodes, "call", call)
    proxy = DistributedProxy(config=Config(DistributedProxy=traits))
    assert {finding.level for finding in await proxy.check()} == {"ok"}
    assert asked[-1] == ["prlimit", f"--as={2**40}", "--", "env", "NOTE=${UID}{"]
    await proxy.close()


@pytest.mark.parametrize(
    ("user", "phase"), [("ada", Phase.RUNNING), ("1001", Phase.UNKNOWN), ("bea", Phase.GONE), (None, Phase.GONE)]
)
def test_an_agent_whose_user_has_no_name_for_now_is_not_gone(user: str | None, phase: Phase) -> None:
    """A host that cannot reach its directory service tells uids; somebody else's process may have the pid."""
    agents = [{"pid": 7, "kernel_id": "k1", "user": user}] if user else []
    state: State = {"host": "a", "pid": 7, "user": "ada"}
    assert phase_of("k1", state, {"agents": agents}, "").phase is phase


def request_of(kernel_id: str) -> LaunchRequest:
    """A kernel of Ada's that is to run anywhere."""
    return LaunchRequest(
        kernel_id=kernel_id,
        gateway_id="g",
        epoch=1,
        owner="ada",
        kernelspec="python",
        argv=("python",),
        env={},
        agent=AgentSettings(client_public_key="", launch_token=""),
        unix_user="ada",
    )


async def test_a_burst_of_launches_asks_each_host_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that go on are told, though the one that asked first has been given up."""
    asked: Counter[str] = Counter()
    release = threading.Event()

    def call(self: Nodes, host: Host, login: str, action: str, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        asked[host.name] += 1
        release.wait()
        return {"agents": [], "load": 1.0 if host.name == "a" else 0.0}

    monkeypatch.setattr(Nodes, "call", call)
    traits = {"hosts": ["a", "b"], "user": "hub", "placement": "least-load", "ask_seconds": 60.0}
    proxy = DistributedProxy(config=Config(DistributedProxy=traits))
    launches = [asyncio.ensure_future(proxy._candidates(request_of(f"k{number}"), {})) for number in range(100)]
    try:
        await eventually(lambda: len(asked) == 2, "both hosts are asked")
        launches[0].cancel()
        await asyncio.wait({launches[0]})
    finally:
        release.set()
    assert await asyncio.gather(*launches[1:]) == [["b", "a"]] * 99
    assert launches[0].cancelled() and asked == {"a": 1, "b": 1}
    proxy.known.of("b").at = 1e-9  # long ago
    await proxy._candidates(request_of("k100"), {})
    assert asked == {"a": 1, "b": 2}
    await proxy.close()


async def test_launches_that_meet_the_same_taken_name_go_on_to_the_same_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody has taken the first; each of the others is left for when that one is taken as well."""
    proxy = DistributedProxy(config=Config(DistributedProxy={"hosts": ["a"], "user": "hub"}))
    taken = Path(proxy._path("g", "k", proxy.known.hosts["a"], "ada", 0)).parent
    met, all_met = 0, asyncio.Event()

    async def launch_on(
        self: DistributedProxy, host: Host, request: LaunchRequest, state: State, tickets: Any
    ) -> dict[str, Any]:
        nonlocal met
        if Path(str(state["runtime_dir"])).parent != taken:
            return {}
        met += 1
        if met == 5:
            all_met.set()
        await all_met.wait()
        return {"taken": "it exists"}

    async def launch(kernel_id: str) -> Path:
        states = [state async for state in proxy.launch(request_of(kernel_id))]
        return Path(str(states[-1]["runtime_dir"])).parent

    monkeypatch.setattr(DistributedProxy, "_launch_on", launch_on)
    monkeypatch.setattr(DistributedProxy, "_registered", lambda *_: {})
    places = await asyncio.gather(*(launch(f"k{number}") for number in range(5)))
    assert {*places, await launch("k5")} == {Path(proxy._path("g", "k", proxy.known.hosts["a"], "ada", 1)).parent}
    await proxy.close()


class Client:
    """A login at a host that hung up at once: as paramiko has it then."""

    def __init__(self, transport: Callable[[], Any]) -> None:
        self.get_transport = transport
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Gone:
    """What is left of its connection."""

    def __init__(self) -> None:
        self.sock = socket.socket()
        self.sock.close()


@pytest.mark.parametrize("transport", [Gone, lambda: None])
async def test_a_host_that_hangs_up_at_once_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, transport: Callable[[], Any]
) -> None:
    client = Client(transport)
    monkeypatch.setattr(ssh_pool, "connect", lambda *_: client)
    proxy = DistributedProxy(config=Config(DistributedProxy={"hosts": ["a"], "user": "hub"}))
    with pytest.raises(SshError, match="the connection broke off") as caught:
        await asyncio.to_thread(proxy.pool.command, Host("a", "a"), "hub", ["true"], b"", 5.0)
    assert caught.value.problem is Problem.UNREACHABLE and client.closed
    await proxy.close()


def test_it_says_how_it_acts_as_an_owner() -> None:
    def says(**traits: Any) -> str:
        return DistributedProxy(user="gw", **traits).says("alice", "alice@EXAMPLE.TEST")

    gss = {"gss_keytab": "/etc/gw.keytab", "gss_principal": "gw/host@EXAMPLE.TEST"}
    assert says() == "the gateway logs in as gw with its key and becomes alice by a rule of sudo."
    assert says(login_as_owner=True) == "the gateway logs in as alice with its key."
    assert says(**gss, login_as_owner=True) == (
        "the gateway logs in as alice with tickets of gw/host@EXAMPLE.TEST, by k5login."
    )
    assert says(**gss, owner_login="s4u") == (
        "the gateway logs in as alice with a ticket of alice@EXAMPLE.TEST by constrained delegation (S4U)."
    )
    without_rules = DistributedProxy(user="gw", **gss, owner_login="s4u")
    assert "a ticket of bob@EXAMPLE.TEST" in without_rules.says("bob", None)
    without_rules.remember({"user": "bob", "principal": "robert@EXAMPLE.TEST"})
    assert without_rules.principal_of("bob") == "robert@EXAMPLE.TEST"
