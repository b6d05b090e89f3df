"""Who there is: users, groups and their properties, as the Hub (or the token file) knows them now."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hub_gateway.auth.base import Caller
from hub_gateway.kernels.types import JSON

__all__ = ["FilePeople", "GroupInfo", "NoPeople", "People", "PeoplePage", "Person"]


@dataclass(frozen=True)
class Person:
    """One user. `last_activity` is as the Hub writes it."""

    name: str
    groups: frozenset[str] = frozenset()
    admin: bool = False
    last_activity: str | None = None


@dataclass(frozen=True)
class GroupInfo:
    """One group: who is in it, and what the Hub's administrators noted of it (`cost_center`, for example)."""

    name: str
    users: frozenset[str] = frozenset()
    properties: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class PeoplePage:
    """Some of the users, by name; `next` is where the next page begins, None on the last one."""

    people: tuple[Person, ...]
    total: int
    next: int | None = None


class People(abc.ABC):
    """Users and groups, now. Every method raises `Unavailable` where their source cannot be asked.

    Answers may be as old as the source's cache (30 s at the Hub), except with `fresh`.
    """

    @abc.abstractmethod
    async def user(self, name: str, *, fresh: bool = False) -> Person | None:
        """One user, or None where there is none of that name."""

    @abc.abstractmethod
    async def group(self, name: str, *, fresh: bool = False) -> GroupInfo | None:
        """One group, or None."""

    @abc.abstractmethod
    async def groups(self) -> tuple[GroupInfo, ...]:
        """All groups, by name."""

    async def last_known_groups(self) -> tuple[GroupInfo, ...]:
        """All groups; while their source is away as it last said them, however long ago. Not for anybody's powers."""
        return await self.groups()

    @abc.abstractmethod
    async def page(self, query: str = "", *, offset: int = 0, limit: int = 50) -> PeoplePage:
        """Users whose names hold `query`, whatever its case."""

    async def auth_state(self, name: str) -> Mapping[str, JSON]:
        """What the Hub's authenticator remembers of a user; secret, for the most part. Raises `Unavailable`."""
        return {}

    async def members(self, names: Iterable[str], *, fresh: bool = False) -> frozenset[str]:
        """Everybody who is in one of these groups. A group that does not exist has nobody."""
        found = await asyncio.gather(*(self.group(name, fresh=fresh) for name in sorted(names)))
        return frozenset().union(*(one.users for one in found if one is not None))


class _Listed(People):
    """People of whom there is a list at hand."""

    @abc.abstractmethod
    async def everybody(self, *, fresh: bool = False) -> Mapping[str, Person]:
        """All users by name."""

    async def user(self, name: str, *, fresh: bool = False) -> Person | None:
        return (await self.everybody(fresh=fresh)).get(name)

    async def group(self, name: str, *, fresh: bool = False) -> GroupInfo | None:
        people = await self.everybody(fresh=fresh)
        users = frozenset(person.name for person in people.values() if name in person.groups)
        return GroupInfo(name, users) if users else None

    async def groups(self) -> tuple[GroupInfo, ...]:
        people = (await self.everybody()).values()
        names = sorted(frozenset().union(*(person.groups for person in people)))
        return tuple(GroupInfo(n, frozenset(person.name for person in people if n in person.groups)) for n in names)

    async def page(self, query: str = "", *, offset: int = 0, limit: int = 50) -> PeoplePage:
        people = await self.everybody()
        found = [people[name] for name in sorted(people) if query.lower() in name.lower()]
        end = offset + limit
        return PeoplePage(tuple(found[offset:end]), len(found), end if end < len(found) else None)


class NoPeople(_Listed):
    """Where nobody is known before they come."""

    async def everybody(self, *, fresh: bool = False) -> Mapping[str, Person]:
        return {}


class FilePeople(_Listed):
    """The users of a token file. A group is there as long as somebody in the file is in it; it has no properties.

    `callers(fresh)` gives whom the file names, of whom some may have several tokens: their groups are joined.
    """

    def __init__(self, callers: Callable[[bool], Sequence[Caller]]) -> None:
        self._callers = callers

    async def everybody(self, *, fresh: bool = False) -> Mapping[str, Person]:
        found: dict[str, Person] = {}
        for caller in await asyncio.to_thread(self._callers, fresh):
            known = found.get(caller.name, Person(caller.name))
            found[caller.name] = Person(caller.name, known.groups | caller.groups, known.admin or caller.admin)
        return found
