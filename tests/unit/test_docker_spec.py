"""What a kernel's container is to be: data alone, so no daemon is needed to look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import GatewayError, LaunchFailed, LaunchRefused
from hub_gateway.kernels.types import Resources
from hub_gateway.proxies.base import AgentSettings, LaunchRequest
from hub_gateway.proxies.docker import DockerProxy
from hub_gateway.proxies.docker_client import _note, _progress, pull_refusal, refusal_of
from hub_gateway.proxies.docker_spec import agent_document, container_config, mount_of
from hub_gateway.proxies.swarm import SwarmProxy
from hub_gateway.proxies.swarm_spec import Placement, service_spec

SECRET = "launch-token-of-the-test"


def request(**more: Any) -> LaunchRequest:
    return LaunchRequest(
        **{
            "kernel_id": "k1",
            "gateway_id": "g1",
            "epoch": 3,
            "owner": "alice",
            "kernelspec": "python",
            "argv": ("python3", f"{launchers_dir()}/ipykernel_launcher.py", "-f", "{connection_file}"),
            "env": {"KERNEL_USERNAME": "alice", "TOKEN": SECRET},
            "agent": AgentSettings("key", SECRET),
            "config": {"image_name": "localhost/image"},
            **more,
        }
    )


def test_a_container_is_confined() -> None:
    plan = DockerProxy().plan(request(resources=Resources(cpu=1.5, memory=2**30, gpu=2)))
    config = container_config(plan)
    host = config["HostConfig"]
    assert config["User"] == "1000:1000"
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["NanoCpus"], host["Memory"], host["MemorySwap"]) == (1_500_000_000, 2**30, 2**30)
    assert host["DeviceRequests"] == [{"Driver": "", "Count": 2, "Capabilities": [["gpu"]]}]
    assert host["PidsLimit"] > 0 and host["LogConfig"]["Config"]["max-size"]
    assert config["Labels"] == {"hub-gateway.gateway": "g1", "hub-gateway.kernel": "k1", "hub-gateway.epoch": "3"}
    assert SECRET not in json.dumps(config)


def test_a_service_is_confined_too() -> None:
    plan = SwarmProxy().plan(request(resources=Resources(cpu=1.5, memory=2**30, gpu=1)))
    files = {"agent.py": {"id": "2", "name": "agent"}}
    spec = service_spec(plan, Placement(("node.role==worker",), True, 5.0), {"id": "1", "name": "secret"}, files)
    task = spec["task_template"]
    assert task["ContainerSpec"]["ReadOnly"] and task["ContainerSpec"]["CapabilityDrop"] == ["ALL"]
    assert task["Resources"]["Reservations"]["MemoryBytes"] == task["Resources"]["Limits"]["MemoryBytes"] == 2**30
    assert task["Placement"]["Constraints"] == ["node.role==worker"]
    assert task["RestartPolicy"] == {"Condition": "none"}
    assert SECRET not in json.dumps(spec)


def test_launchers_are_found_in_the_container() -> None:
    proxy = DockerProxy()
    document = json.loads(agent_document(request(), proxy.plan(request())))
    assert document["argv"][:2] == ["python3", "/opt/hub-gateway/ipykernel_launcher.py"]
    assert document["env"]["HOME"] == "/home/alice"
    assert set(proxy.shipped()) >= {"container.py", "agent.py", "ipykernel_launcher.py"}


@pytest.mark.parametrize(
    "source", ["/etc", "/srv/homes/../../etc", "/srv/homesick", "/", "/srv/homes/{username}/../../../root"]
)
def test_volumes_outside_of_the_allowed_roots(source: str) -> None:
    with pytest.raises(LaunchFailed, match="may not have"):
        mount_of({"source": source, "target": "/data"}, {"username": "alice"}, ("/srv/homes",))


@pytest.mark.parametrize("name", ["../bob", "a/b", "", ".", "x" * 200, "al ice", "-v", "alice\n"])
def test_names_that_are_no_directory(name: str) -> None:
    template = {"source": "/srv/homes/{username}", "target": "/home/{username}"}
    with pytest.raises(LaunchFailed, match="cannot be a part"):
        mount_of(template, {"username": name}, ("/srv/homes",))


def test_volumes() -> None:
    mount = mount_of(
        {"source": "/srv/homes/{username}", "target": "/home/{username}"}, {"username": "a.b@c"}, ("/srv",)
    )
    assert (mount.source, mount.target, mount.kind) == ("/srv/homes/a.b@c", "/home/a.b@c", "bind")
    assert mount_of({"source": "home-{username}", "target": "/d"}, {"username": "alice"}, ()).kind == "volume"


def test_a_kernel_starts_where_its_notebook_is_or_at_home() -> None:
    proxy = DockerProxy(
        volumes=[{"source": "/srv/{username}", "target": "/home/{username}"}], allowed_host_roots=["/srv"]
    )
    for wish, found in (("/home/alice/work", "/home/alice/work"), ("/home/bob", "/home/alice"), (None, "/home/alice")):
        assert proxy.plan(request(cwd=wish)).cwd == found


@pytest.mark.parametrize(("user", "words"), [("0:0", "uid 0"), ("999", "uid 999"), ("1000:0", "gid 0")])
def test_uids_that_no_kernel_gets(user: str, words: str) -> None:
    with pytest.raises(LaunchRefused, match=words):
        DockerProxy(user=user).plan(request())


def test_root_by_name() -> None:
    with pytest.raises(LaunchRefused, match="the unix user root"):
        DockerProxy().plan(request(unix_user="root"))


def test_images() -> None:
    proxy = DockerProxy()
    with pytest.raises(GatewayError, match="names no image"):
        proxy.plan(request(config={}))
    with pytest.raises(LaunchRefused, match="allowed: localhost/image"):
        proxy.plan(request(env={"KERNEL_IMAGE": "evil"}))
    proxy.allowed_images = ["localhost/*"]
    assert proxy.plan(request(env={"KERNEL_IMAGE": "localhost/other:1"})).image == "localhost/other:1"
    with pytest.raises(LaunchRefused):
        proxy.plan(request(config={"image_name": "elsewhere/image"}))


def test_networks_that_are_not_the_kernels_own() -> None:
    for name in ("host", "none", "container:x"):
        with pytest.raises(TraitError):
            DockerProxy(network=name)
        with pytest.raises(LaunchFailed):
            DockerProxy().plan(request(config={"image_name": "i", "network": name}))


def test_progress_and_refusals_are_sentences() -> None:
    layers: dict[str, tuple[bool, int, int]] = {}
    for event in (
        {"status": "Pulling from library/x", "id": "latest"},
        {"status": "Already exists", "id": "a"},
        {"status": "Downloading", "id": "b", "progressDetail": {"current": 2**20, "total": 4 * 2**20}},
    ):
        _note(layers, event)
    assert _progress("x", layers) == "Fetching the image x: 1 of 2 layers, 1 of 4 MiB."
    assert "no login" in pull_refusal("x", "pull access denied for x, repository does not exist").message
    assert "no disk space" in refusal_of("write /y: no space left on device", image="x", python="python3")


async def test_a_machine_without_docker_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no Docker is not told of it as an error, and the reaper does not ask for it."""
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr("hub_gateway.proxies.container.SOCKET", f"unix://{tmp_path}/none.sock")
    for proxy in (DockerProxy(), SwarmProxy()):
        assert await proxy.owned("g1") == []
        assert [finding.level for finding in await proxy.check()] == ["ok"]
        await proxy.close()
    named = DockerProxy(url=f"unix://{tmp_path}/other.sock")
    assert [finding.level for finding in await named.check()] == ["error"]
    await named.close()
