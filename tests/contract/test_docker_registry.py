"""Images that are not on the Docker host: fetched from a real registry, with and without a login."""

from __future__ import annotations

import base64
import json
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hub_gateway.kernels.service import CreateKernel
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.proxies import docker_client, swarm
from hub_gateway.proxies.container import ContainerProxy
from tests.contract.client import Message
from tests.contract.conftest import Bench
from tests.contract.docker_case import DOCKER, SWARM, container_spec
from tests.contract.mini import MiniGateway
from tests.contract.suite import marks_of
from tests.contract.test_conformance import reserved
from tests.contract.test_conformance_docker import started
from tests.engines.docker import IMAGE, docker_engine
from tests.engines.registry import Registry
from tests.harness.waiting import eventually

pytestmark = marks_of("docker", "registry")

single = pytest.mark.parametrize("bench", [DOCKER.name], indirect=True)
both = pytest.mark.parametrize("bench", [DOCKER.name, SWARM.name], indirect=True)

LOGIN = ("hub-gateway", "correct-horse-battery")
NAME = "kernels/python"
FILE = "/usr/local/share/of-this-image"


@pytest.fixture(scope="module")
def registries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, Registry]]:
    """One for everybody and one with a login, which have the same image."""
    place = tmp_path_factory.mktemp("registry")
    made: list[Registry] = []
    try:
        for name, login in (("open", None), ("closed", LOGIN)):
            made.append(Registry(place / name, place / "images", login).start())
        api = docker_engine().client.api
        # A layer of its own, which no daemon has yet.
        write = ["python3", "-c", f"import os; open('{FILE}', 'wb').write(os.urandom(2**23))"]
        maker = api.create_container(IMAGE, write)["Id"]
        api.start(maker)
        assert api.wait(maker)["StatusCode"] == 0
        path = ["ENV PATH=/usr/local/bin:/usr/bin:/bin"]
        api.commit(maker, f"{made[0].address}/{NAME}", "latest", changes=path)
        api.remove_container(maker)
        assert "error" not in api.push(f"{made[0].address}/{NAME}", tag="latest")
        yield made[0], made[1]
    finally:
        for one in made:
            one.stop()


@pytest.fixture
def missing(bench: Bench, registries: tuple[Registry, Registry]) -> Iterator[Bench]:
    """With the kernelspecs `open`, `closed` and `none`, whose images are not there."""
    images = {name: f"{one.address}/{NAME}:latest" for name, one in zip(("open", "closed"), registries, strict=True)}
    images["none"] = f"{registries[0].address}/{NAME}:none"

    def forget() -> None:
        client = bench.case.engine().client  # type: ignore[attr-defined]
        for tag in [tag for one in client.images.list() for tag in one.tags if tag in images.values()]:
            client.images.remove(tag, force=True)

    forget()
    for name, image in images.items():
        bench.add_spec(name, container_spec(image_name=image))
    yield bench
    forget()


def log_in(gateway: MiniGateway, bench: Bench, registry: Registry, password: str = LOGIN[1]) -> Path:
    """Configure a login, as `docker login` writes it down."""
    file = bench.state_dir / "logins.json"
    auth = base64.b64encode(f"{LOGIN[0]}:{password}".encode()).decode()
    file.write_text(json.dumps({"auths": {registry.address: {"auth": auth}}}))
    file.chmod(0o600)
    daemon_of(gateway, bench)._logins = str(file)
    return file


def daemon_of(gateway: MiniGateway, bench: Bench) -> docker_client.DockerDaemon:
    proxy = gateway.proxies.get(bench.case.name)
    assert isinstance(proxy, ContainerProxy)
    return proxy.daemon


@asynccontextmanager
async def silent(registry: Registry) -> AsyncIterator[Callable[[], None]]:
    """A registry that takes questions and answers none, until what this gives is called; in any case at the end."""
    registry.pause()
    try:
        yield registry.go_on
    finally:
        registry.go_on()


def text_of(message: Message) -> str:
    """What a message shows, if it is one that does."""
    return str(message["content"].get("data", {}).get("text/plain", ""))


@single
async def test_the_user_sees_how_far_it_is(
    missing: Bench, registries: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the cell that waits, also while the registry says nothing; then the cell runs."""
    monkeypatch.setattr(docker_client, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(docker_client, "SILENT_SECONDS", 0.5)
    async with missing.gateway() as gateway, silent(registries[0]) as go_on:
        created = await gateway.service.create(missing.alice, CreateKernel(name="open"))
        client = await gateway.connect(missing.alice, created.id)
        cell = client.run(f"import os; size = os.path.getsize('{FILE}')")
        shown: list[str] = []

        def waited_for(message: Message) -> bool:
            shown.append(text_of(message))
            return "is still waited for" in shown[-1]

        def replied(message: Message) -> bool:
            shown.append(text_of(message))
            return message["msg_type"] == "execute_reply"

        await client.receive(waited_for)
        go_on()

        reply = await client.receive(replied)
        assert (reply["parent_header"]["msg_id"], reply["content"]["status"]) == (cell, "ok")
        assert any("which is not on the Docker host yet" in text for text in shown)
        assert any("of 2 layers" in text and "of 8 MiB" in text for text in shown), shown
        assert await client.execute("print(size)") == f"{2**23}\n"
        await gateway.service.shutdown(missing.alice, created.id)
        await eventually(lambda: not missing.leftovers(gateway), "nothing left")


@pytest.mark.parametrize("bench", [SWARM.name], indirect=True)
async def test_the_user_sees_that_a_node_fetches_it(
    missing: Bench, registries: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swarm says no more of it, and a kernel is not too late because of it."""
    monkeypatch.setattr(swarm, "PREPARING_SECONDS", 0.5)
    async with missing.gateway() as gateway, silent(registries[0]) as go_on:
        created = await gateway.service.create(missing.alice, CreateKernel(name="open"))
        client = await gateway.connect(missing.alice, created.id)
        cell = client.run("print('it is there')")
        for _ in range(2):
            await client.receive(lambda message: "it fetches the image" in text_of(message))
        go_on()
        text, reply = await client.result(cell)
        assert (text, reply["content"]["status"]) == ("it is there\n", "ok")
        await gateway.service.shutdown(missing.alice, created.id)
        await eventually(lambda: not missing.leftovers(gateway), "nothing left")


@single
async def test_many_who_wait_for_one_image_keep_nobody_from_another(
    missing: Bench, registries: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is fetched once for all of them."""
    monkeypatch.setattr(docker_client, "PULLS", 2)
    async with missing.gateway() as gateway, silent(registries[0]) as go_on:
        log_in(gateway, missing, registries[1])
        waiting = [
            (who, await gateway.service.create(who, CreateKernel(name="open")))
            for who in (missing.alice, missing.bob, missing.alice)
        ]
        daemon = daemon_of(gateway, missing)
        await eventually(lambda: daemon._pulling, "the image is being fetched")
        other = await gateway.start(missing.bob, "closed")
        assert other.status is KernelStatus.RUNNING, other.message
        go_on()
        for _, record in waiting:
            assert (await gateway.settled(record.id)).status is KernelStatus.RUNNING
        assert not daemon._pulling
        for who, record in (*waiting, (missing.bob, other)):
            await gateway.service.shutdown(who, record.id)
        await eventually(lambda: not missing.leftovers(gateway), "nothing left")


@single
async def test_an_image_that_its_registry_does_not_have(missing: Bench) -> None:
    async with missing.gateway() as gateway:
        record = await gateway.start(missing.alice, "none")
        assert record.status is KernelStatus.FAILED
        assert "its registry has none of this name and tag" in record.message
        assert "check its name" in record.message and "manifest unknown" in record.message
        assert await reserved(gateway) == set()


@both
async def test_a_registry_that_asks_for_a_login(
    missing: Bench, registries: tuple[Registry, Registry], caplog: pytest.LogCaptureFixture
) -> None:
    """Who has none reads so; with one in the gateway's configuration the kernel runs. It is to be read nowhere."""
    caplog.set_level(logging.DEBUG)
    async with missing.gateway() as gateway:
        refused = [await gateway.start(missing.alice, "closed")]
        file = log_in(gateway, missing, registries[1], "wrong")
        refused.append(await gateway.start(missing.alice, "closed"))
        for record in refused:
            assert record.status is KernelStatus.FAILED
            # Which of the two it is a swarm does not say.
            words = "asks for a login" if missing.case is DOCKER else "There is no image"
            assert words in record.message
            assert "ask the administrator" in record.message
        assert await reserved(gateway) == set()

        file = log_in(gateway, missing, registries[1])
        record, client = await started(missing, gateway, "closed")
        assert await client.execute(f"import os\nprint(os.path.getsize('{FILE}'))") == f"{2**23}\n"

        api = missing.case.engine().client.api  # type: ignore[attr-defined]
        (container,) = missing.agents(gateway)
        places = [
            caplog.text,
            json.dumps(api.inspect_container(container)),
            json.dumps(record.proxy_state),
            json.dumps(dict(os.environ)),
            *(one.message for one in refused),
        ]
        if missing.case is SWARM:
            places.append(json.dumps(api.inspect_service(record.proxy_state["service"])))
        auth = json.loads(file.read_text())["auths"][registries[1].address]["auth"]
        assert not [place for place in places if LOGIN[1] in place or auth in place]
        await gateway.service.shutdown(missing.alice, record.id)
        await eventually(lambda: not missing.leftovers(gateway), "nothing left")


@both
async def test_logins_that_cannot_be_used(missing: Bench, registries: tuple[Registry, Registry]) -> None:
    """What is wrong with them the administrator reads, the user whom to ask."""
    async with missing.gateway() as gateway:
        file = log_in(gateway, missing, registries[1])
        proxy = gateway.proxies.get(missing.case.name)
        assert isinstance(proxy, ContainerProxy)
        proxy.registry_logins = str(file)

        async def errors() -> list[str]:
            return [found.message for found in await proxy.check() if found.level == "error"]

        assert not await errors()
        file.chmod(0o644)
        assert "every user of this machine may use" in (await errors())[0]
        record = await gateway.start(missing.alice, "closed")
        assert record.status is KernelStatus.FAILED
        assert "logins for image registries cannot be used; ask the administrator" in record.message
        file.write_text("no JSON")
        assert "is not JSON" in (await errors())[0]
        file.unlink()
        assert "cannot be read" in (await errors())[0]
        await eventually(lambda: not missing.leftovers(gateway), "nothing left")
