"""/api/limits, /api/queue, /api/requests: what everybody may know of their own limits, and ask for."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, powers
from hub_gateway.db.models import utcnow
from hub_gateway.errors import BadRequest, NotFound
from hub_gateway.kernels.service import owner_of
from hub_gateway.quotas.amounts import amount
from hub_gateway.quotas.fields import Body
from hub_gateway.quotas.types import Resource
from hub_gateway.web.authority import Authority, Reach, kind_of
from hub_gateway.web.plain import plain
from hub_gateway.web.tenancy import TenancyHandler, cursor, read_cursor

__all__ = ["AnswerHandler", "LimitsHandler", "OneRequestHandler", "QueueHandler", "RequestsHandler"]

MAX_ID = 2**31 - 1
MAX_AHEAD = timedelta(days=366)


async def _reach(authority: Authority) -> Reach:
    """Whose entries and requests the caller sees: their own, and those of whom they have power over."""
    if not powers(authority.caller, QUOTAS_READ):
        return Reach(False, frozenset((owner_of(authority.caller),)))
    found = await authority.reach(QUOTAS_READ)
    return found if found.everything else Reach(False, found.owners | {owner_of(authority.caller)})


class LimitsHandler(TenancyHandler):
    """One's limits and what is held or used of them; with `user`, somebody else's."""

    async def get(self) -> None:
        query = self.query("user")
        person = await self.authority().person(QUOTAS_READ, query.text("user"))
        views = await self.quotas.limits(person.name, kind_of(person.name), person.groups)
        self.write_json(
            {
                "user": person.name,
                "groups": sorted(person.groups),
                "limits": plain(views),
                "maintenance": await self.quotas.maintenance(),
            }
        )


class QueueHandler(TenancyHandler):
    """What waits: one's own kernels, and those of whom one may see."""

    async def get(self) -> None:
        query = self.query("user")
        user = query.text("user")
        reach = await _reach(self.authority())
        found = [
            plain(entry)
            for entry in await self.quotas.queue()
            if reach.over(entry.owner) and user in (None, entry.owner)
        ]
        self.write_json({"queue": found})


class RequestsHandler(TenancyHandler):
    """Requests for more: see one's own and those that one may answer; open one."""

    async def get(self) -> None:
        query = self.query("state", "user", "after", "limit")
        state, user = query.choice("state", ("open", "granted", "refused", "withdrawn")), query.text("user")
        authority = self.authority()
        reach = await _reach(authority)
        mine = owner_of(self.caller)
        wanted = user if user is not None else None if powers(self.caller, QUOTAS_READ) else mine
        key, limit = read_cursor(query.text("after"), int), query.number("limit", 200, 1, 200)
        before = None if key is None else key[0]
        found = await self.quotas.requests(
            state=state, owner=wanted, owners=reach.among, before=before, limit=limit + 1
        )
        page = found[:limit]
        following = cursor(page[-1].id) if len(found) > limit else None
        self.write_json({"requests": [plain(one) for one in page], "next": following})

    async def post(self) -> None:
        body = self.fields("policy", "amount", "until", "reason")
        await self.privileged()
        policy, reason = body.text("policy", size=100, needed=True), body.note("reason", needed=True)
        until = body.moment("until")
        now = utcnow()
        if until is None or not now < until <= now + MAX_AHEAD:
            raise BadRequest("The field `until` must be a moment in the next 366 days.")
        owner = owner_of(self.caller)
        views = await self.quotas.limits(owner, kind_of(owner), self.caller.groups)
        view = next((view for view in views if _name(view) == policy), None)
        if view is None:
            raise NotFound(f"There is no limit {policy!r} of yours; see your limits for their names.")
        found = await self.quotas.open_request(owner, self.caller.groups, policy, _amount(body, view), until, reason)
        self.write_json(plain(found), 201)


class OneRequestHandler(TenancyHandler):
    """One request."""

    async def delete(self, request_id: str) -> None:
        self.query()
        await self.privileged()
        await self.quotas.withdraw(_number(request_id), owner_of(self.caller))
        self.set_status(204)


class AnswerHandler(TenancyHandler):
    """Grant a request, for a time, or refuse it."""

    async def post(self, request_id: str) -> None:
        body = self.fields("grant", "text", "amount", "until")
        authority = await self.privileged()
        authority.require(QUOTAS_WRITE)
        number = _number(request_id)
        grant, text = body.flag("grant"), body.note("text", needed=not body.flag("grant"))
        request = await self.quotas.request(number)
        if request is None or request.state != "open":
            raise no_request()
        await authority.may_answer(request.owner)
        until, now = body.moment("until"), utcnow()
        if until is not None and not now < until <= now + MAX_AHEAD:
            raise BadRequest("The field `until` must be a moment in the next 366 days.")
        more: dict[str, Any] = {"until": until}
        if body.found.get("amount") is not None:
            more["amount"] = await self._granted(body, request.policy)
        if not authority.unlimited(QUOTAS_WRITE):
            more["lead"] = True
        found = await self.quotas.answer(number, self.caller.name, grant, text, **more)
        self.write_json(plain(found))

    async def _granted(self, body: Body, name: str) -> float:
        policy = await self.quotas.policy(name)
        if policy is None:
            raise NotFound(f"The policy {name} that was asked about does not exist any more; refuse the request.")
        return _amount(body, policy)


def no_request() -> NotFound:
    """The answer for a request that does not exist, and for one that is not the caller's business."""
    return NotFound("There is no open request of that number that you may answer.")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > MAX_ID:
        raise no_request()
    return int(text)


def _name(view: Any) -> str:
    """The name of a limit's policy, which the view may hold as a whole."""
    policy = view.policy
    return policy if isinstance(policy, str) else str(policy.name)


def _amount(body: Body, view: Any) -> float:
    return amount(Resource(view.resource), "The field `amount`", body.found.get("amount"))
