"""Everybody's kernels as a table that is filtered, sorted and paged by the database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.among import among
from hub_gateway.db.models import Kernel
from hub_gateway.errors import BadRequest
from hub_gateway.kernels.types import JSON, KernelStatus, isoformat
from hub_gateway.web.authority import Reach

if TYPE_CHECKING:
    from hub_gateway.services import Services

__all__ = ["SORTS", "KernelFilter", "KernelPage", "KernelRow", "kernel_page", "owners_of"]

MAX_LIMIT = 500
ENDED = KernelStatus.STOPPED.value
_COLUMNS = (
    Kernel.id,
    Kernel.owner,
    Kernel.kernelspec,
    Kernel.proxy,
    Kernel.status,
    Kernel.execution_state,
    Kernel.connections,
    Kernel.created_at,
    Kernel.last_activity,
    Kernel.cpu,
    Kernel.memory,
    Kernel.gpu,
    Kernel.gpu_model,
    Kernel.queue,
    Kernel.queue_reason,
    Kernel.principal,
    Kernel.unix_user,
    Kernel.path,
    Kernel.message,
    Kernel.restarts,
)
SORTS: dict[str, Any] = {
    "created": Kernel.created_at,
    "activity": Kernel.last_activity,
    "owner": Kernel.owner,
    "kernelspec": Kernel.kernelspec,
    "proxy": Kernel.proxy,
    "status": Kernel.status,
    "cpu": Kernel.cpu,
    "memory": Kernel.memory,
    "gpu": Kernel.gpu,
}
"""What the table may be sorted by; with "-" before it, the largest first."""
MOMENTS = ("created", "activity")


@dataclass(frozen=True)
class KernelFilter:
    """Which kernels are wanted. `status` "live" is all that are not stopped."""

    reach: Reach
    owner: str | None = None
    owners: frozenset[str] | None = None
    """The members of a group that was asked for."""
    status: str = "live"
    kernelspec: str | None = None
    query: str | None = None
    sort: str = "-created"
    limit: int = 50


@dataclass(frozen=True)
class KernelRow:
    """One line of the table."""

    id: str
    owner: str
    kernelspec: str
    proxy: str
    status: str
    execution_state: str
    connections: int
    created_at: datetime
    last_activity: datetime
    cpu: float
    memory: int
    gpu: int
    gpu_model: str
    queue: str
    queue_reason: str
    principal: str | None
    unix_user: str | None
    path: str | None
    message: str
    restarts: int

    def as_json(self) -> dict[str, JSON]:
        """As the REST API shows it."""
        found: dict[str, Any] = {**vars(self)}
        found["created_at"], found["last_activity"] = isoformat(self.created_at), isoformat(self.last_activity)
        return found


@dataclass(frozen=True)
class KernelPage:
    """Some of the kernels that match, how many match in all, and the key of the last one where there are more."""

    rows: tuple[KernelRow, ...]
    total: int
    counts: dict[str, int]
    """How many match, by status (of all statuses but `stopped`), whatever status was asked for."""
    after: tuple[Any, str] | None = None


async def kernel_page(services: Services, wanted: KernelFilter, after: Sequence[Any] | None = None) -> KernelPage:
    """One page. `after` is the key of the page before. Raises `BadRequest`, `Unavailable`."""
    name = wanted.sort.removeprefix("-")
    if name not in SORTS:
        raise BadRequest(f"Kernels cannot be sorted by {name[:60]!r}; use one of {', '.join(SORTS)}.")
    page = await services.db.read(lambda tx: _read(tx, wanted, after))
    links = services.kernels.controller.links
    rows = []
    for row in page.rows:
        relay = links.existing(row.id) if row.status == KernelStatus.RUNNING.value else None
        if relay is not None and relay.linked:
            # This process knows better than the row, which is written every some seconds only.
            row = replace(
                row,
                execution_state=relay.execution_state.value,
                connections=relay.connections,
                last_activity=max(row.last_activity, relay.last_activity),
            )
        rows.append(row)
    return replace(page, rows=tuple(rows))


async def owners_of(services: Services, kernel_ids: Iterable[str]) -> dict[str, str]:
    """Who owns these kernels; stopped and unknown ones are left out."""
    wanted = list(kernel_ids)
    return await services.db.read(
        lambda tx: {
            row.id: row.owner
            for row in tx.execute(
                select(Kernel.id, Kernel.owner).where(among(tx, Kernel.id, wanted), Kernel.status != ENDED)
            )
        }
    )


def _read(tx: Transaction, wanted: KernelFilter, after: Sequence[Any] | None) -> KernelPage:
    conditions = _conditions(tx, wanted)
    grouped = select(Kernel.status, func.count()).where(Kernel.status != ENDED, *conditions).group_by(Kernel.status)
    counts: dict[str, int] = {row[0]: row[1] for row in tx.execute(grouped)}
    if wanted.status == "live":
        conditions.append(Kernel.status != ENDED)
        total = sum(counts.values())
    else:
        conditions.append(Kernel.status == wanted.status)
        total = counts.get(wanted.status, 0)
        if wanted.status == ENDED:
            total = tx.scalar(select(func.count()).select_from(Kernel).where(*conditions)) or 0
    name, down = wanted.sort.removeprefix("-"), wanted.sort.startswith("-")
    column = SORTS[name]
    if after is not None:
        value, last = after
        if name in MOMENTS:
            value = _moment(value)
        beyond = column < value if down else column > value
        conditions.append(or_(beyond, and_(column == value, Kernel.id < last if down else Kernel.id > last)))
    order = (column.desc(), Kernel.id.desc()) if down else (column.asc(), Kernel.id.asc())
    limit = min(wanted.limit, MAX_LIMIT)
    found = tx.execute(select(*_COLUMNS).where(*conditions).order_by(*order).limit(limit + 1)).all()
    rows = tuple(KernelRow(**row._mapping) for row in found[:limit])
    key = None
    if len(found) > limit:
        attribute = {"created": "created_at", "activity": "last_activity"}.get(name, name)
        value = getattr(rows[-1], attribute)
        key = (isoformat(value) if name in MOMENTS else value, rows[-1].id)
    return KernelPage(rows, total, counts, key)


def _conditions(tx: Transaction, wanted: KernelFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    owners = wanted.owners
    if not wanted.reach.everything:
        owners = wanted.reach.owners if owners is None else owners & wanted.reach.owners
    if owners is not None:
        found.append(among(tx, Kernel.owner, sorted(owners)))
    if wanted.owner is not None:
        found.append(Kernel.owner == wanted.owner)
    if wanted.kernelspec is not None:
        found.append(Kernel.kernelspec == wanted.kernelspec)
    if wanted.query is not None:
        searched = (Kernel.id, Kernel.owner, Kernel.kernelspec, Kernel.path, Kernel.principal)
        found.append(or_(*(column.icontains(wanted.query, autoescape=True) for column in searched)))
    return found


def _moment(value: Any) -> datetime:
    try:
        return datetime.strptime(str(value), "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise BadRequest("The argument `after` is not one that this gateway gave; begin at the first page.") from error
