"""What `jupyter hubgateway check` says of the hosts: each fault in a sentence, with what to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from hub_gateway.errors import GatewayError
from hub_gateway.kernels.types import Resources
from hub_gateway.proxies.base import Finding
from hub_gateway.proxies.distributed_config import DistributedOptions
from hub_gateway.proxies.ssh_hosts import Host
from hub_gateway.proxies.ssh_node import Bundle, Nodes
from hub_gateway.proxies.ssh_pool import Lane, Problem, SshError, SshPool

__all__ = ["Checker"]

LOOK_SECONDS = 40.0
ROOM_ERROR, ROOM_WARNING = 32 * 2**20, 512 * 2**20
"""Bytes that should be free where kernels write their logs."""
SKEW_WARNING, SKEW_ERROR = 5.0, 300.0
"""Seconds; Kerberos refuses who is more than five minutes off."""
HINTS = {
    Problem.UNREACHABLE: "is the host up, does sshd run there, and does a firewall let this machine in?",
    Problem.HOST_KEY: "compare the key by another way, then put it into known_hosts: ssh-keyscan HOST",
    Problem.REFUSED: "put the gateway's public key into the login's authorized_keys, or its principal into k5login",
    Problem.BROKEN: "look at the host's load, and at sshd's log there",
    Problem.UNFINISHED: "log in as that user: does the home directory, the login shell or PAM hang?",
    Problem.BUSY: "log in as that user: does the home directory, the login shell or PAM hang?",
}


class Checker:
    """Looks at every host at once, by connections of its own: those of kernels say nothing of a new one."""

    def __init__(self, bundle: Bundle, options: DistributedOptions, hosts: Callable[[], Mapping[str, Host]]) -> None:
        self.bundle = bundle
        self.options = options
        self.hosts = hosts

    async def run(self) -> list[Finding]:
        """The findings, host by host; none where there are no hosts."""
        hosts = self.hosts()
        pool = SshPool(self.options.ssh_options())
        nodes = Nodes(pool, self.bundle, self.options.node_options())
        try:
            found = await asyncio.gather(*(self._host(nodes, host) for host in hosts.values()))
        finally:
            await asyncio.to_thread(pool.close)
        findings = [finding for some in found for finding in some]
        if hosts and not self.options.limit_command:
            message = "kernels can take more than they ask for: nothing on the hosts enforces limits"
            findings.append(Finding("warning", "limits", message, "set DistributedProxy.limit_command"))
        return findings

    async def _host(self, nodes: Nodes, host: Host) -> list[Finding]:
        try:
            return await nodes.pool.run(host, lambda: list(self._look(nodes, host)), lane=Lane.LOOK)
        except SshError as error:
            return [Finding("error", host.name, error.text, error.hint or HINTS[error.problem])]
        except GatewayError as error:
            return [Finding("error", host.name, error.message, error.hint)]

    def _look(self, nodes: Nodes, host: Host) -> Iterator[Finding]:
        options = self.options
        request: dict[str, Any] = {"runtime_root": options.runtime_root}
        asked_at = time.time()
        answer = nodes.call(host, options.user, "look", request, within=LOOK_SECONDS)
        yield Finding("ok", host.name, f"{options.user} can log in; Python {answer['python']}")
        yield from _clock(host, float(answer["time"]), asked_at, time.time())
        user = options.check_user
        if user and user != options.user:
            login = user if options.as_owner else options.user
            request["limit_command"] = options.limits(Resources(cpu=1, memory=2**40))
            answer = nodes.call(host, login, "look", request, user=user, within=LOOK_SECONDS)
            yield Finding("ok", host.name, f"the gateway may act as {user}: it {options.way(user)}")
        yield from _facts(host, answer, options)


def _facts(host: Host, answer: Mapping[str, Any], options: DistributedOptions) -> Iterator[Finding]:
    if not answer["zmq"]:
        message = f"{options.python} has no pyzmq, without which no agent runs: {_last(answer.get('why'))}"
        yield Finding("error", host.name, message, f"on {host.name}: {options.python} -m pip install pyzmq")
    elif answer["zmq"].endswith("without CURVE"):
        message = f"pyzmq {answer['zmq']}: links could not be encrypted"
        yield Finding("error", host.name, message, "install pyzmq's own wheel")
    else:
        yield Finding("ok", host.name, f"the agent runs with pyzmq {answer['zmq'].split()[0]}")
    root, free = options.runtime_root, int(answer.get("free") or 0)
    if not answer.get("writable"):
        message = f"{root} cannot be written there {answer.get('root_error') or ''}".strip()
        hint = "make it writable for all (mode 1777), or set DistributedProxy.runtime_root"
        yield Finding("error", host.name, message, hint)
    elif free < ROOM_WARNING:
        level: Literal["error", "warning"] = "error" if free < ROOM_ERROR else "warning"
        message = (
            f"the disk of {root} is {'full' if level == 'error' else 'nearly full'} ({free / 1e6:.0f} MB are free)"
        )
        yield Finding(level, host.name, message, "make room there")
    if answer.get("open"):
        message = f"{root} is open to all without the sticky bit: users can take away each other's directories"
        yield Finding("error", host.name, message, f"on {host.name}: chmod +t {root}")
    if answer.get("limits"):
        message = f"limits cannot be enforced: {_last(answer['limits'])}"
        yield Finding("error", host.name, message, "correct DistributedProxy.limit_command")


def _clock(host: Host, there: float, before: float, after: float) -> Iterator[Finding]:
    skew = there - after if there > after else min(0.0, there - before)
    if abs(skew) > SKEW_WARNING:
        words = f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
        level: Literal["error", "warning"] = "error" if abs(skew) > SKEW_ERROR else "warning"
        yield Finding(level, host.name, words, "run an NTP client on both machines")


def _last(text: object) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[-1] if lines else "no reason given"
