"""What the web layer calls: kernels and sessions, as their owner may see and change them."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session as Transaction
from traitlets import Float, List, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.auth.base import Caller
from hub_gateway.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    GatewayError,
    LaunchFailed,
    LaunchRefused,
    NotFound,
    Unavailable,
)
from hub_gateway.identity.mapper import Identity, IdentityMapper
from hub_gateway.kernels.admissions import Admitted, Claim
from hub_gateway.kernels.controller import SAME_MOMENT, Controller
from hub_gateway.kernels.environment import client_environment, kernel_environment, notebook_of
from hub_gateway.kernels.notices import NoticeBoard
from hub_gateway.kernels.reconcile import tail_lines
from hub_gateway.kernels.resources import wished
from hub_gateway.kernels.sessions import SessionRow, Sessions
from hub_gateway.kernels.specs import KernelSpecs, Spec
from hub_gateway.kernels.types import (
    JSON,
    CreateKernel,
    ExecutionState,
    KernelRecord,
    KernelStatus,
    KernelTarget,
    LaunchPlan,
    NewKernel,
    isoformat,
)
from hub_gateway.logs import about
from hub_gateway.metrics import METRICS
from hub_gateway.proxies.base import IdentityNeed

if TYPE_CHECKING:
    from hub_gateway.link.relay import KernelRelay

__all__ = ["CreateKernel", "KernelService", "owner_of"]


def owner_of(caller: Caller) -> str:
    """The owner of what this caller starts. A user's name holds no "/", so no user is taken for a service."""
    return caller.name if caller.kind == "user" else f"services/{caller.name}"


class KernelService(LoggingConfigurable):
    """Kernels and sessions of all callers, each of whom meets only their own.

    What belongs to somebody else is `NotFound`, word for word like what does not exist.
    """

    client_envs = List(
        Unicode(),
        help="""Names of environment variables, besides KERNEL_*, that clients may set for their kernels.

        `["*"]` allows all; do that only where kernels run as their owners.
        """,
    ).tag(config=True)
    stop_wait_seconds = Float(
        10.0, help="How long (seconds) DELETE waits for a kernel to be gone; after that it ends unattended."
    ).tag(config=True)
    restart_wait_seconds = Float(
        60.0, help="How long (seconds) a restart may take until the kernel answers again."
    ).tag(config=True)

    def __init__(
        self, *, controller: Controller, specs: KernelSpecs, identity: IdentityMapper | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.controller = controller
        self.store = controller.store
        self.specs = specs
        self.identity = identity or IdentityMapper(parent=self, db=self.store.db)
        self.sessions = Sessions(self.store)
        self.notices = NoticeBoard(self.store.db, controller.links)

    # Kernels

    async def list(self, caller: Caller) -> Sequence[KernelRecord]:
        """The caller's kernels that are not stopped, oldest first."""
        return [self.overlaid(record) for record in await self.store.list(owner_of(caller))]

    async def get(self, caller: Caller, kernel_id: str) -> KernelRecord:
        """One kernel of the caller. Raises `NotFound`."""
        return self.overlaid(await self._own(caller, kernel_id))

    async def create(self, caller: Caller, wanted: CreateKernel, kernel_id: str | None = None) -> KernelRecord:
        """Admit a kernel and have it started; returns when it is admitted.

        Raises `BadRequest`, `PayloadTooLarge`, `NotFound` (kernelspec), `Forbidden`, `Conflict` (id taken).
        """
        return await self._create(caller, wanted, kernel_id)

    async def _create(
        self,
        caller: Caller,
        wanted: CreateKernel,
        kernel_id: str | None = None,
        *,
        first: Claim = lambda tx: None,
        also: Callable[[Transaction, KernelRecord], None] = lambda tx, made: None,
    ) -> KernelRecord:
        """`create`, in whose transaction `first` may object and `also` write."""
        try:
            admitted = await self._admit(caller, wanted, kernel_id, first, also)
        except GatewayError as error:
            METRICS.launches.labels("refused" if isinstance(error, LaunchRefused) else "failed").inc()
            raise
        METRICS.launches.labels(admitted.verdict.outcome).inc()
        return await self._begun(admitted)

    async def _admit(
        self,
        caller: Caller,
        wanted: CreateKernel,
        kernel_id: str | None,
        first: Claim,
        also: Callable[[Transaction, KernelRecord], None],
    ) -> Admitted:
        username = caller.name
        client = client_environment(wanted.env, allowed=self.client_envs, username=username)
        key = _kernel_id(kernel_id or client.pop("KERNEL_ID", None))
        offered = client.pop("KERNEL_KRB5_CCACHE", "")  # which is nothing for an environment, wherever it runs
        spec = await self.specs.get(wanted.name, username, caller.groups)
        proxy = self.controller.proxies.resolve(spec.proxy)
        found = self.controller.proxies.get(proxy)
        identity = await self._identity(caller, proxy)
        resources, queue = wished(spec.bounds, spec.name, client)
        new = NewKernel(
            id=key,
            owner=identity.owner,
            service=caller.kind == "service",
            groups=tuple(sorted(caller.groups)),
            hub_server=caller.server,
            kernelspec=spec.name,
            proxy=proxy,
            unix_user=identity.unix_user,
            principal=identity.principal,
            identity_rule=identity.rule,
            cost_center=identity.cost_center,
            path=wanted.path or notebook_of(wanted.env),
            plan=replace(
                _plan(spec, wanted, client, kernel_id=key, username=username),
                tickets=offered if self._takes_offered(found.tickets) else "",
            ),
            resources=resources,
            least=spec.bounds.least,
            queue=queue,
            cull_idle_timeout=spec.number("cull_idle_timeout"),
        )

        def claim(tx: Transaction) -> None:
            first(tx)
            self.identity.claim(tx, identity)

        admitted = await self.store.admit(new, claim, also)
        said = (key, spec.name, admitted.verdict.outcome, new.owner)
        self.log.info("Kernel %s (%s) %s for %s", *said, extra=about(new))
        return admitted

    async def _begun(self, admitted: Admitted) -> KernelRecord:
        """Have an admitted kernel started, and tell its user what there is to tell."""
        record = admitted.record
        if admitted.notices:
            await self.notices.give(record.id)
        if record.status is not KernelStatus.QUEUED:
            self.controller.changed(record.id, proxy=record.proxy)
        return record

    async def shutdown(self, caller: Caller, kernel_id: str) -> None:
        """Stop a kernel; returns when it is gone, or is at least certain to end. Raises `NotFound`."""
        await self._own(caller, kernel_id)
        await self.stop(kernel_id)

    async def stop(self, kernel_id: str, reason: str = "") -> None:
        """Stop a kernel, whoever owns it. A `reason` (one sentence) is shown in its notebook."""
        await self._ask_to_stop(kernel_id, reason)
        await self._until_gone(kernel_id)

    async def stop_for(self, actor: str, kernel_ids: Sequence[str], reason: str) -> frozenset[str]:
        """Stop kernels of others, for somebody who stands in the audit trail with each; those that were there to stop.

        Returns when they are gone, or at least certain to end.
        """
        asked = await asyncio.gather(*(self._ask_to_stop(kernel_id, reason, actor) for kernel_id in kernel_ids))
        there = frozenset(record.id for record in asked if record is not None)
        await asyncio.gather(*(self._until_gone(kernel_id) for kernel_id in there))
        return there

    async def _ask_to_stop(self, kernel_id: str, reason: str, actor: str = "") -> KernelRecord | None:
        """Once this returns, the kernel is certain to end."""
        relay = self.controller.links.existing(kernel_id)
        if reason and relay is not None:
            relay.notify(reason)
        record = await self.store.ask_to_stop(kernel_id, reason, actor=actor)
        self.controller.changed(kernel_id, stop=True)
        return record

    async def _until_gone(self, kernel_id: str) -> None:
        with contextlib.suppress(Unavailable):  # it ends, whether or not that can be seen now
            await self.controller.wait(kernel_id, lambda row: row is None or not row.live, self.stop_wait_seconds)

    async def restart(self, caller: Caller, kernel_id: str) -> KernelRecord:
        """Restart a kernel in place; a failed one is started anew. Returns when it is ready.

        Raises `NotFound`, `Conflict` (starting or being shut down), `Unavailable`, `LaunchFailed`.
        """
        record = await self._own(caller, kernel_id)
        if record.live and (record.status is KernelStatus.STOPPING or record.target is not KernelTarget.RUNNING):
            if record.target is KernelTarget.STOPPED:
                raise Conflict("The kernel is being shut down; start a new one.")
            record = await self._until_ended(kernel_id)  # it failed just now; what is left of it is being removed
        if record.status is KernelStatus.FAILED:
            identity = await self._still_the_same(caller, record)
            admitted = await self.store.revive(kernel_id, identity, lambda tx: self.identity.claim(tx, identity))
            self.controller.renewed(kernel_id)
            await self._begun(admitted)
            return admitted.record if admitted.verdict.outcome == "queued" else await self._until_running(kernel_id)
        if record.status is not KernelStatus.RUNNING:
            raise Conflict(f"The kernel is {record.status.value}; wait until it runs, then restart it.")
        await self.controller.links.call(kernel_id, lambda relay: relay.restart())
        return self.overlaid(await self._own(caller, kernel_id))

    async def interrupt(self, caller: Caller, kernel_id: str) -> None:
        """Interrupt what the kernel runs. Raises `NotFound`, `Conflict`, `Unavailable`."""
        record = await self._own(caller, kernel_id)
        if record.status is not KernelStatus.RUNNING:
            raise Conflict(f"The kernel is {_said(record)}; there is nothing to interrupt.")
        await self.controller.links.call(kernel_id, lambda relay: relay.interrupt())

    async def relay(self, caller: Caller, kernel_id: str) -> KernelRelay:
        """The relay for a websocket: also while the kernel starts (it waits) or has failed (it says so)."""
        relay = self._relay_of(await self._own(caller, kernel_id))
        if not relay.linked:
            await self.controller.links.restore(kernel_id)
        return relay

    def _relay_of(self, record: KernelRecord) -> KernelRelay:
        links = self.controller.links
        known = links.existing(record.id)
        relay = known or links.relay(record.id)
        if known is None and (record.status is KernelStatus.FAILED or (not record.live and record.message)):
            relay.fail(record.message, tail_lines(record.stderr_tail))
        elif not relay.linked and record.registration is not None and record.live:
            links.link_later(record.id)
        return relay

    async def register(self, kernel_id: str, payload: dict[str, Any]) -> None:
        """The launch endpoint: an agent says where it listens, and proves that it was launched by us.

        Raises `BadRequest`, `Forbidden`, `NotFound`, and `Conflict` for one that is replayed or outdated.
        """
        await self.store.register(kernel_id, payload)
        self.controller.changed(kernel_id)

    def kernel_model(self, record: KernelRecord) -> dict[str, JSON]:
        """A kernel as the Jupyter REST API shows it. Extras are under names that Jupyter does not use."""
        model: dict[str, JSON] = {
            "id": record.id,
            "name": record.kernelspec,
            "last_activity": isoformat(record.last_activity),
            "execution_state": record.execution_state.value,
            "connections": record.connections,
            "created_at": isoformat(record.created_at),
        }
        if record.message:
            model["reason"] = record.message
        until = record.proxy_state.get("credentials_until")
        if isinstance(until, int | float) and record.live:
            model["credentials_valid_until"] = isoformat(datetime.fromtimestamp(until, timezone.utc))
        return model

    # Kernelspecs

    async def kernelspecs(self, caller: Caller) -> dict[str, JSON]:
        """The kernelspecs that the caller may use, in Jupyter's form."""
        return await self.specs.catalogue(caller.name, caller.groups)

    async def kernelspec_resource(self, name: str, path: str, caller: Caller | None = None) -> Path:
        """A file of a kernelspec (its logo). Raises `NotFound`."""
        if caller is None:
            return await self.specs.resource(name, path, None)
        return await self.specs.resource(name, path, caller.name, caller.groups)

    # Sessions

    async def list_sessions(self, caller: Caller) -> Sequence[dict[str, JSON]]:
        """The caller's sessions whose kernels are not stopped."""
        kernels = {record.id: record for record in await self.list(caller)}
        rows = await self.sessions.list(owner_of(caller))
        return [row.model(self.kernel_model(kernels[row.kernel_id])) for row in rows if row.kernel_id in kernels]

    async def create_session(self, caller: Caller, body: Mapping[str, Any]) -> dict[str, JSON]:
        """Open a session: for an existing kernel (`kernel.id`), or a new one (`kernel.name`).

        A path that has a session of that type already gets that one, as in jupyter_server.
        """
        wanted, owner = self.sessions.parse(body), owner_of(caller)
        for found in await self.list_sessions(caller):
            if (found["path"], found["type"]) == (wanted.path, wanted.type) and wanted.path:
                return found
        kernel = _wanted_kernel(body, wanted.path)
        if isinstance(kernel, str):
            row = await self.sessions.insert(owner, wanted, kernel)
            return row.model(self.kernel_model(await self.get(caller, row.kernel_id)))
        made: list[SessionRow] = []

        def first(tx: Transaction) -> None:
            there = self.sessions.open(tx, owner, wanted)
            if there is not None:
                raise _AlreadyOpen(there)

        def also(tx: Transaction, record: KernelRecord) -> None:
            made[:] = [self.sessions.add(tx, owner, wanted, record.id)]

        try:
            record = await self._create(caller, kernel, first=first, also=also)
        except _AlreadyOpen as error:
            return error.row.model(self.kernel_model(await self.get(caller, error.row.kernel_id)))
        return made[0].model(self.kernel_model(record))

    async def get_session(self, caller: Caller, session_id: str) -> dict[str, JSON]:
        """One session. Raises `NotFound`."""
        row = await self.sessions.get(owner_of(caller), session_id)
        return row.model(self.kernel_model(await self.get(caller, row.kernel_id)))

    async def patch_session(self, caller: Caller, session_id: str, body: Mapping[str, Any]) -> dict[str, JSON]:
        """Change path, name, type or kernel of a session; a kernel that nothing uses any more is stopped."""
        owner = owner_of(caller)
        changed = self.sessions.parse(body, await self.sessions.get(owner, session_id))
        kernel = None if body.get("kernel") is None else _wanted_kernel(body, changed.path)
        if isinstance(kernel, CreateKernel):
            done: list[tuple[SessionRow, str | None]] = []

            def also(tx: Transaction, record: KernelRecord) -> None:
                done[:] = [self.sessions.change(tx, owner, session_id, changed, record.id)]

            await self._create(caller, kernel, also=also)
            row, unused = done[0]
        else:
            row, unused = await self.sessions.update(owner, session_id, changed, kernel)
        await self._end(unused)
        return row.model(self.kernel_model(await self.get(caller, row.kernel_id)))

    async def delete_session(self, caller: Caller, session_id: str) -> None:
        """Close a session and stop its kernel, unless another session uses that. Raises `NotFound`."""
        await self._end(await self.sessions.delete(owner_of(caller), session_id))

    # Inside

    async def _end(self, kernel_id: str | None) -> None:
        """Have a kernel ended whose target says so, and wait for that."""
        if kernel_id is None:
            return
        self.controller.changed(kernel_id, stop=True)
        await self._until_gone(kernel_id)

    async def _own(self, caller: Caller, kernel_id: str) -> KernelRecord:
        # Almost always the kernel is on the caller's list, which is at hand.
        owner = owner_of(caller)
        for record in await self.store.list(owner):
            if record.id == kernel_id:
                return record
        found = await self.store.get(kernel_id)
        if found is None or found.owner != owner or found.status is KernelStatus.STOPPED:
            raise NotFound(f"Kernel {kernel_id[:64]} does not exist, or has ended.")
        return found

    async def _until_ended(self, kernel_id: str) -> KernelRecord:
        seconds = self.restart_wait_seconds
        found = await self.controller.wait(kernel_id, lambda row: row is None or not row.live, seconds)
        if found is None or found.status is KernelStatus.STOPPED:
            raise NotFound(f"Kernel {kernel_id} does not exist, or has ended.")
        if found.live:
            raise Unavailable("The kernel has failed, and what is left of it is still being ended; try again later.")
        return found

    async def _until_running(self, kernel_id: str) -> KernelRecord:
        found = await self.controller.wait(
            kernel_id, lambda row: row is None or row.status is not KernelStatus.STARTING, self.restart_wait_seconds
        )
        if found is None or found.status is KernelStatus.STOPPED:
            raise NotFound(f"Kernel {kernel_id} does not exist, or has ended.")
        if found.status is KernelStatus.STARTING:
            raise Unavailable("The kernel is still starting; it will be usable when it is up.")
        if found.status is not KernelStatus.RUNNING:
            raise LaunchFailed(found.message or "The kernel ended while it was starting.")
        return self.overlaid(found)

    def overlaid(self, record: KernelRecord) -> KernelRecord:
        """The record with what this process's relay knows better than the row."""
        unwanted = record.live and record.target is not KernelTarget.RUNNING
        if unwanted or record.status is not KernelStatus.RUNNING:
            # Listed until it is proven gone, but nobody can do anything with it any more.
            dead = unwanted or record.status in (KernelStatus.FAILED, KernelStatus.STOPPING)
            state = ExecutionState.DEAD if dead else record.execution_state
            return record if state is record.execution_state else replace(record, execution_state=state)
        relay = self.controller.links.existing(record.id)
        if relay is None or not relay.linked:
            return record
        # The row has the websockets of the replica that drives the kernel.
        elsewhere = 0 if record.lease_holder == self.store.instance else record.connections
        connections = relay.connections + elsewhere
        known = (record.execution_state, record.connections) == (relay.execution_state, connections)
        if known and relay.last_activity - record.last_activity < SAME_MOMENT:
            return record
        return replace(
            record,
            execution_state=relay.execution_state,
            last_activity=max(record.last_activity, relay.last_activity),
            connections=connections,
        )

    async def _still_the_same(self, caller: Caller, record: KernelRecord) -> Identity:
        """The owner of a kernel that failed as they are now.

        Raises `Forbidden` where it would be started again as somebody whom its owner is no more, or from a kernelspec
        that is for others by now; one that is gone does no harm.
        """
        if await self.specs.find(record.kernelspec) is not None:
            try:
                await self.specs.get(record.kernelspec, caller.name, caller.groups)
            except NotFound as error:
                name = record.kernelspec
                raise Forbidden(f"The kernelspec {name} is not offered to you any more; start a new kernel.") from error
        identity = await self._identity(caller, record.proxy)
        if identity.unix_user != record.unix_user:
            raise Forbidden("Your kernels do not run as the unix user of this one any more; start a new kernel.")
        return identity

    def _takes_offered(self, need: IdentityNeed) -> bool:
        credentials = self.controller.proxies.credentials
        return credentials is not None and credentials.takes_offered(need)

    async def _identity(self, caller: Caller, proxy: str) -> Identity:
        """As whom the caller's kernels run there. Raises `Forbidden`, `Unavailable`."""
        found = self.controller.proxies.get(proxy)
        return await self.identity.map(caller, need=found.identity, tickets=found.tickets)


class _AlreadyOpen(Exception):
    """Another request opened the session meanwhile."""

    def __init__(self, row: SessionRow) -> None:
        super().__init__(row.id)
        self.row = row


def _wanted_kernel(body: Mapping[str, Any], path: str) -> str | CreateKernel:
    """What a session's body says of its kernel: the id of one that is there, or a new one. Raises `BadRequest`."""
    kernel = {} if body.get("kernel") is None else body["kernel"]
    if not isinstance(kernel, Mapping):
        raise BadRequest("`kernel` must be an object with `id` or `name`.")
    if kernel.get("id"):
        return str(kernel["id"])
    name, env = kernel.get("name"), body.get("env") or kernel.get("env") or {}
    if name is not None and not isinstance(name, str):
        raise BadRequest("`kernel.name` must be a string.")
    return CreateKernel(name=name, env=env, path=path or None)


def _kernel_id(given: object) -> str:
    if given is None or given == "":
        return str(uuid.uuid4())
    try:
        return str(uuid.UUID(str(given)))
    except ValueError as error:
        raise BadRequest("A kernel id must be a UUID; leave it out to get a new one.") from error


def _said(record: KernelRecord) -> str:
    return "dead" if record.status is KernelStatus.FAILED else record.status.value


def _plan(spec: Spec, wanted: CreateKernel, client: Mapping[str, str], *, kernel_id: str, username: str) -> LaunchPlan:
    known = {"resource_dir": spec.resource_dir, "kernel_id": kernel_id, "kernel_name": spec.name}

    def filled(argument: str) -> str:
        for name, value in known.items():
            argument = argument.replace("{" + name + "}", value)
        return argument

    return LaunchPlan(
        argv=tuple(filled(argument) for argument in spec.argv),
        env=kernel_environment(spec.env, client, kernel_id=kernel_id, username=username),
        cwd=client.get("KERNEL_WORKING_DIR") or None,
        interrupt_mode=spec.interrupt_mode,
        config=spec.proxy_config,
        transport=spec.transport,
        encryption=spec.encryption,
        start_seconds=spec.launch_seconds,
    )
