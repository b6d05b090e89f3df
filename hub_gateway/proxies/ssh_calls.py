"""What the distributed proxy asks of hosts, one call each of `launchers/node.py`, and what it learns by that."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import GatewayError, LaunchFailed, Unavailable
from hub_gateway.kernels.types import JSON
from hub_gateway.proxies.distributed_config import DistributedOptions
from hub_gateway.proxies.ssh_hosts import Host, Hosts
from hub_gateway.proxies.ssh_node import Bundle, Nodes, as_error
from hub_gateway.proxies.ssh_pool import Lane, Problem, SshError, SshPool

__all__ = ["LAUNCH_SECONDS", "READ_SECONDS", "HostCalls"]

LAUNCH_SECONDS = 45.0
READ_SECONDS = 10.0


class HostCalls(DistributedOptions):
    """The hosts, and calls on them. `known` is what is known of them."""

    options_of = "DistributedProxy"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pool = SshPool(self.ssh_options())
        self.nodes = Nodes(self.pool, Bundle(Path(launchers_dir())), self.node_options())
        self._names_taken: dict[tuple[str, str], int] = {}
        """By host and user, how many names of directories are somebody else's there."""
        self._refreshing: dict[str, asyncio.Task[Any]] = {}

    @cached_property
    def known(self) -> Hosts:
        """The hosts of the configuration, and what is known of them."""
        return Hosts(self.configured_hosts(), self.placement_rule(), frozenset(self.drained_hosts), self.retry_seconds)

    async def _find(self, host: Host, gateway_id: str) -> tuple[dict[str, Any] | None, str]:
        """What there is on a host, or None and why it cannot be asked. One that is slow is not waited for."""
        if host.name in self.lost_hosts:
            return {"agents": [], "directories": [], "lost": True}, ""
        request = {
            "gateway_id": gateway_id,
            "host": host.name,
            "runtime_root": self.runtime_root,
            "drain_file": self.drain_file,
        }
        asked = asyncio.ensure_future(
            self.pool.run(
                host, lambda: self.nodes.call(host, self.user, "find", request, within=READ_SECONDS), lane=Lane.LOOK
            )
        )
        asked.add_done_callback(_unheard)
        done, _ = await asyncio.wait({asked}, timeout=self.ask_seconds)
        if not done:
            self.known.failed(host.name, "it does not answer")
            return None, "it does not answer"
        try:
            found = asked.result()
        except SshError as error:
            self._failed(host, self.user, error)
            return None, error.text
        except GatewayError as error:
            return None, error.message
        self.known.answered(host.name, found)
        return found, ""

    async def _refresh(self, names: Iterable[str]) -> None:
        """Learn how hosts are. Launches that ask the same host at the same time share one question.

        A poll shares none: an answer that was under way before a kernel was there would tell that it is gone.
        """
        asked = []
        for name in names:
            task = self._refreshing.get(name)
            if task is None or task.done():
                task = self._refreshing[name] = asyncio.ensure_future(self._find(self.known.hosts[name], ""))
            asked.append(asyncio.shield(task))  # whoever gives up leaves it to the others
        await asyncio.gather(*asked)

    async def _effect(self, host: Host, action: str, user: str, request: Mapping[str, Any]) -> None:
        """Have something done, to its end. Raises `Unavailable`."""
        try:
            call = self._calling(host, action, user, LAUNCH_SECONDS, request)
            await self.pool.run(host, call, who=self._who(user))
        except SshError as error:
            self._failed(host, user, error)
            raise as_error(host, error) from error
        except LaunchFailed as error:  # of something that is to end: it is not known whether it has
            raise Unavailable(error.message, hint=error.hint) from error

    def _calling(
        self, host: Host, action: str, user: str, within: float, request: Mapping[str, Any]
    ) -> Callable[[], dict[str, Any]]:
        return lambda: self.nodes.call(host, self._login(user), action, request, user=user, within=within)

    def _names(self, state: Mapping[str, JSON], gateway_id: str, kernel_id: str) -> dict[str, Any]:
        """What every request about one kernel says."""
        return {
            "gateway_id": gateway_id,
            "kernel_id": kernel_id,
            "host": state["host"],
            "runtime_dir": state["runtime_dir"],
            "drain_file": self.drain_file,
            "seconds": self.shutdown_seconds,
        }

    def _host(self, name: str, recorded: Mapping[str, JSON] | None) -> Host:
        """A host by its name; one that is no longer configured as a kernel's state has it."""
        found = self.known.hosts.get(name)
        if found is not None:
            return found
        address, port = (recorded or {}).get("address"), (recorded or {}).get("port")
        return Host(name, address if isinstance(address, str) else name, port if isinstance(port, int) else 22)

    def _user(self, unix_user: object) -> str:
        """The unix user of a kernel."""
        return unix_user if isinstance(unix_user, str) and unix_user else self.user

    def _login(self, user: str) -> str:
        """As whom to log in for a kernel of that user."""
        return user if self.as_owner else self.user

    def _who(self, user: str) -> str:
        """Whose turn a call is, of users who must not hold each other up; nobody's where there is but one."""
        return "" if user == self.user else user

    def _failed(self, host: Host, user: str, error: SshError) -> None:
        """Remember what is wrong with a host: what one user alone has there keeps nobody else's kernels away."""
        theirs = not error.problem.of_host or (error.problem is Problem.REFUSED and self.as_owner)
        if user == self.user or not theirs:
            self.known.failed(host.name, error.text)

    def _number(self, host: Host, user: str) -> int:
        """The first name of a directory there that is not known to be somebody else's."""
        return self._names_taken.get((host.name, user), 0)

    def _path(self, gateway_id: str, kernel_id: str, host: Host, user: str, number: int) -> str:
        # Hashed: kernel ids may come from clients, and the path must be short and the kernel's alone.
        name = hashlib.sha256(f"{gateway_id}/{kernel_id}/{host.name}".encode()).hexdigest()[:16]
        return f"{self.runtime_root}/{self.names.name(user, f'{user}@{host.name}/{number}')}/{name}"


def _unheard(future: asyncio.Future[Any]) -> None:
    """Perhaps nobody waits any more for what a slow host says."""
    if not future.cancelled():
        future.exception()
