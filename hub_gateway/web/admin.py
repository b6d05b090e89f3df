"""/api/admin/..., /api/maintenance: everybody's kernels, people, clusters, and the door that can be shut."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from hub_gateway.auth.people import PeoplePage, Person
from hub_gateway.auth.scopes import KERNELS_READ, KERNELS_STOP, MAINTENANCE_WRITE, QUOTAS_READ, require
from hub_gateway.db.among import among
from hub_gateway.db.models import Kernel
from hub_gateway.deadlines import within
from hub_gateway.errors import GatewayError, NotFound
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.proxies.base import Finding
from hub_gateway.quotas.types import SubjectKind
from hub_gateway.web.authority import Authority
from hub_gateway.web.kerneltable import (
    MAX_LIMIT,
    SORTS,
    KernelFilter,
    KernelPage,
    kernel_page,
    owners_of,
)
from hub_gateway.web.plain import plain
from hub_gateway.web.tenancy import TenancyHandler, cursor, read_cursor

if TYPE_CHECKING:
    from hub_gateway.services import Services

__all__ = [
    "AdminKernelsHandler",
    "AdminStopHandler",
    "ClustersHandler",
    "MaintenanceHandler",
    "PeopleHandler",
    "cluster_findings",
    "find_kernels",
    "find_people",
    "held_by",
    "stop_kernels",
]

MAX_STOPPED = 1000
CHECK_SECONDS = 10.0
STATUSES = ("live", *(status.value for status in KernelStatus))


async def find_kernels(
    services: Services, authority: Authority, *, group: str | None = None, after: Any = None, **wanted: Any
) -> KernelPage:
    """The kernels that the caller may see. `wanted` is as `KernelFilter`'s. Raises `NotFound` for a group."""
    reach = await authority.reach(KERNELS_READ)
    owners = None
    if group is not None:
        power = require(authority.caller, KERNELS_READ)
        known = await authority.people.group(group) if power.over_group(group) else None
        if known is None:
            raise NotFound(f"There is no group {group[:100]!r} that you may see.")
        owners = known.users
    return await kernel_page(services, KernelFilter(reach, owners=owners, **wanted), after)


async def find_people(services: Services, authority: Authority, query: str, *, offset: int, limit: int) -> PeoplePage:
    """The users that the caller may see."""
    reach = await authority.reach(QUOTAS_READ)
    people = authority.people
    if reach.everything:
        return await people.page(query, offset=offset, limit=limit)
    names = sorted(name for name in reach.owners if query.lower() in name.lower())
    end = offset + limit
    found = await asyncio.gather(*(people.user(name) for name in names[offset:end]))
    shown = tuple(person for person in found if person is not None)
    return PeoplePage(shown, len(names), end if end < len(names) else None)


async def stop_kernels(services: Services, authority: Authority, ids: list[str], message: str) -> dict[str, list[str]]:
    """Have kernels stopped: `{"stopping": [...], "unknown": [...]}`.

    What the caller may not stop is unknown, like what does not exist or has been stopped. The sentence, with the name
    of who stopped it, reaches each notebook; what has failed only goes off the lists. Each stop is in the audit trail
    with it. Returns when every stop is certain to happen.
    """
    reach = await authority.reach(KERNELS_STOP)
    owners = await owners_of(services, ids)
    mine = [kernel_id for kernel_id in ids if kernel_id in owners and reach.over(owners[kernel_id])]
    actor = authority.caller.name
    said = f"Stopped by {actor}: {message}" if message else f"Stopped by {actor}."
    stopping = await services.kernels.stop_for(actor, mine, said)
    return {"stopping": [k for k in ids if k in stopping], "unknown": [k for k in ids if k not in stopping]}


async def cluster_findings(services: Services, only: str | None = None) -> dict[str, list[Finding]]:
    """What every proxy's (or one's) `check` finds, by proxy; no answer in time is an error of its own."""

    async def check(name: str, proxy: Any) -> tuple[str, list[Finding]]:
        try:
            return name, list(await within(proxy.check(), CHECK_SECONDS))
        except asyncio.TimeoutError:
            said = f"It did not answer within {CHECK_SECONDS:g} seconds."
        except GatewayError as error:
            said = error.message
        return name, [Finding("error", name, said)]

    proxies = services.kernels.controller.proxies.all()
    found = await asyncio.gather(*(check(name, proxy) for name, proxy in proxies if only in (None, name)))
    return dict(sorted(found))


async def held_by(services: Services, people: tuple[Person, ...]) -> dict[str, int]:
    """How many kernels each of them has."""
    names = [person.name for person in people]
    live = (KernelStatus.STARTING.value, KernelStatus.RUNNING.value, KernelStatus.STOPPING.value)
    return await services.db.read(
        lambda tx: {
            row[0]: row[1]
            for row in tx.execute(
                select(Kernel.owner, func.count())
                .where(among(tx, Kernel.owner, names), Kernel.status.in_(live))
                .group_by(Kernel.owner)
            )
        }
    )


class AdminKernelsHandler(TenancyHandler):
    """Everybody's kernels, or a group's."""

    async def get(self) -> None:
        query = self.query("owner", "group", "status", "kernelspec", "q", "sort", "after", "limit")
        choices = (*SORTS, *(f"-{name}" for name in SORTS))
        sort = query.choice("sort", choices, "-created") or "-created"
        name = sort.removeprefix("-")
        number = name in ("cpu", "memory", "gpu")
        after = read_cursor(query.text("after", size=4096), (int, float) if number else str, str)
        page = await find_kernels(
            self.services,
            self.authority(),
            group=query.text("group"),
            after=after,
            owner=query.text("owner"),
            status=query.choice("status", STATUSES, "live"),
            kernelspec=query.text("kernelspec"),
            query=query.text("q"),
            sort=sort,
            limit=query.number("limit", 50, 1, MAX_LIMIT),
        )
        self.write_json(
            {
                "kernels": [row.as_json() for row in page.rows],
                "total": page.total,
                "counts": page.counts,
                "next": None if page.after is None else cursor(*page.after),
            }
        )


class AdminStopHandler(TenancyHandler):
    """Stop kernels of others, and say why in their notebooks."""

    async def post(self) -> None:
        body = self.fields("ids", "message")
        authority = await self.privileged()
        require(self.caller, KERNELS_STOP)
        ids, message = body.names("ids", MAX_STOPPED), body.text("message", size=500)
        self.write_json(await stop_kernels(self.services, authority, ids, message), 202)


class PeopleHandler(TenancyHandler):
    """Users, their groups, how many kernels they have, and (`limits=true`) what they hold of their limits."""

    async def get(self) -> None:
        query = self.query("q", "after", "limit", "limits")
        key = read_cursor(query.text("after"), int)
        offset = 0 if key is None else max(0, min(int(key[0]), 2**31))
        page = await find_people(
            self.services,
            self.authority(),
            query.text("q") or "",
            offset=offset,
            limit=query.number("limit", 50, 1, 200),
        )
        held = await held_by(self.services, page.people)
        people: list[dict[str, Any]] = []
        for person in page.people:
            one: dict[str, Any] = {
                "name": person.name,
                "groups": sorted(person.groups),
                "admin": person.admin,
                "last_activity": person.last_activity,
                "kernels": held.get(person.name, 0),
            }
            if query.flag("limits"):
                views = await self.quotas.limits(person.name, SubjectKind.USER, person.groups)
                one["limits"] = plain(views)
            people.append(one)
        following = None if page.next is None else cursor(page.next)
        self.write_json({"people": people, "total": page.total, "next": following})


class ClustersHandler(TenancyHandler):
    """The state of every cluster."""

    async def get(self) -> None:
        self.query()
        require(self.caller, KERNELS_READ)
        found = await cluster_findings(self.services)
        self.write_json({name: [asdict(finding) for finding in findings] for name, findings in found.items()})


class MaintenanceHandler(TenancyHandler):
    """Whether new launches are let in, and the sentence that who is kept out reads."""

    async def get(self) -> None:
        self.query()
        self.write_json({"sentence": await self.quotas.maintenance()})

    async def put(self) -> None:
        body = self.fields("sentence")
        await self.privileged()
        require(self.caller, MAINTENANCE_WRITE)
        sentence = body.text("sentence", size=500).strip() or None
        await self.quotas.set_maintenance(sentence, self.caller.name)
        self.write_json({"sentence": await self.quotas.maintenance()})
