"""The proxies under test: how each is set up, and how to see what it left."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from hub_gateway._paths import launchers_dir
from hub_gateway.kernels.types import KernelRecord
from hub_gateway.proxies import tagged
from hub_gateway.proxies.local import LocalProxy

__all__ = ["LOCAL", "OTHER_USER", "SUDO", "NodeCase", "ProxyCase"]

UNIX_USERS = ("hgt-alice", "hgt-bob")


@dataclass(frozen=True)
class ProxyCase:
    """One proxy on one engine: subclasses say how to look at the engine from outside.

    `yields` is how many states its launch yields; `prepare` makes what the engine needs and gives the
    configuration, or skips.
    """

    name: str
    yields: int
    prepare: Callable[[Path], Mapping[str, Any]]
    users: tuple[str, str] = ("alice", "bob")
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Kernelspecs (of conftest) that cannot be launched, and words of the engine that must reach the user."""
    needs: tuple[str, ...] = ()
    """The engines of tests/engines that it takes."""
    specs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Kernelspecs beside the ones that every proxy gets."""
    impersonates: bool = False
    """Whether kernels run as the unix user that their owner is mapped to."""

    def leftovers(self, gateway_id: str, state_dir: Path) -> list[str]:
        """What there still is of this gateway's kernels, in words."""
        raise NotImplementedError

    def agents(self, gateway_id: str) -> list[str]:
        """The agents of this gateway that live, by whatever names them."""
        raise NotImplementedError

    def kill_agent(self, record: KernelRecord) -> None:
        """End a kernel's agent and all that it started, at once and behind the gateway's back."""
        raise NotImplementedError

    def clean(self, gateway_ids: set[str], state_dir: Path) -> None:
        """End what a failed test left on the engine."""
        raise NotImplementedError


class NodeCase(ProxyCase):
    """Agents are processes of this machine, with the gateway's id and the kernel's in their command lines."""

    def leftovers(self, gateway_id: str, state_dir: Path) -> list[str]:
        found = [
            f"process {process.pid}: {argv}"
            for process, argv in processes()
            if gateway_id in argv or any(f"{state_dir}/run" in word for word in argv)
        ]
        roots = [state_dir / "run", *(state_dir / "users").glob("*")]
        return found + [f"directory {path}" for root in roots if root.is_dir() for path in root.iterdir()]

    def agents(self, gateway_id: str) -> list[str]:
        return [str(agent.process.pid) for agent in tagged.agents(gateway_id)]

    def kill_agent(self, record: KernelRecord) -> None:
        pid = record.proxy_state["pid"]
        assert isinstance(pid, int)
        agent = psutil.Process(pid)
        for process in (agent, *agent.children(recursive=True)):
            process.kill()

    def clean(self, gateway_ids: set[str], state_dir: Path) -> None:
        for process, words in processes():
            if gateway_ids & set(words) or any(str(state_dir) in word for word in words):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def processes() -> Iterator[tuple[psutil.Process, list[str]]]:
    """The processes of this machine that run, and their command lines."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process, words
        except psutil.Error:
            continue


def own_user(state_dir: Path) -> Mapping[str, Any]:
    return {}


@functools.cache
def python_for_everybody() -> str | None:
    """A Python with our packages that other unix users can execute; None where there is none."""
    place = Path(tempfile.mkdtemp(prefix="hgt-python-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    place.chmod(0o755)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = place / "lib" / version / "site-packages"
    for base in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin")):
        if base is None:
            continue
        make = [base, "-m", "venv", "--clear", "--without-pip", str(place)]
        if subprocess.run(make, capture_output=True, check=False).returncode:
            continue
        # Our own packages, from where they are, or, where others may not look there, copied.
        for provide in (link_packages, copy_packages):
            provide(packages)
            if usable_by_nobody(str(place / "bin" / "python")):
                return str(place / "bin" / "python")
    return None


def usable_by_nobody(python: str) -> bool:
    """Whether an unprivileged user can run a kernel with it."""
    probe = [python, "-I", "-c", "import zmq, ipykernel"]
    try:
        return subprocess.run(probe, user="nobody", capture_output=True, check=False, cwd="/").returncode == 0
    except PermissionError:
        return False


def link_packages(target: Path) -> None:
    """Make our packages importable from where they are."""
    (target / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")


def copy_packages(target: Path) -> None:
    """Copy ipykernel and what it needs."""
    (target / "ours.pth").unlink(missing_ok=True)
    missing, seen = ["ipykernel"], set()
    while missing:
        name = re.split(r"[^\w.-]", missing.pop(), maxsplit=1)[0]
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an optional one, or for another platform
        missing += [one for one in found.requires or () if "extra ==" not in one]
        for file in found.files or ():
            if ".." not in file.parts:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target / file)


def administer(program: str) -> str:
    """A program of the system's administrator, which need not be on everybody's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") or program


def other_user(state_dir: Path) -> Mapping[str, Any]:
    if os.geteuid() != 0:
        pytest.skip("acting as other unix users takes root")
    python = python_for_everybody()
    if python is None:
        pytest.skip("no Python that other unix users can execute")
    for user in UNIX_USERS:
        try:
            pwd.getpwnam(user)
        except KeyError:
            subprocess.run([administer("useradd"), "--create-home", "--shell", "/bin/sh", user], check=True)
    state_dir.chmod(0o755)
    # The checkout may lie where other users may not look.
    launchers = shutil.copytree(launchers_dir(), state_dir / "launchers", ignore=shutil.ignore_patterns("__pycache__"))
    return {
        "UnixUsers": {"impersonate": True},
        "LocalProxy": {
            "python": python,
            "launchers": str(launchers),
            "user_runtime_root": str(state_dir / "users"),
        },
    }


class SudoProxy(LocalProxy):
    """The local proxy as an unprivileged gateway has it; root needs no rule for sudo."""

    def _is_root(self) -> bool:
        return False


def by_sudo(state_dir: Path) -> Mapping[str, Any]:
    config = other_user(state_dir)
    (state_dir / "users").mkdir()
    (state_dir / "users").chmod(0o1777)
    traits = {"extra_proxies": {"sudo": SudoProxy}, "default_proxy": "sudo"}
    return {**config, "Proxies": traits, "SudoProxy": config["LocalProxy"]}


SUDO = NodeCase("local-by-sudo", 2, by_sudo, UNIX_USERS, {"nowhere": "nonexistent"}, needs=("sudo",), impersonates=True)
"""Differs from the case before in how the launcher is called, so it is put to a part of the suite only."""

LOCAL = NodeCase("local", 3, own_user, refusals={"nowhere": "nonexistent"})
OTHER_USER = NodeCase("local-as-other-user", 2, other_user, UNIX_USERS, {"nowhere": "nonexistent"}, impersonates=True)
