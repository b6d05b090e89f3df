"""The loops of quotas: the queue moves, limits are enforced, figures are measured, old audit lines go."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session as Transaction
from traitlets import Float
from traitlets.config import LoggingConfigurable

from hub_gateway import audit
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.deadlines import end, within
from hub_gateway.errors import GatewayError
from hub_gateway.kernels import notices as board
from hub_gateway.kernels.service import KernelService
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.metrics import METRICS
from hub_gateway.quotas import use
from hub_gateway.quotas.enforce import Line, Notice, Stop, enforce, look
from hub_gateway.quotas.notices import Notifier
from hub_gateway.quotas.queue import Dispatched, dispatch, due, entries
from hub_gateway.quotas.resolve import active
from hub_gateway.quotas.types import Counts, SubjectKind

if TYPE_CHECKING:
    from hub_gateway.link.relay import KernelRelay

__all__ = ["QuotaRunner"]

PURGE_SECONDS = 3600.0
LINES = 10
"""In one transaction: whoever launches meanwhile waits for it."""
ABANDONED = "The kernel no longer waits: its notebook was closed."
_IS_QUEUED = Kernel.status == KernelStatus.QUEUED.value
_WAITING = select(Kernel.id, Kernel.connections, Kernel.last_activity).where(_IS_QUEUED)


@dataclass(frozen=True)
class _Look:
    """The queue at one moment: whether it moves, what waits, and whose notebook was closed for long enough."""

    due: bool = False
    waiting: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()


class QuotaRunner(LoggingConfigurable):
    """Runs beside a controller, in every gateway process; what they do at once is the same, and done once."""

    queue_seconds = Float(1.0, min=0.01, help="How often (seconds) the queue is looked at.").tag(config=True)
    fair_share_half_life = Float(
        86400.0,
        min=1.0,
        help="""After how long (seconds) use counts half in the order of the queue.

        Who used less lately goes first. A long one remembers last week's use, a short one only this morning's.
        """,
    ).tag(config=True)
    queue_abandon_seconds = Float(
        30.0, help="After how long (seconds) without a notebook (a websocket) a kernel no longer waits."
    ).tag(config=True)
    enforce_seconds = Float(
        10.0, help="How often (seconds) soft limits, graces and what was used up over time are looked at."
    ).tag(config=True)

    def __init__(self, *, service: KernelService, notifier: Notifier, audit_days: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.service = service
        self.store = service.store
        self.notifier = notifier
        self._audit_days = audit_days
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._started = time.monotonic()
        self._shown: dict[str, tuple[KernelRelay, str]] = {}
        self._open: dict[str, float] = {}
        """When it was last written that the notebook of a kernel that waits is open."""

    async def recount(self) -> None:
        """Sum up anew what is held. Called at the start; a difference is a defect, mended and told."""
        wrong = await self.store.write(use.recount)
        if wrong:
            METRICS.count_swallowed("use")
            self.log.warning("The sums of what is held were wrong in %d places; they are right again", wrong)

    def start(self) -> None:
        """Begin."""
        self._started = time.monotonic()
        self._tasks = [
            asyncio.ensure_future(self._every(self.queue_seconds, "queue", self.move, self._wake)),
            asyncio.ensure_future(self._every(self.enforce_seconds, "enforcer", self.enforce, asyncio.Event())),
            asyncio.ensure_future(
                self._every(self.queue_seconds, "notices", self.service.notices.deliver, asyncio.Event())
            ),
            asyncio.ensure_future(self._every(PURGE_SECONDS, "audit", self.purge, asyncio.Event())),
        ]

    async def close(self) -> None:
        """Stop; notices that are under way go out."""
        await end(self._tasks)
        await self.notifier.close()

    def wake(self) -> None:
        """Room may have come: look at the queue now."""
        self._wake.set()

    async def _every(self, seconds: float, name: str, call: Callable[[], Awaitable[Any]], wake: asyncio.Event) -> None:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(wake.wait(), seconds)
            wake.clear()
            try:
                await call()
            except GatewayError as error:
                METRICS.count_swallowed(name)
                self.log.warning("%s: %s", name, error.message)
            except Exception:
                # A defect; but without its loops nothing would be admitted from the queue, or stopped, ever again.
                METRICS.count_swallowed(name)
                self.log.exception("%s: it is tried again", name)

    # The queue

    async def move(self) -> Dispatched:
        """Start what there is room for now, and tell the others where they stand."""
        look = await self.store.db.read(self._look)
        METRICS.queued.set(len(look.waiting))
        found = Dispatched()
        if look.due:
            admitter, half_life = self.store.admitter, self.fair_share_half_life
            found = await self.store.write(lambda tx: dispatch(tx, admitter, utcnow(), half_life=half_life))
            for kernel_id in (*found.admitted, *found.expired):
                self.service.controller.changed(kernel_id)
        waiting = look.waiting - {*found.admitted, *found.expired}
        METRICS.queued.set(len(waiting))
        await self._tell(waiting)
        await self._abandon(waiting, look.left)
        return found

    def _look(self, tx: Transaction) -> _Look:
        # Policies that were changed are read here, and not by the next launch while all the others wait for it.
        self.store.admission.policies.index(tx)
        rows = tx.execute(_WAITING).all()
        if not rows:
            return _Look()
        now = utcnow()
        since = now - timedelta(seconds=self.queue_abandon_seconds)
        left = frozenset(key for key, connections, seen in rows if connections and seen < since)
        moves = due(tx, self.store.admitter, now, half_life=self.fair_share_half_life)
        return _Look(moves, frozenset(row[0] for row in rows), left)

    async def _tell(self, waiting: Collection[str]) -> None:
        """Show each notebook that is open here where it stands."""
        links = self.service.controller.links
        relays = {key: relay for key in waiting if (relay := links.existing(key)) is not None}
        self._shown = {key: shown for key, shown in self._shown.items() if key in relays}
        if not relays:
            return
        admitter, half_life = self.store.admitter, self.fair_share_half_life
        found = await self.store.db.read(
            lambda tx: entries(tx, admitter, utcnow(), half_life=half_life, only=relays.keys())
        )
        for entry in found:
            shown = (relays[entry.kernel_id], entry.sentence)
            if self._shown.get(entry.kernel_id) != shown:
                self._shown[entry.kernel_id] = shown
                shown[0].announce(entry.sentence)

    async def _abandon(self, waiting: Collection[str], left: Collection[str]) -> None:
        """Have nothing wait whose notebook is closed.

        Which notebooks are open stands in the kernels' rows, written by the replica that serves them: so it is known
        also after a restart, and to all. A kernel that never had a notebook open was asked for by a program, and waits.
        """
        links, now = self.service.controller.links, time.monotonic()
        self._open = {key: at for key, at in self._open.items() if key in waiting}
        seen = []
        for key in waiting:
            relay = links.existing(key)
            if relay is None or not relay.attached_once:
                continue
            known = self._open.get(key)
            if known is None or (relay.connections and now - known >= self.queue_abandon_seconds / 3):
                self._open[key] = now
                seen.append(key)
        if seen:
            statement = update(Kernel).where(Kernel.id.in_(bindparam("kernels", expanding=True)), _IS_QUEUED)
            values = statement.values(connections=1, last_activity=utcnow())
            some = values.execution_options(synchronize_session=False)
            await self.store.write(lambda tx: tx.execute(some, {"kernels": seen}) and None)
        if now - self._started < self.queue_abandon_seconds:
            return  # websockets that a restart has cut are still on their way back
        for key in left:
            relay = links.existing(key)
            if key in waiting and key not in seen and (relay is None or not relay.connections):
                self.log.info("Kernel %s no longer waits: its notebook is closed", key)
                await self.service.stop(key, ABANDONED)

    # Limits over time

    async def enforce(self) -> None:
        """Tell who is above a limit, stop what was told to stop, and measure."""
        admission = self.store.admission
        lines = await self.store.db.read(lambda tx: look(tx, admission, utcnow()))
        for first in range(0, len(lines), LINES):
            # A few at a time: whoever launches meanwhile waits for one such transaction at most.
            await self._enforce(frozenset(lines[first : first + LINES]))
        await self.store.db.read(self._measure)

    async def _enforce(self, lines: Collection[Line]) -> None:
        admission = self.store.admission

        def act(tx: Transaction) -> tuple[list[Notice], list[Stop]]:
            found, ended = enforce(tx, admission, utcnow(), lines)
            for notice in found:
                board.add(tx, notice.kernels, [notice.sentence])
            return found, ended

        notices, stops = await self.store.write(act)
        for notice in notices:
            self.notifier.tell(notice.owner, notice.policy, notice.event, notice.sentence)
        for stop in stops:
            self.log.info("Kernel %s of %s is stopped under policy %s", stop.kernel_id, stop.owner, stop.policy)
            self.notifier.tell(stop.owner, stop.policy, "stopped", stop.sentence)
        await asyncio.gather(*(self.service.stop(stop.kernel_id, stop.sentence) for stop in stops))

    def _measure(self, tx: Transaction) -> None:
        index = self.store.admission.policies.index(tx)
        now = utcnow()
        holding = [policy for policy in index.by_name.values() if active(policy, now)]
        METRICS.policies.set(len(holding))
        METRICS.maintenance.set(bool(self.store.admission.policies.maintenance(tx)))
        everyone = (SubjectKind.EVERYONE.value, use.EVERYONE)
        rows = use.held_by(tx, [everyone])[everyone]
        for name in ("kernels", "cpu", "memory", "gpu"):
            METRICS.held.labels(name).set(sum(getattr(row, name) for row in rows))
        METRICS.use_ratio.clear()
        for policy in holding:
            if policy.counts is not Counts.TOGETHER or not policy.hard or policy.subject_kind is SubjectKind.USER:
                continue
            scope = everyone if policy.subject_kind is SubjectKind.EVERYONE else ("group", policy.subject)
            held = use.held_by(tx, [scope])[scope]
            METRICS.use_ratio.labels(policy.name).set(
                self.store.admission.used(tx, policy, scope, held, now) / policy.hard
            )

    async def purge(self) -> None:
        """Delete lines of the audit trail that are older than they are to be kept, and notices to nobody."""
        await self.store.db.write(board.purge)
        if self._audit_days > 0:
            before = utcnow() - timedelta(days=self._audit_days)
            await self.store.db.write(lambda tx: audit.purge(tx, before) and None)
