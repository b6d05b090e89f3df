"""Containers of a real dockerd: how the proxy is set up, and how to see what it left."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from docker.errors import APIError, NotFound

from hub_gateway.kernels.types import KernelRecord
from hub_gateway.proxies.docker_spec import GATEWAY
from tests.contract.cases import ProxyCase, administer
from tests.engines.docker import IMAGE, NO_PYTHON, NO_PYZMQ, Dockerd, docker_engine, swarm_engine
from tests.harness.waiting import until

__all__ = ["DOCKER", "SWARM", "DockerCase", "SwarmCase", "container_spec"]

USERS = ("hgt-ann", "hgt-ben")
"""Not those of other cases: a run of one suite removes its accounts while another may still go on."""
MISSING = "localhost:1/hub-gateway-test/missing"
PYTHON = ["python3", "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def container_spec(**config: Any) -> dict[str, Any]:
    """A kernelspec of a container, with `metadata.process_proxy.config`; `resources` go to the gateway's part."""
    resources = config.pop("resources", {})
    return {
        "argv": PYTHON,
        "display_name": "Python",
        "language": "python",
        "metadata": {"process_proxy": {"config": config}, "hub_gateway": {"resources": resources}},
    }


SPECS = {
    "nowhere-image": container_spec(image_name=MISSING),
    "no-python": container_spec(image_name=NO_PYTHON),
    "no-pyzmq": container_spec(image_name=NO_PYZMQ),
    "outside": container_spec(volumes=[{"source": "/etc", "target": "/host"}]),
    "no-directory": container_spec(volumes=[{"source": "/srv/hgt-nothing/{username}", "target": "/data"}]),
    "gpu": container_spec(resources={"gpu": 1}),
    "limited": container_spec(resources={"cpu": 0.5, "memory": "200M"}),
}
REFUSALS = {
    "nowhere": "nonexistent",
    "nowhere-image": "Docker says",
    "no-python": "has no python3",
    "no-pyzmq": "has no pyzmq",
    "outside": "may not have /etc of its host",
    "no-directory": "does not exist",
    "gpu": "can give no GPU",
}


@functools.cache
def unix_users() -> None:
    """Accounts for kernels, until the tests end; also those that a killed run left."""
    if os.geteuid() != 0:
        pytest.skip("dockerd takes root")
    for user in USERS:
        atexit.register(subprocess.run, [administer("userdel"), user], capture_output=True, check=False)
        try:
            pwd.getpwnam(user)
        except KeyError:
            subprocess.run([administer("useradd"), "--no-create-home", "--shell", "/bin/sh", user], check=True)


def in_containers(state_dir: Path) -> Mapping[str, Any]:
    return configuration("docker", "DockerProxy", docker_engine(), state_dir)


def in_a_swarm(state_dir: Path) -> Mapping[str, Any]:
    config = configuration("docker-swarm", "SwarmProxy", swarm_engine(), state_dir)
    return {**config, "SwarmProxy": {**config["SwarmProxy"], "pending_seconds": 3.0}}


def configuration(name: str, proxy: str, daemon: Dockerd, state_dir: Path) -> Mapping[str, Any]:
    unix_users()
    for user in USERS:
        home = state_dir / "homes" / user
        home.mkdir(parents=True, mode=0o700)
        os.chown(home, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    return {
        "UnixUsers": {"impersonate": True},
        "Proxies": {"default_proxy": name},
        proxy: {
            "url": daemon.url,
            "image": IMAGE,
            "volumes": [{"source": f"{state_dir}/homes/{{username}}", "target": "/home/{username}"}],
            "allowed_host_roots": [f"{state_dir}/homes", "/srv"],
            "shutdown_seconds": 5.0,
        },
    }


@dataclass(frozen=True)
class DockerCase(ProxyCase):
    """Agents are containers, with the gateway's id in a label."""

    engine: Callable[[], Dockerd] = docker_engine

    def containers(self, gateway_id: str, *, ended: bool = True) -> list[dict[str, Any]]:
        found = self.engine().client.api.containers(all=ended, filters={"label": [f"{GATEWAY}={gateway_id}"]})
        return list(found)

    def leftovers(self, gateway_id: str, state_dir: Path) -> list[str]:
        volumes = self.engine().client.api.volumes(filters={"label": [f"{GATEWAY}={gateway_id}"]})["Volumes"] or []
        return [
            *(f"container {one['Names']} {one['Status']}" for one in self.containers(gateway_id)),
            *(f"volume {one['Name']}" for one in volumes),
        ]

    def agents(self, gateway_id: str) -> list[str]:
        return [one["Id"] for one in self.containers(gateway_id, ended=False)]

    def kill_agent(self, record: KernelRecord) -> None:
        self.engine().client.api.kill(record.proxy_state["container"])

    def clean(self, gateway_ids: set[str], state_dir: Path) -> None:
        for gateway_id in gateway_ids:
            for one in self.containers(gateway_id):
                with contextlib.suppress(NotFound, APIError):
                    self.engine().client.api.remove_container(one["Id"], force=True, v=True)


DOCKER = DockerCase(
    "docker",
    4,
    in_containers,
    USERS,
    REFUSALS,
    needs=("docker",),
    specs=SPECS,
    impersonates=True,
)


@dataclass(frozen=True)
class SwarmCase(DockerCase):
    """Agents are services, with the gateway's id in a label; their containers carry nothing but the service's name."""

    engine: Callable[[], Dockerd] = swarm_engine

    def containers(self, gateway_id: str, *, ended: bool = True) -> list[dict[str, Any]]:
        found = self.engine().client.api.containers(all=ended, filters={"label": ["com.docker.swarm.service.name"]})
        return list(found)

    def leftovers(self, gateway_id: str, state_dir: Path) -> list[str]:
        api, wanted = self.engine().client.api, {"label": [f"{GATEWAY}={gateway_id}"]}
        return [
            *super().leftovers(gateway_id, state_dir),
            *(f"service {one['Spec']['Name']}" for one in api.services(filters=wanted)),
            *(f"secret {one['Spec']['Name']}" for one in api.secrets(filters=wanted)),
        ]

    def kill_agent(self, record: KernelRecord) -> None:
        api, wanted = self.engine().client.api, f"com.docker.swarm.service.id={record.proxy_state['service']}"
        (found,) = api.containers(filters={"label": [wanted]})
        api.kill(found["Id"])

    def clean(self, gateway_ids: set[str], state_dir: Path) -> None:
        api = self.engine().client.api
        for gateway_id in gateway_ids:
            wanted = {"label": [f"{GATEWAY}={gateway_id}"]}
            for one in api.services(filters=wanted):
                with contextlib.suppress(NotFound, APIError):
                    api.remove_service(one["ID"])
            with contextlib.suppress(AssertionError):
                until(lambda wanted=wanted: not api.tasks(filters=wanted), "the tasks are gone", timeout=10)
            for one in api.secrets(filters=wanted):
                with contextlib.suppress(NotFound, APIError):
                    api.remove_secret(one["ID"])


SWARM = SwarmCase(
    "docker-swarm",
    4,
    in_a_swarm,
    USERS,
    {
        **{name: words for name, words in REFUSALS.items() if name != "gpu"},
        "nowhere-image": "There is no image",
        "gpu": "no suitable node",
        "too-large": "insufficient resources",
        "elsewhere": "scheduling constraints not satisfied",
    },
    needs=("docker",),
    specs={
        **SPECS,
        "too-large": container_spec(resources={"cpu": 1000}),
        "elsewhere": container_spec(constraints=["node.labels.hgt==nowhere"]),
    },
    impersonates=True,
)
