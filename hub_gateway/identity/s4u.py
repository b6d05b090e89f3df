"""Constrained delegation (S4U, [MS-SFU]): tickets of a person for services that the KDC lets the gateway reach.

The gateway asks the KDC for a ticket of the person for itself (S4U2Self, the evidence), and with that for tickets for
the services (S4U2Proxy). What the library then holds has the gateway's own TGT in it: whoever has that is everybody.
So it never leaves this module but as the credentials of a login, or as a file that was put together from the tickets
for the services. Everything here blocks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub_gateway.errors import Forbidden
from hub_gateway.identity import ccachefile
from hub_gateway.identity.ccachefile import FORWARDABLE, Ccache, Ticket
from hub_gateway.identity.kerberos import KeytabTickets, gssapi
from hub_gateway.identity.krb5errors import NOT_ALLOWED, NoTicket, code_of, reason
from hub_gateway.identity.names import parse_principal, shown

__all__ = ["ConstrainedDelegation", "ServiceTickets", "person"]

MEMORY = "/dev/shm"  # noqa: S108 (what is made in it is a directory of ours)


def person(text: str, realm: str, own: str = "") -> str:
    """The principal of a person, with its realm. Raises `Forbidden` for everything else.

    The KDC would as well give the gateway tickets of services: of hosts, of HDFS, of itself.
    """
    try:
        found = parse_principal(text, realm)
    except ValueError as error:
        raise Forbidden(
            f"The gateway gets no tickets of {shown(text)}, for {error}; ask the administrator of the gateway."
        ) from error
    if len(found.components) != 1 or str(found).lower() == own.lower():
        raise Forbidden(
            f"The gateway gets no tickets of {shown(text)}, which is a service's principal and no person's; ask the "
            "administrator of the gateway."
        )
    return str(found)


class ConstrainedDelegation:
    """The gateway's right to reach services as people, with the keytab of its own principal."""

    def __init__(self, keytab: Path, principal: str) -> None:
        self.principal = principal
        self.realm = principal.rpartition("@")[2]
        self._tickets = KeytabTickets(keytab, principal)

    def credentials(self, principal: str, services: Sequence[Any]) -> Any:
        """Credentials of a person that reach these services (GSSAPI names), and hold the tickets for them already.

        Raises `Forbidden` where it is no person, and `NoTicket` with the reason.
        """
        name = person(principal, self.realm, self.principal)
        found = self._evidence(name)
        for service in services:
            try:
                gssapi().SecurityContext(name=service, creds=found, usage="initiate").step()
            except gssapi().exceptions.GSSError as error:
                target = shown_service(service)
                raise NoTicket(self._what(name, target), self._why_not(error, found, name, service)) from error
        return found

    def tickets(self, principal: str, services: Sequence[str]) -> tuple[Ccache, list[Ticket]]:
        """A person's cache, and in it the tickets for these services (principals), which alone may be handed on."""
        full = [service if "@" in service else f"{service}@{self.realm}" for service in services]
        names = [gssapi().Name(service, gssapi().NameType.kerberos_principal) for service in full]
        whole = _cache_of(self.credentials(principal, names))
        wanted = set(full)
        found = [one for one in whole.tickets if one.server in wanted and one.client == whole.principal]
        if missing := wanted - {one.server for one in found}:
            raise NoTicket(self._what(principal, ", ".join(sorted(missing))), "the KDC gave one for another name")
        return whole, found

    def _evidence(self, name: str) -> Any:
        try:
            gateway = self._tickets.acquire(usage="both")
            return gateway.impersonate(gssapi().Name(name, gssapi().NameType.kerberos_principal))
        except gssapi().exceptions.GSSError as error:
            raise NoTicket(self._what(name, self.principal), reason(error, client=name)) from error

    def _why_not(self, error: Any, credentials: Any, name: str, service: Any) -> str:
        """A KDC gives one and the same answer for all that is not allowed; the evidence tells what it is."""
        target = shown_service(service)
        if code_of(error) not in NOT_ALLOWED:
            return reason(error, client=name, service=target)
        if self._forwardable(credentials):
            return (
                f"the KDC does not let {self.principal} delegate to {target}; add it to krbAllowedToDelegateTo "
                "(msDS-AllowedToDelegateTo in Active Directory) of that principal, in a KDC that has constrained "
                "delegation: MIT's own database (db2) has none, its LDAP back end, FreeIPA and Heimdal have"
            )
        if self._may_impersonate(service):
            return (
                f"the KDC has {name} marked as somebody for whom nobody may act (-allow_forwardable, or sensitive and "
                "a member of Protected Users in Active Directory); take that away, or have this user's kernels run "
                "without the user's tickets"
            )
        return (
            f"the KDC does not let {self.principal} act for users; set ok_to_auth_as_delegate of that principal "
            "(protocol transition, TrustedToAuthForDelegation in Active Directory)"
        )

    def _forwardable(self, credentials: Any) -> bool:
        """Whether the evidence can be passed on."""
        tickets = _cache_of(credentials).tickets
        return any(one.server == self.principal and one.flags & FORWARDABLE for one in tickets)

    def _may_impersonate(self, service: Any) -> bool:
        """Whether anybody's evidence could be passed on: that of a service, which is looked at and thrown away."""
        try:
            text = str(service.canonicalize(gssapi().MechType.kerberos))
            text += self.realm if text.endswith("@") else ""  # of hosts whose realm krb5.conf does not tell
            name = gssapi().Name(text, gssapi().NameType.kerberos_principal)
            return self._forwardable(self._tickets.acquire(usage="both").impersonate(name))
        except gssapi().exceptions.GSSError:
            return False

    def _what(self, name: str, target: str) -> str:
        return f"The gateway gets no ticket of {name} for {target}"


class ServiceTickets:
    """A person's tickets for some services and nothing else: a source for `hub_gateway.identity.ccaches`."""

    def __init__(self, delegation: ConstrainedDelegation, principal: str, services: Sequence[str]) -> None:
        self.delegation = delegation
        self.principal = principal
        self.services = services

    def fetch(self, ccache: Path) -> float:
        """New tickets in a new file; when the first of them ends. Raises `Forbidden`, `NoTicket`."""
        whole, tickets = self.delegation.tickets(self.principal, self.services)
        ccache.touch(0o600)
        ccache.write_bytes(whole.only(tickets))
        return float(min(ticket.ends for ticket in tickets))


def shown_service(name: Any) -> str:
    """A service's principal, for a sentence."""
    return str(name).replace("@", "/", 1) if "/" not in str(name) else str(name)


def _cache_of(credentials: Any) -> Ccache:
    """What is in credentials. The library writes them to files only: this one is ours alone, in memory where possible.

    It has the gateway's own TGT in it for that moment, and a process that is killed just then leaves it.
    """
    with tempfile.TemporaryDirectory(
        prefix="hub-gateway-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None
    ) as directory:
        path = Path(directory) / "ccache"
        credentials.store(store={"ccache": f"FILE:{path}"}, overwrite=True, set_default=True)
        return ccachefile.parse(path.read_bytes())
