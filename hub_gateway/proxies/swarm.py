"""The Docker Swarm process proxy: each kernel as a service of one task, wherever the swarm has room for it.

A task has no standard input, so the agent's configuration is a secret of the swarm, which is encrypted in the managers'
log, held in memory on the node, and readable for the kernel's own user alone. The agent's files are configs, named by
their content and shared by all kernels. The agent's first line is read from the service's log.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from traitlets import Enum, Float, List, Unicode

from hub_gateway.errors import LaunchFailed, Unavailable
from hub_gateway.proxies import tagged
from hub_gateway.proxies.base import ClusterObject, Finding, LaunchRequest, Phase, PhaseReport, State
from hub_gateway.proxies.container import ContainerProxy, listed
from hub_gateway.proxies.docker_check import check_daemon
from hub_gateway.proxies.docker_client import errors, last_words, refusal
from hub_gateway.proxies.docker_spec import EPOCH, KERNEL, ContainerPlan, agent_document
from hub_gateway.proxies.specconfig import texts
from hub_gateway.proxies.swarm_manager import SwarmManager
from hub_gateway.proxies.swarm_spec import Placement, attempt_of, newest, phase_of, service_spec, spoilt

__all__ = ["SwarmProxy"]

LOOK_SECONDS = (0.1, 0.5)
REMOVAL_SECONDS = 20.0
PREPARING = "preparing"
PREPARING_SECONDS = 5.0
"""How often the user is told that it still is."""
ATTEMPTS = 3
"""How often a task is started that cannot start for a reason that passes."""


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

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.manager = SwarmManager(self.daemon)

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
            async for adopted in self._adopt(request, plan):
                if not isinstance(adopted, str):
                    yield {**state, **adopted}
                    return
                yield {**state, "progress": adopted}
        try:
            configs = await self._ship()
            secret = await self._secret(request, plan)
            state["secret"] = secret["id"]
            yield dict(state)
            spec = service_spec(plan, placement, secret, configs)
            # The nodes that fetch the image are given the login for its registry.
            service = await self.daemon.change(
                lambda api: str(self.daemon.connect_with_logins().create_service(**spec)["ID"])
            )
        except errors().APIError as error:
            raise refusal(error, image=plan.image, python=plan.python) from error
        state["service"] = service
        yield dict(state)
        async for progress in self._await_registration(request.kernel_id, service, plan, 0):
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
        self, kernel_id: str, service: str, plan: ContainerPlan, attempt: int
    ) -> AsyncIterator[str | dict[str, Any]]:
        """Why the task of this attempt waits, whenever that changes, and at last the registration.

        Raises `LaunchFailed`.
        """
        loop = asyncio.get_running_loop()
        began, started_at, told, delay = loop.time(), 0.0, "", LOOK_SECONDS[0]
        prepared_at = said_at = 0.0
        while True:
            task, report = await self.manager.look(service, attempt)
            now = loop.time()
            if task is not None and spoilt(task) and attempt_of(task["Spec"]) + 1 < ATTEMPTS:
                self.log.info("Kernel %s: its task is started anew: %s", kernel_id, report.reason)
                yield "The node was busy and could not start the kernel; it is started again."
                # Only now: who goes on still has the kernel.
                attempt = await self.manager.again(service, attempt_of(task["Spec"]))
                began, prepared_at = loop.time(), 0.0
                continue
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
            if task is not None and task["Status"]["State"] == PREPARING:
                # The swarm says no more of it than that.
                prepared_at = prepared_at or now
                if now - prepared_at > self.pull_seconds:
                    raise LaunchFailed(
                        f"A node of the swarm had not prepared the kernel, and fetched the image {plan.image}, after "
                        f"{self.pull_seconds:.0f} seconds; try again, or ask the administrator to fetch it beforehand."
                    )
                if now - max(prepared_at, said_at) > PREPARING_SECONDS:
                    said_at = now
                    yield (
                        f"A node of the swarm has been preparing the kernel for {now - prepared_at:.0f} seconds; it "
                        f"fetches the image {plan.image} where it does not have it yet."
                    )
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

    async def _read(self, kernel_id: str, service: str) -> dict[str, Any] | None:
        text = await self.manager.log(service, stdout=True)
        return tagged.registration(text.split(b"\n", 1)[0], kernel_id)

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

    async def _adopt(self, request: LaunchRequest, plan: ContainerPlan) -> AsyncIterator[str | State]:
        """What an interrupted launch of the same kernel left, if its agent comes up; until then, why it does not yet.

        Where nothing comes up, what is left is removed.
        """
        for found in await self.manager.services(request.gateway_id, request.kernel_id):
            service, attempt = str(found["ID"]), attempt_of(found["Spec"]["TaskTemplate"])
            try:
                async for progress in self._await_registration(request.kernel_id, service, plan, attempt):
                    if isinstance(progress, str):
                        yield progress
                    else:
                        yield {"service": service, "epoch": _epoch(found), "registration": progress}
                        return
            except LaunchFailed as error:
                self.log.info("Kernel %s: what is left of its launch is of no use: %s", request.kernel_id, error)
        seconds = self.shutdown_seconds + REMOVAL_SECONDS
        await self.manager.remove(request.gateway_id, request.kernel_id, only=None, seconds=seconds)

    # Afterwards

    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        self.wanted = self.wanted or bool(states)
        gateways = {str(state["gateway_id"]) for state in states.values() if state.get("gateway_id")}
        try:
            here = await self._swarm_id()
            listed = [one for gateway_id in gateways for one in await self.manager.services(gateway_id)]
            found = [one for gateway_id in gateways for one in await self.manager.tasks(gateway_id)]
            nodes = await self.manager.nodes(found)
        except (Unavailable, errors().APIError):
            return dict.fromkeys(states, PhaseReport(Phase.UNKNOWN, "the swarm does not answer"))
        services = {str(one["ID"]): attempt_of(one["Spec"]["TaskTemplate"]) for one in listed}
        tasks: dict[str, list[dict[str, Any]]] = {}
        for one in found:
            tasks.setdefault(str(one["ServiceID"]), []).append(one)

        def phase(state: State) -> PhaseReport:
            service = state.get("service")
            if state.get("swarm") not in (None, here):
                return PhaseReport(Phase.UNKNOWN, "its service belongs to another swarm")
            if not isinstance(service, str):
                return PhaseReport(Phase.PENDING)
            if service not in services:
                return PhaseReport(Phase.GONE, "its service is not there any more; somebody removed it")
            task = newest(tasks.get(service, ()), services[service])
            return PhaseReport(Phase.PENDING) if task is None else phase_of(task, nodes)

        return {key: phase(state) for key, state in states.items()}

    async def terminate(self, state: State) -> None:
        kernel_id, gateway_id, only = state.get("kernel_id"), state.get("gateway_id"), state.get("only")
        assert isinstance(kernel_id, str) and isinstance(gateway_id, str)
        if state.get("swarm") not in (None, await self._swarm_id()):
            raise Unavailable(
                "The kernel's service belongs to another swarm than the one that this gateway speaks to.",
                hint=f"{self.url} is not in the swarm {state['swarm']}, which launched it",
            )
        seconds = self.shutdown_seconds + REMOVAL_SECONDS
        await self.manager.remove(gateway_id, kernel_id, only=only if isinstance(only, str) else None, seconds=seconds)

    async def signal(self, state: State, signum: int) -> None:
        """Not in a swarm: its managers pass no signals on. The agent, where it is reached, does it."""
        self.log.info("No signal can be sent to the service %s of a swarm", state.get("service"))

    async def search(self, gateway_id: str) -> Sequence[ClusterObject]:
        if not (await self.daemon.ask(lambda api: api.info())).get("Swarm", {}).get("ControlAvailable"):
            return []
        found = [(one, "service") for one in await self.manager.services(gateway_id)]
        names = {one["Spec"]["Name"] for one, _ in found}
        secrets = await self.manager.secrets(gateway_id)
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
        return (await self.manager.log(service, stdout=False, lines=lines)).decode("utf-8", "replace")

    async def check(self) -> Sequence[Finding]:
        if self.unused:
            return self.not_used("swarm kernels")
        networks = [self.network, *self.extra_networks]
        found = await check_daemon(self.daemon, "swarm kernels", [], networks, swarm=True, wanted=self.wanted)
        return [*found, *await asyncio.to_thread(lambda: list(self.check_logins("swarm kernels")))]


def _epoch(found: Mapping[str, Any]) -> int:
    return tagged.epoch_of(str(found["Spec"]["Labels"].get(EPOCH, "")))
