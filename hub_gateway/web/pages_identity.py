"""The identity map: as whom kernels run, by which rule, and what belongs to whom."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tornado.web import authenticated

from hub_gateway.auth.people import Person
from hub_gateway.auth.scopes import IDENTITY_READ, IDENTITY_WRITE, powers
from hub_gateway.auth.scopes import require as require_scope
from hub_gateway.errors import BadRequest, NotFound, Unavailable
from hub_gateway.identity import claims
from hub_gateway.identity.types import Step
from hub_gateway.web.authority import Authority
from hub_gateway.web.console import ConsoleHandler
from hub_gateway.web.tenancy import cursor, read_cursor

if TYPE_CHECKING:
    from hub_gateway.web.parts import IdentityPart

__all__ = ["IdentityPage", "ReleasePage"]

PAGE = 20
CLAIMS = 50
FIRST = ("", "", "")


class _IdentityPage(ConsoleHandler):
    """What both share."""

    @property
    def identity(self) -> IdentityPart:
        """The part that maps users to principals."""
        if self.services.identity is None:
            raise NotFound("This gateway is set up without this part.")
        return self.services.identity


class IdentityPage(_IdentityPage):
    """The people whom one may see, each as whom they run; every step of it for one of them; and what is held."""

    @authenticated
    async def get(self) -> None:
        self.require(IDENTITY_READ)
        authority = self.authority()
        asked = self.chosen({"q": "", "user": "", "from": "", "after": ""})
        power = authority.require(IDENTITY_READ)
        explained: Any = None
        if asked["user"]:
            explained = await self._explained(authority, asked["user"])
        people, total = await self._people(authority, asked["q"], _number(asked["from"]))
        mapped = await asyncio.gather(*(self._mapped(person, power.everything) for person in people))
        reach = await authority.reach(IDENTITY_READ)
        key = read_cursor(asked["after"] or None, str, str, str) or FIRST
        held = await self.services.db.read(
            lambda tx: claims.find(
                tx,
                asked["q"],
                owners=None if reach.everything else reach.owners,
                after=(key[0], key[1], key[2]),
                limit=CLAIMS + 1,
            )
        )
        last = held[CLAIMS - 1] if len(held) > CLAIMS else None
        write, begin = powers(self.caller, IDENTITY_WRITE), _number(asked["from"])
        self.page(
            "admin_identity.html",
            "Identity",
            "admin/identity",
            asked=asked,
            explained=explained,
            mapped=list(zip(people, mapped, strict=True)),
            total=total,
            following=begin + PAGE if begin + PAGE < total else None,
            held=held[:CLAIMS],
            more="" if last is None else cursor(last.hub_user, last.kind, last.name),
            releases={one.hub_user for one in held if write and await authority.covers(write, one.hub_user)},
        )

    async def _people(self, authority: Authority, query: str, offset: int) -> tuple[Sequence[Person], int]:
        reach = await authority.reach(IDENTITY_READ)
        if reach.everything:
            page = await authority.people.page(query, offset=offset, limit=PAGE)
            return page.people, page.total
        names = sorted(name for name in reach.owners if query.lower() in name.lower())
        found = await asyncio.gather(*(authority.people.user(name) for name in names[offset : offset + PAGE]))
        return [person for person in found if person is not None], len(names)

    async def _mapped(self, person: Person, name_holders: bool) -> Step:
        """How the mapping of somebody ends."""
        try:
            steps: list[Step] = await self.identity.explain(
                person.name, person.groups, name_holders=name_holders, attempt=False
            )
        except Unavailable as error:
            return Step("result", "", "unavailable", error.message)
        return steps[-1]

    async def _explained(self, authority: Authority, name: str) -> list[Step]:
        power = authority.require(IDENTITY_READ)
        if not await authority.covers(power, name):
            raise NotFound(f"There is no user {name[:100]!r} whom you may see.")
        person = await authority.person(IDENTITY_READ, name)
        # Whose name somebody else goes by is for those who may look at everybody.
        found: list[Step] = await self.identity.explain(person.name, person.groups, name_holders=power.everything)
        return found


class ReleasePage(_IdentityPage):
    """Give back what a user holds."""

    async def post(self, user: str) -> None:
        self.check_form()
        authority = await self.privileged()
        power = require_scope(self.caller, IDENTITY_WRITE)
        missing = f"Nothing is held for a user {user[:100]!r} whom you may release."
        if not await authority.covers(power, user):
            raise NotFound(missing)
        if self.field("confirm") != "yes":
            raise BadRequest("What a user holds is released when you tick that you are sure; nothing was changed.")
        if not await self.identity.release(user, self.caller.name):
            raise NotFound(missing)
        self.done("admin/identity", f"What {user} held is released; who is mapped to it next gets it.")


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 9 else 0
