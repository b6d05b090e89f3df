"""The ways to act as a kernel's owner; `hub_gateway.identity.credentials` says which one serves which need."""

from __future__ import annotations

import abc
import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from traitlets import TraitError, Unicode, validate
from traitlets.config import LoggingConfigurable

from hub_gateway.auth.base import AbstractMeta
from hub_gateway.errors import Forbidden
from hub_gateway.identity import kerberos
from hub_gateway.identity.ccaches import CCACHE, CredentialStore
from hub_gateway.identity.types import Identity

__all__ = ["Credential", "CredentialProvider", "KeytabCredential", "NoCredential", "SudoCredential"]

GATEWAY = "gateway"
"""The key of the gateway's own tickets in the store; no kernel id is this word."""


@dataclass(frozen=True)
class Credential:
    """What a proxy may use for one kernel. There is no secret in it: tickets stay in `ccache`, a 0600 file."""

    kind: str
    unix_user: str | None = None
    """As whom to run on a node."""
    acts_for: str | None = None
    """For whom to act on a cluster that trusts the gateway: the user's short name."""
    principal: str | None = None
    """Whose tickets are in `ccache`."""
    ccache: Path | None = None
    ends: float | None = None
    """When the tickets end (`time.time`), unless renewed: by the gateway, but for those that have a `renew_till`."""
    life: float = 0.0
    """How long (seconds) such a ticket lives after each renewal."""
    renew_till: float | None = None
    """Until when whoever has the tickets may renew them; `ends` where that is never."""


class CredentialProvider(LoggingConfigurable, metaclass=AbstractMeta):
    """One way to act as a kernel's owner. `state` of all of them is in one `CredentialStore`."""

    kind: ClassVar[str]
    auth_state: Callable[[str], Awaitable[Mapping[str, Any]]] | None = None
    """What the Hub's authenticator remembers of a user; None without a Hub."""

    def __init__(self, *, store: CredentialStore, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.store = store

    @abc.abstractmethod
    def says(self, identity: Identity) -> str:
        """What would be used for this identity, in one sentence."""

    @abc.abstractmethod
    async def obtain(self, identity: Identity, kernel_id: str) -> Credential:
        """What a proxy may use for this kernel. Raises `Forbidden`, `Unavailable`."""

    async def attempt(self, identity: Identity) -> None:
        """Find out whether `obtain` would do now; nothing is kept. Raises what that would."""
        if why := await self.store.calls.run(self.problem):
            raise kerberos.unusable(why)

    def takes_offered(self) -> bool:
        """Whether it uses tickets that a client has brought along; they are not kept otherwise."""
        return False

    def unset(self) -> str:
        """Which options it lacks; empty where none."""
        return ""

    def problem(self) -> str:
        """Why it cannot be used as it is configured; empty if it can. May block."""
        return self.unset()


class NoCredential(CredentialProvider):
    """Nothing is needed."""

    kind = "none"

    def says(self, identity: Identity) -> str:
        return "no credential is needed."

    async def obtain(self, identity: Identity, kernel_id: str) -> Credential:
        return Credential(self.kind, identity.unix_user)


class SudoCredential(CredentialProvider):
    """The gateway becomes the user, on a node that lets it."""

    kind = "sudo"

    def says(self, identity: Identity) -> str:
        if identity.unix_user is None:
            return "the gateway's own unix user, with no credential."
        uid = "" if identity.uid is None else f" (uid {identity.uid})"
        return f"the gateway becomes the unix user {identity.unix_user}{uid}, as root or by its rule of sudo."

    async def obtain(self, identity: Identity, kernel_id: str) -> Credential:
        return Credential(self.kind, identity.unix_user)


class KeytabCredential(CredentialProvider):
    """Tickets of the gateway's own principal, with which it acts for users."""

    kind = "keytab"

    keytab = Unicode(
        help="""The keytab of the gateway's own principal. Nobody but the gateway's user (and group) may read it."""
    ).tag(config=True)
    principal = Unicode(help="The gateway's own principal, as `hub-gateway/host.example.com@EXAMPLE.COM`.").tag(
        config=True
    )

    @validate("principal")
    def _check_principal(self, proposal: Any) -> Any:
        if proposal["value"] and "@" not in proposal["value"].strip("@"):
            raise TraitError(f"{type(self).__name__}.principal needs its realm, as in hub-gateway/host@EXAMPLE.COM")
        return proposal["value"]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._one_at_a_time = asyncio.Lock()

    @property
    def tickets(self) -> kerberos.KeytabTickets:
        """The source of the gateway's own tickets."""
        return kerberos.KeytabTickets(Path(self.keytab), self.principal)

    def says(self, identity: Identity) -> str:
        user = identity.unix_user or identity.principal or "nobody"
        return f"the gateway's own tickets ({self.principal}) from its keytab, acting for {user}."

    async def obtain(self, identity: Identity, kernel_id: str) -> Credential:
        acts_for = _short(identity)
        path = await self.ccache()
        return Credential(self.kind, None, acts_for, self.principal, path, self.store.ends(GATEWAY))

    async def ccache(self) -> Path:
        """A file with the gateway's own tickets that is kept fresh: for programs that the gateway itself runs."""
        if why := await self.store.calls.run(self.problem):
            raise kerberos.unusable(why)
        async with self._one_at_a_time:
            ends = self.store.ends(GATEWAY)
            if ends is not None and ends > time.time():
                return self.store.path / GATEWAY / CCACHE
            return await self.store.keep(GATEWAY, self.tickets)

    async def token(self, service: str) -> bytes:
        """The token that opens a conversation with a service's principal, for `Authorization: Negotiate`."""
        tickets = self.tickets
        return await self.store.calls.run(lambda: kerberos.first_token(tickets, service))

    def unset(self) -> str:
        if not self.keytab or not self.principal:
            return "set KeytabCredential.keytab and KeytabCredential.principal"
        return ""

    def problem(self) -> str:
        if why := self.unset() or kerberos.missing():
            return why
        try:
            mode = Path(self.keytab).stat().st_mode
        except OSError as error:
            return f"the keytab {self.keytab} cannot be read: {error.strerror}"
        if mode & 0o007:
            return f"everybody may read the keytab {self.keytab}; take that right away (chmod o=)"
        return ""


def _short(identity: Identity) -> str:
    """The short name under which a cluster knows a user: the unix user, or the principal's first component.

    The mapper has refused principals of whom that would say too little: of other realms, and of services.
    """
    if identity.unix_user is not None:
        return identity.unix_user
    if identity.principal is None:
        raise Forbidden("Nothing says as whom your kernels run on the cluster; ask the administrator of the gateway.")
    return identity.principal.partition("@")[0]
