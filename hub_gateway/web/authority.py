"""Who may do what to whom: scopes, resolved to people as the Hub knows them.

REST and pages both come through here. What a caller may not see is `NotFound`, with the very sentence that says that
something does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hub_gateway.auth.base import Caller
from hub_gateway.auth.people import NoPeople, People, Person
from hub_gateway.auth.scopes import QUOTAS_READ, QUOTAS_WRITE, Power, powers, require
from hub_gateway.errors import Forbidden, NotFound
from hub_gateway.kernels.service import owner_of
from hub_gateway.quotas.types import Policy, SubjectKind

if TYPE_CHECKING:
    from hub_gateway.services import Services

__all__ = ["Authority", "Reach", "kind_of", "people_of"]

SERVICE_PREFIX = "services/"


@dataclass(frozen=True)
class Reach:
    """Whose things a caller may see or change: everybody's, or those of these owners."""

    everything: bool
    owners: frozenset[str] = frozenset()

    @property
    def among(self) -> frozenset[str] | None:
        """The owners among whom is to be looked, None for all."""
        return None if self.everything else self.owners

    def over(self, owner: str) -> bool:
        """Whether it covers what that owner has."""
        return self.everything or owner in self.owners


def people_of(services: Services) -> People:
    """Users and groups, from where callers come from."""
    return services.authenticator.people or NoPeople()


def kind_of(owner: str) -> SubjectKind:
    """Whether an owner of kernels is a user or a service."""
    return SubjectKind.SERVICE if owner.startswith(SERVICE_PREFIX) else SubjectKind.USER


class Authority:
    """The rules, for one request. `fresh` asks the Hub now who is in which group (before privileged acts)."""

    def __init__(self, services: Services, caller: Caller, *, fresh: bool = False) -> None:
        self.caller = caller
        self.fresh = fresh
        self.people = people_of(services)

    def require(self, scope: str) -> Power:
        """The caller's power of a scope. Raises `Forbidden` where there is none."""
        return require(self.caller, scope)

    def unlimited(self, scope: str) -> bool:
        """Whether the caller has the scope over everything."""
        return powers(self.caller, scope).everything

    # -- people

    async def reach(self, scope: str) -> Reach:
        """Whose things the scope covers. Raises `Forbidden` without any power, `Unavailable`."""
        power = require(self.caller, scope)
        if power.everything:
            return Reach(True)
        return Reach(False, power.users | await self.people.members(power.groups, fresh=self.fresh))

    async def covers(self, power: Power, user: str) -> bool:
        """Whether a power covers a user. Raises `Unavailable`."""
        if power.everything or user in power.users:
            return True
        return bool(power.groups) and user in await self.people.members(power.groups, fresh=self.fresh)

    async def person(self, scope: str, name: str | None) -> Person:
        """The user of that name, or (None, or one's own name) oneself, for which no scope is needed.

        Raises `Forbidden`, `NotFound` for who does not exist and for whom the scope does not cover alike.
        """
        caller = self.caller
        if name is None or name == owner_of(caller):
            return Person(owner_of(caller), caller.groups, caller.admin)
        missing = f"There is no user {name[:100]!r} whom you may see."
        power = require(caller, scope)
        if not await self.covers(power, name):
            raise NotFound(missing)
        if kind_of(name) is SubjectKind.SERVICE:
            return Person(name)
        found = await self.people.user(name, fresh=self.fresh)
        if found is None:
            raise NotFound(missing)
        return found

    # -- policies

    async def may_read(self) -> Callable[[Policy], bool]:
        """Which policies the caller may see: those about everyone, and those about whom their power covers."""
        power = require(self.caller, QUOTAS_READ)
        reach = await self.reach(QUOTAS_READ)

        def readable(policy: Policy) -> bool:
            if power.everything or policy.subject_kind is SubjectKind.EVERYONE:
                return True
            if policy.subject_kind is SubjectKind.GROUP:
                return power.over_group(policy.subject)
            return policy.subject_kind is SubjectKind.USER and reach.over(policy.subject)

        return readable

    def authored(self, policy: Policy) -> Policy:
        """A policy as the caller sets it: a lead's is a lead's, whatever it says."""
        return policy if self.unlimited(QUOTAS_WRITE) else replace(policy, delegated=True)

    async def check_policy(self, policy: Policy) -> None:
        """Whether the caller may set, change or delete a policy. Raises `Forbidden`, with the rule in its sentence."""
        power = require(self.caller, QUOTAS_WRITE)
        if power.everything:
            return
        whom = ", ".join((*sorted(f"group {group}" for group in power.groups), *sorted(power.users)))
        if policy.subject_kind is SubjectKind.GROUP:
            covered = power.over_group(policy.subject)
        elif policy.subject_kind is SubjectKind.USER:
            covered = await self.covers(power, policy.subject)
        else:
            covered = False
        if not covered:
            raise Forbidden(
                f"Your permission to set policies is for {whom}; this policy is about somebody else, so ask the "
                "administrator of the gateway."
            )
        if policy.subject_kind is SubjectKind.USER and policy.subject == self.caller.name:
            raise Forbidden("You may set the limits of others, but not your own; ask the administrator of the gateway.")
        if not policy.delegated:
            raise Forbidden(
                f"The policy {policy.name} is an administrator's, and your permission is for {whom}; set a lower limit "
                "beside it, or ask the administrator of the gateway."
            )

    async def may_answer(self, owner: str) -> None:
        """Whether the caller may answer a request of that user.

        Raises `NotFound` as for a request that does not exist, `Forbidden` for one's own.
        """
        power = require(self.caller, QUOTAS_WRITE)
        if power.everything:
            return
        if not await self.covers(power, owner):
            raise NotFound("There is no open request of that number that you may answer.")
        if owner == owner_of(self.caller):
            raise Forbidden("You may answer the requests of others, but not your own; ask the administrator.")
