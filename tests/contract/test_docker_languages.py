"""Kernels of other languages than Python, by the images and kernelspecs that the project offers."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from hub_gateway.kernels.types import KernelStatus
from tests.contract.conftest import Bench
from tests.contract.docker_case import DOCKER
from tests.contract.suite import marks_of
from tests.engines.docker import docker_engine
from tests.engines.images import debian_archive
from tests.harness.gateway import ROOT
from tests.harness.waiting import eventually

pytestmark = marks_of("docker")

BASE = ("debian", "bookworm-slim")
"""What the Dockerfiles build on; here from Debian's packages, so that no registry is asked."""
BUILT = "localhost/hub-gateway-test/r:latest"


@pytest.fixture(scope="module")
def r_image() -> Iterator[str]:
    """The image of `launchers/images/r`, built as its Dockerfile says."""
    api = docker_engine().client.api
    path = ["ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    api.import_image_from_file(str(debian_archive()), repository=BASE[0], tag=BASE[1], changes=path)
    steps = list(
        api.build(path=str(ROOT / "launchers" / "images" / "r"), tag=BUILT, network_mode="host", decode=True, rm=True)
    )
    assert not [step for step in steps if "error" in step], steps[-5:]
    yield BUILT
    api.remove_image(BUILT, force=True)
    api.remove_image(":".join(BASE), force=True)


@pytest.mark.parametrize("bench", [DOCKER.name], indirect=True)
async def test_r(bench: Bench, r_image: str) -> None:
    """It computes, keeps what it has through an interrupt, and is restarted."""
    spec = json.loads((ROOT / "kernelspecs" / "r_docker" / "kernel.json").read_text())
    spec["metadata"]["process_proxy"]["config"]["image_name"] = r_image
    bench.add_spec("r", spec)
    async with bench.gateway() as gateway:
        record = await gateway.start(bench.alice, "r")
        assert record.status is KernelStatus.RUNNING, record.message
        client = await gateway.connect(bench.alice, record.id)
        assert await client.execute("x <- 6 * 7; cat(x)") == "42"
        assert await client.execute("cat(Sys.getenv('USER'))") == bench.alice.name
        busy = client.run("cat('begun\\n'); flush.console(); while (TRUE) Sys.sleep(0.01)")
        await client.receive(lambda m: "begun" in str(m["content"].get("text")))
        await gateway.service.interrupt(bench.alice, record.id)
        await client.result(busy)
        assert await client.execute("cat(x)") == "42"
        await gateway.service.restart(bench.alice, record.id)
        _, reply = await client.result(client.run("x"))
        assert "not found" in str(reply["content"])
        await gateway.service.shutdown(bench.alice, record.id)
        await eventually(lambda: not bench.leftovers(gateway), "nothing left")
