"""Who is calling: the one type that the rest of the gateway knows of authentication."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from traitlets.config import LoggingConfigurable
from traitlets.traitlets import MetaHasTraits

if TYPE_CHECKING:
    from hub_gateway.auth.people import People

__all__ = ["AbstractMeta", "Authenticator", "Caller"]


@dataclass(frozen=True)
class Caller:
    """An authenticated caller, as the Hub (or the token file) describes the presented token.

    `server` is the single-user server that the token belongs to: "" for the default server, its
    name for a named one, None where the token is not a server's.
    """

    name: str
    kind: Literal["user", "service"] = "user"
    groups: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    admin: bool = False
    server: str | None = None


class AbstractMeta(abc.ABCMeta, MetaHasTraits):
    """Abstract methods and traits in one class."""


class Authenticator(LoggingConfigurable, metaclass=AbstractMeta):
    """Resolves tokens to callers. Implementations never block the event loop."""

    people: People | None = None
    """Users and groups of the same source; None where it knows none before they come."""

    @abc.abstractmethod
    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        """The caller of a token, or None where nobody issued it or it has expired.

        `fresh` asks the source now and not the cache (before privileged acts). Raises `Forbidden`
        for a known caller without access to this service, `TooManyRequests` for an address that
        keeps trying bad tokens, and `Unavailable` where the source cannot be asked.
        """

    async def start(self) -> None:
        """Open what needs a running event loop."""

    async def close(self) -> None:
        """Release it."""
