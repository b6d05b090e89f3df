"""What the gateway does with Kerberos itself, by python-gssapi: all of it blocks, and none of it at import.

The package `gssapi` is of the optional dependencies `kerberos`; without it every call raises `Unavailable`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hub_gateway.errors import Unavailable

__all__ = ["KeytabTickets", "first_token", "missing"]


def missing() -> str:
    """Why Kerberos cannot be used here; empty if it can."""
    try:
        import gssapi  # noqa: F401
    except ImportError as error:
        return f"the gateway's optional part for Kerberos is not usable: pip install 'hub-gateway[kerberos]' ({error})"
    return ""


def _gssapi() -> Any:
    if why := missing():
        raise Unavailable("The gateway cannot get Kerberos tickets; ask its administrator.", hint=why)
    import gssapi

    return gssapi


class KeytabTickets:
    """Tickets of one principal, whose keytab is at hand: a source for `hub_gateway.identity.ccaches`."""

    def __init__(self, keytab: Path, principal: str) -> None:
        self.keytab = keytab
        self.principal = principal

    def fetch(self, ccache: Path) -> float:
        """A new ticket-granting ticket in a new file; when it ends (seconds since the epoch). Raises `Unavailable`."""
        credentials = self._acquire(f"FILE:{ccache}")
        return time.time() + float(credentials.lifetime)

    def acquire(self) -> Any:
        """Credentials for one use. Acquired anew each time: held ones end, these are renewed at half their life."""
        return self._acquire(f"MEMORY:hub-gateway:{self.keytab}:{self.principal}")

    def _acquire(self, ccache: str) -> Any:
        gssapi = _gssapi()
        if not self.keytab.is_file():
            raise Unavailable(
                "The gateway's keytab is not there, so it cannot get Kerberos tickets; ask its administrator.",
                hint=f"there is no file {self.keytab}",
            )
        try:
            name = gssapi.Name(self.principal, gssapi.NameType.kerberos_principal)
            store = {"client_keytab": f"FILE:{self.keytab}", "ccache": ccache}
            made = gssapi.Credentials(name=name, usage="initiate", store=store)
            if not made.lifetime:  # asking makes the library get a ticket
                raise Unavailable("The gateway's Kerberos ticket has ended; try again in a minute.")
            return made
        except gssapi.exceptions.GSSError as error:
            raise Unavailable(
                "The gateway cannot get a Kerberos ticket at the moment; try again in a minute, or tell its "
                "administrator.",
                hint=f"{self.principal} with {self.keytab}: {' '.join(str(error).split())}",
            ) from error


def first_token(tickets: KeytabTickets, service: str) -> bytes:
    """The token that opens a conversation with a service (a principal), for `Authorization: Negotiate`."""
    gssapi = _gssapi()
    credentials = tickets.acquire()
    try:
        target = gssapi.Name(service, gssapi.NameType.kerberos_principal)
        token: bytes | None = gssapi.SecurityContext(name=target, creds=credentials, usage="initiate").step()
    except gssapi.exceptions.GSSError as error:
        raise Unavailable(
            "The gateway cannot get a Kerberos ticket for a service at the moment; try again in a minute, or tell its "
            "administrator.",
            hint=f"{tickets.principal} for {service}: {' '.join(str(error).split())}",
        ) from error
    return token or b""
