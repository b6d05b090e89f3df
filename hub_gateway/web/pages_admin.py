"""Pages for administrators, and for leads of groups as far as their permissions go."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from tornado.web import authenticated

from hub_gateway.auth.scopes import (
    AUDIT_READ,
    KERNELS_READ,
    KERNELS_STOP,
    MAINTENANCE_WRITE,
    QUOTAS_READ,
    QUOTAS_WRITE,
    USAGE_READ,
    powers,
)
from hub_gateway.auth.scopes import require as require_scope
from hub_gateway.db.models import utcnow
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.web.admin import find_kernels, stop_kernels
from hub_gateway.web.console import ConsoleHandler
from hub_gateway.web.kerneltable import SORTS
from hub_gateway.web.tenancy import cursor, read_cursor
from hub_gateway.web.usage import BY, span, usage_of, within

__all__ = [
    "AnswerHandler",
    "AuditHandler",
    "KernelsHandler",
    "MaintenanceHandler",
    "QueueHandler",
    "RequestsHandler",
    "StopKernelsHandler",
    "UsageHandler",
]

MAX_STOPPED = 500
PAGE = 100
REQUEST_STATES = ("open", "granted", "refused", "withdrawn")
ORDERS = (
    ("-created", "newest"),
    ("created", "oldest"),
    ("-activity", "last used"),
    ("activity", "longest unused"),
    ("owner", "owner"),
    ("kernelspec", "kernel"),
    ("proxy", "cluster"),
    ("status", "status"),
    ("-cpu", "most CPU"),
    ("-memory", "most memory"),
    ("-gpu", "most GPUs"),
)
"""How the table of kernels may be sorted, and what that is called. The REST API knows more."""


class KernelsHandler(ConsoleHandler):
    """Everybody's kernels."""

    @authenticated
    async def get(self) -> None:
        self.require(KERNELS_READ)
        wanted = self.chosen({"q": "", "group": "", "status": "live", "sort": "-created", "after": ""})
        sort = wanted["sort"] if wanted["sort"].removeprefix("-") in SORTS else "-created"
        number = sort.removeprefix("-") in ("cpu", "memory", "gpu")
        found = await find_kernels(
            self.services,
            self.authority(),
            group=wanted["group"] or None,
            after=read_cursor(wanted["after"] or None, (int, float) if number else str, str),
            status=wanted["status"],
            query=wanted["q"] or None,
            sort=sort,
        )
        following = None if found.after is None else cursor(*found.after)
        self.page(
            "admin_kernels.html",
            "Kernels",
            "admin/kernels",
            live="live_kernels.html",
            found=found,
            wanted=wanted,
            sort=sort,
            following=following,
            sorts=ORDERS,
            stops=bool(powers(self.caller, KERNELS_STOP)),
        )


class StopKernelsHandler(ConsoleHandler):
    """Stop kernels of others, with a word to their notebooks."""

    async def post(self) -> None:
        self.check_form()
        authority = await self.privileged()
        ids = self.get_body_arguments("id")[:MAX_STOPPED]
        if not ids:
            raise BadRequest("No kernel is chosen; tick the ones to be stopped.")
        done = await stop_kernels(self.services, authority, ids, self.field("message")[:500])
        count = len(done["stopping"])
        self.done("admin/kernels", f"{count} kernel{' is' if count == 1 else 's are'} being stopped.", good=count > 0)


class UsageHandler(ConsoleHandler):
    """Use and cost, of everybody or of a group."""

    @authenticated
    async def get(self) -> None:
        self.require(USAGE_READ)
        today = utcnow()
        wanted = self.chosen({"by": "user", "from": f"{today:%Y-%m}-01", "to": f"{today:%Y-%m-%d}", "group": ""})
        by = wanted["by"] if wanted["by"] in BY else "user"
        start, end = span(_date(wanted["from"]), _date(wanted["to"]) + timedelta(days=1))
        scoped, reports = usage_of(self.caller, user=None, group=wanted["group"] or None), self.reports
        report = await self.services.db.read(
            lambda tx: reports.report(tx, by, start, end, owner=scoped.owner, groups=scoped.groups)
        )
        report = within(report, scoped)
        if self.get_query_argument("format", "") == "csv":
            self.csv(report, f"usage-by-{by}")
            return
        self.page("admin_usage.html", "Usage", "admin/usage", report=report, wanted=wanted, by=by, choices=BY)


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc)
    except ValueError as error:
        raise BadRequest(f"{text[:40]!r} is not a date such as 2030-01-31.") from error


class QueueHandler(ConsoleHandler):
    """Who waits for what."""

    @authenticated
    async def get(self) -> None:
        self.require(QUOTAS_READ)
        reach = await self.authority().reach(QUOTAS_READ)
        entries = [entry for entry in await self.quotas.queue() if reach.over(entry.owner)]
        self.page("admin_queue.html", "Queue", "admin/queue", live="live_queue.html", entries=entries)


class RequestsHandler(ConsoleHandler):
    """Requests for more."""

    @authenticated
    async def get(self) -> None:
        self.require(QUOTAS_READ)
        reach = await self.authority().reach(QUOTAS_READ)
        wanted = self.chosen({"state": "", "before": ""})
        state = wanted["state"] if wanted["state"] in REQUEST_STATES else None
        before = int(wanted["before"]) if wanted["before"].isdecimal() and len(wanted["before"]) < 10 else None
        found = await self.quotas.requests(state=state, owners=reach.among, before=before, limit=PAGE + 1)
        open_ones = await self.quotas.requests(state="open", owners=reach.among)
        writes = bool(powers(self.caller, QUOTAS_WRITE))
        self.page(
            "admin_requests.html",
            "Requests",
            "admin/requests",
            live="live_requests.html",
            requests=found[:PAGE],
            following=found[PAGE - 1].id if len(found) > PAGE else None,
            unanswered=len(open_ones),
            wanted=wanted,
            states=REQUEST_STATES,
            writes=writes,
            asked=await self.asked(found[:PAGE]),
        )


class AnswerHandler(ConsoleHandler):
    """Answer a request, once."""

    async def post(self, request_id: str) -> None:
        self.check_form()
        authority = await self.privileged()
        require_scope(self.caller, QUOTAS_WRITE)
        found = await self.quotas.request(int(request_id)) if len(request_id) < 10 else None
        if found is None or found.state != "open":
            raise NotFound("There is no open request of that number that you may answer.")
        await authority.may_answer(found.owner)
        grant = self.field("answer") == "grant"
        lead = not authority.unlimited(QUOTAS_WRITE)
        await self.quotas.answer(found.id, self.caller.name, grant, self.field("text"), lead=lead)
        self.done("admin/requests", f"Request {found.id} is {'granted' if grant else 'refused'}.")


class AuditHandler(ConsoleHandler):
    """The audit trail."""

    @authenticated
    async def get(self) -> None:
        self.require(AUDIT_READ)
        wanted = self.chosen({"actor": "", "subject": "", "action": "", "before": ""})
        before = int(wanted["before"]) if wanted["before"].isdecimal() and len(wanted["before"]) < 18 else None
        named = {name: wanted[name] or None for name in ("actor", "subject", "action")}
        audit = self.audit
        lines = await self.services.db.read(lambda tx: audit.query(tx, **named, before_id=before, limit=50))
        verified = None
        if self.get_query_argument("verify", ""):
            verified = await self.services.db.read(audit.verify)
        self.page("admin_audit.html", "Audit trail", "admin/audit", lines=lines, wanted=wanted, verified=verified)


class MaintenanceHandler(ConsoleHandler):
    """The door that can be shut."""

    @authenticated
    async def get(self) -> None:
        self.require(MAINTENANCE_WRITE)
        sentence = await self.quotas.maintenance()
        self.page("admin_maintenance.html", "Maintenance", "admin/maintenance", sentence=sentence)

    async def post(self) -> None:
        self.check_form()
        await self.privileged()
        require_scope(self.caller, MAINTENANCE_WRITE)
        on = self.field("on") == "yes"
        sentence = self.field("sentence")[:500]
        if on and not sentence:
            raise BadRequest("Maintenance needs a sentence for those who are kept out.")
        await self.quotas.set_maintenance(sentence if on else None, self.caller.name)
        self.done("admin/maintenance", "No kernels are started now." if on else "Kernels are started again.")
