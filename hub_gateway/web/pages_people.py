"""Users and groups: what applies to them and why, what they hold, why they were refused, and more for a time."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tornado.web import authenticated

from hub_gateway.auth.base import Caller
from hub_gateway.auth.people import GroupInfo, PeoplePage, Person
from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, powers
from hub_gateway.auth.scopes import require as require_scope
from hub_gateway.db.models import utcnow
from hub_gateway.errors import BadRequest, Conflict, Forbidden, GatewayError, NotFound
from hub_gateway.quotas.amounts import amount
from hub_gateway.quotas.grants import check_counts, check_lead, grant_from
from hub_gateway.quotas.resolve import name_of
from hub_gateway.quotas.types import Counts, Policy, SubjectKind
from hub_gateway.web.admin import find_people, held_by
from hub_gateway.web.authority import Authority, kind_of
from hub_gateway.web.console import ConsoleHandler

if TYPE_CHECKING:
    from hub_gateway.quotas.explain import Explanation, LimitView

__all__ = ["GroupsHandler", "PeopleHandler", "PersonHandler", "limits_of"]

PAGE = 20
REFUSALS = 3
MAX_GRANT = timedelta(days=366)
GRANTED = (Counts.EACH, Counts.KERNEL)


@dataclass(frozen=True)
class Shown:
    """One user, as the table shows them."""

    person: Person
    kernels: int
    limits: Sequence[LimitView]
    explained: Explanation


class PeopleHandler(ConsoleHandler):
    """The users over whom one has power."""

    @authenticated
    async def get(self) -> None:
        self.require(QUOTAS_READ)
        asked = self.chosen({"q": "", "group": "", "after": ""})
        offset = int(asked["after"]) if asked["after"].isdecimal() and len(asked["after"]) < 9 else 0
        page = await self._page(asked["q"], asked["group"], offset)
        held = await held_by(self.services, page.people)
        shown = await asyncio.gather(*(self._one(person, held.get(person.name, 0)) for person in page.people))
        self.page(
            "admin_people.html",
            "People",
            "admin/people",
            people=shown,
            total=page.total,
            following=page.next,
            asked=asked,
            refusals=REFUSALS,
            groups_too=bool(powers(self.caller, QUOTAS_READ).groups) or powers(self.caller, QUOTAS_READ).everything,
            writes=bool(powers(self.caller, QUOTAS_WRITE)),
        )

    async def _page(self, query: str, group: str, offset: int) -> PeoplePage:
        authority = self.authority()
        if not group:
            return await find_people(self.services, authority, query, offset=offset, limit=PAGE)
        found = await authority.people.group(group) if authority.require(QUOTAS_READ).over_group(group) else None
        if found is None:
            raise NotFound(f"There is no group {group[:100]!r} that you may see.")
        names = sorted(name for name in found.users if query.lower() in name.lower())
        end = offset + PAGE
        people = await asyncio.gather(*(authority.people.user(name) for name in names[offset:end]))
        there = tuple(person for person in people if person is not None)
        return PeoplePage(there, len(names), end if end < len(names) else None)

    async def _one(self, person: Person, kernels: int) -> Shown:
        kind = kind_of(person.name)
        limits, explained = await asyncio.gather(
            self.quotas.limits(person.name, kind, person.groups), self.quotas.explain(person.name, kind, person.groups)
        )
        return Shown(person, kernels, limits, explained)


class GroupsHandler(ConsoleHandler):
    """The groups over which one has power, and the limits that are theirs."""

    @authenticated
    async def get(self) -> None:
        self.require(QUOTAS_READ)
        authority, asked = self.authority(), self.chosen({"q": "", "after": ""})
        power = authority.require(QUOTAS_READ)
        if power.everything:
            known = await authority.people.groups()
        else:
            asked_for = await asyncio.gather(*(authority.people.group(name) for name in sorted(power.groups)))
            known = tuple(group for group in asked_for if group is not None)
        text = asked["q"].lower()
        found = [group for group in known if text in group.name.lower()]
        rest = [group for group in found if group.name > asked["after"]]
        limits = await asyncio.gather(*(self._limits(group) for group in rest[:PAGE]))
        self.page(
            "admin_groups.html",
            "Groups",
            "admin/people",
            groups=list(zip(rest, limits, strict=False)),
            total=len(found),
            following=rest[PAGE - 1].name if len(rest) > PAGE else "",
            asked=asked,
            writes=bool(powers(self.caller, QUOTAS_WRITE)),
        )

    async def _limits(self, group: GroupInfo) -> list[LimitView]:
        """What is about the group itself: as it is for somebody who is in this group, and has nothing."""
        views: Sequence[LimitView] = await self.quotas.limits("", SubjectKind.USER, [group.name])
        return [view for view in views if view.subject == f"group:{group.name}"]


class PersonHandler(ConsoleHandler):
    """One user: every policy about them, whether it counts and why; and a form that gives more for a time."""

    @authenticated
    async def get(self, name: str) -> None:
        self.require(QUOTAS_READ)
        await self._person(await self._named(self.authority(), QUOTAS_READ, name))

    async def post(self, name: str) -> None:
        self.check_form()
        authority = await self.privileged()
        require_scope(self.caller, QUOTAS_WRITE)
        person = await self._named(authority, QUOTAS_WRITE, name)
        typed = {field: self.field(field) for field in ("policy", "amount", "until", "reason")}
        try:
            grant = await self._grant(authority, person, typed)
            await authority.check_policy(grant)
            made = (await self.quotas.put(grant, self.caller.name)).policy
        except (BadRequest, Conflict, Forbidden) as error:
            # What was typed stays, beside the reason.
            self.set_status(error.status)
            await self._person(person, typed=typed, error=error)
            return
        said = f"{person.name} has more of {typed['policy']} until {made.valid_until:%Y-%m-%d %H:%M} UTC."
        self.done(f"admin/people/{quote(person.name, safe='')}", said)

    async def _named(self, authority: Authority, scope: str, name: str) -> Person:
        """The user of that name. Being oneself is no permission to look here."""
        if not await authority.covers(authority.require(scope), name):
            raise NotFound(f"There is no user {name[:100]!r} whom you may see.")
        return await authority.person(scope, name)

    async def _grant(self, authority: Authority, person: Person, typed: Mapping[str, str]) -> Policy:
        """The grant that the form asks for.

        Raises `BadRequest` (with the name of the field), `Forbidden`, `Conflict` where it would have no effect.
        """
        view = next((one for one in grantable(await limits_of(self, person)) if one.policy == typed["policy"]), None)
        before = None if view is None else await self.quotas.policy(view.policy)
        if before is None or before.hard is None:
            raise _wrong("policy", f"{person.name} has no limit {typed['policy'][:100]!r} of which more can be given.")
        if not authority.unlimited(QUOTAS_WRITE):
            check_lead(before)
        wanted = amount(before.resource, "The field `amount`", typed["amount"])
        if wanted <= before.hard:
            raise _wrong("amount", f"The limit {before.name} allows as much already; give more than that.")
        if not typed["reason"]:
            raise _wrong("reason", "Write why; the reason stands in the audit trail.")
        grant = grant_from(
            before,
            name=f"grant-{re.sub(r'[^A-Za-z0-9._@-]', '-', name_of(person.name))[:60]}-{secrets.token_hex(4)}",
            owner=person.name,
            hard=wanted,
            ends=_end_of(typed["until"]),
            approver=self.caller.name,
            note=typed["reason"].replace("\r", ""),
        )
        check_counts(grant, before, await self.quotas.policies(), person.groups, utcnow())
        return grant

    async def _person(
        self, person: Person, *, typed: Mapping[str, str] | None = None, error: GatewayError | None = None
    ) -> None:
        kind, spec = kind_of(person.name), self.get_query_argument("kernelspec", "")[:255].strip()
        explained = await self.quotas.explain(person.name, kind, person.groups, spec or None)
        limits = await limits_of(self, person)
        found = re.match(r"The field `(\w+)`:? ", "" if error is None else error.message)
        sentence = "" if error is None else error.message[found.end() if found else 0 :]
        soon = (utcnow() + timedelta(days=7)).strftime("%Y-%m-%d")
        self.page(
            "admin_person.html",
            f"User {person.name}" if kind is SubjectKind.USER else person.name,
            "admin/people",
            person=person,
            kind=kind,
            limits=limits,
            explained=explained,
            spec=spec,
            specs=await self._specs(person),
            readable=await self.authority().may_read(),
            choices=self._choices(limits),
            typed=typed or {"policy": "", "amount": "", "until": soon, "reason": ""},
            where=found[1] if found else "",
            sentence=sentence[:1].upper() + sentence[1:],
            held=(await held_by(self.services, (person,))).get(person.name, 0),
            writes=await self._may_grant(person),
        )

    def _choices(self, limits: Collection[LimitView]) -> list[LimitView]:
        """The limits of which the visitor can give more: a lead, of those that leads have set."""
        whole = self.authority().unlimited(QUOTAS_WRITE)
        return [view for view in grantable(limits) if whole or view.delegated]

    async def _may_grant(self, person: Person) -> bool:
        authority, power = self.authority(), powers(self.caller, QUOTAS_WRITE)
        if not power or not await authority.covers(power, person.name):
            return False
        return power.everything or person.name != self.owner

    async def _specs(self, person: Person) -> list[str]:
        """What this person may start."""
        somebody = Caller(person.name, groups=frozenset(person.groups))
        catalogue: Any = await self.services.kernels.kernelspecs(somebody)
        return sorted(catalogue.get("kernelspecs", {}))


async def limits_of(page: ConsoleHandler, person: Person) -> Sequence[LimitView]:
    """What applies to somebody, and what they hold of it."""
    return await page.quotas.limits(person.name, kind_of(person.name), person.groups)


def grantable(limits: Collection[LimitView]) -> list[LimitView]:
    """The limits of which one person can be given more: not those that many have together."""
    return [view for view in limits if view.counts in GRANTED and view.hard is not None]


def _wrong(field: str, sentence: str) -> BadRequest:
    return BadRequest(f"The field `{field}`: {sentence}")


def _end_of(text: str) -> datetime:
    """The end of a day (UTC). Raises `BadRequest`."""
    try:
        found = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=timezone.utc) + timedelta(days=1)
    except (ValueError, OverflowError) as error:
        raise _wrong("until", "The last day must be a date such as 2030-01-31.") from error
    if not utcnow() < found < utcnow() + MAX_GRANT:
        raise _wrong("until", "The last day must be today or in the next year.")
    return found
