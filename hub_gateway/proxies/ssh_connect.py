"""Making one SSH connection, and saying in words what is wrong with a host that has none.

A host's key must be in known_hosts. paramiko blocks, so this is for threads.
"""

from __future__ import annotations

import enum
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_gateway.errors import GatewayError
from hub_gateway.proxies.ssh_hosts import Host

__all__ = ["Authenticate", "Problem", "SshError", "SshOptions", "connect", "importing"]

LOG = logging.getLogger("hub_gateway.proxies.ssh")
KEEPALIVE_SECONDS = 15
SILENT_SECONDS = 20

Authenticate = Callable[[str, Host], dict[str, Any]]
"""More arguments for `paramiko.SSHClient.connect`, by login and host. Called in a thread."""


class Problem(enum.Enum):
    """What was wrong with a host, or with what one user has there."""

    UNREACHABLE = "unreachable"
    HOST_KEY = "host key"
    REFUSED = "authentication"
    BROKEN = "broken off"  # after the command was sent: what it did is not known
    UNFINISHED = "unfinished"  # the same, but the connection goes on: it is this one command that hangs
    BUSY = "busy"  # nothing was sent: earlier commands of the same user hang there

    @property
    def sent(self) -> bool:
        """Whether the host may have begun to do what it was asked for."""
        return self in (Problem.BROKEN, Problem.UNFINISHED)

    @property
    def of_host(self) -> bool:
        """Whether it concerns everybody who has something on the host."""
        return self not in (Problem.UNFINISHED, Problem.BUSY)


class SshError(Exception):
    """A host could not be asked. The text is a clause for a sentence: "its host key is not in known_hosts".

    `hanging` is the channel of a command that still runs, which ends when the command does. `hint` says what to do,
    where more is known than the problem.
    """

    def __init__(self, problem: Problem, text: str, hanging: Any = None, hint: str = "") -> None:
        super().__init__(text)
        self.problem = problem
        self.text = text
        self.hanging = hanging
        self.hint = hint


@dataclass(frozen=True)
class SshOptions:
    """How to connect. Durations in seconds."""

    known_hosts: tuple[Path, ...]
    authenticate: Authenticate
    connect_seconds: float = 10.0
    calls_per_user: int = 4
    """How many calls of one user a host carries out at once."""
    steady: str = ""
    """The login whose first connection to a host is kept for good; others' end when they are not used any more."""


def importing() -> Any:
    """paramiko, which takes a tenth of a second to import: only a gateway with SSH hosts needs it."""
    import paramiko

    return paramiko


def connect(host: Host, login: str, options: SshOptions) -> Any:
    """A client that is logged in. Blocks. Raises `SshError`."""
    paramiko = importing()
    seconds = options.connect_seconds
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    try:
        for path in options.known_hosts:
            if path.is_file():
                client.load_system_host_keys(str(path))
        sock = _socket(host, seconds)
        arguments = {
            "sock": sock,
            "timeout": seconds,
            "banner_timeout": seconds,
            "auth_timeout": seconds,
            "channel_timeout": seconds,
            "allow_agent": False,
            "look_for_keys": False,
            **options.authenticate(login, host),
        }
        client.connect(host.address, host.port, login, **arguments)
        client.get_transport().set_keepalive(KEEPALIVE_SECONDS)
    except Exception as error:
        client.close()
        raise _explained(error, host, login, options.known_hosts) from error
    LOG.info("Connected to %s as %s", host.name, login)
    return client


def _socket(host: Host, seconds: float) -> socket.socket:
    sock = socket.create_connection((host.address, host.port), timeout=seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it a command takes 48 ms in place of 5
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # What is sent and not acknowledged for so long ends the connection; keepalives see to it that something is.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
    return sock


def _explained(error: Exception, host: Host, login: str, known_hosts: tuple[Path, ...]) -> SshError:
    """What an attempt to connect came to, for a user and an operator."""
    paramiko = importing()
    if isinstance(error, SshError):
        return error
    if isinstance(error, GatewayError):
        return SshError(Problem.REFUSED, f"the gateway has nothing to log in with: {error.hint or error.message}")
    files = " or ".join(map(str, known_hosts))
    if isinstance(error, paramiko.BadHostKeyException):
        return SshError(
            Problem.HOST_KEY,
            f"its host key is not the one in {files}: either it was installed anew, or somebody is in between",
        )
    if isinstance(error, paramiko.SSHException) and "not found in known_hosts" in str(error):
        return SshError(Problem.HOST_KEY, f"its host key is not in {files}")
    if isinstance(error, paramiko.AuthenticationException) or type(error).__name__ == "AuthFailure":
        return SshError(Problem.REFUSED, f"it does not let {login} log in ({_short(error)})")
    if isinstance(error, TimeoutError):
        return SshError(Problem.UNREACHABLE, "it does not answer")
    if isinstance(error, socket.gaierror):
        return SshError(Problem.UNREACHABLE, f"the name {host.address} is not known")
    if isinstance(error, OSError | EOFError | paramiko.SSHException):
        return SshError(Problem.UNREACHABLE, f"it cannot be reached ({_short(error)})")
    return SshError(Problem.REFUSED, f"logging in as {login} is not possible ({type(error).__name__}: {_short(error)})")


def _short(error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return text[-300:] or type(error).__name__
