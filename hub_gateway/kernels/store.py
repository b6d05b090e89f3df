"""The kernels' rows: read as records, written in whole transactions.

What the owner of a lease writes is in `hub_gateway.kernels.leases`; here is what anybody may do:
admit a kernel, ask for its end, read.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import ip_address
from typing import Any, TypeVar

from sqlalchemy import Select, bindparam, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.engine import Database
from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.db.settings import put, settings
from hub_gateway.db.together import Together
from hub_gateway.errors import BadRequest, Conflict, Forbidden, LaunchRefused, NotFound
from hub_gateway.identity.types import Identity
from hub_gateway.kernels import failpoints, notices
from hub_gateway.kernels.admissions import Admitted, Admitter, Claim
from hub_gateway.kernels.registration import proof_of, registration_of
from hub_gateway.kernels.rows import (
    ALL_LISTED,
    ALL_LIVE,
    BY_ID,
    BY_OWNER,
    KERNELS,
    LINK,
    MINE,
    PLAN,
    one,
    plan_of,
    record_of,
)
from hub_gateway.kernels.types import (
    JSON,
    ExecutionState,
    KernelRecord,
    KernelStatus,
    KernelTarget,
    LaunchPlan,
    NewKernel,
    Registration,
)
from hub_gateway.metrics import METRICS
from hub_gateway.quotas.admission import Admission

__all__ = ["Activity", "KernelStore", "LinkFacts", "number", "storable"]

T = TypeVar("T")

GATEWAY_ID = "gateway_id"
_HOSTNAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
SOME_LISTED = ALL_LISTED.where(KERNELS.c.id.in_(bindparam("kernels", expanding=True)))


@dataclass(frozen=True)
class LinkFacts:
    """What it takes to talk to a kernel's agent. Keys are Z85."""

    kernel_id: str
    epoch: int
    registration: Registration
    client_public: str
    client_secret: str
    proxy: str = ""
    proxy_state: Mapping[str, JSON] = field(default_factory=dict)


def storable(value: Any) -> Any:
    """A value that came from an agent or a cluster, as every database takes it; JSON and columns' values alike.

    PostgreSQL's text holds no NUL, UTF-8 no lone surrogate: both become U+FFFD.
    """
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {storable(key): storable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [storable(one) for one in value]
    return value


def number(value: object) -> int | None:
    """A number as an integer column takes it (32 bits); None for anything else."""
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31
    return value if fits else None  # type: ignore[return-value]


def addressable(host: str, port: int, key: str) -> bool:
    """Whether these can be the address (a host name or an IP address) and the Z85 key of an agent."""
    try:
        ip_address(host.partition("%")[0])
        name = True
    except ValueError:
        name = _HOSTNAME.fullmatch(host) is not None
    return name and len(host) <= 255 and 0 < port < 65536 and len(key) == 40 and key.isascii() and key.isprintable()


def _noted(tx: Transaction, found: Admitted | LaunchRefused) -> Admitted | LaunchRefused:
    """What there is to say of an admission is kept for the notebook."""
    if isinstance(found, Admitted) and found.notices:
        notices.add(tx, [found.record.id], found.notices)
    return found


def _or_refused(found: Admitted | LaunchRefused) -> Admitted:
    """What was committed. Raises the refusal, which is counted only now."""
    if isinstance(found, LaunchRefused):
        if found.resource:
            METRICS.refusals.labels(found.resource).inc()
        raise found
    return found


@dataclass(frozen=True)
class Activity:
    """What a relay saw of its kernel since it was last written."""

    kernel_id: str
    execution_state: ExecutionState
    last_activity: datetime
    connections: int


class KernelStore:
    """Reads and writes kernels for one gateway process, whose id is `instance`.

    `list` keeps what it read for `cache_seconds`, until this process writes anything: a client that polls
    its kernels costs one look into a dict, what it did through this replica it sees at once, and what
    happened through another replica after that time at the latest.
    """

    def __init__(
        self,
        db: Database,
        vault: Vault,
        *,
        instance: str,
        lease_seconds: float = 30.0,
        cache_seconds: float = 0.25,
        admission: Admission | None = None,
    ) -> None:
        self.db = db
        self.vault = vault
        self.instance = instance
        self.lease_seconds = lease_seconds
        self.admission = admission or Admission()
        self.admitter = Admitter(vault, self.admission, instance=instance, lease_seconds=lease_seconds)
        self._together = Together(self.write, max_waiting=db.max_waiting)
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
            lock(tx)  # two replicas may begin at once
            found = settings(tx).get(GATEWAY_ID)
            if found is None:
                found = uuid.uuid4().hex[:12]
                put(tx, GATEWAY_ID, found)
            return found

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
        reading = asyncio.ensure_future(self._select(BY_OWNER, {"owner": owner}))
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
        found = await self._select(BY_ID, {"kernel": kernel_id})
        return found[0] if found else None

    async def live(self) -> Sequence[KernelRecord]:
        """All that may hold anything on a cluster, whoever holds the lease."""
        return await self._select(ALL_LIVE)

    async def mine(self) -> Sequence[KernelRecord]:
        """Those of them that this process drives."""
        return await self._select(MINE, {"holder": self.instance})

    async def some(self, kernel_ids: Iterable[str]) -> dict[str, KernelRecord]:
        """Those of these kernels that are not stopped, in one transaction."""
        wanted = list(kernel_ids)

        def read(tx: Transaction) -> dict[str, KernelRecord]:
            found = {}
            for start in range(0, len(wanted), 500):
                for row in tx.execute(SOME_LISTED, {"kernels": wanted[start : start + 500]}).mappings():
                    found[row["id"]] = record_of(row)
            return found

        return await self.db.read(read)

    async def plan(self, kernel_id: str) -> tuple[LaunchPlan, str, str]:
        """The launch plan, the launch token and the public half of the link key. Raises `NotFound`."""
        row = await self.db.read(lambda tx: tx.execute(PLAN, {"kernel": kernel_id}).one_or_none())
        if row is None:
            raise NotFound(f"There is no kernel {kernel_id}.")
        return plan_of(self.vault.decrypt_json(row[0])), self.vault.decrypt(row[1]), row[2]

    async def link_facts(self, kernel_ids: Iterable[str]) -> dict[str, LinkFacts]:
        """What it takes to link to those kernels; those without a registered agent are left out."""
        wanted = list(kernel_ids)

        def read(tx: Transaction) -> dict[str, LinkFacts]:
            found = {}
            for start in range(0, len(wanted), 500):
                for row in tx.execute(LINK, {"kernels": wanted[start : start + 500]}):
                    key, epoch, host, port, public_key, pid, client_public, client_secret, proxy, state = row
                    registration = Registration(host or "", port or 0, public_key or "", pid or 0)
                    secret = self.vault.decrypt(client_secret)
                    found[key] = LinkFacts(key, epoch, registration, client_public, secret, proxy, state or {})
            return found

        return await self.db.read(read)

    async def _select(self, statement: Select[Any], values: dict[str, Any] | None = None) -> tuple[KernelRecord, ...]:
        return await self.db.read(
            lambda tx: tuple(record_of(row) for row in tx.execute(statement, values or {}).mappings())
        )

    # Writing

    async def admit(
        self,
        new: NewKernel,
        claim: Claim | None = None,
        also: Callable[[Transaction, KernelRecord], None] = lambda tx, made: None,
    ) -> Admitted:
        """Admit or queue a kernel: its row and its reservation, and what is `also` to be written, in one transaction.

        Raises `LaunchRefused` (then nothing but a line of the audit trail is written), `Conflict` for a taken id, and
        what `claim` raises.
        """
        launch = await asyncio.to_thread(self.admitter.secrets, new.plan)

        def write(tx: Transaction) -> Admitted | LaunchRefused:
            made = _noted(tx, self.admitter.admit(tx, new, launch, claim))
            if isinstance(made, Admitted):
                also(tx, made.record)
            return made

        try:
            with METRICS.admission_seconds.time():
                found = await self._together.run(write)
        except IntegrityError as error:
            raise Conflict(
                f"There is, or was, a kernel with the id {new.id}; leave the id out to get a new one."
            ) from error
        made = _or_refused(found)
        failpoints.hit("admit.after_commit")
        return made

    async def ask_to_stop(self, kernel_id: str, reason: str = "", *, actor: str = "") -> KernelRecord | None:
        """Set the target to stopped; a failed or queued kernel, which holds nothing, is stopped with it.

        With a `reason` it ends as failed, so that its notebook says why; one that has failed already says so itself,
        and stays as it is. An `actor` is somebody who stops what belongs to others: the audit trail has it with the
        stop, and what has failed goes off the lists, too. None for what does not exist; for an actor also for what
        has been stopped before.
        """
        return await self.write(self.stopping(kernel_id, reason, actor))

    def stopping(
        self, kernel_id: str, reason: str = "", actor: str = ""
    ) -> Callable[[Transaction], KernelRecord | None]:
        """What `ask_to_stop` writes, for whoever writes more in the same transaction."""
        holds_nothing = (KernelStatus.FAILED.value, KernelStatus.QUEUED.value)
        target = KernelTarget.ENDED if reason else KernelTarget.STOPPED
        status = KernelStatus.FAILED if reason else KernelStatus.STOPPED
        values: dict[str, Any] = {"message": reason} if reason else {}

        def clear(tx: Transaction, message: str) -> bool:
            """For an actor: whether there is anything left to stop, after what has failed is off the lists."""
            found = tx.execute(BY_ID, {"kernel": kernel_id}).mappings().one_or_none()
            if found is None or found["status"] == KernelStatus.STOPPED.value:
                return False
            if found["status"] == KernelStatus.FAILED.value:
                gone = {"status": KernelStatus.STOPPED.value, "target": KernelTarget.STOPPED.value}
                tx.execute(update(Kernel).where(Kernel.id == kernel_id).values(**gone))
            detail = {"kernel": kernel_id, "message": message}
            audit.append(tx, actor=actor, action="kernel.stop", subject=found["owner"], detail=detail)
            return True

        def stop(tx: Transaction) -> KernelRecord | None:
            lock(tx)  # one that waits may be admitted at this moment
            if actor and not clear(tx, reason):
                return None
            wanted = update(Kernel).where(Kernel.id == kernel_id)
            if reason:  # whoever stops what has ended already has nothing to tell
                wanted = wanted.where(Kernel.status != KernelStatus.FAILED.value, Kernel.target != "stopped")
            tx.execute(wanted.values(target=target.value, **values))
            ended = {"status": status.value, "stopped_at": utcnow(), "execution_state": ExecutionState.DEAD.value}
            tx.execute(wanted.where(Kernel.status.in_(holds_nothing)).values(**ended))
            row = tx.execute(BY_ID, {"kernel": kernel_id}).mappings().one_or_none()
            return None if row is None else record_of(row)

        return stop

    async def revive(self, kernel_id: str, identity: Identity | None = None, claim: Claim | None = None) -> Admitted:
        """Admit a failed kernel once more, under the same id, for its owner as they are now.

        Raises `Conflict`, `LaunchRefused`.
        """
        plan, _, _ = await self.plan(kernel_id)
        launch = await asyncio.to_thread(self.admitter.secrets, plan)
        found = await self.write(lambda tx: _noted(tx, self.admitter.revive(tx, kernel_id, launch, identity, claim)))
        return _or_refused(found)

    async def register(self, kernel_id: str, payload: dict[str, Any]) -> KernelRecord:
        """Take an agent's registration, once. Raises `BadRequest`, `Forbidden`, `Conflict`, `NotFound`.

        Anybody may call this, so the proof is looked at in a reader: what is refused never waits, and has nobody
        wait, for SQLite's one writer. The update is conditional, so that of two registrations that arrive at once
        (also through two replicas) one is refused.
        """
        facts = registration_of(kernel_id, payload)
        good = addressable(facts.host, facts.port, facts.key) and facts.proof.isascii()
        if not good or number(facts.pid) is None:
            raise BadRequest("`host` must be a host name or an IP address, `public_key` a Z85 key, `pid` a process id.")
        outdated = "This launch is already registered, or is no longer the current one."

        def check(tx: Transaction) -> None:
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

        def take(tx: Transaction) -> KernelRecord:
            taken = tx.execute(
                update(Kernel)
                .where(
                    Kernel.id == kernel_id,
                    Kernel.registered_at.is_(None),
                    Kernel.launch_epoch == facts.epoch,
                    Kernel.status == KernelStatus.STARTING.value,
                )
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
            return one(tx, kernel_id)

        await self.db.read(check)
        return await self.write(take)

    async def write_activity(self, seen: Sequence[Activity]) -> None:
        """Write what relays saw, in one statement; only for kernels that this process drives.

        The relays of other replicas see the same state and activity, which are the agent's, but each only its own
        websockets: of what two of them write in turns, half would be wrong.
        """
        if not seen:
            return
        statement = (
            KERNELS.update()
            .where(
                KERNELS.c.id == bindparam("kernel"),
                KERNELS.c.status == KernelStatus.RUNNING.value,
                KERNELS.c.lease_holder == self.instance,
            )
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

    async def write_open(self, kernel_ids: Sequence[str]) -> None:
        """Write that notebooks of these kernels are open here, to those that another replica drives.

        Its culler knows only its own websockets. What it reads is the time of the last activity, so this counts as
        one: a kernel is never taken for unused while it is open anywhere. The price is that such a kernel is shown as
        active; a count per replica would need a table, and somebody to clear up after replicas that were killed.
        """
        now = utcnow()

        def touch(tx: Transaction) -> None:
            for start in range(0, len(kernel_ids), 500):
                tx.execute(
                    update(Kernel)
                    .where(
                        Kernel.id.in_(kernel_ids[start : start + 500]),
                        Kernel.status == KernelStatus.RUNNING.value,
                        Kernel.lease_holder != self.instance,
                        Kernel.last_activity < now,
                    )
                    .values(last_activity=now)
                    .execution_options(synchronize_session=False)
                )

        if kernel_ids:
            await self.db.write(touch)

    async def age_out(self, failed_before: datetime, stopped_before: datetime) -> None:
        """Take long-failed kernels off the lists, and forget long-stopped ones."""

        def age(tx: Transaction) -> None:
            failed = (Kernel.status == KernelStatus.FAILED.value) & (Kernel.stopped_at < failed_before)
            gone = (Kernel.status == KernelStatus.STOPPED.value) & (Kernel.stopped_at < stopped_before)
            tx.execute(update(Kernel).where(failed).values(status=KernelStatus.STOPPED.value))
            tx.execute(delete(Kernel).where(gone))

        await self.write(age)
