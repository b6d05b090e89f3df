"""What a second node does to kernels of a swarm: it is too busy at first, is lost, or leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench
from tests.contract.docker_case import SWARM, container_spec
from tests.contract.mini import MiniGateway
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.contract.test_conformance_docker import gone, started
from tests.engines.docker import swarm_engine
from tests.engines.swarm_node import LABEL, SwarmNode
from tests.harness.waiting import eventually

pytestmark = [*marks_of("docker"), pytest.mark.parametrize("bench", [SWARM.name], indirect=True)]

THERE = container_spec(constraints=[f"node.labels.{LABEL.replace('=', '==')}"])


@pytest.fixture(scope="module")
def node() -> Iterator[SwarmNode]:
    """It is there for these tests alone: kernels of others would be put on it."""
    made = SwarmNode(swarm_engine())
    try:
        yield made.start().join()
    finally:
        made.remove()


@pytest.fixture
def there(bench: Bench, node: SwarmNode) -> Bench:
    """With the kernelspec `there`, whose kernels run on the second node."""
    bench.add_spec("there", THERE)
    return bench


async def ended_everywhere(bench: Bench, node: SwarmNode, gateway: MiniGateway) -> None:
    """Nothing is left of the gateway's kernels, on neither node."""
    await eventually(lambda: not bench.leftovers(gateway), "nothing is left", timeout=120)
    # A node that was cut off looks for its managers at longer and longer intervals.
    await eventually(lambda: not node.client.api.containers(all=True), "no container on the second node", timeout=120)


async def test_a_node_that_is_too_busy_once(there: Bench, node: SwarmNode) -> None:
    """Its kernel was never started, so it can be started again; the user has a kernel and not an error."""
    node.faults.left, before = 1, node.faults.failed
    async with there.gateway() as gateway:
        record, client = await started(there, gateway, "there")
        assert node.faults.failed == before + 1
        assert record.registration is not None and record.registration.host == node.place
        assert await client.execute("print(6 * 7)") == "42\n"
        assert await gateway.proxies.get(record.proxy).logs({**record.proxy_state}) == ""
        assert len(node.client.api.containers()) == 1
        await gateway.service.shutdown(there.alice, record.id)
        await ended_everywhere(there, node, gateway)


async def test_a_node_that_stays_too_busy(there: Bench, node: SwarmNode) -> None:
    """The user reads what to do, and it is not tried for ever."""
    node.faults.left, before = 3, node.faults.failed
    async with there.gateway() as gateway:
        record = await gateway.start(there.alice, "there")
        assert record.status is KernelStatus.FAILED
        assert "too busy to start the kernel; try again" in record.message
        assert "device or resource busy" in record.message
        assert node.faults.failed == before + 3
        assert await reserved(gateway) == set()
        await ended_everywhere(there, node, gateway)


LOST = "its node {} has left the swarm, or does not answer any more (down)"


@pytest.mark.parametrize(
    ("go", "words"),
    [
        pytest.param(SwarmNode.cut, (LOST,), id="lost"),
        # Its daemon may have the time to end the agent, which tells the cell before anybody knows of the node.
        pytest.param(SwarmNode.leave, (LOST, "The kernel was shut down"), id="left"),
    ],
)
async def test_a_node_that_goes(
    there: Bench, node: SwarmNode, go: Callable[[SwarmNode], None], words: tuple[str, ...]
) -> None:
    """Its kernels are dead, and say so in the cell that runs; they hold nothing, and nobody waits for the node."""
    async with there.gateway() as gateway:
        gateway.controller.poll_seconds = 5.0  # which is how long a poll may take, too
        record, client = await started(there, gateway, "there")
        busy = client.run("print('begun')\nwhile True: pass")
        await client.receive(lambda m: "begun" in str(m["content"].get("text")))
        go(node)
        _, reply = await client.result(busy)
        assert any(one.format(node.hostname) in str(reply["content"]) for one in words)
        ended = await gone(gateway, record.id)
        assert ended.message == f"The kernel ended with its agent: {LOST.format(node.hostname)}."
        assert await reserved(gateway) == set()
        assert not await gateway.proxies.get(record.proxy).owned(gateway.gateway_id)
        node.mend()
        await ended_everywhere(there, node, gateway)
