"""The Docker process proxy: each kernel in a container of one daemon, as its owner's unix user.

A container is known again by its labels: gateway id, kernel id and epoch. The agent's files are put into a volume of
the container's own before it starts, and its configuration, secrets included, goes to its standard input; so the daemon
may be on another machine, and nothing secret is in an argument, a label or the container's environment.
"""

from __future__ import annotations

import asyncio
import io
import re
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from traitlets import Enum, Unicode, default

from hub_gateway.errors import LaunchFailed, Unavailable
from hub_gateway.proxies import tagged
from hub_gateway.proxies.base import ClusterObject, Finding, LaunchRequest, Phase, PhaseReport, State
from hub_gateway.proxies.container import ContainerProxy
from hub_gateway.proxies.docker_check import check_daemon
from hub_gateway.proxies.docker_client import errors, last_words, refusal, said
from hub_gateway.proxies.docker_events import DockerEvents
from hub_gateway.proxies.docker_spec import (
    AGENT_DIR,
    AGENT_PORT,
    EPOCH,
    GATEWAY,
    KERNEL,
    ContainerPlan,
    agent_document,
    container_config,
)

__all__ = ["DockerProxy"]

LOOK_SECONDS = (0.03, 0.25)
ENDED = ("exited", "dead", "removing")
OUT_OF_MEMORY = 137
_EXIT = re.compile(r"Exited \((\d+)\)")


class DockerProxy(ContainerProxy):
    """Kernels as containers of one Docker daemon."""

    identifies = ("container",)

    reach = Enum(
        ["container", "published"],
        "container",
        help="""How the gateway reaches agents.

        `container`: at the container's own address, for a gateway on the daemon's machine, or in a container of the
        same network. `published`: at a free port of the daemon's machine (`publish_address`), for a daemon elsewhere.
        Either way the connection is encrypted, and lets in nobody but the gateway.
        """,
    ).tag(config=True)
    publish_address = Unicode(
        "127.0.0.1",
        help="Address of the daemon's machine at which agents' ports are published, and reached by the gateway.",
    ).tag(config=True)

    @default("network")
    def _default_network(self) -> str:
        return "bridge"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.on_ended: Callable[[str], None] = lambda kernel_id: None
        """Told, on the event loop, the id of a kernel whose container has ended."""
        self._events = DockerEvents(self.daemon, lambda kernel_id: self.on_ended(kernel_id), self.log)
        self._id = ""

    async def close(self) -> None:
        self._events.close()
        await super().close()

    # Launch

    async def launch(self, request: LaunchRequest) -> AsyncIterator[State]:
        self.wanted = True
        plan = await asyncio.to_thread(self.plan, request)
        if self.reach == "published":
            plan = replace(plan, publish=self.publish_address)
        # The intent is recorded before anything is done: whatever follows can be found by it.
        state: State = {"daemon": await self._daemon_id()}
        yield dict(state)
        self._events.start(request.gateway_id)
        if request.previous is not None:
            adopted = await self._adopt(request, plan)
            if adopted is not None:
                yield {**state, **adopted}
                return
        async with aclosing(self._fetch(plan.image)) as sentences:
            async for sentence in sentences:
                yield {**state, "progress": sentence}
        container = await self._create(plan)
        state["container"] = container
        yield dict(state)
        try:
            await self.daemon.start(container, agent_document(request, plan))
        except errors().APIError as error:
            raise refusal(error, image=plan.image, python=plan.python) from error
        yield dict(state)
        state["registration"] = await self._registration(request.kernel_id, container, plan)
        yield state

    async def _daemon_id(self, *, anew: bool = False) -> str:
        """The daemon's own id: what another one does not have proves nothing about a container of this one."""
        if anew or not self._id:
            self._id = str((await self.daemon.ask(lambda api: api.info()))["ID"])
        return self._id

    async def _fetch(self, image: str) -> AsyncGenerator[str, None]:
        """Have the image there; sentences of how far it is, if it has to be fetched."""
        try:
            await self.daemon.ask(lambda api: api.inspect_image(image))
            return
        except errors().NotFound as error:
            if not self.pull:
                raise refusal(error, image=image, python=self.python) from error
        except errors().APIError as error:
            raise refusal(error, image=image, python=self.python) from error
        yield f"Fetching the image {image}, which is not on the Docker host yet."
        async with aclosing(self.daemon.pull(image, self.pull_seconds)) as sentences:
            async for sentence in sentences:
                yield sentence

    async def _create(self, plan: ContainerPlan) -> str:
        files = await asyncio.to_thread(lambda: packed(self.shipped()))

        def create(api: Any) -> str:
            made = api.create_container_from_config(container_config(plan), plan.name)
            container = str(made["Id"])
            for network in plan.networks[1:]:
                api.connect_container_to_network(container, network)
            api.put_archive(container, AGENT_DIR, files)
            return container

        try:
            return await self.daemon.change(create)
        except errors().APIError as error:
            raise refusal(error, image=plan.image, python=plan.python) from error

    async def _registration(self, kernel_id: str, container: str, plan: ContainerPlan) -> dict[str, Any]:
        """What the agent's first line says, and where it is reached. Raises `LaunchFailed`."""
        deadline = asyncio.get_running_loop().time() + self.register_seconds
        delay, longest = LOOK_SECONDS
        while True:
            found = await self._look(kernel_id, container, plan)
            if found is not None:
                return found
            if asyncio.get_running_loop().time() > deadline:
                raise LaunchFailed(
                    f"The kernel's agent did not listen within {self.register_seconds:.0f} seconds of the start of its "
                    "container; try again, or ask the administrator."
                )
            await asyncio.sleep(delay)
            delay = min(1.5 * delay, longest)

    async def _look(self, kernel_id: str, container: str, plan: ContainerPlan) -> dict[str, Any] | None:
        """The registration, if it is there by now. Raises `LaunchFailed` where the container has ended."""

        def look(api: Any) -> tuple[bytes, dict[str, Any] | None]:
            said_first = bytes(api.logs(container, stdout=True, stderr=False))
            # Asked afterwards, so that an ended container has said all.
            return said_first, api.inspect_container(container) if b"\n" in said_first or not said_first else None

        try:
            output, facts = await self.daemon.ask(look)
        except errors().NotFound as error:
            raise LaunchFailed(
                "The kernel's container was removed while it was starting; start the kernel again."
            ) from error
        registration = tagged.registration(output.split(b"\n", 1)[0], kernel_id)
        if registration is not None and facts is not None:
            return {**registration, **self._address(facts, plan)}
        if facts is not None and facts["State"]["Status"] in ENDED:
            lines = await self.logs({"container": container}, 5)
            raise LaunchFailed(last_words(_ended(facts).reason, lines, image=plan.image, python=plan.python))
        return None

    def _address(self, facts: Mapping[str, Any], plan: ContainerPlan) -> dict[str, Any]:
        network = facts["NetworkSettings"]
        if plan.publish is not None:
            bound = (network["Ports"].get(f"{AGENT_PORT}/tcp") or [{}])[0]
            if bound.get("HostPort"):
                return {"host": plan.publish, "port": int(bound["HostPort"])}
        address = network["Networks"].get(plan.networks[0], {}).get("IPAddress")
        if not address:
            raise LaunchFailed(
                f"The kernel's container has no address in the network {plan.networks[0]}; ask the administrator."
            )
        return {"host": str(address), "port": AGENT_PORT}

    async def _adopt(self, request: LaunchRequest, plan: ContainerPlan) -> State | None:
        """What an interrupted launch of the same kernel left, if its agent lives; the rest of it is removed."""
        for found in await self._list(request.gateway_id, request.kernel_id):
            if found["State"] == "running":
                try:
                    registration = await self._registration(request.kernel_id, found["Id"], plan)
                except LaunchFailed as error:
                    self.log.info("Kernel %s: what is left of its launch is of no use: %s", request.kernel_id, error)
                else:
                    return {"container": found["Id"], "epoch": _epoch(found), "registration": registration}
            await self._remove(found["Id"])
        return None

    # Afterwards

    async def _list(self, gateway_id: str, kernel_id: str | None = None) -> list[dict[str, Any]]:
        """The containers of a gateway, or of one of its kernels: one call."""
        wanted = [f"{GATEWAY}={gateway_id}", *([f"{KERNEL}={kernel_id}"] if kernel_id else [])]
        return list(await self.daemon.ask(lambda api: api.containers(all=True, filters={"label": wanted})))

    async def poll(self, states: Mapping[str, State]) -> dict[str, PhaseReport]:
        self.wanted = self.wanted or bool(states)
        gateways = {str(state["gateway_id"]) for state in states.values() if state.get("gateway_id")}
        try:
            listed = [one for gateway_id in gateways for one in await self._list(gateway_id)]
            containers = {one["Id"]: one for one in listed}
            missing = any(state.get("container") not in (None, *containers) for state in states.values())
            here = await self._daemon_id(anew=missing)
        except (Unavailable, errors().APIError) as error:
            reason = "Docker does not answer" if isinstance(error, Unavailable) else said(error)
            return dict.fromkeys(states, PhaseReport(Phase.UNKNOWN, reason))
        for gateway_id in gateways:
            self._events.start(gateway_id)
        return {key: await self._phase(state, containers, here) for key, state in states.items()}

    async def _phase(self, state: State, containers: Mapping[str, dict[str, Any]], here: str) -> PhaseReport:
        if state.get("daemon") not in (None, here):
            return PhaseReport(Phase.UNKNOWN, "its container belongs to another Docker daemon")
        container = state.get("container")
        if not isinstance(container, str):
            return PhaseReport(Phase.PENDING)
        found = containers.get(container)
        if found is None:
            return PhaseReport(Phase.GONE, "its container is not there any more; somebody removed it")
        if found["State"] == "created":
            return PhaseReport(Phase.PENDING)
        if found["State"] not in ENDED:
            return PhaseReport(Phase.RUNNING)
        try:
            # Ended ones are few, and removed soon.
            return _ended(await self.daemon.ask(lambda api: api.inspect_container(container)))
        except (Unavailable, errors().APIError):
            code = _EXIT.match(str(found.get("Status")))
            return PhaseReport(Phase.GONE, "its container has ended", int(code[1]) if code else None)

    async def terminate(self, state: State) -> None:
        kernel_id, gateway_id, only = state.get("kernel_id"), state.get("gateway_id"), state.get("only_container")
        assert isinstance(kernel_id, str) and isinstance(gateway_id, str)
        await self._require_here(state)
        found = [one["Id"] for one in await self._list(gateway_id, kernel_id) if only in (None, one["Id"])]
        await asyncio.gather(*(self._remove(container) for container in found))

    async def _require_here(self, state: State) -> None:
        """Containers of another daemon cannot be seen from here, which does not prove that they are gone."""
        if state.get("daemon") not in (None, await self._daemon_id()):
            raise Unavailable(
                "The kernel's container belongs to another Docker daemon than the one that this gateway speaks to.",
                hint=f"{self.url} is not the daemon {state['daemon']}, which launched it",
            )

    async def _remove(self, container: str) -> None:
        """Ask the agent to end, then remove the container, and its volume."""
        seconds = int(self.shutdown_seconds)

        def remove(api: Any) -> None:
            try:
                api.stop(container, timeout=seconds)
                api.remove_container(container, force=True, v=True)
            except errors().NotFound:
                return
            except errors().APIError as error:
                if error.status_code != HTTPStatus.CONFLICT:
                    raise
                _await_gone(api, container)  # somebody else is removing it

        try:
            await self.daemon.change(remove)
        except errors().APIError as error:
            raise Unavailable(
                "Docker did not remove the kernel's container; it is tried again.", hint=said(error)
            ) from error

    async def signal(self, state: State, signum: int) -> None:
        await self._require_here(state)
        container = state.get("container")
        if not isinstance(container, str):
            return

        def send(api: Any) -> None:
            made = api.exec_create(container, [self.python, "-I", f"{AGENT_DIR}/container.py", "--signal", str(signum)])
            api.exec_start(made["Id"])

        try:
            await self.daemon.change(send)
        except errors().APIError as error:
            self.log.info("A signal did not reach the container %s: %s", container, said(error))

    async def search(self, gateway_id: str) -> Sequence[ClusterObject]:
        return [
            ClusterObject(
                kernel_id=found["Labels"].get(KERNEL, ""),
                gateway_id=gateway_id,
                epoch=_epoch(found),
                state={
                    "kernel_id": found["Labels"].get(KERNEL, ""),
                    "gateway_id": gateway_id,
                    "container": found["Id"],
                    "only_container": found["Id"],
                },
                description=f"container {found['Id'][:12]} ({found['Status']})",
            )
            for found in await self._list(gateway_id)
        ]

    async def logs(self, state: State, lines: int = 50) -> str:
        container = state.get("container")
        if not isinstance(container, str):
            return ""
        try:
            # Its standard output holds the registration, and nothing else.
            text = await self.daemon.ask(lambda api: api.logs(container, stdout=False, stderr=True, tail=lines))
        except errors().APIError:
            return ""
        return bytes(text).decode("utf-8", "replace")

    async def check(self) -> Sequence[Finding]:
        if self.unused:
            return self.not_used("docker kernels")
        networks = [self.network, *self.extra_networks]
        found = await check_daemon(self.daemon, "docker kernels", [self.image], networks, wanted=self.wanted)
        return [*found, *await asyncio.to_thread(lambda: list(self.check_logins("docker kernels")))]


def packed(files: Mapping[str, bytes]) -> bytes:
    """A tar of files that everybody may read and root alone may change."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def _epoch(found: Mapping[str, Any]) -> int:
    return tagged.epoch_of(str(found["Labels"].get(EPOCH, "")))


def _ended(facts: Mapping[str, Any]) -> PhaseReport:
    """How a container ended (`ContainerInspect`)."""
    state, code = facts["State"], int(facts["State"]["ExitCode"])
    if state.get("OOMKilled"):
        limit = int(facts["HostConfig"].get("Memory") or 0)
        allowed = f" of {limit / 2**20:.0f} MiB" if limit else ""
        reason = f"its container ran out of memory{allowed} (exit code {code}); ask for more memory"
    elif state.get("Error"):
        reason = f"its container ended: {state['Error']}"
    else:
        killed = " (SIGKILL; somebody killed it, or the machine ran out of memory)" if code == OUT_OF_MEMORY else ""
        reason = f"its container ended with exit code {code}{killed}"
    return PhaseReport(Phase.GONE, reason, code)


def _await_gone(api: Any, container: str) -> None:
    """Wait until a container that is being removed is gone."""
    try:
        api.wait(container, condition="removed")
    except errors().APIError as error:
        if not isinstance(error, errors().NotFound):
            raise
