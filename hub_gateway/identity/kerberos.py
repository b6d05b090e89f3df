"""What the gateway does with Kerberos itself, by python-gssapi: all of it blocks, and none of it at import.

The package `gssapi` is of the optional dependencies `kerberos`; without it every call raises `Unavailable`.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from hub_gateway.errors import Unavailable
from hub_gateway.identity.krb5errors import reason, said

__all__ = ["KeytabTickets", "first_token", "gssapi", "in_default_realm", "missing", "unusable"]


def missing() -> str:
    """Why Kerberos cannot be used here; empty if it can."""
    try:
        import gssapi  # noqa: F401
    except ImportError as error:
        return f"the gateway's optional part for Kerberos is not usable: pip install 'hub-gateway[kerberos]' ({error})"
    return ""


def unusable(why: str) -> Unavailable:
    """What a user is told where no tickets can be had at all, for a reason that is the administrator's affair."""
    return Unavailable("The gateway cannot get Kerberos tickets; ask its administrator.", hint=why)


def gssapi() -> Any:
    """The module gssapi, which is optional. Raises `Unavailable`."""
    if why := missing():
        raise unusable(why)
    return importlib.import_module("gssapi")


def in_default_realm(name: str) -> str:
    """A principal with its realm: where it has none, the default one of krb5.conf, if there is one."""
    if "@" in name or missing():
        return name
    try:
        kerberos_principal = gssapi().NameType.kerberos_principal
        return str(gssapi().Name(name, kerberos_principal).canonicalize(gssapi().MechType.kerberos))
    except gssapi().exceptions.GSSError:
        return name


class KeytabTickets:
    """Tickets of one principal, whose keytab is at hand: a source for `hub_gateway.identity.ccaches`."""

    def __init__(self, keytab: Path, principal: str) -> None:
        self.keytab = keytab
        self.principal = principal

    def fetch(self, ccache: Path) -> float:
        """A new ticket-granting ticket in a new file; when it ends (seconds since the epoch). Raises `Unavailable`."""
        credentials = self._acquire(f"FILE:{ccache}")
        return time.time() + float(credentials.lifetime)

    def acquire(self, usage: str = "initiate") -> Any:
        """Credentials for one use. Acquired anew each time: held ones end, these are renewed at half their life."""
        return self._acquire(f"MEMORY:hub-gateway:{usage}:{self.keytab}:{self.principal}", usage)

    def _acquire(self, ccache: str, usage: str = "initiate") -> Any:
        library = gssapi()
        if not self.keytab.is_file():
            raise Unavailable(
                "The gateway's keytab is not there, so it cannot get Kerberos tickets; ask its administrator.",
                hint=f"there is no file {self.keytab}",
            )
        try:
            name = library.Name(self.principal, library.NameType.kerberos_principal)
            store = {"client_keytab": f"FILE:{self.keytab}", "ccache": ccache}
            if usage == "both":  # without it no ticket of somebody else for ourselves can be taken
                store["keytab"] = f"FILE:{self.keytab}"
            made = library.Credentials(name=name, usage=usage, store=store)
            if not made.lifetime:  # asking makes the library get a ticket
                raise Unavailable("The gateway's Kerberos ticket has ended; try again in a minute.")
            return made
        except library.exceptions.GSSError as error:
            raise Unavailable(
                "The gateway cannot get a Kerberos ticket at the moment; try again in a minute, or tell its "
                "administrator.",
                hint=f"{self.principal} with {self.keytab}: {reason(error, client=self.principal)}",
            ) from error


def first_token(tickets: KeytabTickets, service: str) -> bytes:
    """The token that opens a conversation with a service (a principal), for `Authorization: Negotiate`."""
    library = gssapi()
    credentials = tickets.acquire()
    try:
        target = library.Name(service, library.NameType.kerberos_principal)
        token: bytes | None = library.SecurityContext(name=target, creds=credentials, usage="initiate").step()
    except library.exceptions.GSSError as error:
        raise Unavailable(
            "The gateway cannot get a Kerberos ticket for a service at the moment; try again in a minute, or tell its "
            "administrator.",
            hint=f"{tickets.principal} for {service}: {said(error)}",
        ) from error
    return token or b""
