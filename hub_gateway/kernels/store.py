"""The kernels' rows: read as records, written in whole transactions.

What the owner of a lease writes is in `hub_gateway.kernels.leases`; here is what anybody may do:
admit a kernel, ask for its end, read.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar, cast

import zmq
from sqlalchemy import RowMapping, Select, Table, bindparam, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.clock import db_now
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, Reservation, Setting, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.errors import BadRequest, Conflict, Forbidden, NotFound
from hub_gateway.kernels import failpoints
from hub_gateway.kernels.types import (
    ExecutionState,
    KernelRecord,
    KernelStatus,
    KernelTarget,
    LaunchPlan,
    NewKernel,
    Registration,
    Resources,
)

__all__ = ["LIVE", "Activity", "KernelStore", "LinkFacts", "proof_of"]

T = TypeVar("T")

LIVE = (KernelStatus.STARTING.value, KernelStatus.RUNNING.value, KernelStatus.STOPPING.value)
LISTED = (*LIVE, KernelStatus.FAILED.value)

_TABLE = cast(Table, Kernel.__table__)
_SECRET = {"launch", "launch_token", "link_secret", "link_public"}
_COLUMNS = [column for column in _TABLE.columns if column.name not in _SECRET]

# Made once: building a statement of this width takes longer than running it.
_SELECT: Select[Any] = select(*_COLUMNS).order_by(_TABLE.c.created_at, _TABLE.c.id)
_BY_ID = _SELECT.where(_TABLE.c.id == bindparam("kernel"))
_BY_OWNER = _SELECT.where(_TABLE.c.owner == bindparam("owner"), _TABLE.c.status.in_(LISTED))
_ALL_LIVE = _SELECT.where(_TABLE.c.status.in_(LIVE))
_ALL_LISTED = _SELECT.where(_TABLE.c.status.in_(LISTED))
_PLAN = select(Kernel.launch, Kernel.launch_token, Kernel.link_public).where(Kernel.id == bindparam("kernel"))
_LINK = select(
    Kernel.id,
    Kernel.epoch,
    Kernel.agent_host,
    Kernel.agent_port,
    Kernel.agent_public_key,
    Kernel.agent_pid,
    Kernel.link_public,
    Kernel.link_secret,
).where(Kernel.agent_port.is_not(None), Kernel.id.in_(bindparam("kernels", expanding=True)))


@dataclass(frozen=True)
class LinkFacts:
    """What it takes to talk to a kernel's agent. Keys are Z85."""

    kernel_id: str
    epoch: int
    registration: Registration
    client_public: str
    client_secret: str


@dataclass(frozen=True)
class Activity:
    """What a relay saw of its kernel since it was last written."""

    kernel_id: str
    execution_state: ExecutionState
    last_activity: datetime
    connections: int


def proof_of(token: str, kernel_id: str, epoch: int, host: str, port: int, public_key: str) -> str:
    """The proof of a registration: hex HMAC-SHA256 by the launch token over the facts, joined with `|`."""
    facts = "|".join((kernel_id, str(epoch), host, str(port), public_key))
    return hmac.new(token.encode(), facts.encode(), sha256).hexdigest()


class KernelStore:
    """Reads and writes kernels for one gateway process, whose id is `instance`.

    `list` keeps what it read for `cache_seconds`, until this process writes anything: a client that polls
    its kernels costs one look into a dict, what it did through this replica it sees at once, and what
    happened through another replica after that time at the latest.
    """

    def __init__(
        self, db: Database, vault: Vault, *, instance: str, lease_seconds: float = 30.0, cache_seconds: float = 0.25
    ) -> None:
        self.db = db
        self.vault = vault
        self.instance = instance
        self.lease_seconds = lease_seconds
        self._cache_seconds = cache_seconds
        self._version = 0
        self._lists: dict[str, tuple[int, float, asyncio.Future[tuple[KernelRecord, ...]]]] = {}

    async def write(self, fn: Callable[[Transaction], T]) -> T:
        """`Database.write`; whatever was cached is read anew."""
        try:
            return await self.db.write(fn)
        finally:
            self._version += 1
            self._lists.clear()

    async def gateway_id(self) -> str:
        """The id of this installation: what its objects on clusters are labelled with. Made on first use."""

        def read_or_make(tx: Transaction) -> str:
            found = tx.get(Setting, "gateway_id")
            if found is None:
                found = Setting(key="gateway_id", value=uuid.uuid4().hex[:12])
                tx.add(found)
            return found.value

        try:
            return await self.write(read_or_make)
        except IntegrityError:  # two replicas made it at once, and the other was first
            return await self.write(read_or_make)

    # Reading

    async def list(self, owner: str) -> Sequence[KernelRecord]:
        """The owner's kernels that are not stopped, oldest first; failed ones too."""
        now = time.monotonic()
        kept = self._lists.get(owner)
        if (
            kept is not None
            and kept[0] == self._version
            and (not kept[2].done() or now - kept[1] < self._cache_seconds)
        ):
            return await asyncio.shield(kept[2])
        reading = asyncio.ensure_future(self._select(_BY_OWNER, {"owner": owner}))
        if len(self._lists) > 10_000:
            self._lists.clear()
        self._lists[owner] = (self._version, now, reading)
        try:
            return await asyncio.shield(reading)
        except BaseException:
            self._lists.pop(owner, None)
            raise

    async def get(self, kernel_id: str) -> KernelRecord | None:
        """One kernel, whatever its status."""
        found = await self._select(_BY_ID, {"kernel": kernel_id})
        return found[0] if found else None

    async def live(self) -> Sequence[KernelRecord]:
        """All that may hold anything on a cluster, whoever holds the lease."""
        return await self._select(_ALL_LIVE)

    async def listed(self) -> Sequence[KernelRecord]:
        """All kernels of all owners that are not stopped."""
        return await self._select(_ALL_LISTED)

    async def plan(self, kernel_id: str) -> tuple[LaunchPlan, str, str]:
        """The launch plan, the launch token and the public half of the link key. Raises `NotFound`."""
        row = await self.db.read(lambda tx: tx.execute(_PLAN, {"kernel": kernel_id}).one_or_none())
        if row is None:
            raise NotFound(f"There is no kernel {kernel_id}.")
        return _plan(self.vault.decrypt_json(row[0])), self.vault.decrypt(row[1]), row[2]

    async def link_facts(self, kernel_ids: Iterable[str]) -> dict[str, LinkFacts]:
        """What it takes to link to those kernels; those without a registered agent are left out."""
        wanted = list(kernel_ids)

        def read(tx: Transaction) -> dict[str, LinkFacts]:
            found = {}
            for start in range(0, len(wanted), 500):
                for row in tx.execute(_LINK, {"kernels": wanted[start : start + 500]}):
                    key, epoch, host, port, public_key, pid, client_public, client_secret = row
                    registration = Registration(host or "", port or 0, public_key or "", pid or 0)
                    found[key] = LinkFacts(key, epoch, registration, client_public, self.vault.decrypt(client_secret))
            return found

        return await self.db.read(read)

    async def _select(self, statement: Select[Any], values: dict[str, Any] | None = None) -> tuple[KernelRecord, ...]:
        return await self.db.read(
            lambda tx: tuple(_record(row) for row in tx.execute(statement, values or {}).mappings())
        )

    # Writing

    async def admit(self, new: NewKernel) -> KernelRecord:
        """Admit a kernel: its row and its reservation, in one transaction. Raises `Conflict` for a taken id."""
        launch = self._launch_values(new.plan)
        now = utcnow()

        def insert(tx: Transaction) -> KernelRecord:
            tx.execute(
                _TABLE.insert().values(
                    id=new.id,
                    owner=new.owner,
                    groups=list(new.groups),
                    hub_server=new.hub_server,
                    kernelspec=new.kernelspec,
                    proxy=new.proxy,
                    unix_user=new.unix_user,
                    name=new.name,
                    path=new.path,
                    status=KernelStatus.STARTING.value,
                    target=KernelTarget.RUNNING.value,
                    execution_state=ExecutionState.STARTING.value,
                    connections=0,
                    created_at=now,
                    last_activity=now,
                    message="",
                    stderr_tail="",
                    restarts=0,
                    cull_idle_timeout=new.cull_idle_timeout,
                    cpu=new.resources.cpu,
                    memory=new.resources.memory,
                    gpu=new.resources.gpu,
                    lease_holder=self.instance,
                    lease_until=db_now() + self.lease_seconds,
                    epoch=1,
                    launch_epoch=1,
                    proxy_state={},
                    **launch,
                )
            )
            tx.add(
                Reservation(
                    kernel_id=new.id,
                    owner=new.owner,
                    kernels=1,
                    cpu=new.resources.cpu,
                    memory=new.resources.memory,
                    gpu=new.resources.gpu,
                    created_at=now,
                )
            )
            tx.flush()
            failpoints.hit("admit.before_commit")
            return _one(tx, new.id)

        try:
            record = await self.write(insert)
        except IntegrityError as error:
            raise Conflict(
                f"There is, or was, a kernel with the id {new.id}; leave the id out to get a new one."
            ) from error
        failpoints.hit("admit.after_commit")
        return record

    async def ask_to_stop(self, kernel_id: str) -> KernelRecord | None:
        """Set the target to stopped; a failed kernel, which holds nothing any more, is stopped with it."""

        def stop(tx: Transaction) -> KernelRecord | None:
            failed = (Kernel.id == kernel_id) & (Kernel.status == KernelStatus.FAILED.value)
            tx.execute(update(Kernel).where(Kernel.id == kernel_id).values(target=KernelTarget.STOPPED.value))
            tx.execute(update(Kernel).where(failed).values(status=KernelStatus.STOPPED.value))
            row = tx.execute(_BY_ID, {"kernel": kernel_id}).mappings().one_or_none()
            return None if row is None else _record(row)

        return await self.write(stop)

    async def revive(self, kernel_id: str) -> KernelRecord:
        """Admit a failed kernel once more, under the same id. Raises `Conflict` where it is not failed."""
        plan, _, _ = await self.plan(kernel_id)
        launch = self._launch_values(plan)

        def again(tx: Transaction) -> KernelRecord:
            changed = tx.execute(
                update(Kernel)
                .where(Kernel.id == kernel_id, Kernel.status == KernelStatus.FAILED.value)
                .values(
                    status=KernelStatus.STARTING.value,
                    target=KernelTarget.RUNNING.value,
                    execution_state=ExecutionState.STARTING.value,
                    message="",
                    exit_code=None,
                    stderr_tail="",
                    started_at=None,
                    stopped_at=None,
                    last_activity=utcnow(),
                    restarts=Kernel.restarts + 1,
                    lease_holder=self.instance,
                    lease_until=db_now() + self.lease_seconds,
                    epoch=Kernel.epoch + 1,
                    launch_epoch=Kernel.epoch + 1,
                    proxy_state={},
                    registered_at=None,
                    agent_host=None,
                    agent_port=None,
                    agent_public_key=None,
                    agent_pid=None,
                    **launch,
                )
                .returning(Kernel.id)
            ).one_or_none()
            if changed is None:
                raise Conflict(f"Kernel {kernel_id} cannot be started again now.")
            tx.execute(
                update(Reservation)
                .where(Reservation.kernel_id == kernel_id)
                .values(created_at=utcnow(), released_at=None)
            )
            return _one(tx, kernel_id)

        return await self.write(again)

    async def register(self, kernel_id: str, payload: dict[str, Any]) -> KernelRecord:
        """Take an agent's registration, once. Raises `BadRequest`, `Forbidden`, `Conflict`, `NotFound`.

        The update is conditional, so that of two registrations that arrive at once through two
        replicas one is refused.
        """
        facts = _registration_of(kernel_id, payload)
        outdated = "This launch is already registered, or is no longer the current one."

        def take(tx: Transaction) -> KernelRecord:
            row = tx.execute(
                select(Kernel.launch_token, Kernel.launch_epoch, Kernel.registered_at, Kernel.status).where(
                    Kernel.id == kernel_id
                )
            ).one_or_none()
            if row is None:
                raise NotFound("No kernel with this id is expected to register.")
            token, epoch, registered_at, status = row
            expected = proof_of(self.vault.decrypt(token), kernel_id, facts.epoch, facts.host, facts.port, facts.key)
            if not hmac.compare_digest(expected.encode(), facts.proof.encode()):
                raise Forbidden("The registration does not prove that it comes from the launched agent.")
            if registered_at is not None or status != KernelStatus.STARTING.value or facts.epoch != epoch:
                raise Conflict(outdated)
            taken = tx.execute(
                update(Kernel)
                .where(Kernel.id == kernel_id, Kernel.registered_at.is_(None), Kernel.launch_epoch == epoch)
                .values(
                    registered_at=utcnow(),
                    agent_host=facts.host,
                    agent_port=facts.port,
                    agent_public_key=facts.key,
                    agent_pid=facts.pid,
                )
                .returning(Kernel.id)
            ).one_or_none()
            if taken is None:
                raise Conflict(outdated)
            return _one(tx, kernel_id)

        return await self.write(take)

    async def write_activity(self, seen: Sequence[Activity]) -> None:
        """Write what relays saw, in one statement; only for kernels that this process holds."""
        if not seen:
            return
        statement = (
            _TABLE.update()
            .where(_TABLE.c.id == bindparam("kernel"), _TABLE.c.status == KernelStatus.RUNNING.value)
            .values(
                execution_state=bindparam("state"),
                last_activity=bindparam("activity"),
                connections=bindparam("sockets"),
            )
        )
        values = [
            {
                "kernel": one.kernel_id,
                "state": one.execution_state.value,
                "activity": one.last_activity,
                "sockets": one.connections,
            }
            for one in seen
        ]
        # Not through `self.write`: lists overlay all of this from memory, so nothing cached has become wrong.
        await self.db.write(lambda tx: tx.connection().execute(statement, values) and None)

    async def age_out(self, failed_before: datetime, stopped_before: datetime) -> None:
        """Take long-failed kernels off the lists, and forget long-stopped ones."""

        def age(tx: Transaction) -> None:
            failed = (Kernel.status == KernelStatus.FAILED.value) & (Kernel.stopped_at < failed_before)
            gone = (Kernel.status == KernelStatus.STOPPED.value) & (Kernel.stopped_at < stopped_before)
            tx.execute(update(Kernel).where(failed).values(status=KernelStatus.STOPPED.value))
            tx.execute(delete(Kernel).where(gone))

        await self.write(age)

    def _launch_values(self, plan: LaunchPlan) -> dict[str, Any]:
        public, secret = zmq.curve_keypair()
        return {
            "launch": self.vault.encrypt_json(asdict(plan)),
            "launch_token": self.vault.encrypt(secrets.token_urlsafe(32)),
            "link_public": public.decode(),
            "link_secret": self.vault.encrypt(secret.decode()),
        }


@dataclass(frozen=True)
class _Facts:
    epoch: int
    host: str
    port: int
    key: str
    pid: int
    proof: str


def _registration_of(kernel_id: str, payload: dict[str, Any]) -> _Facts:
    epoch, host, port = (payload.get(name) for name in ("epoch", "host", "port"))
    key, pid, proof = (payload.get(name) for name in ("public_key", "pid", "proof"))
    if not (
        payload.get("kernel_id") == kernel_id
        and isinstance(epoch, int)
        and isinstance(host, str)
        and 0 < len(host) <= 255
        and isinstance(port, int)
        and 0 < port < 65536
        and isinstance(key, str)
        and len(key) == 40
        and isinstance(pid, int)
        and isinstance(proof, str)
    ):
        raise BadRequest("The registration must hold kernel_id, epoch, host, port, public_key, pid and proof.")
    return _Facts(epoch, host, port, key, pid, proof)


def _one(tx: Transaction, kernel_id: str) -> KernelRecord:
    return _record(tx.execute(_BY_ID, {"kernel": kernel_id}).mappings().one())


def _plan(found: Any) -> LaunchPlan:
    return LaunchPlan(**{**found, "argv": tuple(found["argv"])})


def _record(row: RowMapping) -> KernelRecord:
    port = row["agent_port"]
    return KernelRecord(
        id=row["id"],
        owner=row["owner"],
        kernelspec=row["kernelspec"],
        proxy=row["proxy"],
        status=KernelStatus(row["status"]),
        target=KernelTarget(row["target"]),
        execution_state=ExecutionState(row["execution_state"]),
        created_at=row["created_at"],
        last_activity=row["last_activity"],
        epoch=row["epoch"],
        connections=row["connections"],
        groups=tuple(row["groups"]),
        hub_server=row["hub_server"],
        unix_user=row["unix_user"],
        resources=Resources(row["cpu"], row["memory"], row["gpu"]),
        proxy_state=cast("dict[str, Any]", row["proxy_state"]),
        registration=None
        if port is None
        else Registration(row["agent_host"], port, row["agent_public_key"], row["agent_pid"] or 0),
        message=row["message"],
        exit_code=row["exit_code"],
        stderr_tail=row["stderr_tail"],
        started_at=row["started_at"],
        stopped_at=row["stopped_at"],
        name=row["name"],
        path=row["path"],
        restarts=row["restarts"],
        cull_idle_timeout=row["cull_idle_timeout"],
        lease_holder=row["lease_holder"],
        launch_epoch=row["launch_epoch"],
    )
