"""Fifty kernels at once, on every resource manager."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from typing import Any

import pytest

from hub_gateway.auth.base import Caller
from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from tests.contract.cases import OTHER_USER
from tests.contract.conftest import Bench
from tests.contract.docker_case import DOCKER, SWARM
from tests.contract.mini import MiniGateway
from tests.contract.ssh_case import SSH_SUDO
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.harness import flood_kernel
from tests.harness.waiting import eventually

KERNELS = 50


def light(bench: Bench) -> None:
    """The kernelspec `light`: a kernel that starts in a moment, for all users."""
    if bench.case in (DOCKER, SWARM):
        for home in (bench.state_dir / "homes").iterdir():
            shutil.copy(flood_kernel.__file__, home)
        script = "/home/{username}/flood_kernel.py"
    else:
        script = shutil.copy(flood_kernel.__file__, bench.state_dir)
    for user in bench.case.users:
        argv = ["python3", script.replace("{username}", user), "-f", "{connection_file}"]
        bench.add_spec(f"light-{user}", {"argv": argv, "display_name": "Light", "language": "none"})


@pytest.mark.parametrize(
    "bench",
    [
        pytest.param(case.name, marks=marks_of(*case.needs), id=case.name)
        for case in (OTHER_USER, SSH_SUDO, DOCKER, SWARM)
    ],
    indirect=True,
)
async def test_fifty_at_once(bench: Bench) -> None:
    """All of them come up, work, and are gone in the end; nobody's is too late because of the others."""
    light(bench)
    config: Any = bench.setup.config
    # They start beside each other on the cores of a test machine.
    config["Controller"] = {**config.get("Controller", {}), "start_seconds": 240.0}
    config["ContainerProxy"] = {**config.get("ContainerProxy", {}), "register_seconds": 240.0}
    callers = [(bench.alice, bench.bob)[number % 2] for number in range(KERNELS)]
    async with bench.gateway() as gateway:
        created = await asyncio.gather(
            *(gateway.service.create(one, CreateKernel(name=f"light-{one.name}")) for one in callers)
        )
        assert len({one.id for one in created}) == KERNELS
        records = await asyncio.gather(*(gateway.settled(one.id, timeout=240) for one in created))
        assert Counter((one.status, one.message) for one in records) == {(KernelStatus.RUNNING, ""): KERNELS}
        assert await reserved(gateway) == {one.id for one in records}
        assert len(bench.agents(gateway)) == KERNELS
        told = await asyncio.gather(*(used(gateway, *one) for one in zip(callers, records, strict=True)))
        assert told == ["00000000"] * KERNELS
        await asyncio.gather(
            *(gateway.service.shutdown(*(caller, one.id)) for caller, one in zip(callers, records, strict=True))
        )

        async def released() -> bool:
            return await reserved(gateway) == set()

        # Nobody's request waits for as long as a busy cluster takes to end fifty.
        await eventually(released, "no reservation is held", timeout=120)
        await eventually(lambda: not bench.leftovers(gateway), "nothing is left", timeout=120)


async def used(gateway: MiniGateway, caller: Caller, record: KernelRecord) -> str:
    """What a cell of a kernel prints."""
    client = await gateway.connect(caller, record.id)
    return (await client.execute("stream 1"))[:8]
