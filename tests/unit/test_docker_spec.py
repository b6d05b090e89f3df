"""What a kernel's container is to be: data alone, so no daemon is needed to look at it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, DockerException, InvalidVersion
from traitlets import TraitError
from traitlets.config import Config

from hub_gateway._paths import launchers_dir
from hub_gateway.app import HubGateway
from hub_gateway.cli import probes
from hub_gateway.errors import GatewayError, LaunchFailed, LaunchRefused, Unavailable
from hub_gateway.kernels.types import Resources
from hub_gateway.proxies.base import AgentSettings, LaunchRequest, Phase, PhaseReport
from hub_gateway.proxies.docker import DockerProxy
from hub_gateway.proxies.docker_client import DockerDaemon, _note, _progress, pull_refusal, refusal_of
from hub_gateway.proxies.docker_spec import agent_document, container_config, mount_of
from hub_gateway.proxies.registry import Proxies
from hub_gateway.proxies.swarm import SwarmProxy
from hub_gateway.proxies.swarm_spec import Placement, newest, phase_of, service_spec, spoilt

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


def task(state: str, error: str = "", pid: int = 0, **more: Any) -> dict[str, Any]:
    """A task of a swarm."""
    status = {"State": state, "Err": error, "ContainerStatus": {"ContainerID": "c", "PID": pid, "ExitCode": 128}}
    return {"CreatedAt": "1", "DesiredState": "running", "NodeID": "n", "Spec": {}, "Status": status, **more}


def test_only_a_task_that_never_ran_is_started_again() -> None:
    """One that did may have cost a user something already, and most reasons stay."""
    busy = "starting container failed: unable to remount dir as readonly: device or resource busy"
    assert spoilt(task("failed", busy)) and spoilt(task("rejected", busy))
    assert not spoilt(task("failed", busy, pid=7))
    assert not spoilt(task("rejected", "No such image: x"))
    assert not spoilt(task("running", pid=7))


def test_the_newest_task_is_of_the_newest_attempt() -> None:
    first = task("failed", CreatedAt="1")
    second = task("running", CreatedAt="2", Spec={"ForceUpdate": 1})
    assert newest([], 0) is None
    assert newest([first], 0) is first
    assert newest([first], 1) is None
    assert newest([second, first], 1) is second


@pytest.mark.parametrize(
    ("node", "phase", "words"),
    [
        ("ready", Phase.RUNNING, ""),
        ("unknown", Phase.RUNNING, ""),
        ("down", Phase.GONE, "its node worker-1 has left the swarm, or does not answer any more (down)"),
        (None, Phase.GONE, "its node was removed from the swarm"),
    ],
)
def test_a_task_that_the_swarm_has_given_up(node: str | None, phase: Phase, words: str) -> None:
    """It is gone with its node; on one that is there it runs until it has ended."""
    nodes = {"n": {"Status": {"State": node}, "Description": {"Hostname": "worker-1"}}} if node else {}
    given_up = task("running", pid=7, DesiredState="shutdown")
    assert phase_of(given_up, nodes) == PhaseReport(phase, words)
    assert phase_of({**given_up, "DesiredState": "running"}, nodes).phase is Phase.RUNNING


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
    proxy.choose_images = False
    with pytest.raises(LaunchRefused, match="allowed: localhost/image"):
        proxy.plan(request(env={"KERNEL_IMAGE": "localhost/other:1"}))
    assert proxy.plan(request(env={"KERNEL_IMAGE": "localhost/image"})).image == "localhost/image"
    with pytest.raises(LaunchRefused, match=r"allowed: localhost/\*"):
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
    assert "login may not have it" in pull_refusal("x", "pull access denied for x, repository does not exist").message
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


class OtherPeoples:
    """A daemon's answers, as docker's client has them; or what it raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def info(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"Swarm": {"LocalNodeState": "inactive"}, "MemoryLimit": 1, "CpuCfsQuota": 1, "PidsLimit": 1}

    def version(self) -> dict[str, str]:
        return {"Version": "27.0", "ApiVersion": "1.46"}

    def containers(self, **_: Any) -> list[Any]:
        self.info()
        return []


@pytest.fixture
def somebodys_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Docker's socket is by default there is one, at which nobody lets the gateway in."""
    path = tmp_path / "docker.sock"
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr("hub_gateway.proxies.container.SOCKET", f"unix://{path}")
    with socket.socket(socket.AF_UNIX) as refusing:
        refusing.bind(str(path))  # it does not listen: root, too, is refused then
        path.chmod(0)
        yield path


WANTED = {
    "by its own options": ({"DockerProxy": {"timeout": 3.0}}, {"SwarmProxy": {"timeout": 3.0}}),
    "as the default": ({"Proxies": {"default_proxy": "docker"}}, {"Proxies": {"default_proxy": "docker-swarm"}}),
}


async def test_somebody_elses_docker_disturbs_nobody(somebodys_socket: Path) -> None:
    registry = Proxies()
    for name in ("docker", "docker-swarm"):
        proxy = registry.get(name)
        assert await proxy.owned("g1") == []
        (finding,) = await proxy.check()
        assert finding.level == "ok" and finding.message.startswith("not in use; Docker cannot be reached")
        # Of a kernel that there is, somebody must be told.
        await proxy.poll({"k1": {"kernel_id": "k1", "gateway_id": "g1"}})
        with pytest.raises(Unavailable):
            await proxy.owned("g1")
        assert [one.level for one in await proxy.check()] == ["error"]
    await registry.close()


@pytest.mark.parametrize("how", WANTED)
async def test_a_docker_that_is_wanted_must_be_reached(somebodys_socket: Path, how: str) -> None:
    for name, config in zip(("docker", "docker-swarm"), WANTED[how], strict=True):
        registry = Proxies(config=Config(config))
        with pytest.raises(Unavailable):
            await registry.get(name).owned("g1")
        (finding,) = await registry.get(name).check()
        assert finding.level == "error" and "dockerd runs" in finding.hint  # it is not its version that is at fault
        await registry.close()


async def test_a_kernelspec_wants_its_docker(somebodys_socket: Path, tmp_path: Path) -> None:
    """Though nothing else speaks of it: that the socket lets nobody in is the commonest fault of all."""
    spec = {"argv": ["x"], "display_name": "X", "metadata": {"process_proxy": {"name": "docker"}}}
    (tmp_path / "kernels" / "x").mkdir(parents=True)
    (tmp_path / "kernels" / "x" / "kernel.json").write_text(json.dumps(spec))
    gateway = HubGateway(config=Config(KernelSpecManager={"kernel_dirs": [str(tmp_path / "kernels")]}))
    gateway.state_dir = str(tmp_path)
    found = {finding.what: finding.level async for finding in probes.proxies(gateway)}
    assert (found["docker: docker kernels"], found["docker-swarm: swarm kernels"]) == ("error", "ok")


async def test_a_docker_that_is_no_swarm(somebodys_socket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options for both proxies do not mean that there is a swarm."""
    monkeypatch.setattr(DockerDaemon, "connect", lambda self: OtherPeoples())
    shared = SwarmProxy(config=Config(ContainerProxy={"timeout": 3.0}))
    assert await shared.owned("g1") == []
    assert [(one.level, one.message[:10]) for one in await shared.check()] == [("ok", "not in use")]
    own = SwarmProxy(config=Config(SwarmProxy={"timeout": 3.0}))
    assert [one.message for one in await own.check() if one.level == "error"] == [
        "it is no manager of a swarm (inactive)"
    ]
    for proxy in (shared, own):
        await proxy.close()


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (InvalidVersion("API versions below 1.24 are no longer supported by this library."), "upgrade"),
        (APIError("400", explanation="client version 1.52 is too new. Maximum supported API version is 1.39"), "upgr"),
        (APIError("403", explanation="denied by a plugin"), "rights"),
        (DockerException("Error while fetching server API version: ('Connection aborted.')"), "dockerd runs"),
    ],
)
async def test_what_to_do_where_docker_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, error: Exception, hint: str
) -> None:
    daemon = OtherPeoples(error)
    monkeypatch.setattr(DockerDaemon, "connect", lambda self: daemon)
    proxy = DockerProxy(url="unix:///nowhere.sock")
    (finding,) = await proxy.check()
    assert finding.level == "error" and hint in finding.hint
    await proxy.close()


def test_what_a_gateway_without_docker_and_ssh_does_not_load(tmp_path: Path) -> None:
    """Their clients take time and memory; neither a start nor a sweep for leftovers needs them."""
    program = f"""
import asyncio, sys
import hub_gateway.app, hub_gateway.runtime
from hub_gateway.proxies import container, registry
container.SOCKET = "unix://{tmp_path}/none.sock"

async def sweep():
    proxies = registry.Proxies()
    print([await proxy.owned("g1") for name, proxy in proxies.all() if name != "local"])
    await proxies.close()

asyncio.run(sweep())
print(sorted({{"docker", "paramiko"}} & set(sys.modules)))
"""
    environment = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["[[], [], []]", "[]"]
