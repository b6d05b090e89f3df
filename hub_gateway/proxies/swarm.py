"""The Docker Swarm process proxy: each kernel as a service of one task, wherever the swarm has room for it.

A task has no standard input, so the agent's configuration is a secret of the swarm, which is encrypted in the managers'
log, held in memory on the node, and readable for the kernel's own user alone. The agent's files are configs, named by
their content and shared by all kernels. The agent's first line is read from the service's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from traitlets import Enum, Float, List, Unicode

from hub_gateway.errors import LaunchFailed, Unavailable
from hub_gateway.proxies import tagged
from hub_gateway.proxies.base import ClusterObject, Finding, LaunchRequest, Phase, PhaseReport, State
from hub_gateway.proxies.container import ContainerProxy, listed
from hub_gateway.proxies.docker_check import check_daemon
from hub_gateway.proxies.docker_client import errors, last_words, refusal, said
from hub_gateway.proxies.docker_spec import EPOCH, GATEWAY, KERNEL, ContainerPlan, agent_document
from hub_gateway.proxies.specconfig import texts
from hub_gateway.proxies.swarm_spec import Placement, phase_of, service_spec

__all__ = ["SwarmProxy"]

LOOK_SECONDS = (0.1, 0.5)
REMOVAL_SECONDS = 20.0


class SwarmProxy(ContainerProxy):
    """Kernels as services of a Docker swarm."""

    config_keys = {**ContainerProxy.config_keys, "constraints": texts}
    identifies = ("service",)

    reach = Enum(
        ["published", "network"],
        "published",
        help="""How the gateway reaches agents.

        `published`: at a free port of the node, for a gateway anywhere. `network`: at the task's address in `network`,
        an overlay network that the gateway is in itself. Either way the connection is encrypted, and lets in nobody
        but the gateway.
        """,
    ).tag(config=True)
    constraints = List(
        Unicode(),
        help="""On which nodes kernels may run, such as `node.labels.kernels==true`, `node.role==worker`.

        A kernelspec may add its own (`constraints` in `metadata.process_proxy.config`).
        """,
    ).tag(config=True)
    pending_seconds = Float(
        30.0,
        help="""How long (seconds) a kernel may wait for a node that has room for it.

        The user reads at once why there is none, and after this time the launch has failed.
        """,
    ).tag(config=True)

    def configured(self) -> bool:
        # What is said for both proxies may be meant for Docker alone, and that daemon be in no swarm.
        return self._speaks_of(ContainerProxy)

    # Launch

    async def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        self.wanted = True
        plan = await asyncio.to_thread(self.plan, request)
        constraints = (*self.constraints, *map(str, listed(request, "constraints")))
        placement = Placement(constraints, self.reach == "published", self.shutdown_seconds)
        # The intent is recorded before anything is done: whatever follows can be found by it.
        state: State = {"swarm": await self._swarm_id()}
        yield dict(state)
        if request.previous is not None:
            adopted = await self._adopt(request, plan)
            if adopted is not None:
                yield {**state, **adopted}
                return
        try:
            configs = await self._ship()
            secret = await self._secret(request, plan)
            state["secret"] = secret["id"]
            yield dict(state)
            spec = service_spec(plan, placement, secret, configs)
            service = await self.daemon.change(lambda api: str(api.create_service(**spec)["ID"]))
        except errors().APIError as error:
            raise refusal(error, image=plan.image, python=plan.python) from error
        state["service"] = service
        yield dict(state)
        async for progress in self._await_registration(request.kernel_id, service, plan):
            if isinstance(progress, str):
                yield {**state, "progress": progress}
            else:
                state["registration"] = progress
        yield state

    async def _swarm_id(self) -> str:
        info = (await self.daemon.ask(lambda api: api.info())).get("Swarm", {})
        cluster = info.get("Cluster") or {}
        if not info.get("ControlAvailable") or not cluster.get("ID"):
            raise Unavailable(
                "The Docker daemon that the gateway speaks to is no manager of a swarm; ask the administrator.",
                hint=f"{self.url}: its swarm is {info.get('LocalNodeState')}; set SwarmProxy.url to a manager",
            )
        return str(cluster["ID"])

    async def _ship(self) -> dict[str, dict[str, str]]:
        """The agent's files as configs of the swarm, made where they are not there yet."""
        files = await asyncio.to_thread(self.shipped)

        def ship(api: Any) -> dict[str, dict[str, str]]:
            wanted = {name: f"hub-gateway-{hashlib.sha256(data).hexdigest()[:16]}" for name, data in files.items()}
            there = {one["Spec"]["Name"]: one["ID"] for one in api.configs(filters={"name": list(wanted.values())})}
            for file, name in wanted.items():
                if name in there:
                    continue
                try:
                    there[name] = api.create_config(name, files[file])["ID"]
                except errors().APIError as error:
                    if error.status_code != HTTPStatus.CONFLICT:
                        raise
                    (found,) = api.configs(filters={"name": name})  # another replica made it at this moment
                    there[name] = found["ID"]
            return {file: {"name": name, "id": there[name]} for file, name in wanted.items()}

        return await self.daemon.change(ship)

    async def _secret(self, request: LaunchRequest, plan: ContainerPlan) -> dict[str, str]:
        document = agent_document(request, plan)
        made = await self.daemon.change(lambda api: api.create_secret(plan.name, document, labels=dict(plan.labels)))
        return {"id": str(made["ID"]), "name": plan.name}

    async def _await_registration(
        self, kernel_id: str, service: str, plan: ContainerPlan
    ) -> AsyncIterator[str | dict[str, Any]]:
        """Why it waits, whenever that changes, and at last the registration. Raises `LaunchFailed`."""
        loop = asyncio.get_running_loop()
        began, started_at, told, delay = loop.time(), 0.0, "", LOOK_SECONDS[0]
        while True:
            task = await self._task(service)
            report = PhaseReport(Phase.PENDING) if task is None else phase_of(task)
            now = loop.time()
            if report.phase is Phase.GONE:
                lines = await self.logs({"service": service}, 5)
                raise LaunchFailed(last_words(report.reason, lines, image=plan.image, python=plan.python))
            if report.phase is Phase.RUNNING and task is not None:
                started_at = started_at or now
                registration = await self._read(kernel_id, service)
                if registration is not None:
                    yield {**registration, **await self._address(task, plan)}
                    return
            if report.reason and report.reason != told:
                told = report.reason
                yield told
            if not started_at and report.reason and now - began > self.pending_seconds:
                raise LaunchFailed(
                    f"{report.reason} It was not started within {self.pending_seconds:.0f} seconds; ask for less cpu, "
                    "memory or GPU, or try again later."
                )
            if started_at and now - started_at > self.register_seconds:
                raise LaunchFailed(
                    f"The kernel's agent did not listen within {self.register_seconds:.0f} seconds of the start of its "
                    "task; try again, or ask the administrator."
                )
            await asyncio.sleep(delay)
            delay = min(1.5 * delay, LOOK_SECONDS[1])

    async def _task(self, service: str) -> dict[str, Any] | None:
        """The one task of a service, as soon as there is one."""
        try:
            found = await self.daemon.ask(lambda api: api.tasks(filters={"service": service}))
        except errors().NotFound as error:
            raise LaunchFailed(
                "The kernel's service was removed while it was starting; start the kernel again."
            ) from error
        except errors().APIError as error:
            raise Unavailable("The swarm does not answer; try again in a minute.", hint=said(error)) from error
        return max(found, key=lambda one: str(one["CreatedAt"]), default=None)

    async def _read(self, kernel_id: str, service: str) -> dict[str, Any] | None:
        text = await self._log(service, stdout=True)
        return tagged.registration(text.split(b"\n", 1)[0], kernel_id)

    async def _log(self, service: str, *, stdout: bool, lines: int | str = "all") -> bytes:
        def read(api: Any) -> bytes:
            return b"".join(api.service_logs(service, stdout=stdout, stderr=not stdout, tail=lines, is_tty=False))

        try:
            return await self.daemon.ask(read)
        except errors().APIError:
            return b""  # a node that has just taken the task may not have its log yet

    async def _address(self, task: Mapping[str, Any], plan: ContainerPlan) -> dict[str, Any]:
        if self.reach == "published":
            ports = (task["Status"].get("PortStatus") or {}).get("Ports") or []
            node = await self.daemon.ask(lambda api: api.inspect_node(task["NodeID"]))
            address = str(node["Status"].get("Addr") or "")
            if address in ("", "0.0.0.0"):  # noqa: S104 (what a manager says that was not told its address)
                address = str((node.get("ManagerStatus") or {}).get("Addr", "")).rpartition(":")[0].strip("[]")
            if ports and address:
                return {"host": address, "port": int(ports[0]["PublishedPort"])}
        for attachment in task.get("NetworksAttachments") or []:
            if attachment["Network"]["Spec"]["Name"] in plan.networks and attachment.get("Addresses"):
                return {"host": str(attachment["Addresses"][0]).partition("/")[0]}
        raise LaunchFailed(
            "The kernel's task has no address at which the gateway could reach it; ask the administrator."
        )

    async def _adopt(self, request: LaunchRequest, plan: ContainerPlan) -> State | None:
        """What an interrupted launch of the same kernel left, if its agent comes up; the rest of it is removed."""
        for found in await self._services(request.gateway_id, request.kernel_id):
            service = str(found["ID"])
            try:
                async for progress in self._await_registration(request.kernel_id, service, plan):
                    if not isinstance(progress, str):
                        return {"service": service, "epoch": _epoch(found), "registration": progress}
            except LaunchFailed as error:
                self.log.info("Kernel %s: what is left of its launch is of no use: %s", request.kernel_id, error)
        await self._remove(request.gateway_id, request.kernel_id)
        return None

    # Afterwards

    async def _services(self, gateway_id: str, kernel_id: str | None = None) -> list[dict[str, Any]]:
        wanted = _wanted(gateway_id, kernel_id)
        try:
            return list(await self.daemon.ask(lambda api: api.services(filters={"label": wanted})))
        except errors().APIError as error:
            raise Unavailable("The swarm does not answer; try again in a minute.", hint=said(error)) from error

    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        self.wanted = self.wanted or bool(states)
        gateways = {str(state["gateway_id"]) for state in states.values() if state.get("gateway_id")}
        try:
            here = await self._swarm_id()
            services = {str(one["ID"]) for gateway_id in gateways for one in await self._services(gateway_id)}
            found = [one for gateway_id in gateways for one in await self.daemon.ask(_tasks(gateway_id))]
        except (Unavailable, errors().APIError) as error:
            reason = "the swarm does not answer" if isinstance(error, Unavailable) else said(error)
            return dict.fromkeys(states, PhaseReport(Phase.UNKNOWN, reason))
        tasks = {str(one["ServiceID"]): one for one in sorted(found, key=lambda one: str(one["CreatedAt"]))}

        def phase(state: State) -> PhaseReport:
            service = state.get("service")
            if state.get("swarm") not in (None, here):
                return PhaseReport(Phase.UNKNOWN, "its service belongs to another swarm")
            if not isinstance(service, str):
                return PhaseReport(Phase.PENDING)
            if service not in services:
                return PhaseReport(Phase.GONE, "its service is not there any more; somebody removed it")
            return phase_of(tasks[service]) if service in tasks else PhaseReport(Phase.PENDING)

        return {key: phase(state) for key, state in states.items()}

    async def terminate(self, state: State) -> None:
        kernel_id, gateway_id, only = state.get("kernel_id"), state.get("gateway_id"), state.get("only")
        assert isinstance(kernel_id, str) and isinstance(gateway_id, str)
        if state.get("swarm") not in (None, await self._swarm_id()):
            raise Unavailable(
                "The kernel's service belongs to another swarm than the one that this gateway speaks to.",
                hint=f"{self.url} is not in the swarm {state['swarm']}, which launched it",
            )
        await self._remove(gateway_id, kernel_id, only=only if isinstance(only, str) else None)

    async def _remove(self, gateway_id: str, kernel_id: str, *, only: str | None = None) -> None:
        """Remove a kernel's services, wait for their tasks to be gone, and remove their secrets."""
        wanted, loop = _wanted(gateway_id, kernel_id), asyncio.get_running_loop()
        services = [one for one in await self._services(gateway_id, kernel_id) if only in (None, one["ID"])]
        names = {str(one["Spec"]["Name"]) for one in services}
        try:
            for service in services:
                await self.daemon.change(partial(_gone, "remove_service", service["ID"]))
            deadline = loop.time() + self.shutdown_seconds + REMOVAL_SECONDS
            ending = {str(one["ID"]) for one in services}
            while ending & {str(one["ServiceID"]) for one in await self.daemon.ask(_tasks(gateway_id, kernel_id))}:
                if loop.time() > deadline:
                    raise Unavailable("The swarm has not ended the kernel's task yet; it is waited for.")
                await asyncio.sleep(LOOK_SECONDS[0])
            for secret in await self.daemon.ask(lambda api: api.secrets(filters={"label": wanted})):
                if only in (None, secret["ID"]) or secret["Spec"]["Name"] in names:
                    await self.daemon.change(partial(_gone, "remove_secret", secret["ID"]))
        except errors().APIError as error:
            raise Unavailable("The swarm did not remove the kernel; it is tried again.", hint=said(error)) from error

    async def signal(self, state: State, signum: int) -> None:
        """Not in a swarm: its managers pass no signals on. The agent, where it is reached, does it."""
        self.log.info("No signal can be sent to the service %s of a swarm", state.get("service"))

    async def search(self, gateway_id: str) -> Sequence[ClusterObject]:
        if not (await self.daemon.ask(lambda api: api.info())).get("Swarm", {}).get("ControlAvailable"):
            return []
        found = [(one, "service") for one in await self._services(gateway_id)]
        names = {one["Spec"]["Name"] for one, _ in found}
        secrets = await self.daemon.ask(lambda api: api.secrets(filters={"label": _wanted(gateway_id)}))
        found += [(one, "secret") for one in secrets if one["Spec"]["Name"] not in names]
        return [
            ClusterObject(
                kernel_id=one["Spec"]["Labels"].get(KERNEL, ""),
                gateway_id=gateway_id,
                epoch=_epoch(one),
                state={
                    "kernel_id": one["Spec"]["Labels"].get(KERNEL, ""),
                    "gateway_id": gateway_id,
                    kind: str(one["ID"]),
                    "only": str(one["ID"]),
                },
                description=f"{kind} {one['Spec']['Name']}",
            )
            for one, kind in found
        ]

    async def logs(self, state: State, lines: int = 50) -> str:
        service = state.get("service")
        if not isinstance(service, str):
            return ""
        return (await self._log(service, stdout=False, lines=lines)).decode("utf-8", "replace")

    async def check(self) -> Sequence[Finding]:
        if self.unused:
            return self.not_used("swarm kernels")
        networks = [self.network, *self.extra_networks]
        return await check_daemon(self.daemon, "swarm kernels", [], networks, swarm=True, wanted=self.wanted)


def _wanted(gateway_id: str, kernel_id: str | None = None) -> list[str]:
    return [f"{GATEWAY}={gateway_id}", *([f"{KERNEL}={kernel_id}"] if kernel_id else [])]


def _epoch(found: Mapping[str, Any]) -> int:
    return tagged.epoch_of(str(found["Spec"]["Labels"].get(EPOCH, "")))


def _tasks(gateway_id: str, kernel_id: str | None = None) -> Callable[[Any], list[dict[str, Any]]]:
    # By label, which tasks have of their service: by the service itself nothing is found any more once it is removed.
    wanted = _wanted(gateway_id, kernel_id)
    return lambda api: list(api.tasks(filters={"label": wanted}))


def _gone(remove: str, what: str, api: Any) -> None:
    """Remove it, unless it is gone."""
    with contextlib.suppress(errors().NotFound):
        getattr(api, remove)(what)
