"""The Hub scopes that this gateway knows, as data: the Hub's configuration and the documentation are made from it.

They are custom scopes of JupyterHub (they begin with `custom:`), to be defined in `c.JupyterHub.custom_scopes`
and granted by `c.JupyterHub.load_roles`; each may be filtered by `!user=` or `!group=`. A browser's token carries
only those that the service lists in `oauth_client_allowed_scopes` too.

What a filter covers is JupyterHub's rule: `!user=bob` is bob, `!group=analysts` is the group and who is in it *now*,
by the Hub, also where a kernel was started before its owner came or left. Only the ledger is an exception: it bills
the groups of the launch, and so a lead sees there what was billed to the group.

Powers come from the scopes of the presented token alone. That its owner is an admin of the Hub gives none: a token
that an admin's notebook server holds must not open everybody's kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hub_gateway.auth.base import Caller
from hub_gateway.errors import Forbidden, NotFound

__all__ = [
    "ADMIN",
    "AUDIT_READ",
    "IDENTITY_READ",
    "IDENTITY_WRITE",
    "KERNELS_READ",
    "KERNELS_STOP",
    "LEDGER_WRITE",
    "MAINTENANCE_WRITE",
    "QUOTAS_READ",
    "QUOTAS_WRITE",
    "SCOPES",
    "SERVICE_SCOPES",
    "USAGE_READ",
    "Power",
    "Scope",
    "client_scopes",
    "custom_scopes",
    "granted",
    "powers",
    "require",
    "scope_table",
]


@dataclass(frozen=True)
class Scope:
    """One scope; it includes its `subscopes`. `filtered`: whether a `!user=` or `!group=` on it means anything."""

    name: str
    description: str
    subscopes: tuple[str, ...] = ()
    filtered: bool = True


KERNELS_READ = "custom:hub-gateway:kernels:read"
KERNELS_STOP = "custom:hub-gateway:kernels:stop"
QUOTAS_READ = "custom:hub-gateway:quotas:read"
QUOTAS_WRITE = "custom:hub-gateway:quotas:write"
USAGE_READ = "custom:hub-gateway:usage:read"
AUDIT_READ = "custom:hub-gateway:audit:read"
IDENTITY_READ = "custom:hub-gateway:identity:read"
IDENTITY_WRITE = "custom:hub-gateway:identity:write"
LEDGER_WRITE = "custom:hub-gateway:ledger:write"
MAINTENANCE_WRITE = "custom:hub-gateway:maintenance:write"
ADMIN = "custom:hub-gateway:admin"

_PARTS: tuple[Scope, ...] = (
    Scope(KERNELS_READ, "See everybody's remote kernels"),
    Scope(KERNELS_STOP, "Stop everybody's remote kernels", (KERNELS_READ,)),
    Scope(QUOTAS_READ, "See policies, the queue, requests for more, and what everybody holds of their limits"),
    Scope(QUOTAS_WRITE, "Set policies, answer requests for more and give temporary grants", (QUOTAS_READ,)),
    Scope(USAGE_READ, "See reports of what everybody used and what it cost"),
    Scope(AUDIT_READ, "Read the audit trail, and check that it is whole", filtered=False),
    Scope(IDENTITY_READ, "See as which principal and unix user everybody's kernels run, and why"),
    Scope(IDENTITY_WRITE, "Release a principal or unix user from the user who has it", (IDENTITY_READ,)),
    Scope(LEDGER_WRITE, "Set prices, close months and correct the ledger", (USAGE_READ,), filtered=False),
    Scope(MAINTENANCE_WRITE, "Turn maintenance mode on and off", filtered=False),
)
SCOPES: tuple[Scope, ...] = (
    Scope(ADMIN, "Everything that an administrator of the gateway does", tuple(part.name for part in _PARTS)),
    *_PARTS,
)

SERVICE_SCOPES: tuple[str, ...] = (
    "users:activity",
    "list:users",
    "read:users:name",
    "read:users:groups",
    "read:users:activity",
    "list:groups",
    "read:groups",
)
"""What the gateway's own role at the Hub holds: activity of users; people and groups, with their properties."""


def custom_scopes() -> dict[str, dict[str, Any]]:
    """The value for `c.JupyterHub.custom_scopes`."""
    found: dict[str, dict[str, Any]] = {}
    for scope in SCOPES:
        found[scope.name] = {"description": scope.description}
        if scope.subscopes:
            found[scope.name]["subscopes"] = list(scope.subscopes)
    return found


def client_scopes() -> list[str]:
    """The value for `oauth_client_allowed_scopes` of the service: the most that a browser's login may carry."""
    return [scope.name for scope in SCOPES]


def scope_table() -> str:
    """All scopes as a table in Markdown, for the documentation."""
    lines = ["| scope | what it allows | includes | filters |", "| --- | --- | --- | --- |"]
    for scope in SCOPES:
        included = ", ".join(f"`{name.rpartition('hub-gateway:')[2]}`" for name in scope.subscopes)
        filters = "`!user=`, `!group=`" if scope.filtered else "none"
        lines.append(f"| `{scope.name}` | {scope.description} | {included or '-'} | {filters} |")
    return "\n".join(lines) + "\n"


def _including() -> dict[str, frozenset[str]]:
    """By scope: those that include it, itself among them."""
    below = {scope.name: scope.subscopes for scope in SCOPES}

    def closure(name: str) -> set[str]:
        return {name}.union(*(closure(sub) for sub in below[name]))

    reach = {name: closure(name) for name in below}
    return {name: frozenset(other for other, names in reach.items() if name in names) for name in below}


_INCLUDING = _including()
_FILTERED = {scope.name: scope.filtered for scope in SCOPES}


@dataclass(frozen=True)
class Power:
    """What a caller may do of one scope: to everything, or to these groups (and who is in them) and users.

    It is false where there is none at all.
    """

    scope: str
    everything: bool = False
    groups: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.everything or bool(self.groups or self.users)

    def over(self, user: str, groups: Iterable[str] = ()) -> bool:
        """Whether it covers a user, who is in `groups`."""
        return self.everything or user in self.users or not self.groups.isdisjoint(groups)

    def over_group(self, group: str) -> bool:
        """Whether it covers a whole group."""
        return self.everything or group in self.groups


def powers(caller: Caller, scope: str) -> Power:
    """What a caller may do of a scope.

    Scopes that include it count with their filters, whether or not the Hub has listed it too. A filter of
    another kind, or on a scope that cannot be filtered, gives nothing.
    """
    everything, groups, users = False, set(), set()
    for held in caller.scopes:
        name, mark, filtered = held.partition("!")
        if name not in _INCLUDING[scope]:
            continue
        kind, equals, value = filtered.partition("=")
        if not mark:
            everything = True
        elif not _FILTERED[scope]:
            continue
        elif kind == "group" and value:
            groups.add(value)
        elif kind == "user" and (value or not equals) and caller.kind == "user":
            # `!user` alone is the token's owner.
            users.add(value or caller.name)
        elif kind == "user" and value:
            users.add(value)
    return Power(scope, everything, frozenset(groups), frozenset(users))


def require(
    caller: Caller,
    scope: str,
    *,
    user: str | None = None,
    groups: Iterable[str] = (),
    group: str | None = None,
    missing: str = "There is nothing of that name that you may see or change.",
) -> Power:
    """The caller's power, if it covers the user (who is in `groups`), or the group, or (without either) anything.

    Raises `Forbidden` where the caller has no power at all, which says nothing of what there is, and `NotFound` with
    the sentence `missing`, which must be the one for what does not exist, where it does not reach that far.
    """
    power = powers(caller, scope)
    if not power:
        raise Forbidden(
            f"This needs the permission {scope}, which your token does not have; ask the administrator of the Hub "
            "for it, or use a token that has it."
        )
    if (user is not None and not power.over(user, groups)) or (group is not None and not power.over_group(group)):
        raise NotFound(missing)
    return power


def granted(caller: Caller, scope: str, *, user: str, groups: Iterable[str] = ()) -> bool:
    """Whether the caller holds a scope for something of `user`, who is in `groups`."""
    return powers(caller, scope).over(user, groups)
