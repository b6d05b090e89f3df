"""Real OpenSSH servers on several loopback addresses, each with a port and a host key of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.engines import ADMIN_PATH, missing
from tests.harness.waiting import until

__all__ = ["ADDRESSES", "LOGIN", "SshNode", "SshNodes", "make_unix_user", "remove_unix_user", "sweep_sudo_rules"]

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
SUDOERS = Path("/etc/sudoers.d")
LOGIN = "hgt-login"
"""The unix user as whom the gateway logs in."""

# Accounts without a password are locked, and directories below /tmp not strict, where there is no PAM to judge better.
_CONFIG = """\
ListenAddress {address}
Port {port}
HostKey {directory}/host_key
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PubkeyAuthentication yes
AuthorizedKeysFile {root}/authorized_keys/%u
MaxStartups 100:30:200
LogLevel VERBOSE
{more}
"""


@dataclass
class SshNode:
    """One server. `environment` is the daemon's, beside a PATH."""

    address: str
    port: int
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def known(self) -> str:
        """Its line of known_hosts."""
        kind, key = (self.directory / "host_key.pub").read_text().split()[:2]
        return f"[{self.address}]:{self.port} {kind} {key}\n"

    @property
    def log(self) -> Path:
        return self.directory / "sshd.log"

    def start(self) -> None:
        """Serve."""
        # Paths are absolute: it runs itself anew for each connection.
        command = [program("sshd"), "-D", "-f", str(self.directory / "sshd_config"), "-E", str(self.log)]
        process = self.process = subprocess.Popen(
            command, env={"PATH": os.defpath, **self.environment}, preexec_fn=die_with_parent
        )

        def settled() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), 1):
                return True
            return process.poll() is not None

        until(settled, f"sshd on {self.address} is up")
        assert process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        """End the server and the connections that there are. Kernels are none of its children, and go on."""
        if self.process is None:
            return
        family = self._family()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGCONT)
                one.kill()
        self.process.wait(10)
        until(lambda: not any(map(lives, family)), "the connections of sshd are gone")
        self.process = None

    def freeze(self, *, frozen: bool = True) -> None:
        """Answer nothing any more, though the kernel of the system still takes connections; or go on."""
        for one in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def _family(self) -> list[psutil.Process]:
        assert self.process is not None
        server = psutil.Process(self.process.pid)
        found = [server]
        for one in server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if one.name() == "sshd":  # what users run is left alone
                    found.append(one)
        return found


class SshNodes:
    """Servers that one gateway may log in to as `LOGIN`, by a key.

    `more` is appended to every sshd_config.
    """

    def __init__(self, directory: Path, *addresses: str, more: str = "", environment: Mapping[str, str] | None = None):
        if reason := missing("ssh"):
            pytest.skip(reason)
        if os.geteuid() != 0:
            pytest.skip("an sshd that lets several users in takes root")
        self.directory = directory
        self.key = directory / "key"
        self.known_hosts = directory / "known_hosts"
        self._sudoers: Path | None = None
        sweep_sudo_rules(SUDOERS)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
        make_unix_user(LOGIN)
        keygen(self.key)
        self.let_in(LOGIN)
        self.nodes = [self._make(address, more, environment or {}) for address in addresses or ADDRESSES]
        self.known_hosts.write_text("".join(node.known for node in self.nodes))

    def _make(self, address: str, more: str, environment: Mapping[str, str]) -> SshNode:
        place = self.directory / address.replace(":", "_")
        place.mkdir()
        keygen(place / "host_key")
        for _ in range(3):  # somebody else may take the port first
            node = SshNode(address, free_port(address), place, environment)
            facts = {"address": address, "port": node.port, "directory": place, "root": self.directory, "more": more}
            (place / "sshd_config").write_text(_CONFIG.format(**facts))
            with contextlib.suppress(AssertionError):
                node.start()
                return node
        raise AssertionError(f"sshd does not start: {node.log.read_text()}")

    @property
    def hosts(self) -> list[str]:
        """As `DistributedProxy.hosts` names them."""
        return [f"[{n.address}]:{n.port}" if ":" in n.address else f"{n.address}:{n.port}" for n in self.nodes]

    def let_in(self, user: str) -> None:
        """Let the gateway's key in as that user."""
        folder = self.directory / "authorized_keys"
        folder.mkdir(exist_ok=True)
        shutil.copy(self.key.with_suffix(".pub"), folder / user)

    def sudo_rule(self, python: str, launcher: str, *users: str) -> None:
        """The one rule that the gateway needs: `launcher` is a regular expression of sudoers."""
        name = str(self.directory).strip("/").replace("/", "-").replace(".", "-")
        path = self._sudoers = SUDOERS / f"hgt-{os.getpid()}-{name}"
        path.write_text(f"{LOGIN} ALL=({', '.join(users)}) NOPASSWD: {python} ^-I {launcher}$\n")
        path.chmod(0o440)

    def drop_sudo_rule(self) -> None:
        if self._sudoers is not None:
            self._sudoers.unlink(missing_ok=True)
            self._sudoers = None

    def stop(self) -> None:
        """End everything."""
        self.drop_sudo_rule()
        with contextlib.ExitStack() as each:  # all of them, whatever becomes of one
            for node in self.nodes:
                each.callback(node.stop)


def sweep_sudo_rules(directory: Path) -> None:
    """Remove the rules of tests that were killed; that of a process which lives is in use."""
    for path in directory.glob("hgt-*"):
        match = re.match(r"hgt-(\d+)-", path.name)
        if match is not None and not psutil.pid_exists(int(match[1])):
            path.unlink(missing_ok=True)


def die_with_parent() -> None:
    """Have Linux end a server with the tests that started it, however these end (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be waited for, perhaps by a slow init, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def program(name: str) -> str:
    """A program of the system's administrator, which need not be on everybody's PATH."""
    found = shutil.which(name, path=ADMIN_PATH)
    assert found is not None, f"{name} is not there"
    return found


def keygen(path: Path) -> None:
    subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as found:
        found.bind((address, 0))
        port: int = found.getsockname()[1]
        return port


def make_unix_user(name: str) -> None:
    """A unix user who may log in, without a password to do it with."""
    try:
        pwd.getpwnam(name)
    except KeyError:
        subprocess.run([program("useradd"), "--create-home", "--shell", "/bin/sh", name], check=True)
    subprocess.run([program("usermod"), "--password", "*", name], check=True)


def remove_unix_user(name: str) -> None:
    """Remove the user and the home directory; it is none where there is none."""
    subprocess.run([program("userdel"), "--remove", name], capture_output=True, check=False)
