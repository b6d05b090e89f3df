"""What is Docker's own: what a container may and may not, and what becomes of kernels when somebody meddles with it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator

import pytest

from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from hub_gateway.proxies.base import Phase
from hub_gateway.proxies.docker import DockerProxy
from hub_gateway.proxies.swarm import SwarmProxy
from tests.contract.client import KernelClient
from tests.contract.conftest import Bench
from tests.contract.docker_case import DOCKER, SWARM, container_spec
from tests.contract.mini import MiniGateway
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.engines.docker import NO_PYTHON, docker_engine
from tests.harness.waiting import eventually

pytestmark = marks_of("docker")

single = pytest.mark.parametrize("bench", [DOCKER.name], indirect=True)
both = pytest.mark.parametrize("bench", [case.name for case in (DOCKER, SWARM)], indirect=True)


async def started(bench: Bench, gateway: MiniGateway, name: str = "python") -> tuple[KernelRecord, KernelClient]:
    """A kernel of alice's that runs, and a client of it."""
    record = await gateway.start(bench.alice, name)
    assert record.status is KernelStatus.RUNNING, record.message
    return record, await gateway.connect(bench.alice, record.id)


async def gone(gateway: MiniGateway, kernel_id: str) -> KernelRecord:
    """The kernel, as soon as it has failed."""
    found = await gateway.controller.wait(kernel_id, lambda row: row is not None and not row.live, 60)
    assert found is not None and found.status is KernelStatus.FAILED
    return found


@both
async def test_users_share_nothing(bench: Bench) -> None:
    """Each has the own uid, the own files and processes, and those of nobody else."""
    async with bench.gateway() as gateway:
        records = await asyncio.gather(gateway.start(bench.alice), gateway.start(bench.bob))
        seen = []
        for caller, record in zip((bench.alice, bench.bob), records, strict=True):
            client = await gateway.connect(caller, record.id)
            await client.execute(f"open('/home/{caller.name}/note', 'w').write('{caller.name}')")
            code = (
                "import os, json, glob\n"
                "print(json.dumps([os.getuid(), os.getcwd(), os.listdir('/home'), len(glob.glob('/proc/[0-9]*')), "
                "os.path.expanduser('~')]))"
            )
            seen.append(json.loads(await client.execute(code)))
        (uid, cwd, homes, processes, home), (other, _, foreign, _, _) = seen
        assert uid != other and uid >= 1000 and other >= 1000
        assert (cwd, home) == (f"/home/{bench.alice.name}",) * 2
        assert homes == [bench.alice.name] and foreign == [bench.bob.name]
        assert processes < 10
        note = bench.state_dir / "homes" / bench.alice.name / "note"
        assert note.read_text() == bench.alice.name and note.stat().st_uid == uid
        await asyncio.gather(
            gateway.service.shutdown(bench.alice, records[0].id), gateway.service.shutdown(bench.bob, records[1].id)
        )


@both
async def test_a_container_can_do_little(bench: Bench) -> None:
    """No capabilities, no way to gain any, nothing of the image to change; and nothing secret where others look."""
    async with bench.gateway() as gateway:
        record, client = await started(bench, gateway)
        status = await client.execute("print(open('/proc/self/status').read())")
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert {facts[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
        if bench.case is DOCKER:  # services know it from Docker 25 on
            assert facts["NoNewPrivs"] == "1"
        for path in ("/usr/x", "/opt/hub-gateway/agent.py", "/etc/passwd"):
            _, reply = await client.result(client.run(f"open({path!r}, 'a')"))
            assert reply["content"]["ename"] in ("OSError", "PermissionError", "FileNotFoundError")
        _, token, _ = await gateway.service.store.plan(record.id)
        api = bench.case.engine().client.api  # type: ignore[attr-defined]
        (container,) = bench.agents(gateway)
        shown = json.dumps(
            [api.inspect_container(container), *api.services()]
            if bench.case is SWARM
            else api.inspect_container(container)
        )
        assert token not in shown and record.id not in json.dumps(api.inspect_container(container)["Args"])
        await gateway.service.shutdown(bench.alice, record.id)


@both
async def test_limits_are_in_force(bench: Bench) -> None:
    """Cpu as the cgroup says, memory as the cell finds out; the user reads that it was memory."""
    async with bench.gateway() as gateway:
        record, client = await started(bench, gateway, "limited")
        assert (record.resources.cpu, record.resources.memory) == (0.5, 200 * 2**20)
        code = (
            "import os\n"
            "v1, v2 = '/sys/fs/cgroup/cpu/cpu.cfs_quota_us', '/sys/fs/cgroup/cpu.max'\n"
            "print(open(v2 if os.path.exists(v2) else v1).read().split()[0])"
        )
        assert await client.execute(code) == "50000\n"
        _, reply = await client.result(client.run("x = bytearray(600 * 2**20)"))
        assert "137" in str(reply["content"]) and "out of memory" in str(reply["content"])
        assert await client.execute("print('again')") == "again\n"
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


@pytest.mark.parametrize("bench", [SWARM.name], indirect=True)
async def test_a_swarm_without_room_says_so_at_once(bench: Bench) -> None:
    """Under the cell that waits, long before the launch has failed."""
    bench.add_spec("no-memory", container_spec(resources={"memory": "100T"}))
    async with bench.gateway() as gateway:
        proxy = gateway.proxies.get("docker-swarm")
        assert isinstance(proxy, SwarmProxy)
        proxy.pending_seconds = 600.0
        created = await gateway.service.create(bench.alice, CreateKernel(name="no-memory"))
        client = await gateway.connect(bench.alice, created.id)
        client.run("print(1)")
        shown = await client.receive(lambda message: message["msg_type"] == "display_data", timeout=20)
        assert "no suitable node (insufficient resources on 1 node)" in shown["content"]["data"]["text/plain"]
        assert (await gateway.service.get(bench.alice, created.id)).status is KernelStatus.STARTING
        await gateway.service.shutdown(bench.alice, created.id)
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


@both
async def test_removed_behind_our_back(bench: Bench) -> None:
    """The kernel is dead within a poll, says why, and can be started again."""
    async with bench.gateway() as gateway:
        gateway.controller.poll_seconds = 0.5
        record, _ = await started(bench, gateway)
        api = bench.case.engine().client.api  # type: ignore[attr-defined]
        if bench.case is SWARM:
            api.remove_service(record.proxy_state["service"])
        else:
            api.remove_container(record.proxy_state["container"], force=True, v=True)
        ended = await gone(gateway, record.id)
        assert "somebody removed it" in ended.message
        assert await reserved(gateway) == set()
        again = await gateway.service.restart(bench.alice, record.id)
        assert again.status is KernelStatus.RUNNING
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


@single
async def test_an_end_is_heard_and_not_polled_for(bench: Bench) -> None:
    """The daemon's events tell it, long before the next poll."""
    async with bench.gateway() as gateway:
        gateway.controller.poll_seconds = 3600.0
        record, _ = await started(bench, gateway)
        bench.case.kill_agent(record)
        ended = await gone(gateway, record.id)
        assert "137" in ended.message


@pytest.fixture
async def restored() -> AsyncIterator[None]:
    """The daemon runs again afterwards, whatever happened."""
    yield
    if not docker_engine().answers():
        docker_engine().start()


@single
async def test_daemon_restarted_under_running_kernels(bench: Bench, restored: None) -> None:
    """While it is away nothing is said to be gone; afterwards everything is as it was."""
    async with bench.gateway() as gateway:
        record, client = await started(bench, gateway)
        await client.execute("x = 42")
        proxy = gateway.proxies.get("docker")
        state = {**record.proxy_state, "kernel_id": record.id, "gateway_id": gateway.gateway_id}
        docker_engine().stop(signal.SIGKILL)
        report = (await proxy.poll({record.id: state}))[record.id]
        assert report.phase is Phase.UNKNOWN and report.reason
        (finding,) = await proxy.check()
        assert finding.level == "error" and "cannot be reached" in finding.message
        assert await client.execute("print(x)") == "42\n"
    docker_engine().start()
    async with bench.gateway() as gateway:
        assert [one.id for one in await gateway.service.list(bench.alice)] == [record.id]
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("print(x)") == "42\n"
        report = (await gateway.proxies.get("docker").poll({record.id: state}))[record.id]
        assert report.phase is Phase.RUNNING
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")


@single
async def test_daemon_away_at_launch(bench: Bench, restored: None) -> None:
    """The launch waits for it, within its time."""
    docker_engine().stop(signal.SIGKILL)
    async with bench.gateway() as gateway:
        starting = asyncio.ensure_future(gateway.start(bench.alice))
        await eventually(lambda: gateway.proxies.get("docker"), "the proxy is made")
        docker_engine().start()
        record = await starting
        assert record.status is KernelStatus.RUNNING, record.message
        await gateway.service.shutdown(bench.alice, record.id)


@single
async def test_chosen_images(bench: Bench) -> None:
    """Nobody chooses an image that is not allowed, and everybody reads which ones are."""
    async with bench.gateway() as gateway:
        for allowed, words in (
            ([], "allowed: localhost/"),
            (["registry.example.org/*"], "allowed: registry.example.org"),
        ):
            proxy = gateway.proxies.get("docker")
            assert isinstance(proxy, DockerProxy)
            proxy.allowed_images = allowed
            record = await gateway.start(bench.alice, env={"KERNEL_IMAGE": NO_PYTHON})
            assert record.status is KernelStatus.FAILED
            assert "may not run" in record.message or "not one that kernels may run" in record.message
            assert words in record.message
        proxy.allowed_images = ["localhost/hub-gateway-test/*"]
        record = await gateway.start(bench.alice, env={"KERNEL_IMAGE": NO_PYTHON})
        assert "has no python3" in record.message
        assert await reserved(gateway) == set()


@single
async def test_the_published_way(bench: Bench) -> None:
    """A gateway on another machine than the daemon reaches agents at a port of that machine."""
    async with bench.gateway() as gateway:
        proxy = gateway.proxies.get("docker")
        assert isinstance(proxy, DockerProxy)
        proxy.reach = "published"
        record, client = await started(bench, gateway)
        assert record.registration is not None and record.registration.host == "127.0.0.1"
        assert await client.execute("print(1)") == "1\n"
        await gateway.service.shutdown(bench.alice, record.id)


@single
async def test_a_signal_without_the_link(bench: Bench) -> None:
    async with bench.gateway() as gateway:
        record, client = await started(bench, gateway)
        busy = client.run("import time\nprint('begun')\nwhile True: time.sleep(0.01)")
        await client.receive(lambda m: "begun" in str(m["content"].get("text")))
        await gateway.proxies.get("docker").signal({**record.proxy_state}, signal.SIGINT)
        _, reply = await client.result(busy)
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        await gateway.service.shutdown(bench.alice, record.id)


@single
async def test_prohibited_uids(bench: Bench) -> None:
    """System accounts get no kernel, whatever the mapping says."""
    async with bench.gateway() as gateway:
        proxy = gateway.proxies.get("docker")
        assert isinstance(proxy, DockerProxy)
        proxy.minimum_uid = 100_000
        record = await gateway.start(bench.alice)
        assert record.status is KernelStatus.FAILED
        assert "Kernels never run as the unix user" in record.message
        assert not bench.leftovers(gateway)


@both
async def test_check(bench: Bench) -> None:
    """An administrator reads what is there, and what is missing."""
    async with bench.gateway() as gateway:
        proxy = gateway.proxies.get("docker" if bench.case is DOCKER else "docker-swarm")
        assert isinstance(proxy, DockerProxy | SwarmProxy)
        assert {finding.level for finding in await proxy.check()} == {"ok"}
        proxy.network = "nowhere"
        messages = [finding.message for finding in await proxy.check()]
        assert any("no network nowhere" in message for message in messages)
