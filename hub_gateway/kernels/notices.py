"""Sentences for a kernel's notebooks, kept as rows until one of them has shown them, whichever replica serves it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.db.tenancy import Notice as Row
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.metrics import METRICS

if TYPE_CHECKING:
    from hub_gateway.kernels.links import Links
    from hub_gateway.link.relay import KernelRelay
    from hub_gateway.link.sinks import Notice

__all__ = ["NoticeBoard", "add", "purge"]

MAX_KEPT = 5
"""For a kernel; of more, the oldest are forgotten."""
SOME = 500
ENDED = (KernelStatus.STOPPED.value, KernelStatus.FAILED.value)


def add(tx: Transaction, kernel_ids: Collection[str], sentences: Sequence[str]) -> None:
    """Have the notebooks of these kernels told; in the transaction of what they are told about."""
    now = utcnow()
    for kernel_id in kernel_ids:
        for sentence in sentences:
            tx.execute(insert(Row).values(kernel_id=kernel_id, sentence=sentence, made_at=now))
        kept = select(Row.id).where(Row.kernel_id == kernel_id).order_by(Row.id.desc()).limit(MAX_KEPT)
        some = tx.scalars(kept).all()
        if len(some) == MAX_KEPT:
            tx.execute(delete(Row).where(Row.kernel_id == kernel_id, Row.id < some[-1]))


def purge(tx: Transaction) -> None:
    """Forget what was to be told about kernels that have ended: their notebooks say so themselves."""
    ended = select(Kernel.id).where(Kernel.status.in_(ENDED)).scalar_subquery()
    tx.execute(delete(Row).where(Row.kernel_id.in_(ended)).execution_options(synchronize_session=False))


class NoticeBoard:
    """Gives notices to the websockets of one process, and takes those down that were shown.

    Each process gives a notice to its own websockets. Once one of them, of whatever process, has shown it, it is given
    to no others. A process that is killed between showing one and taking it down has it shown twice.
    """

    def __init__(self, db: Database, links: Links) -> None:
        self._db = db
        self._links = links
        self._given: dict[int, tuple[str, KernelRelay, Notice]] = {}
        self._shown: set[int] = set()

    async def give(self, kernel_id: str) -> None:
        """Give what there is to the notebooks of a kernel that is about to be opened here."""
        relay = self._links.relay(kernel_id)
        for number, _, sentence in await self._db.read(lambda tx: _kept(tx, [kernel_id])):
            self._give(number, kernel_id, relay, sentence)

    async def deliver(self) -> None:
        """Give what is new to the websockets of this process, and take down what was shown."""
        shown = frozenset(self._shown)
        if shown:
            gone = delete(Row).where(Row.id.in_(shown)).execution_options(synchronize_session=False)
            await self._db.write(lambda tx: tx.execute(gone) and None)
            self._shown -= shown
        relays = {kernel_id: relay for kernel_id, relay in self._links if relay.connections}
        asked = sorted({*relays, *(kernel_id for kernel_id, _, _ in self._given.values())})
        kept = await self._db.read(lambda tx: _kept(tx, asked))
        for number in self._given.keys() - {number for number, _, _ in kept}:
            # Shown here, or by another process.
            _, relay, notice = self._given.pop(number)
            relay.withdraw(notice)
        for number, kernel_id, sentence in kept:
            if kernel_id in relays:
                self._give(number, kernel_id, relays[kernel_id], sentence)

    def _give(self, number: int, kernel_id: str, relay: KernelRelay, sentence: str) -> None:
        given = self._given.get(number)
        if number not in self._shown and (given is None or given[1] is not relay):
            self._given[number] = kernel_id, relay, relay.notify(sentence, lambda: self._has_shown(number))

    def _has_shown(self, number: int) -> None:
        self._shown.add(number)
        METRICS.notices.labels("notebook", "sent").inc()


def _kept(tx: Transaction, kernel_ids: Sequence[str]) -> list[tuple[int, str, str]]:
    """Number, kernel and sentence of the notices of some kernels, oldest first."""
    found: list[tuple[int, str, str]] = []
    if not kernel_ids or tx.execute(select(Row.id).limit(1)).first() is None:
        return found
    for first in range(0, len(kernel_ids), SOME):
        some = Row.kernel_id.in_(kernel_ids[first : first + SOME])
        rows = tx.execute(select(Row.id, Row.kernel_id, Row.sentence).where(some))
        found += ((number, kernel_id, sentence) for number, kernel_id, sentence in rows)
    return sorted(found)
