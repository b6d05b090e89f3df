"""The distributed process proxy: kernels on a list of hosts, by SSH.

A kernel runs as the user who logs in, or as another unix user by one rule of sudo, or as its owner by a login as the
owner. Everything on a host is done by `launchers/node.py`, one call each. An agent is known again, by any
later gateway, by the tags in its command line: kernel id, gateway id, epoch, and the host's name.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hub_gateway._paths import launchers_dir
from hub_gateway.errors import LaunchFailed, LaunchRefused
from hub_gateway.kernels.types import Registration
from hub_gateway.proxies import tagged
from hub_gateway.proxies.agent_config import AGENT_ENVIRONMENT, agent_config
from hub_gateway.proxies.base import (
    ClusterObject,
    Finding,
    IdentityNeed,
    LaunchRequest,
    Phase,
    PhaseReport,
    ProcessProxy,
    State,
)
from hub_gateway.proxies.names import NAMES
from hub_gateway.proxies.ssh_calls import LAUNCH_SECONDS, READ_SECONDS, HostCalls
from hub_gateway.proxies.ssh_check import Checker
from hub_gateway.proxies.ssh_hosts import Host, listed
from hub_gateway.proxies.ssh_node import as_error
from hub_gateway.proxies.ssh_pool import SshError
from hub_gateway.proxies.ssh_reports import nowhere, phase_of
from hub_gateway.proxies.ssh_tickets import CCACHE, Given, KernelTickets, check_tickets
from hub_gateway.proxies.ssh_tunnel import Tunnels

__all__ = ["DistributedProxy"]

TICKETS = {"none": IdentityNeed.NONE, "services": IdentityNeed.SERVICE_TICKET, "tgt": IdentityNeed.USER_TGT}
FRESH_SECONDS = 10.0


class DistributedProxy(HostCalls, ProcessProxy):
    """Kernels on hosts that are reached by SSH."""

    identity = IdentityNeed.UNIX_USER
    identifies = ("host", "pid")

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.enforces = self.enforced()
        self.tunnels = Tunnels()
        self.tickets = TICKETS[self.kernel_tickets]
        self.ticket_keeper = KernelTickets(self.tickets, self._deliver, self.log)

    async def close(self) -> None:
        self.ticket_keeper.close()
        self.tunnels.close()
        self.pool.close()

    # Launch

    async def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        user = self._user(request.unix_user)
        tickets = await self.ticket_keeper.first(self.credentials, request)
        refused: dict[str, str] = {}
        pinned = "host" in (request.previous or {})  # to where an interrupted launch may have left something
        todo = deque((name, 0, 0) for name in await self._candidates(request, refused))
        while todo:
            name, attempt, free = todo.popleft()
            host = self._host(name, request.previous)
            number = max(free, self._number(host, user))  # other launches may have found more names taken meanwhile
            directory = (request.previous or {}).get("runtime_dir")
            if not isinstance(directory, str) or attempt:  # else it is perhaps of another gateway, with other names
                directory = self._path(request.gateway_id, request.kernel_id, host, user, number)
            where: State = {"host": host.name, "address": host.address, "port": host.port}
            state: State = {**where, "user": user, "runtime_dir": directory}
            if request.principal is not None:
                state["principal"] = request.principal
            if tickets.text:
                state |= {"tickets": self.tickets.value, "owner": request.owner}
            self.remember(state, anew=True)
            # The intent is recorded before anything is done: whatever follows can be found by it.
            yield {**state, "progress": f"starting on {host.name}"}
            try:
                made = await self._launch_on(host, request, state, tickets)
            except SshError as error:
                self._failed(host, user, error)
                if error.problem.sent or pinned:
                    raise as_error(host, error) from error  # it may run there: nowhere else before that is known
                refused[name] = error.text
                continue
            except LaunchFailed:
                if not pinned:
                    yield {"nowhere": True}  # the launcher leaves nothing behind where it refuses
                raise
            if made.get("taken"):
                refused[name] = f"somebody there has taken the place of the kernels of {user} ({made['taken']})"
                if attempt < NAMES:
                    todo.appendleft((name, attempt + 1, number + 1))
                continue
            if made.get("drained"):
                self.known.of(name).drained = refused[name] = str(made["drained"])
                continue
            self._names_taken[host.name, user] = max(number, self._number(host, user))
            until = tickets.until(made.get("renew_till"))
            lasting: State = {} if until is None else {"credentials_until": until}
            yield {**state, **lasting, **self._registered(host, request, made)}
            return
        yield {"nowhere": True}  # there is nothing to end, on hosts that could not even be asked
        raise LaunchFailed(nowhere(refused))

    async def _candidates(self, request: LaunchRequest, refused: dict[str, str]) -> list[str]:
        """The hosts to try, in this order. An interrupted launch is looked for where it was, and goes on there."""
        before = (request.previous or {}).get("host")
        if isinstance(before, str):
            return [before]
        wanted = self._wanted(request)
        await self._refresh(self.known.stale(wanted, FRESH_SECONDS))
        found = self.known.order(wanted)
        refused.update({name: self.known.why_not(name) for name in wanted if name not in found})
        return found

    def _wanted(self, request: LaunchRequest) -> list[str]:
        """The hosts on which the kernelspec's kernels may run. Raises `LaunchRefused`."""
        names = listed(request.config.get("hosts") or request.config.get("remote_hosts")) or list(self.known.hosts)
        if unknown := [name for name in names if name not in self.known.hosts]:
            raise LaunchRefused(
                f"The kernelspec {request.kernelspec} names hosts that this gateway does not have "
                f"({', '.join(unknown)}). Ask the administrator.",
                hint="add them to DistributedProxy.hosts",
            )
        if not names:
            raise LaunchRefused(
                "This gateway has no hosts for such kernels. Ask the administrator.", hint="set DistributedProxy.hosts"
            )
        chosen = request.env.get("KERNEL_REMOTE_HOST")  # Enterprise Gateway's way to ask for one
        if not chosen:
            return names
        if chosen not in names:
            raise LaunchRefused(
                f"Kernels of {request.kernelspec} cannot run on {chosen[:100]!r}; choose one of {', '.join(names)}."
            )
        return [chosen]

    async def _launch_on(self, host: Host, request: LaunchRequest, state: State, tickets: Given) -> dict[str, Any]:
        self.known.of(host.name).launched += 1
        user, login = str(state["user"]), self._login(str(state["user"]))
        env = dict(request.env)
        ccache = f"{state['runtime_dir']}/{CCACHE}"
        if tickets.text:
            env["KRB5CCNAME"] = f"FILE:{ccache}"

        def go() -> dict[str, Any]:
            shelf = self.nodes.shelf(host, login)
            listen = "127.0.0.1" if self.network == "tunnel" else host.listen or shelf.address
            config = agent_config(
                request,
                argv=self._argv(request, shelf.directory),
                launchers=Path(shelf.directory),
                runtime_dir=str(state["runtime_dir"]),
                env=env,
                cwd=request.cwd,
                listen=listen,
                ports=self.port_limits(request.config),
            )
            tags = tagged.arguments(request.kernel_id, request.gateway_id, request.epoch)
            asked = {
                **self._names(state, request.gateway_id, request.kernel_id),
                "epoch": request.epoch,
                "command": [self.python, "-IS", shelf.agent, *tags, "--host", host.name],
                "agent_env": {"PATH": self.path, "LANG": "C.UTF-8", **AGENT_ENVIRONMENT},
                "config": {**config, "tickets": tickets.renewal(ccache)},
                "tickets": tickets.text,
            }
            return self.nodes.call(host, login, "launch", asked, user=user, within=LAUNCH_SECONDS)

        return await self.pool.run(host, go, who=self._who(user))

    def _registered(self, host: Host, request: LaunchRequest, made: Mapping[str, Any]) -> State:
        """What the last state says beside the first. Raises `LaunchFailed`."""
        found = tagged.registration(str(made.get("line") or "").encode(), request.kernel_id)
        if found is None:
            said = str(made.get("log") or "").strip().splitlines()[-5:]
            if "No module named 'zmq'" in str(made.get("log")):
                raise LaunchFailed(
                    f"The host {host.name} cannot run kernels: its Python has no pyzmq. Ask the administrator.",
                    hint=f"on {host.name}: {self.python} -m pip install pyzmq",
                )
            raise LaunchFailed(
                f"The kernel's agent on {host.name} ended before it was up. It said: {' / '.join(said) or 'nothing'}"
            )
        if host.reach and self.network != "tunnel":
            found["host"] = host.reach
        state: State = {"pid": found["pid"], "boot": str(made.get("boot") or ""), "registration": found}
        if self.network == "tunnel":
            state["tunnel"] = True
        if isinstance(made.get("epoch"), int):
            state["epoch"] = made["epoch"]
        return state

    def _argv(self, request: LaunchRequest, shelf: str) -> list[str]:
        ours = str(launchers_dir())
        argv = [word.replace(ours, shelf, 1) if word.startswith(ours) else word for word in request.argv]
        if argv[0] in ("python", "python3"):
            argv[0] = self.python
        return [*self.limits(request.resources), *argv]

    async def route(self, state: State, registration: Registration) -> Registration:
        kernel_id, name = state.get("kernel_id"), state.get("host")
        if not state.get("tunnel") or not isinstance(kernel_id, str) or not isinstance(name, str):
            return registration
        self.remember(state)
        host, login = self._host(name, state), self._login(str(state.get("user")))
        target = (registration.host, registration.port)
        port = self.tunnels.port(kernel_id, lambda: self.pool.tunnel(host, login, target))
        return replace(registration, host="127.0.0.1", port=port)

    # Afterwards

    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        by_host: dict[str, dict[str, State]] = {}
        for kernel_id, state in states.items():
            self.remember(state)
            by_host.setdefault(str(state.get("host") or ""), {})[kernel_id] = state
        reports: dict[str, PhaseReport] = {}

        async def ask(name: str, some: Mapping[str, State]) -> None:
            gateway_id = str(next(iter(some.values())).get("gateway_id") or "")
            found, why = await self._find(self._host(name, next(iter(some.values()))), gateway_id)
            for kernel_id, state in some.items():
                report = reports[kernel_id] = phase_of(kernel_id, state, found, why)
                if (
                    found is not None and report.phase is not Phase.GONE
                ):  # also where it shows no other users' processes
                    self.ticket_keeper.tend(self.credentials, kernel_id, state)

        if "" in by_host:
            reports.update({kernel_id: PhaseReport(Phase.PENDING) for kernel_id in by_host.pop("")})
        await asyncio.gather(*(ask(name, some) for name, some in by_host.items()))
        return reports

    async def _deliver(self, state: State, tickets: str) -> None:
        """Give a kernel that runs newer tickets. Raises `SshError`, `LaunchFailed`."""
        host, user = self._host(str(state["host"]), state), self._user(state.get("user"))
        request = {"runtime_dir": state["runtime_dir"], "tickets": tickets}
        await self.pool.run(host, self._calling(host, "tickets", user, READ_SECONDS, request), who=self._who(user))

    async def terminate(self, state: State) -> None:
        kernel_id, gateway_id, name = state.get("kernel_id"), state.get("gateway_id"), state.get("host")
        assert isinstance(kernel_id, str) and isinstance(gateway_id, str)
        self.remember(state)
        self.tunnels.close_port(kernel_id)
        await self.ticket_keeper.ended(self.credentials, kernel_id)
        if not isinstance(name, str) or name in self.lost_hosts:
            return  # nothing was begun, or nothing of it is left
        host, user = self._host(name, state), self._user(state.get("user") or state.get("unix_user"))
        directory = state.get("runtime_dir") or self._path(gateway_id, kernel_id, host, user, self._number(host, user))
        request = self._names({**state, "runtime_dir": directory}, gateway_id, kernel_id)
        if "only_pid" in state:
            request["pid"] = state["pid"]
        await self._effect(host, "end", user, request)

    async def signal(self, state: State, signum: int) -> None:
        kernel_id, gateway_id, name = state.get("kernel_id"), state.get("gateway_id"), state.get("host")
        self.remember(state)
        if isinstance(name, str) and isinstance(state.get("pid"), int):
            names = self._names(state, str(gateway_id), str(kernel_id))
            user = self._user(state.get("user"))
            request = {**names, "pid": state["pid"], "signum": signum}
            await self._effect(self._host(name, state), "signal", user, request)

    async def owned(self, gateway_id: str) -> Sequence[ClusterObject]:
        found: list[ClusterObject] = []

        async def ask(host: Host) -> None:
            answer, why = await self._find(host, gateway_id)
            if answer is None:
                self.log.warning("The host %s cannot be searched for leftovers: %s", host.name, why)
            else:
                found.extend(self._objects(host, gateway_id, answer))

        await asyncio.gather(*(ask(host) for host in self.known.hosts.values()))
        return found

    def _objects(self, host: Host, gateway_id: str, answer: Mapping[str, Any]) -> Iterable[ClusterObject]:
        living = set()
        where: State = {"host": host.name, "address": host.address, "port": host.port, "gateway_id": gateway_id}
        for agent in answer["agents"]:
            kernel_id, epoch = str(agent["kernel_id"]), int(agent["epoch"])
            living.add(kernel_id)
            mine: State = {"kernel_id": kernel_id, "pid": agent["pid"], "user": agent["user"], "only_pid": True}
            what = f"agent process {agent['pid']} on {host.name}"
            yield ClusterObject(kernel_id, gateway_id, epoch, {**where, **mine}, what)
        for left in answer["directories"]:
            if left["kernel_id"] not in living:
                mine = {"kernel_id": left["kernel_id"], "runtime_dir": left["path"], "user": self.user}
                what = f"directory {left['path']} on {host.name}"
                yield ClusterObject(left["kernel_id"], gateway_id, left["epoch"], {**where, **mine}, what)

    def same(self, recorded: State, found: State) -> bool:
        if "only_pid" in found:
            return super().same(recorded, found)
        return all(recorded.get(key) == found.get(key) for key in ("host", "runtime_dir"))

    async def logs(self, state: State, lines: int = 50) -> str:
        name, directory = state.get("host"), state.get("runtime_dir")
        if not isinstance(name, str) or not isinstance(directory, str) or name in self.lost_hosts:
            return ""
        self.remember(state)
        host, user = self._host(name, state), self._user(state.get("user"))
        call = self._calling(host, "logs", user, READ_SECONDS, {"runtime_dir": directory})
        try:
            answer = await self.pool.run(host, call, who=self._who(user))
        except SshError as error:
            raise as_error(host, error) from error
        return "\n".join(str(answer["text"]).splitlines()[-lines:])

    def says(self, unix_user: str | None, principal: str | None) -> str:
        user = self._user(unix_user)
        if user == self.user:
            return f"the gateway logs in as {user}, as whom kernels run."
        return f"the gateway {self.way(user, principal)}."

    async def check(self) -> Sequence[Finding]:
        checker = Checker(self.nodes.bundle, self, self.configured_hosts)
        found = await checker.run()
        if self.configured_hosts():
            found += await check_tickets(self.credentials, self.tickets, self.check_user, self.check_principal)
        return found
