"""A kernel's owner's own TGT: from the Hub, from a file, or brought along by the client.

The gateway hands a copy on and keeps none. Whose it is, is what stands in it, and it must be the principal of the
mapping: nobody gets a ticket of somebody else, wherever it comes from.
"""

from __future__ import annotations

import base64
import binascii
import os
import pwd
import stat
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar

from traitlets import Bool, Unicode

from hub_gateway.errors import Forbidden
from hub_gateway.identity import ccachefile, kerberos
from hub_gateway.identity.ccachefile import RENEWABLE, Ccache, Ticket
from hub_gateway.identity.krb5errors import NoTicket
from hub_gateway.identity.names import hub_name_problem, shown
from hub_gateway.identity.providers import Credential, CredentialProvider
from hub_gateway.identity.types import Identity

__all__ = ["UserTgtCredential"]

MAX_BYTES = 1024 * 1024
LEAST_SECONDS = 5.0
"""A ticket that ends sooner is of no use to a kernel that has yet to start."""


class UserTgtCredential(CredentialProvider):
    """A copy of the owner's own TGT, with which a kernel reaches whatever its owner reaches."""

    kind: ClassVar[str] = "user_tgt"

    auth_state_key = Unicode(
        help="""The key of a user's auth_state on the Hub that has a credential cache of type FILE, in base64.

        An authenticator that logs users in by SPNEGO with delegation, or by their password, can put it there. The
        gateway's role on the Hub then needs the scope `admin:auth_state`.
        """
    ).tag(config=True)
    ccache_file = Unicode(
        help="""A file with a user's tickets: `{user}` is the name at the Hub, `{unix_user}` and `{uid}` the unix user.

        Example: `c.UserTgtCredential.ccache_file = "/run/hub-gateway/tickets/{user}/ccache"`. It must be a file (no
        link) of that unix user, of the gateway's or of root, and nothing of it may be open to everybody.
        """
    ).tag(config=True)
    accept_offered = Bool(
        False,
        help="""Whether clients may bring tickets along: KERNEL_KRB5_CCACHE, a credential cache of type FILE in base64.

        It is taken out of the environment, whether it is accepted or not. Where it is, it is kept encrypted with the
        kernel's plan, for another start.
        """,
    ).tag(config=True)

    def says(self, identity: Identity) -> str:
        return f"a copy of the TGT of {identity.principal or 'nobody'}, from {' or '.join(self._places(identity))}."

    def takes_offered(self) -> bool:
        return self.accept_offered

    def unset(self) -> str:
        if not (self.auth_state_key or self.ccache_file or self.accept_offered):
            return "set UserTgtCredential.auth_state_key, ccache_file or accept_offered"
        return ""

    async def obtain(self, identity: Identity, kernel_id: str) -> Credential:
        ccache, ticket = await self.ticket(identity)
        path = await self.store.keep(kernel_id, _Copy(ccache.only([ticket]), ticket.ends), renew=False)
        renewable = bool(ticket.flags & RENEWABLE)
        return Credential(
            self.kind,
            identity.unix_user,
            None,
            ccache.principal,
            path,
            float(ticket.ends),
            float(ticket.ends - ticket.begins),
            float(max(ticket.renew_till, ticket.ends) if renewable else ticket.ends),
        )

    async def attempt(self, identity: Identity) -> None:
        asked = self.ccache_file or identity.offered or (self.auth_state_key and self.auth_state is not None)
        if asked:  # else it depends on what a client will bring, or on what the running gateway hears of the Hub
            await self.ticket(identity)

    async def ticket(self, identity: Identity) -> tuple[Ccache, Ticket]:
        """The owner's TGT, in the cache that it comes from. Raises `Forbidden`, `NoTicket` with all reasons."""
        if why := self.unset():
            raise kerberos.unusable(why)
        if identity.principal is None:
            raise Forbidden(
                "Nothing says whose Kerberos tickets your kernels get; ask the administrator of the gateway.",
                hint="the rule of IdentityMapper names no principal",
            )
        reasons = []
        async for place, found in self._found(identity):
            if isinstance(found, str):
                reasons.append(found)
                continue
            try:
                return _usable(found, identity.principal)
            except ValueError as error:
                reasons.append(f"{place} {error}")
        raise NoTicket(
            f"There is no Kerberos ticket of {identity.principal} for the kernel",
            f"{'; '.join(reasons)}; get a new one, as by logging in to the Hub again, or by kinit",
        )

    async def _found(self, identity: Identity) -> AsyncIterator[tuple[str, bytes | str]]:
        """What there is, place by place: a credential cache, or why there is none."""
        if self.accept_offered:
            place = "what the client has brought along"
            yield place, _decoded(identity.offered, place) if identity.offered else "the client has brought none along"
        if self.auth_state_key:
            place = "the Hub's auth_state"
            state = await self.auth_state(identity.hub_user) if self.auth_state is not None else {}
            text = state.get(self.auth_state_key)
            given = isinstance(text, str) and text
            yield place, _decoded(str(text), place) if given else f"{place} has none ({self.auth_state_key})"
        if self.ccache_file:
            identity = await self.store.calls.run(lambda: _with_uid(identity))
            path = self._path(identity)
            yield str(path), await self.store.calls.run(lambda: _read(path, identity.uid))

    def _places(self, identity: Identity) -> list[str]:
        found = ["the client"] if self.accept_offered else []
        found += [f"the Hub's auth_state ({self.auth_state_key})"] if self.auth_state_key else []
        if not self.ccache_file:
            return found
        try:
            return [*found, str(self._path(identity))]
        except Forbidden:  # it is said where the ticket is wanted
            return [*found, self.ccache_file]

    def _path(self, identity: Identity) -> Path:
        """The file of a user. Raises `Forbidden` for a name that is none for a file."""
        if hub_name_problem(identity.hub_user) or identity.hub_user in (".", ".."):
            raise Forbidden(
                f"There is no file with tickets of {shown(identity.hub_user)}, whose name is none for a file."
            )
        uid = "" if identity.uid is None else str(identity.uid)
        values = {"{user}": identity.hub_user, "{unix_user}": identity.unix_user or "", "{uid}": uid}
        text = self.ccache_file
        for name, value in values.items():
            text = text.replace(name, value)
        return Path(text)


@dataclass(frozen=True)
class _Copy:
    """What was found, for the file from which it is handed on."""

    data: bytes
    ends: float

    def fetch(self, ccache: Path) -> float:
        ccache.touch(0o600)
        ccache.write_bytes(self.data)
        return self.ends


def _usable(data: bytes, principal: str) -> tuple[Ccache, Ticket]:
    """The TGT in a cache of that principal. Raises `ValueError` with the reason, as the end of a clause."""
    try:
        found = ccachefile.parse(data)
    except ValueError as error:
        raise ValueError(f"is damaged, for {error}") from error
    if found.principal != principal:
        raise ValueError(f"has tickets of {shown(found.principal)}, not of {principal}")
    realm = principal.rpartition("@")[2]
    granting = [one for one in found.tickets if one.server == f"krbtgt/{realm}@{realm}" and one.client == principal]
    if not granting:
        raise ValueError("has no TGT")
    best = max(granting, key=lambda one: one.ends)
    if best.ends < time.time() + LEAST_SECONDS:
        raise ValueError(
            f"has a ticket that ended at {datetime.fromtimestamp(best.ends, timezone.utc):%Y-%m-%d %H:%M} UTC"
        )
    return found, best


def _decoded(text: str, place: str) -> bytes | str:
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # programs write it in lines
    except (ValueError, binascii.Error):
        return f"{place} is not in base64"


def _with_uid(identity: Identity) -> Identity:
    """With the uid that the unix user has on the gateway's node, where there is one."""
    if identity.uid is not None or identity.unix_user is None:
        return identity
    try:
        return replace(identity, uid=pwd.getpwnam(identity.unix_user).pw_uid)
    except KeyError:
        return identity


def _read(path: Path, uid: int | None) -> bytes | str:
    """A file of somebody who may say what is in it, or why it is not used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in {0, os.geteuid(), uid}:
            return f"{path} is no file of the right user"
        if facts.st_mode & 0o007:
            return f"{path} is open to everybody (chmod o=)"
        return file.read(MAX_BYTES)
