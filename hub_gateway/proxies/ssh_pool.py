"""SSH connections that are kept, and the threads in which they are used: apart for what must not hold each other up.

What one user does on a host (`Lane.CALL`), what the gateway asks of it for everybody (`Lane.LOOK`), and the tunnels of
kernels (`Lane.TUNNEL`) have connections and threads of their own, and each user of a host only so many calls at once.
A command that hangs is given up by itself: the connection, which others use too, goes on as long as the host answers
by it. One by which it does not gets nothing new, and what goes through it may end, or come to life again, undisturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hub_gateway.proxies.ssh_connect import Problem, SshError, SshOptions, connect, importing
from hub_gateway.proxies.ssh_hosts import Host
from hub_gateway.proxies.ssh_turns import Turns
from hub_gateway.proxies.threads import to_its_end

__all__ = ["Done", "Lane", "Problem", "SshError", "SshOptions", "SshPool"]

T = TypeVar("T")
SESSIONS = 8
"""Commands on one connection; sshd allows ten (MaxSessions), and counts one that hangs until it has ended."""
CONNECTIONS = 6
"""For each login of a host in one lane. Sessions that hang may fill some of them."""
LOOKS = 4
CHUNK = 65536
CHANNEL_SECONDS = 10.0
ANSWER_SECONDS = 5.0
"""How long a host may take to answer by a connection on which something hangs."""
FULL_SECONDS = 0.05
REFUSED_SECONDS = 0.25
"""How long a connection that takes no further session is not asked for one: sshd may be set to fewer than ten."""
IDLE_SECONDS = 60.0
AGAIN_SECONDS = 3.0
"""A login that failed is not repeated for so long: whoever waits for it learns the same."""
ANSWER_BYTES = 16 * 2**20


class Lane(enum.Enum):
    """What a connection, or a thread, is for."""

    CALL = "call"
    LOOK = "look"
    TUNNEL = "tunnel"


THREADS = {Lane.CALL: 32, Lane.LOOK: LOOKS}
"""For each host: several users whose calls hang leave enough of them for others."""


@dataclass(frozen=True)
class Done:
    """What a command wrote, its exit code, and at which of its addresses the host was reached."""

    out: bytes
    err: str
    code: int
    address: str = ""


@dataclass
class _Connection:
    """One connection, and the channels that it has. Those that were given up (`hanging`) count, as sshd counts them."""

    client: Any
    address: str = ""
    channels: list[Any] = field(default_factory=list)
    hanging: list[Any] = field(default_factory=list)
    opening: int = 0
    retired: bool = False
    refused_at: float = 0.0
    used_at: float = field(default_factory=time.monotonic)

    @property
    def alive(self) -> bool:
        transport = self.client.get_transport()
        return transport is not None and transport.is_active()

    def sessions(self) -> int:
        self.channels = [channel for channel in self.channels if not channel.closed]
        self.hanging = [channel for channel in self.hanging if not channel.closed]
        return len(self.channels) + self.opening

    def roomy(self, lane: Lane) -> bool:
        """Whether a further channel may be opened; tunnels are no sessions, of which sshd counts the number."""
        if self.retired or not self.alive:
            return False
        if lane is Lane.TUNNEL:
            return True
        return self.sessions() < SESSIONS and time.monotonic() - self.refused_at > REFUSED_SECONDS

    def unused(self) -> bool:
        """Whether nobody waits for anything that comes by it."""
        return self.sessions() == len(self.hanging)


@dataclass
class _Place:
    """One login at one host, in one lane: its connections, and why the last attempt to make one failed."""

    steady: bool = True
    """Whether its first connection is kept for good."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by who makes a connection."""
    connections: list[_Connection] = field(default_factory=list)
    failed: SshError | None = None
    failed_at: float = 0.0


class SshPool:
    """Runs commands on hosts. `run` is called on the event loop, `command` and `tunnel` in threads."""

    def __init__(self, options: SshOptions) -> None:
        self.options = options
        self._places: dict[tuple[str, int, str, Lane], _Place] = {}
        self._threads: dict[tuple[str, int, Lane], ThreadPoolExecutor] = {}
        self._turns = Turns()
        self._guard = threading.Lock()
        """Over what is in a `_Place`; never held while waiting for a host."""
        self._closed = False
        self._swept = time.monotonic()

    async def run(self, host: Host, call: Callable[[], T], *, who: str = "", lane: Lane = Lane.CALL) -> T:
        """Have something done in one of a host's threads, to its end, when it is the turn of `who`.

        Calls for nobody in particular (empty) are as many as fit on one connection. Who is cancelled while waiting
        has done nothing. Raises what `call` does, and `SshError` where earlier calls of `who` all hang.
        """
        loop = asyncio.get_running_loop()
        at_once = LOOKS if lane is Lane.LOOK else self.options.calls_per_user if who else SESSIONS
        async with self._turns.take((host.address, host.port, lane, who), at_once) as line:

            def in_turn() -> T:
                try:
                    return call()
                except SshError as error:
                    if error.hanging is not None:
                        # On the loop, which may just be looking through them; it hears of this before it hears the end.
                        loop.call_soon_threadsafe(line.hanging.append, error.hanging)
                    raise

            key = (host.address, host.port, lane)
            threads = self._threads.get(key)
            if threads is None:
                name = f"ssh-{lane.value}-{host.name}"
                threads = self._threads[key] = ThreadPoolExecutor(THREADS[lane], thread_name_prefix=name)
            return await to_its_end(loop.run_in_executor(threads, in_turn))

    def command(
        self, host: Host, login: str, words: Sequence[str], stdin: bytes, seconds: float, lane: Lane = Lane.CALL
    ) -> Done:
        """Run a command, whose words reach the node as they are, and which reads no more than `stdin`. Blocks.

        Raises `SshError`.

        SSH has one string for a command, which the login's shell reads: each word is quoted for it.
        """
        deadline = time.monotonic() + seconds
        connection, channel = self._channel(
            host, login, lane, lambda one: one.open_session(timeout=min(CHANNEL_SECONDS, seconds))
        )
        given_up = False
        try:
            _execute(channel, " ".join(map(shlex.quote, words)), deadline)
            # Nothing says that this was all: where the command has just ended by itself, paramiko may send that
            # after it has closed the channel, for which sshd ends the whole connection.
            with contextlib.suppress(OSError):  # it has ended without reading all; what it said tells why
                channel.sendall(stdin)
            return _result(channel, deadline, connection.address)
        except (OSError, EOFError, importing().SSHException) as error:
            slow = isinstance(error, TimeoutError) or time.monotonic() >= deadline
            why = f"it did not answer within {seconds:.0f} seconds" if slow else f"the connection broke off ({error})"
            answers = self._answers(connection) if slow else connection.alive
            if not answers:
                self._retire(connection)
                raise SshError(Problem.BROKEN, why) from error
            if not slow:
                raise SshError(Problem.UNFINISHED, f"the command was broken off there ({error})") from error
            given_up = True
            raise SshError(Problem.UNFINISHED, why, hanging=channel) from error
        finally:
            with self._guard:
                if given_up:
                    connection.hanging.append(channel)  # open, so that its end is heard of
                connection.used_at = time.monotonic()
            if not given_up:
                channel.close()
            self._tidy(self._place(host, login, lane))

    def tunnel(self, host: Host, login: str, target: tuple[str, int]) -> Any:
        """A channel to a port of the host, opened through the connection. Blocks. Raises `SshError`."""
        _, channel = self._channel(
            host,
            login,
            Lane.TUNNEL,
            lambda transport: transport.open_channel("direct-tcpip", target, ("127.0.0.1", 0), timeout=CHANNEL_SECONDS),
        )
        return channel

    def close(self) -> None:
        """Disconnect. What runs on the hosts goes on."""
        self._closed = True
        self._turns.close()
        with self._guard:
            connections = [one for place in self._places.values() for one in place.connections]
        for connection in connections:
            connection.client.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)

    # Channels

    def _channel(self, host: Host, login: str, lane: Lane, make: Callable[[Any], Any]) -> tuple[_Connection, Any]:
        broken, deadline = 0, time.monotonic() + CHANNEL_SECONDS
        while True:
            connection = self._connection(host, login, lane, deadline)
            channel = None
            try:
                transport = connection.client.get_transport()
                if transport is None:
                    raise EOFError("it was closed")
                channel = make(transport)
                return connection, channel
            except (OSError, EOFError, importing().SSHException) as error:
                if _refused(error) and connection.alive:
                    # A session that has ended counts until sshd has noticed, and sshd may be set to take fewer.
                    connection.refused_at = time.monotonic()
                    if lane is not Lane.TUNNEL and time.monotonic() < deadline:
                        continue
                    raise SshError(Problem.UNREACHABLE, f"it opens no further channel ({error})") from error
                if lane is Lane.TUNNEL and self._answers(connection):
                    raise SshError(Problem.UNFINISHED, f"the port there does not answer ({error})") from error
                # The connection was dead and nobody had noticed: nothing was sent by it, so another may be made.
                self._retire(connection)
                broken += 1
                if broken == 2:
                    raise SshError(Problem.UNREACHABLE, f"the connection broke off ({error})") from error
            finally:
                with self._guard:
                    connection.opening -= 1
                    if channel is not None:
                        connection.channels.append(channel)

    def _answers(self, connection: _Connection) -> bool:
        """Whether the host answers by this connection. Blocks.

        A channel of a kind that no server has is refused, which needs nothing of any user's (RFC 4254, 5.1). It is
        asked for, as paramiko's own keepalives ask for no answer.
        """
        paramiko = importing()
        try:
            transport = connection.client.get_transport()
            if transport is None:
                return False
            transport.open_channel("keepalive@hub-gateway", timeout=ANSWER_SECONDS).close()
        except (OSError, EOFError, paramiko.SSHException) as error:
            return _refused(error) and connection.alive
        return True

    # Connections

    def _place(self, host: Host, login: str, lane: Lane) -> _Place:
        with self._guard:
            steady = self.options.steady in ("", login)
            return self._places.setdefault((host.address, host.port, login, lane), _Place(steady))

    def _connection(self, host: Host, login: str, lane: Lane, deadline: float) -> _Connection:
        """A connection with room for one more channel, which is counted as being opened. Blocks. Raises `SshError`."""
        place = self._place(host, login, lane)
        self._sweep()
        while True:
            self._tidy(place)
            found = self._roomy(place, lane)
            if found is not None:
                return found
            with place.lock:
                found = self._roomy(place, lane)  # who waited for the lock may find what was made meanwhile
                if found is not None:
                    return found
                if len(place.connections) < CONNECTIONS or self._sacrifice(place):
                    return self._connect(place, host, login)
            if time.monotonic() > deadline:
                raise SshError(Problem.UNREACHABLE, "it opens no further channel")
            time.sleep(FULL_SECONDS)

    def _roomy(self, place: _Place, lane: Lane) -> _Connection | None:
        with self._guard:
            found = next((one for one in place.connections if one.roomy(lane)), None)
            if found is not None:
                found.opening += 1
            return found

    def _connect(self, place: _Place, host: Host, login: str) -> _Connection:
        """A further connection. The place's lock is held."""
        if place.failed is not None and time.monotonic() - place.failed_at < AGAIN_SECONDS:
            raise place.failed
        try:
            if self._closed:
                raise SshError(Problem.UNREACHABLE, "the gateway is ending")
            client = connect(host, login, self.options)
            made = _Connection(client, _address(client), opening=1)
        except SshError as error:
            place.failed, place.failed_at = error, time.monotonic()
            raise
        place.failed = None
        with self._guard:
            place.connections.append(made)
        return made

    def _retire(self, connection: _Connection) -> None:
        """Open no further channel through it. What others have there may go on, if the host comes to life again."""
        with self._guard:
            connection.retired = True

    def _sacrifice(self, place: _Place) -> bool:
        """Retire a connection that is full of what hangs, where those of others would find no room any more."""
        with self._guard:
            found = next((one for one in place.connections if one.hanging and one.unused()), None)
            if found is not None:
                found.retired = True
        self._tidy(place)
        return found is not None

    def _sweep(self) -> None:
        """Tidy up everywhere, now and then: of logins that are not used any more, too."""
        now = time.monotonic()
        with self._guard:
            if now - self._swept < IDLE_SECONDS:
                return
            self._swept, places = now, list(self._places.values())
        for place in places:
            self._tidy(place)

    def _tidy(self, place: _Place) -> None:
        """Close what is dead, what is retired and of no use to anybody, and what was needed for a while only."""
        now, over = time.monotonic(), []
        with self._guard:
            for number, one in enumerate(list(place.connections)):
                spare = number > 0 or not place.steady
                idle = not one.sessions() and spare and now - one.used_at > IDLE_SECONDS
                if not one.alive or ((one.retired or idle) and one.unused()):
                    place.connections.remove(one)
                    over.append(one)
        for one in over:
            one.client.close()


def _address(client: Any) -> str:
    """At which address the host is. Raises `SshError`, and closes the client, where the host has hung up at once."""
    try:
        transport = client.get_transport()
        if transport is None:
            raise EOFError("it was closed")
        return str(transport.sock.getpeername()[0])
    except (OSError, EOFError) as error:
        client.close()
        raise SshError(Problem.UNREACHABLE, f"the connection broke off ({error})") from error


def _refused(error: Exception) -> bool:
    """Whether a channel was refused. Of two that are refused at once, paramiko has the reason for one alone."""
    return isinstance(error, importing().ChannelException) or str(error) == "Unable to open channel."


def _execute(channel: Any, command: str, deadline: float) -> None:
    """Have a command begun. Raises `SSHException`, also at the deadline, of which paramiko knows none here."""
    limit = threading.Timer(max(0.1, deadline - time.monotonic()), channel.close)
    limit.daemon = True
    limit.start()
    try:
        channel.settimeout(max(0.1, deadline - time.monotonic()))
        channel.exec_command(command)
    finally:
        limit.cancel()


def _result(channel: Any, deadline: float, address: str) -> Done:
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
    return Done(bytes(out), err.decode("utf-8", "replace"), channel.exit_status, address)
