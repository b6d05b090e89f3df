"""SSH connections that are kept: one for each host and login, used by a few threads for each host.

paramiko blocks, so everything here runs in threads; they are a host's own, so that one that does not answer
keeps nobody else waiting. A host's key must be in known_hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import shlex
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hub_gateway.errors import GatewayError
from hub_gateway.proxies.ssh_hosts import Host

__all__ = ["Authenticate", "Done", "Problem", "SshError", "SshOptions", "SshPool"]

T = TypeVar("T")
LOG = logging.getLogger("hub_gateway.proxies.ssh")
THREADS = 8
"""For each host; sshd allows ten sessions on a connection (MaxSessions), and as many logins at once (MaxStartups)."""
CHUNK = 65536
CHANNEL_SECONDS = 10.0
FULL_SECONDS = 0.05
KEEPALIVE_SECONDS = 15
SILENT_SECONDS = 20
AGAIN_SECONDS = 3.0
"""A login that failed is not repeated for so long: whoever waits for it learns the same."""
ANSWER_BYTES = 16 * 2**20

Authenticate = Callable[[str, Host], dict[str, Any]]
"""More arguments for `paramiko.SSHClient.connect`, by login and host. Called in a thread."""


class Problem(enum.Enum):
    """What was wrong with a host."""

    UNREACHABLE = "unreachable"
    HOST_KEY = "host key"
    REFUSED = "authentication"
    BROKEN = "broken off"  # after the command was sent: what it did is not known


class SshError(Exception):
    """A host could not be asked. The text is a clause for a sentence: "its host key is not in known_hosts"."""

    def __init__(self, problem: Problem, text: str) -> None:
        super().__init__(text)
        self.problem = problem
        self.text = text


@dataclass(frozen=True)
class SshOptions:
    """How to connect. Durations in seconds."""

    known_hosts: tuple[Path, ...]
    authenticate: Authenticate
    connect_seconds: float = 10.0


@dataclass(frozen=True)
class Done:
    """What a command wrote, and its exit code."""

    out: bytes
    err: str
    code: int


@dataclass
class _Place:
    """One login at one host: its connection, while there is one, and why the last attempt failed."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    client: Any = None
    failed: SshError | None = None
    failed_at: float = 0.0


class SshPool:
    """Runs commands on hosts. `run` is called on the event loop, `command` and `tunnel` in threads."""

    def __init__(self, options: SshOptions) -> None:
        self.options = options
        self._places: dict[tuple[str, int, str], _Place] = {}
        self._threads: dict[tuple[str, int], ThreadPoolExecutor] = {}
        self._guard = threading.Lock()
        self._closed = False

    def run(self, host: Host, call: Callable[[], T]) -> asyncio.Future[T]:
        """Have something done in one of a host's threads."""
        threads = self._threads.get((host.address, host.port))
        if threads is None:
            threads = ThreadPoolExecutor(THREADS, thread_name_prefix=f"ssh-{host.name}")
            self._threads[host.address, host.port] = threads
        return asyncio.get_running_loop().run_in_executor(threads, call)

    def command(self, host: Host, login: str, words: Sequence[str], stdin: bytes, seconds: float) -> Done:
        """Run a command, whose words reach the node as they are, and which reads no more than `stdin`. Blocks.

        Raises `SshError`.

        SSH has one string for a command, which the login's shell reads: each word is quoted for it.
        """
        deadline = time.monotonic() + seconds
        channel = self._channel(host, login, lambda one: one.open_session(timeout=CHANNEL_SECONDS), sessions=True)
        try:
            with contextlib.closing(channel):
                channel.settimeout(max(0.1, deadline - time.monotonic()))
                channel.exec_command(" ".join(map(shlex.quote, words)))
                # Nothing says that this was all: where the command has just ended by itself, paramiko may send that
                # after it has closed the channel, for which sshd ends the whole connection.
                with contextlib.suppress(OSError):  # it has ended without reading all; what it said tells why
                    channel.sendall(stdin)
                return _result(channel, deadline)
        except (OSError, EOFError, _paramiko().SSHException) as error:
            slow = isinstance(error, TimeoutError)
            if slow:
                self._drop(host, login)
            why = f"it did not answer within {seconds:.0f} seconds" if slow else f"the connection broke off ({error})"
            raise SshError(Problem.BROKEN, why) from error

    def tunnel(self, host: Host, login: str, target: tuple[str, int]) -> Any:
        """A channel to a port of the host, opened through the connection. Blocks. Raises `SshError`."""
        return self._channel(
            host,
            login,
            lambda transport: transport.open_channel("direct-tcpip", target, ("127.0.0.1", 0), timeout=CHANNEL_SECONDS),
        )

    def address(self, host: Host, login: str) -> str:
        """At which of its addresses the host was reached. Blocks. Raises `SshError`."""
        peer = self._client(host, login).get_transport().sock.getpeername()
        return str(peer[0])

    def close(self) -> None:
        """Disconnect. What runs on the hosts goes on."""
        self._closed = True
        for place in self._places.values():
            if place.client is not None:
                place.client.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    def _channel(self, host: Host, login: str, make: Callable[[Any], T], *, sessions: bool = False) -> T:
        paramiko = _paramiko()
        broken, deadline = 0, time.monotonic() + CHANNEL_SECONDS
        while True:
            client = self._client(host, login)
            try:
                transport = client.get_transport()
                if transport is None:
                    raise EOFError
                return make(transport)
            except (OSError, EOFError, paramiko.SSHException) as error:
                if _full(error) and _alive(client):
                    # A session that has ended counts until sshd has noticed: there may be ten (MaxSessions).
                    if sessions and time.monotonic() < deadline:
                        time.sleep(FULL_SECONDS)
                        continue
                    raise SshError(Problem.UNREACHABLE, f"it opens no further channel ({error})") from error
                # The connection was dead and nobody had noticed: nothing was sent by it, so it may be made anew.
                self._drop(host, login, client)
                broken += 1
                if broken == 2:
                    raise SshError(Problem.UNREACHABLE, f"the connection broke off ({error})") from error

    def _client(self, host: Host, login: str) -> Any:
        with self._guard:
            place = self._places.setdefault((host.address, host.port, login), _Place())
        with place.lock:
            if place.client is not None and _alive(place.client):
                return place.client
            if place.failed is not None and time.monotonic() - place.failed_at < AGAIN_SECONDS:
                raise place.failed
            try:
                place.client = self._connect(host, login)
            except SshError as error:
                place.client, place.failed, place.failed_at = None, error, time.monotonic()
                raise
            place.failed = None
            return place.client

    def _drop(self, host: Host, login: str, client: Any = None) -> None:
        place = self._places[host.address, host.port, login]
        with place.lock:
            if client is None or place.client is client:
                client, place.client = place.client, None
        if client is not None:
            client.close()

    def _connect(self, host: Host, login: str) -> Any:
        paramiko = _paramiko()
        if self._closed:
            raise SshError(Problem.UNREACHABLE, "the gateway is ending")
        seconds = self.options.connect_seconds
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        try:
            for path in self.options.known_hosts:
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
                **self.options.authenticate(login, host),
            }
            client.connect(host.address, host.port, login, **arguments)
            client.get_transport().set_keepalive(KEEPALIVE_SECONDS)
        except Exception as error:
            client.close()
            raise _explained(error, host, login, self.options.known_hosts) from error
        LOG.info("Connected to %s as %s", host.name, login)
        return client


def _paramiko() -> Any:
    """paramiko, which takes a tenth of a second to import: only a gateway with SSH hosts needs it."""
    import paramiko

    return paramiko


def _alive(client: Any) -> bool:
    transport = client.get_transport()
    return transport is not None and transport.is_active()


def _full(error: Exception) -> bool:
    """Whether a channel was refused. Of two that are refused at once, paramiko has the reason for one alone."""
    return isinstance(error, _paramiko().ChannelException) or str(error) == "Unable to open channel."


def _socket(host: Host, seconds: float) -> socket.socket:
    sock = socket.create_connection((host.address, host.port), timeout=seconds)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # without it a command takes 48 ms in place of 5
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # What is sent and not acknowledged for so long ends the connection; keepalives see to it that something is.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_SECONDS * 1000)
    return sock


def _result(channel: Any, deadline: float) -> Done:
    """Read both outputs to their ends. Raises `TimeoutError` (of `socket`) at the deadline."""
    out, err = bytearray(), bytearray()
    while len(out) < ANSWER_BYTES:
        channel.settimeout(max(0.05, deadline - time.monotonic()))
        part = channel.recv(CHUNK)
        while channel.recv_stderr_ready():
            err += channel.recv_stderr(CHUNK)
        if not part:
            break
        out += part
    while (part := channel.recv_stderr(CHUNK)) and len(err) < CHUNK:
        err += part
    if not channel.status_event.wait(max(0.05, deadline - time.monotonic())):
        raise TimeoutError
    if channel.exit_status < 0:
        raise EOFError("without an exit code")
    return Done(bytes(out), err.decode("utf-8", "replace"), channel.exit_status)


def _explained(error: Exception, host: Host, login: str, known_hosts: tuple[Path, ...]) -> SshError:
    """What an attempt to connect came to, for a user and an operator."""
    paramiko = _paramiko()
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
