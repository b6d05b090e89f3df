"""Kernels on engines: what a start costs beside the engine's own, what an idle kernel costs, and a host that hangs."""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from docker.types import IPAMConfig, IPAMPool
from jupyter_client.connect import write_connection_file
from jupyter_client.session import Session

from benchmarks.bench import Bench, milliseconds, percentile
from benchmarks.client import Endpoint, Http, execute_content
from benchmarks.gateways import HubGateway, in_parallel
from benchmarks.report import Row
from tests.contract import docker_case, ssh_case
from tests.engines.docker import IMAGE, Dockerd, docker_engine, free_network
from tests.engines.ssh import LOGIN, SshNodes
from tests.harness.gateway import ROOT
from tests.harness.waiting import until

__all__ = ["dead_host", "idle_kernels", "starts"]

START_RATIO = 1.15
IDLE_BYTES, IDLE_DESCRIPTORS = 50_000, 2.0
TAIL_RATIO = 1.1
"""How far two measures of the same p99 lie apart by themselves."""
HANGING = 10
HANGS_SECONDS = 15.0
"""Longer than the gateway takes to give up a connection."""
FLOOD = ROOT / "tests" / "harness" / "flood_kernel.py"
Floor = Callable[[], float]
"""Seconds from the engine's own command to the first execute_reply of its kernel."""


def _config(config: Mapping[str, Any]) -> str:
    """A case of the conformance suite as a configuration file."""
    return "".join(f"c.{name}.{key} = {value!r}\n" for name, traits in config.items() for key, value in traits.items())


def _spec(argv: Sequence[str], **config: Any) -> dict[str, Any]:
    proxy = {"process_proxy": {"config": config}}
    return {"argv": [*argv, "-f", "{connection_file}"], "display_name": "x", "language": "python", "metadata": proxy}


@contextmanager
def _hosts(directory: Path) -> Iterator[tuple[SshNodes, dict[str, Any]]]:
    """OpenSSH servers, and the configuration of a gateway that runs kernels there as their owners, by sudo."""
    directory.parent.chmod(0o711)  # kernels run as other users, who must get to what is in it
    nodes = ssh_case.prepare_nodes(directory)
    try:
        yield nodes, dict(ssh_case.distributed(nodes, directory))
    finally:
        nodes.stop()


def _first_reply(gateway: HubGateway, spec: str) -> tuple[float, str]:
    """Seconds from POST to the first execute_reply, and the kernel's id."""
    began = time.perf_counter()
    kernel_id = gateway.create(spec)
    with gateway.channels(kernel_id, v1=True) as channels:
        channels.execute("pass")
        return time.perf_counter() - began, kernel_id


def _floor(command: Sequence[str], connection: Mapping[str, Any], address: str) -> float:
    """Start a kernel by a command, and be its client by a raw socket; it ends as it is asked to."""
    session = Session(key=str(connection["key"]).encode())
    context = zmq.Context()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        shell = context.socket(zmq.DEALER)
        # ms: what is not there yet is asked again at once, also where nothing answers and nothing refuses.
        shell.reconnect_ivl, shell.connect_timeout = 5, 20
        shell.rcvtimeo = 60_000
        shell.connect(f"tcp://{address}:{connection['shell_port']}")
        shell.send_multipart(session.serialize(session.msg("execute_request", execute_content("pass"))))
        shell.recv_multipart()
        seconds = time.perf_counter() - began
        shell.send_multipart(session.serialize(session.msg("shutdown_request", {"restart": False})))
        process.wait(30)
    finally:
        context.destroy(linger=0)
        if process.poll() is None:
            process.kill()
            process.wait()
    return seconds


@contextmanager
def _local(bench: Bench) -> Iterator[tuple[Floor, HubGateway]]:
    directory = bench.fresh("engine-local")
    argv = bench.specs["ipykernel"]["argv"][:-2]

    def floor() -> float:
        path = directory / "connection.json"
        _, connection = write_connection_file(str(path), ip="127.0.0.1")
        return _floor([*argv, "-f", str(path)], connection, "127.0.0.1")

    yield floor, bench.hub


@contextmanager
def _ssh(bench: Bench) -> Iterator[tuple[Floor, HubGateway]]:
    directory = bench.fresh("engine-ssh")
    with _hosts(directory) as (nodes, config):
        node, python = nodes.nodes[0], ssh_case.usable_python()
        argv = [python, "-m", "ipykernel_launcher"]
        options = ["-o", f"UserKnownHostsFile={nodes.known_hosts}", "-o", "BatchMode=yes", "-i", str(nodes.key)]

        def floor() -> float:
            path = directory / "connection.json"
            _, connection = write_connection_file(str(path), ip=node.address)
            path.chmod(0o644)
            ssh = ["ssh", "-F", "none", *options, "-p", str(node.port), f"{LOGIN}@{node.address}"]
            return _floor([*ssh, *argv, "-f", str(path)], connection, node.address)

        spec = _spec(argv, hosts=nodes.hosts[:1])
        hub = HubGateway(directory / "hub", users=ssh_case.USERS, specs={"ipykernel": spec}, config=_config(config))
        with hub:
            yield floor, hub


@contextmanager
def _network(daemon: Dockerd) -> Iterator[tuple[str, str]]:
    """A network in which the floor's container has an address that is known before: its name, and the address."""
    subnet = free_network()
    pool = IPAMPool(subnet=str(subnet))
    network = daemon.client.networks.create("hgt-bench", ipam=IPAMConfig(pool_configs=[pool]))
    try:
        yield "hgt-bench", str(subnet[250])
    finally:
        until(lambda: not daemon.client.containers.list(), "no container is in the network", timeout=60)
        network.remove()


@contextmanager
def _docker(bench: Bench) -> Iterator[tuple[Floor, HubGateway]]:
    directory, daemon = bench.fresh("engine-docker"), docker_engine()
    directory.parent.chmod(0o711)
    directory.chmod(0o755)
    config = dict(docker_case.in_containers(directory))
    with _network(daemon) as (network, address):

        def floor() -> float:
            path = directory / "connection.json"
            _, connection = write_connection_file(str(path), ip="0.0.0.0")
            path.chmod(0o644)
            docker = ["docker", "--host", daemon.url, "run", "--rm", "--network", network, "--ip", address]
            kernel = ["python3", "-m", "ipykernel_launcher", "-f", "/connection.json"]
            command = [*docker, "--volume", f"{path}:/connection.json:ro", IMAGE, *kernel]
            return _floor(command, connection, address)

        config["DockerProxy"] = {**config["DockerProxy"], "network": network}
        spec = _spec(["python3", "-m", "ipykernel_launcher"])
        users = docker_case.USERS
        with HubGateway(directory / "hub", users=users, specs={"ipykernel": spec}, config=_config(config)) as hub:
            yield floor, hub
            hub.delete_all()


ENGINES = {"local": _local, "ssh": _ssh, "docker": _docker}
FLOORS = {"local": "the kernel's command", "ssh": "ssh node python -m ipykernel_launcher", "docker": "docker run"}


def starts(bench: Bench) -> list[Row]:
    """From POST to the first execute_reply, on each engine; the baseline is the engine's own command."""
    rounds = bench.rounds(12)
    bench.report.notes.append(
        f"Starts on engines: one ipykernel from POST to its first execute_reply, {rounds} rounds in turn with the "
        "engine's own command and a raw socket to the same kernel: "
        + "; ".join(f"{name}: {command}" for name, command in FLOORS.items())
        + ". Each of these connects and logs in anew; the gateway keeps its connection to the host, and its first "
        "start is told beside. Its kernels run as the unix user of their owner; the local ones as its own."
    )
    return [_start_row(name, engine, bench, rounds) for name, engine in ENGINES.items()]


def _start_row(name: str, engine: Callable[[Bench], Any], bench: Bench, rounds: int) -> Row:
    direct: list[float] = []
    ours: list[float] = []
    title = f"start to the first reply, {name}"
    try:
        with engine(bench) as (floor, gateway):
            for number in range(rounds + 1):
                for who in random.sample(("direct", "ours"), 2):
                    if who == "direct":
                        direct.append(floor())
                    else:
                        seconds, kernel_id = _first_reply(gateway, "ipykernel")
                        _runs(gateway, kernel_id)
                        ours.append(seconds)
                        gateway.delete(kernel_id)
                if number == 0:  # caches of the disk and of the engine are cold, and the gateway connects at first
                    cold, direct, ours = ours[0], [], []
    except pytest.skip.Exception as reason:
        return Row(title, ours=f"not measured: {reason}")
    except (zmq.ZMQError, subprocess.SubprocessError, AssertionError, OSError, RuntimeError) as error:
        # The rows of the other engines stay.
        return Row(title, ours=f"failed: {error}".splitlines()[0], met=False)
    ratio = statistics.median(ours) / statistics.median(direct)
    return Row(
        title,
        f"<= {START_RATIO} x direct",
        f"{statistics.median(direct):.2f} s",
        f"{statistics.median(ours):.2f} s (the first one {cold:.2f} s)",
        ratio=f"{ratio:.2f} x direct",
        met=ratio <= START_RATIO,
        raw={"direct": direct, "ours": ours},
    )


def _light(directory: Path) -> list[str]:
    """The command of a kernel of few bytes, which every unix user may run."""
    script = directory / FLOOD.name
    shutil.copy(FLOOD, script)
    script.chmod(0o644)
    return [ssh_case.usable_python(), str(script)]


def idle_kernels(bench: Bench) -> list[Row]:
    """What an idle kernel on a host costs the gateway: memory, descriptors, and CPU, of which it should take none."""
    directory, count, first = bench.fresh("engine-idle"), bench.rounds(150), 10
    title = "idle kernel on a host, not used yet, memory and descriptors in the gateway"
    try:
        with _hosts(directory) as (nodes, config):
            spec = _spec(_light(directory), hosts=nodes.hosts)
            with HubGateway(
                directory / "hub", users=ssh_case.USERS, specs={"light": spec}, config=_config(config)
            ) as hub:
                in_parallel(first, lambda _: hub.start("light"))
                before, descriptors = hub.rss(), hub.descriptors()
                in_parallel(count, lambda _: hub.start("light"))
                after, more = hub.rss(), hub.descriptors()
                cpu, began = hub.cpu(), time.perf_counter()
                time.sleep(10)
                share = (hub.cpu() - cpu) / (time.perf_counter() - began)
                alive = _states(hub)
                assert list(alive.values()) == ["idle"] * (first + count), f"not all kernels are idle: {alive}"
                with ThreadPoolExecutor(5) as pool:
                    list(pool.map(hub.delete, alive))
    except pytest.skip.Exception as reason:
        return [Row(title, ours=f"not measured: {reason}")]
    each, fds = 1e6 * (after - before) / count, (more - descriptors) / count
    bench.report.notes.append(
        f"Idle kernels: {count} more beside {first} on three hosts, without websockets; what they add to the gateway's "
        "resident memory and descriptors, divided by their number, and the CPU that it takes with all of them idle."
    )
    return [
        Row(
            title,
            f"<= {IDLE_BYTES // 1000} kB, <= {IDLE_DESCRIPTORS:.0f}",
            ours=f"{each / 1000:.0f} kB, {fds:.2f}",
            met=each <= IDLE_BYTES and fds <= IDLE_DESCRIPTORS + 3 / count,
            raw={"bytes": each, "descriptors": fds},
        ),
        Row(f"CPU with {len(alive)} idle kernels on hosts", ours=f"{100 * share:.1f} %", raw={"share": share}),
    ]


def dead_host(bench: Bench) -> list[Row]:
    """`pass` on one host while another one hangs, on which somebody else starts kernels."""
    directory, count = bench.fresh("engine-dead"), bench.rounds(2000)
    title = f"pass beside {HANGING} launches to a host that hangs"
    try:
        with _hosts(directory) as (nodes, config):
            argv = _light(directory)
            specs = {"good": _spec(argv, hosts=nodes.hosts[:1]), "dead": _spec(argv, hosts=nodes.hosts[1:2])}
            users = ssh_case.USERS
            with HubGateway(directory / "hub", users=users, specs=specs, config=_config(config)) as hub:
                other = Endpoint("127.0.0.1", hub.gateway.port, hub.gateway.headers(users[1]))
                good = hub.start("good")
                with hub.channels(good, v1=True) as channels:
                    _runs(hub, good)
                    before = [channels.execute("pass") for _ in range(count)]
                    nodes.nodes[1].freeze()
                    try:
                        with ThreadPoolExecutor(HANGING) as pool:
                            made = list(pool.map(lambda _: _post(other, "dead"), range(HANGING)))
                        until_seconds, beside = time.monotonic() + HANGS_SECONDS, []
                        while time.monotonic() < until_seconds or len(beside) < count:
                            beside.append(channels.execute("pass"))
                    finally:
                        nodes.nodes[1].freeze(frozen=False)
                hub.delete_all()
                _end_all(other)
    except pytest.skip.Exception as reason:
        return [Row(title, ours=f"not measured: {reason}")]
    assert made == [201] * HANGING, f"the launches were answered {made}"
    bench.report.notes.append(
        f"A host that hangs: {len(before)} round trips before, and {len(beside)} in the {HANGS_SECONDS:.0f} s after it "
        "was stopped (SIGSTOP to sshd) and launches to it were asked for."
    )
    ratio = percentile(beside, 0.99) / percentile(before, 0.99)
    return [
        Row(
            title,
            "p99 unchanged",
            f"{milliseconds(before)}, p99 {1000 * percentile(before, 0.99):.2f}",
            f"{milliseconds(beside)}, p99 {1000 * percentile(beside, 0.99):.2f}",
            ratio=f"p99 {ratio:.2f} x without",
            met=ratio <= TAIL_RATIO,
            raw={"before": before, "beside": beside},
        )
    ]


def _runs(hub: HubGateway, kernel_id: str) -> None:
    """Make sure that it does, and that what was measured is not how fast it failed."""
    until(lambda: _states(hub)[kernel_id] == "idle", "the kernel to be idle")


def _states(hub: HubGateway) -> dict[str, str]:
    """The caller's kernels, and what they do."""
    with Http(hub.endpoint) as http:
        return {one["id"]: one["execution_state"] for one in json.loads(http.request("GET", "/api/kernels")[1])}


def _post(endpoint: Endpoint, spec: str) -> int:
    with Http(endpoint) as http:
        return http.request("POST", "/api/kernels", {"name": spec})[0]


def _end_all(endpoint: Endpoint) -> None:
    with Http(endpoint) as http:
        for kernel in json.loads(http.request("GET", "/api/kernels")[1]):
            http.request("DELETE", f"/api/kernels/{kernel['id']}")
