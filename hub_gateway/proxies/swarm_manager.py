"""What a manager of a swarm is asked, and told, about the services of kernels and their tasks."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from hub_gateway.errors import LaunchFailed, Unavailable
from hub_gateway.proxies.base import Phase, PhaseReport
from hub_gateway.proxies.docker_client import DockerDaemon, errors, said
from hub_gateway.proxies.docker_spec import GATEWAY, KERNEL
from hub_gateway.proxies.swarm_spec import attempt_of, given_up, newest, phase_of, stranded

__all__ = ["SwarmManager"]

LOOK_SECONDS = (0.1, 0.5)
OVERTAKEN = 3
"""How often a change is tried again that somebody else's has overtaken."""
_INCOMPLETE = re.compile(rb"(?m)^(Error grabbing logs: .*)?warning: incomplete log stream\..*\n?")
"""What a manager writes between the lines where it does not reach a node: none of the kernel's words."""


class SwarmManager:
    """One manager, by its daemon. What it refuses is raised as `Unavailable`: that is no fault of a kernel's."""

    def __init__(self, daemon: DockerDaemon) -> None:
        self.daemon = daemon

    async def services(self, gateway_id: str, kernel_id: str | None = None) -> list[dict[str, Any]]:
        """The services of a gateway, or of one of its kernels."""
        labels = _wanted(gateway_id, kernel_id)
        with _answered():
            return list(await self.daemon.ask(lambda api: api.services(filters={"label": labels})))

    async def tasks(self, gateway_id: str, kernel_id: str | None = None) -> list[dict[str, Any]]:
        """All tasks that they ever had; also of services that are removed, until those have ended."""
        # By label, which tasks have of their service: by the service nothing is found any more once it is removed.
        labels = _wanted(gateway_id, kernel_id)
        with _answered():
            return list(await self.daemon.ask(lambda api: api.tasks(filters={"label": labels})))

    async def secrets(self, gateway_id: str, kernel_id: str | None = None) -> list[dict[str, Any]]:
        """Likewise the secrets."""
        labels = _wanted(gateway_id, kernel_id)
        with _answered():
            return list(await self.daemon.ask(lambda api: api.secrets(filters={"label": labels})))

    async def nodes(self, tasks: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The nodes of the swarm by their ids; not asked for where it wants all of these tasks to run."""
        if not any(map(given_up, tasks)):
            return {}
        with _answered():
            return {str(one["ID"]): one for one in await self.daemon.ask(lambda api: api.nodes())}

    async def look(self, service: str, attempt: int) -> tuple[Mapping[str, Any] | None, PhaseReport]:
        """The one task of a service, as soon as there is one of this attempt, and what it means."""
        try:
            with _answered():
                task = newest(await self.daemon.ask(lambda api: api.tasks(filters={"service": service})), attempt)
                if task is None:
                    return None, PhaseReport(Phase.PENDING)
                return task, phase_of(task, await self.nodes([task]))
        except Unavailable as error:
            if isinstance(error.__cause__, errors().NotFound):
                raise LaunchFailed(
                    "The kernel's service was removed while it was starting; start the kernel again."
                ) from error
            raise

    async def again(self, service: str, seen: int) -> int:
        """Have the service's task started anew, whose attempt `seen` is spoilt; which attempt there is then.

        The service stays the same. Nothing is changed where somebody else has done it by now.
        """

        def update(api: Any) -> int:
            found = api.inspect_service(service)
            template = found["Spec"]["TaskTemplate"]
            if attempt_of(template) != seen:
                return attempt_of(template)
            # With the logins of the launch: whatever this client has loaded is sent along.
            self.daemon.connect_with_logins().update_service(
                service,
                found["Version"]["Index"],
                task_template={**template, "ForceUpdate": seen + 1},
                fetch_current_spec=True,
            )
            return seen + 1

        with _answered():
            for _ in range(OVERTAKEN):
                with contextlib.suppress(_OutOfSequence):
                    return await self.daemon.change(lambda api: _in_sequence(update, api))
            return await self.daemon.change(update)

    async def log(self, service: str, *, stdout: bool, lines: int | str = "all") -> bytes:
        """What a service's task wrote to standard output, or to standard error."""

        def read(api: Any) -> bytes:
            return b"".join(api.service_logs(service, stdout=stdout, stderr=not stdout, tail=lines, is_tty=False))

        try:
            return _INCOMPLETE.sub(b"", await self.daemon.ask(read))
        except errors().APIError:
            return b""  # a node that has just taken the task may not have its log yet

    async def remove(self, gateway_id: str, kernel_id: str, *, only: str | None, seconds: float) -> None:
        """Remove a kernel's services, wait for their tasks to have ended, and remove their secrets.

        `only` is the id of the one service, or secret. Raises `Unavailable` where it takes longer than `seconds`. A
        task on a node that is lost is not waited for: the swarm ends it when the node is back.
        """
        loop = asyncio.get_running_loop()
        services = [one for one in await self.services(gateway_id, kernel_id) if only in (None, one["ID"])]
        names = {str(one["Spec"]["Name"]) for one in services}
        for service in services:
            await self._drop("remove_service", service["ID"])
        deadline, delay = loop.time() + seconds, LOOK_SECONDS[0]
        while True:
            tasks = [one for one in await self.tasks(gateway_id, kernel_id) if only in (None, one["ServiceID"])]
            nodes = await self.nodes(tasks)
            if all(given_up(one) and stranded(one, nodes) for one in tasks):
                break
            if loop.time() > deadline:
                raise Unavailable("The swarm has not ended the kernel's task yet; it is waited for.")
            await asyncio.sleep(delay)
            delay = min(1.5 * delay, LOOK_SECONDS[1])
        for secret in await self.secrets(gateway_id, kernel_id):
            if only in (None, secret["ID"]) or secret["Spec"]["Name"] in names:
                await self._drop("remove_secret", secret["ID"])

    async def _drop(self, remove: str, what: str) -> None:
        with _answered("The swarm did not remove the kernel; it is tried again."):
            await self.daemon.change(partial(_gone, remove, what))


class _OutOfSequence(Exception):
    """The swarm itself has written to the service between it was read and changed, as it does when a task fails."""


def _in_sequence(update: Callable[[Any], int], api: Any) -> int:
    try:
        return update(api)
    except errors().APIError as error:
        if "out of sequence" in said(error):
            raise _OutOfSequence from error
        raise


def _wanted(gateway_id: str, kernel_id: str | None = None) -> list[str]:
    """The labels of what belongs to a gateway, or to one of its kernels."""
    return [f"{GATEWAY}={gateway_id}", *([f"{KERNEL}={kernel_id}"] if kernel_id else [])]


@contextlib.contextmanager
def _answered(otherwise: str = "The swarm does not answer; try again in a minute.") -> Iterator[None]:
    """What a manager refuses is no fault of the kernel's. Raises `Unavailable`."""
    try:
        yield
    except errors().APIError as error:
        raise Unavailable(otherwise, hint=said(error)) from error


def _gone(remove: str, what: str, api: Any) -> None:
    """Remove it, unless it is gone."""
    with contextlib.suppress(errors().NotFound):
        getattr(api, remove)(what)
