"""/api/usage, /api/prices, /api/ledger: what was used, what it cost, and what is put right."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from hub_gateway.auth.scopes import LEDGER_WRITE, USAGE_READ, powers, require
from hub_gateway.db.models import utcnow
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.service import owner_of
from hub_gateway.quotas.fields import Body
from hub_gateway.quotas.ledger import Entry, entries
from hub_gateway.web.plain import plain
from hub_gateway.web.tenancy import TenancyHandler, cursor, read_cursor

if TYPE_CHECKING:
    from hub_gateway.auth.base import Caller
    from hub_gateway.quotas.reports import Report

__all__ = [
    "BY",
    "CloseHandler",
    "CorrectionsHandler",
    "EntriesHandler",
    "PricesHandler",
    "Scoped",
    "UsageHandler",
    "span",
    "usage_of",
    "within",
]

BY = ("user", "group", "cost_center", "kernelspec", "proxy", "day")
FORMATS = ("json", "csv", "table")
MAX_SPAN = timedelta(days=10 * 366)
MAX_PRICE = 1e9


@dataclass(frozen=True)
class Scoped:
    """Whose entries of the ledger a report is over; both None: everybody's."""

    owner: str | None = None
    groups: tuple[str, ...] | None = None
    """Of the launch, not of today: what was billed to a group stays the group's."""


def usage_of(caller: Caller, *, user: str | None, group: str | None) -> Scoped:
    """What a caller may see of the ledger, of what they ask for. Without a permission it is one's own.

    Raises `NotFound` for users and groups out of reach. Whether those exist is not looked at: the report of nobody
    is empty, and would say as much.
    """
    mine = owner_of(caller)
    power = powers(caller, USAGE_READ)
    if group is not None:
        if not power.over_group(group):
            raise NotFound(f"There is no group {group[:100]!r} whose usage you may see.")
        return Scoped(user, (group,))
    if user == mine or (user is None and not power):
        return Scoped(mine)
    if user is not None:
        if power.everything or user in power.users:
            return Scoped(user)
        if power.groups:
            return Scoped(user, tuple(sorted(power.groups)))
        raise NotFound(f"There is no user {user[:100]!r} whose usage you may see.")
    if power.everything:
        return Scoped()
    if power.groups:
        return Scoped(None, tuple(sorted(power.groups)))
    raise BadRequest("Your permission is for some users; say which with `?user=`.")


def within(report: Report, scoped: Scoped) -> Report:
    """A report without the other groups of a group's members, whose names are not its lead's business."""
    if report.by != "group" or scoped.groups is None:
        return report
    return replace(report, rows=tuple(row for row in report.rows if row.key in scoped.groups))


class UsageHandler(TenancyHandler):
    """Usage in a time, added up by user, group, ..."""

    async def get(self) -> None:
        query = self.query("by", "from", "to", "format", "user", "group")
        form = query.choice("format", FORMATS, "json")
        scoped = usage_of(self.caller, user=query.text("user"), group=query.text("group"))
        start, end = span(query.moment("from"), query.moment("to"))
        by, reports = query.choice("by", BY, "user") or "user", self.reports
        report = await self.services.db.read(
            lambda tx: reports.report(tx, by, start, end, owner=scoped.owner, groups=scoped.groups)
        )
        report = within(report, scoped)
        if form == "csv":
            self.set_header("Content-Type", "text/csv; charset=UTF-8")
            self.set_header("Content-Disposition", f'attachment; filename="usage-{start:%Y-%m-%d}-{end:%Y-%m-%d}.csv"')
            self.write(report.to_csv())
        elif form == "table":
            self.set_header("Content-Type", "text/plain; charset=UTF-8")
            self.write(report.to_table())
        else:
            model: Any = plain(report)
            self.write_json({**model, "from": plain(start), "to": plain(end)})


def span(start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    """The time of a report: by default the month that goes on, up to now. Raises `BadRequest`."""
    end = end or utcnow()
    start = start or end.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if not start < end:
        raise BadRequest("`from` must be before `to`.")
    if end - start > MAX_SPAN:
        raise BadRequest("A report covers ten years at most; choose `from` and `to` closer together.")
    return start, end


class PricesHandler(TenancyHandler):
    """The price lists; a new one."""

    async def get(self) -> None:
        self.query()
        require(self.caller, USAGE_READ)
        self.write_json({"prices": plain(await self.services.db.read(self.reports.prices))})

    async def post(self) -> None:
        body = self.fields("kernel_hour", "core_hour", "gib_hour", "gpu_hour", "gpu_models", "valid_from")
        await self.privileged()
        require(self.caller, LEDGER_WRITE)
        models = {} if body.found.get("gpu_models") is None else body.found["gpu_models"]
        if not isinstance(models, dict) or len(models) > 100 or not all(0 < len(name) <= 64 for name in models):
            raise BadRequest("The field `gpu_models` must map names of GPU models to prices.")
        amounts = {
            name: body.number(name, low=0, high=MAX_PRICE, default=0)
            for name in ("kernel_hour", "core_hour", "gib_hour", "gpu_hour")
        }
        inner = Body(models, tuple(models))
        prices: dict[str, Any] = {
            **amounts,
            "gpu_models": {name: inner.number(name, low=0, high=MAX_PRICE) for name in models},
            "valid_from": body.moment("valid_from"),
        }
        reports, actor = self.reports, self.caller.name
        found = await self.services.db.write(lambda tx: reports.set_prices(tx, actor, **prices))
        self.write_json(plain(found), 201)


class CloseHandler(TenancyHandler):
    """Close a month: nothing is added to it any more."""

    async def post(self) -> None:
        body = self.fields("month")
        await self.privileged()
        require(self.caller, LEDGER_WRITE)
        month = body.text("month", size=7, needed=True)
        if not re.fullmatch(r"(19|20|21)\d{2}-(0[1-9]|1[0-2])", month):
            raise BadRequest("The field `month` must be a month such as 2030-01.")
        reports, actor = self.reports, self.caller.name
        self.write_json(plain(await self.services.db.write(lambda tx: reports.close_month(tx, month, actor))))


class EntriesHandler(TenancyHandler):
    """Entries of the ledger, the newest first: with the numbers by which they are corrected."""

    async def get(self) -> None:
        query = self.query("user", "group", "after", "limit")
        scoped = usage_of(self.caller, user=query.text("user"), group=query.text("group"))
        key, limit = read_cursor(query.text("after"), int), query.number("limit", 100, 1, 200)
        before = None if key is None else key[0]
        found = await self.services.db.read(
            lambda tx: entries(tx, owner=scoped.owner, groups=scoped.groups, before=before, limit=limit + 1)
        )
        following = cursor(found[limit - 1].id) if len(found) > limit else None
        if scoped.groups is not None:
            found = [_of_groups(one, scoped.groups) for one in found]
        self.write_json({"entries": plain(found[:limit]), "next": following})


def _of_groups(entry: Entry, groups: tuple[str, ...]) -> Entry:
    """An entry as a lead of these groups sees it: as whom it ran, and the other groups, is not their business."""
    shown = tuple(group for group in entry.groups if group in groups)
    return replace(entry, groups=shown, principal=None, unix_user=None)


class CorrectionsHandler(TenancyHandler):
    """Put an entry of the ledger right, by a new one."""

    async def post(self) -> None:
        body = self.fields("entry", "seconds", "cost_center", "note")
        await self.privileged()
        require(self.caller, LEDGER_WRITE)
        entry = int(body.number("entry", low=1, high=2**53))
        seconds, note = body.number("seconds", low=-1e9, high=1e9, default=0), body.note("note", needed=True)
        centre = None if body.found.get("cost_center") is None else body.text("cost_center")
        reports, actor = self.reports, self.caller.name
        made = await self.services.db.write(lambda tx: reports.correct(tx, entry, seconds, note, actor, centre))
        self.write_json(plain(made), 201)
