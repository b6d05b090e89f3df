"""The Hub scopes that this gateway knows, as data: the Hub's configuration and the documentation are made from it.

They are custom scopes of JupyterHub (they begin with `custom:`), to be defined in `c.JupyterHub.custom_scopes`
and granted by `c.JupyterHub.load_roles`; each may be filtered by `!user=` or `!group=`. A browser's token carries
only those that the service lists in `oauth_client_allowed_scopes` too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hub_gateway.auth.base import Caller

__all__ = ["KERNELS_READ", "KERNELS_STOP", "SCOPES", "Scope", "custom_scopes", "granted"]


@dataclass(frozen=True)
class Scope:
    """One scope; it includes its `subscopes`."""

    name: str
    description: str
    subscopes: tuple[str, ...] = ()


KERNELS_READ = "custom:hub-gateway:kernels:read"
KERNELS_STOP = "custom:hub-gateway:kernels:stop"

SCOPES: tuple[Scope, ...] = (
    Scope(KERNELS_READ, "See everybody's remote kernels"),
    Scope(KERNELS_STOP, "Stop everybody's remote kernels"),
)


def custom_scopes() -> dict[str, dict[str, object]]:
    """The value for `c.JupyterHub.custom_scopes`."""
    found: dict[str, dict[str, object]] = {}
    for scope in SCOPES:
        found[scope.name] = {"description": scope.description}
        if scope.subscopes:
            found[scope.name]["subscopes"] = list(scope.subscopes)
    return found


def granted(caller: Caller, scope: str, *, user: str, groups: Iterable[str] = ()) -> bool:
    """Whether the caller holds a scope for something of `user`, who is in `groups`.

    The Hub expands subscopes before it tells us, so a plain comparison is enough; filters are compared by text:
    `scope`, `scope!user=<user>`, `scope!group=<one of the groups>`.
    """
    wanted = {scope, f"{scope}!user={user}", *(f"{scope}!group={group}" for group in groups)}
    return not caller.scopes.isdisjoint(wanted)
