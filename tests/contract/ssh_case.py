"""The distributed proxy on real OpenSSH servers of this machine: hosts that share their processes and files."""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.contract.cases import NodeCase, processes, python_for_everybody
from tests.engines.ssh import LOGIN, SshNodes, make_unix_user, remove_unix_user

__all__ = ["NODES", "SSH_OWN_USER", "SSH_SUDO", "USERS", "SshCase", "distributed", "prepare_nodes"]

USERS = ("hgt-ada", "hgt-bea")
NODES: dict[Path, SshNodes] = {}
"""The servers of a test that runs, by its state directory."""


def prepare_nodes(
    state_dir: Path, *addresses: str, more: str = "", environment: Mapping[str, str] | None = None
) -> SshNodes:
    """Servers for one test, whose users can read what the gateway brings there."""
    if os.geteuid() != 0:
        pytest.skip("an sshd that lets several users in takes root")
    usable_python()
    state_dir.chmod(0o755)
    make_users()
    nodes = NODES[state_dir] = SshNodes(state_dir / "ssh", *addresses, more=more, environment=environment)
    for name in ("users", "shelves"):
        (state_dir / name).mkdir()
        (state_dir / name).chmod(0o1777)
    return nodes


@functools.cache
def make_users() -> None:
    """The unix users of these tests, for as long as these run."""
    for user in (LOGIN, *USERS):
        atexit.register(remove_unix_user, user)
        make_unix_user(user)


def usable_python() -> str:
    """The hosts' Python; without one the test is skipped."""
    python = python_for_everybody()
    if python is None:
        pytest.skip("no Python that other unix users can execute")
    return python


def distributed(nodes: SshNodes, state_dir: Path, **traits: Any) -> Mapping[str, Any]:
    """A gateway's configuration for these hosts."""
    python = usable_python()
    nodes.sudo_rule(python, f"{state_dir}/shelves/{LOGIN}/[0-9a-f]{{64}}/node\\.py", *USERS)
    return {
        "UnixUsers": {"impersonate": True},
        "Controller": {"poll_seconds": 3.0},  # nothing else notices that an agent has ended
        "Proxies": {"default_proxy": "distributed"},
        "DistributedProxy": {
            "hosts": nodes.hosts,
            "user": LOGIN,
            "key_file": str(nodes.key),
            "known_hosts": [str(nodes.known_hosts)],
            "python": python,
            "launchers_root": f"{state_dir}/shelves/{{user}}",
            "runtime_root": f"{state_dir}/users",
            "drain_file": f"{state_dir}/drain",
            **traits,
        },
    }


def by_sudo(state_dir: Path) -> Mapping[str, Any]:
    return distributed(prepare_nodes(state_dir), state_dir)


def as_login(state_dir: Path) -> Mapping[str, Any]:
    config = distributed(prepare_nodes(state_dir), state_dir)
    return {**config, "UnixUsers": {"impersonate": False}}


@dataclass(frozen=True)
class SshCase(NodeCase):
    """Agents are known by the host's name in their command lines; nothing else of a kernel may be in there."""

    needs: tuple[str, ...] = ("ssh", "sudo")
    refusals: Mapping[str, str] = field(default_factory=lambda: {"nowhere": "nonexistent"})

    def leftovers(self, gateway_id: str, state_dir: Path) -> list[str]:
        found = [
            f"process {process.pid}: {argv}"
            for process, argv in processes()
            if gateway_id in argv or any(f"{state_dir}/users" in word for word in argv)
        ]
        return found + [f"{path}" for path in (state_dir / "users").glob("hub-gateway-*/*")]

    def agents(self, gateway_id: str) -> list[str]:
        return [str(process.pid) for process, argv in processes() if gateway_id in argv and "--host" in argv]

    def clean(self, gateway_ids: set[str], state_dir: Path) -> None:
        nodes = NODES.pop(state_dir, None)
        if nodes is not None:
            nodes.stop()
        super().clean(gateway_ids, state_dir)


SSH_SUDO = SshCase("ssh-sudo", 2, by_sudo, USERS, impersonates=True)
SSH_OWN_USER = SshCase("ssh-own-user", 2, as_login)
