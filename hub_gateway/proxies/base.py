"""The contract between the gateway and a resource manager.

A process proxy launches kernel agents on one kind of cluster and can say, later and in another
process, what became of them. It knows nothing of HTTP, websockets, users' tokens or quotas.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from traitlets.config import LoggingConfigurable
from traitlets.traitlets import MetaHasTraits

from hub_gateway.kernels.types import JSON, Registration, Resources
from hub_gateway.proxies.specconfig import Check

if TYPE_CHECKING:
    from hub_gateway.identity.credentials import Credentials

__all__ = [
    "AgentSettings",
    "ClusterObject",
    "Finding",
    "IdentityNeed",
    "LaunchRequest",
    "Phase",
    "PhaseReport",
    "ProcessProxy",
    "State",
]

State: TypeAlias = dict[str, JSON]
"""What a proxy needs to find its cluster object again: JSON, no secrets, a few hundred bytes."""


class IdentityNeed(enum.Enum):
    """What a proxy needs to act as the kernel's owner."""

    NONE = "none"
    UNIX_USER = "unix_user"
    SERVICE_TICKET = "service_ticket"
    USER_TGT = "user_tgt"
    PROXY_USER = "proxy_user"


@dataclass(frozen=True)
class AgentSettings:
    """What the agent is told at launch. Durations in seconds, sizes in bytes."""

    client_public_key: str
    """Z85 CURVE key of the only peer that the agent lets in."""
    launch_token: str
    """Single-use secret with which the agent proves its registration; never in argv or a shared environment."""
    register_url: str = ""
    """Where to post the registration; empty where the proxy reads it itself."""
    listen: str = "127.0.0.1"
    port_first: int = 0
    """The ports on which it may listen, up to `port_last`; 0 is any."""
    port_last: int = 0
    transport: Literal["auto", "ipc", "tcp"] = "auto"
    """Between the agent and its kernel; `auto` is ipc where the node's file system has sockets."""
    kernel_encryption: Literal["none", "curve"] = "none"
    """What the kernel understands; used with tcp."""
    ring_bytes: int = 256 * 2**20
    ring_messages: int = 1_000_000
    window_bytes: int = 4 * 2**20
    orphan_seconds: float = 3600.0
    session_seconds: float = 86400.0
    start_seconds: float = 60.0
    shutdown_seconds: float = 5.0
    stderr_bytes: int = 16 * 2**10
    log_bytes: int = 16 * 2**20
    """Of `kernel.log` and `kernel.log.1` in the runtime directory together, where the agent's stderr is that file."""
    restart_limit: int = 5


@dataclass(frozen=True)
class LaunchRequest:
    """One kernel to launch, complete: a proxy reads nothing else.

    `argv` still holds `{connection_file}`; all other placeholders are filled. `env` is the kernel's
    whole environment. `previous` is the state that an earlier, interrupted launch of the same
    kernel yielded last: a proxy first looks for what that launch left, and adopts it where it lives.
    """

    kernel_id: str
    gateway_id: str
    epoch: int
    owner: str
    kernelspec: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    agent: AgentSettings
    cwd: str | None = None
    unix_user: str | None = None
    principal: str | None = None
    """The owner's, in Kerberos."""
    tickets: str = field(default="", repr=False)
    """Kerberos tickets that the client has brought along (a credential cache, base64)."""
    interrupt_mode: Literal["signal", "message"] = "signal"
    resources: Resources = field(default_factory=Resources)
    config: Mapping[str, JSON] = field(default_factory=dict)
    previous: State | None = None


class Phase(enum.Enum):
    """What the cluster says of a kernel."""

    PENDING = "pending"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"  # the cluster cannot be asked now; never treated as gone


@dataclass(frozen=True)
class PhaseReport:
    """A phase, with the resource manager's own words for the user."""

    phase: Phase
    reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class ClusterObject:
    """Something on the cluster that carries this gateway's label."""

    kernel_id: str
    gateway_id: str
    epoch: int
    state: State
    description: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of `jupyter hubgateway check`."""

    level: Literal["ok", "warning", "error"]
    what: str
    message: str
    hint: str = ""


class _Meta(abc.ABCMeta, MetaHasTraits):
    """Abstract methods and traits in one class."""


class ProcessProxy(LoggingConfigurable, metaclass=_Meta):
    """One resource manager. One instance per process and configuration; methods may run concurrently.

    No method blocks the event loop. Every method may be called by another process than the one
    that launched, with nothing but the recorded state.
    """

    identity: IdentityNeed = IdentityNeed.NONE
    tickets: IdentityNeed = IdentityNeed.NONE
    """Which Kerberos tickets its kernels get, beside what it takes to start them: SERVICE_TICKET, USER_TGT or NONE."""
    credentials: Credentials | None = None
    """Where tickets are had from."""
    enforces: frozenset[str] = frozenset()
    """Which of cpu, memory, gpu, queue the resource manager enforces."""
    identifies: tuple[str, ...] = ()
    """The keys of a state that tell one cluster object of a kernel from another (a pid, an application id)."""
    wanted: bool = False
    """Whether anything speaks for it: an option, a kernelspec, a kernel. A cluster that nobody wants may be missing."""
    config_keys: ClassVar[Mapping[str, Check] | None] = None
    """What a kernelspec's `metadata.process_proxy.config` may hold for it; None: it does not say."""

    @abc.abstractmethod
    def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        """Launch the agent; yield the state after each outside effect.

        The caller records each yielded state before it continues, so that a crash between two yields
        loses at most one effect, which `owned()` finds again. The state may carry `"registration"`
        (host, port, public_key, pid) where the proxy learns it itself; it is then in the last one.
        A key `"progress"` is a sentence for the user. Raises `LaunchRefused` or `LaunchFailed`, with
        the resource manager's own reason; what was started until then is ended by `terminate` of the
        last yielded state.

        It is cancelled where its kernel is no longer wanted, or took too long. Until it has ended, its kernel is not
        terminated and keeps its reservation, so what it waits for needs a time limit of its own.
        """

    @abc.abstractmethod
    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        """The phase of each kernel id, in one call to the cluster."""

    @abc.abstractmethod
    async def terminate(self, state: State) -> None:
        """End it and free what it holds. Idempotent; returns when it is gone.

        The state is the last recorded one (or of `owned`), with at least `kernel_id`, `gateway_id` and
        `unix_user`: also what a launch did and could not report is found by these, and ended.
        """

    @abc.abstractmethod
    async def signal(self, state: State, signum: int) -> None:
        """Send a signal to the kernel, where the link is gone."""

    @abc.abstractmethod
    async def owned(self, gateway_id: str) -> Sequence[ClusterObject]:
        """Everything on the cluster that carries this gateway's label."""

    @abc.abstractmethod
    async def logs(self, state: State, lines: int = 50) -> str:
        """The last lines of what agent and kernel wrote; empty where there is nothing."""

    @abc.abstractmethod
    async def check(self) -> Sequence[Finding]:
        """Whether the cluster can be reached and used, and what to do where not."""

    def check_config(self, config: Mapping[str, JSON]) -> Iterator[Finding]:
        """What is wrong with a kernelspec's `metadata.process_proxy.config`, by this gateway's configuration.

        The types are as `config_keys` has them. May block.
        """
        yield from ()

    def says(self, unix_user: str | None, principal: str | None) -> str:
        """How it acts as a kernel's owner, in a sentence without its capital; empty where that goes without saying."""
        return ""

    async def close(self) -> None:
        """Release clients and pools."""

    async def route(self, state: State, registration: Registration) -> Registration:
        """Where this process reaches an agent that registered so: elsewhere, if the way leads through a tunnel.

        Called before each link is made; what it opens stays open for the link's own reconnections.
        Raises `Unavailable`.
        """
        return registration

    def same(self, recorded: State, found: State) -> bool:
        """Whether the recorded object of a kernel is the found one."""
        return all(recorded.get(key) == found.get(key) for key in self.identifies)

    @staticmethod
    def registration(state: State) -> Registration | None:
        """The registration that a state carries, if any."""
        found = state.get("registration")
        if not isinstance(found, dict):
            return None
        host, port, key, pid = (found.get(name) for name in ("host", "port", "public_key", "pid"))
        if not (isinstance(host, str) and isinstance(port, int) and isinstance(key, str)):
            return None
        return Registration(host, port, key, pid if isinstance(pid, int) else 0)
