"""Pages for everybody: my kernels, my limits, what I used."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from tornado.web import authenticated

from hub_gateway.db.models import utcnow
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.types import KernelStatus
from hub_gateway.quotas.amounts import amount
from hub_gateway.web.authority import kind_of
from hub_gateway.web.console import ConsoleHandler
from hub_gateway.web.held import Held, held_by_day

if TYPE_CHECKING:
    from hub_gateway.quotas.explain import LimitView
    from hub_gateway.quotas.reports import Report

__all__ = ["HistoryHandler", "HomeHandler", "LimitsHandler", "StopHandler", "WithdrawHandler"]

DAYS = 30


class HomeHandler(ConsoleHandler):
    """My kernels."""

    @authenticated
    async def get(self) -> None:
        kernels = await self.services.kernels.list(self.caller)
        waiting = {}
        if any(kernel.status is KernelStatus.QUEUED for kernel in kernels):
            waiting = {entry.kernel_id: entry for entry in await self.quotas.queue() if entry.owner == self.owner}
        self.page("home.html", "My kernels", "home", live="live_home.html", kernels=kernels, waiting=waiting)


class StopHandler(ConsoleHandler):
    """Stop one of my kernels."""

    async def post(self, kernel_id: str) -> None:
        self.check_form()
        await self.services.kernels.shutdown(self.caller, kernel_id)
        self.done("home", "The kernel is shut down.")


class LimitsHandler(ConsoleHandler):
    """My limits, what I hold of them, and asking for more."""

    @authenticated
    async def get(self) -> None:
        caller = self.caller
        limits = await self.quotas.limits(self.owner, kind_of(self.owner), caller.groups)
        requests = await self.quotas.requests(owner=self.owner)
        soon = (utcnow() + timedelta(days=7)).strftime("%Y-%m-%d")
        maintenance = await self.quotas.maintenance()
        held = None if self.refreshes else await self._held(limits)
        self.page(
            "limits.html",
            "My limits",
            "limits",
            live="live_limits.html",
            limits=limits,
            requests=requests,
            until=soon,
            maintenance=maintenance,
            held=held,
            asked=await self.asked(requests),
        )

    async def _held(self, limits: Sequence[LimitView]) -> Held:
        """What I held in the last days, of that which is limited."""
        (by_day,) = await own_reports(self, "day")
        return held_by_day(by_day, limits, utcnow())

    async def post(self) -> None:
        self.check_form()
        await self.privileged()
        name, reason = self.field("policy"), self.field("reason")
        views = await self.quotas.limits(self.owner, kind_of(self.owner), self.caller.groups)
        view = next((view for view in views if view.policy == name), None)
        if view is None:
            raise NotFound(f"There is no limit {name[:100]!r} of yours.")
        if not reason:
            raise BadRequest("A request needs a reason, for whoever answers it.")
        wanted = amount(view.resource, "The amount", self.field("amount"))
        await self.quotas.open_request(self.owner, self.caller.groups, name, wanted, _day(self.field("until")), reason)
        self.done("limits", "Your request is sent; its answer will stand here.")


def _day(text: str) -> datetime:
    """The end of a day. Raises `BadRequest`."""
    try:
        found = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc) + timedelta(days=1)
    except ValueError as error:
        raise BadRequest("The day until which more is needed must be a date such as 2030-01-31.") from error
    if not utcnow() < found < utcnow() + timedelta(days=367):
        raise BadRequest("The day until which more is needed must be in the next year.")
    return found


class WithdrawHandler(ConsoleHandler):
    """Take a request of mine back."""

    async def post(self, request_id: str) -> None:
        self.check_form()
        await self.quotas.withdraw(int(request_id), self.owner)
        self.done("limits", "The request is withdrawn.")


class HistoryHandler(ConsoleHandler):
    """What I used in the last days."""

    @authenticated
    async def get(self) -> None:
        if self.get_query_argument("format", "") == "csv":
            by = self.get_query_argument("by", "day")
            if by not in ("day", "kernelspec"):
                raise BadRequest("Your usage is by `day` or by `kernelspec`; choose one of them with `by`.")
            (report,) = await own_reports(self, by)
            self.csv(report, f"my-usage-by-{by}")
            return
        by_day, by_spec = await own_reports(self, "day", "kernelspec")
        self.page("history.html", "My usage", "history", by_day=by_day, by_spec=by_spec, days=DAYS)


async def own_reports(page: ConsoleHandler, *kinds: str) -> list[Report]:
    """What who looks used in the last days, by each of `kinds`."""
    end = utcnow()
    start = (end - timedelta(days=DAYS)).replace(hour=0, minute=0, second=0, microsecond=0)
    owner, reports = page.owner, page.reports
    return await page.services.db.read(lambda tx: [reports.report(tx, by, start, end, owner=owner) for by in kinds])
