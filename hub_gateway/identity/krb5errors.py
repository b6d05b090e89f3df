"""What an error of the Kerberos library means, as a clause for a sentence."""

from __future__ import annotations

import re
from typing import Any

from hub_gateway.errors import Unavailable

__all__ = ["CLOCKS", "NOT_ALLOWED", "NoTicket", "code_of", "reason", "said"]

_BASE = -1765328384
"""ERROR_TABLE_BASE_krb5 of krb5.h; the numbers up to 127 beyond it are those of RFC 4120, section 7.5.9."""
NOT_ALLOWED = frozenset({12, 13})
"""KDC_ERR_POLICY and KDC_ERR_BADOPTION: what a KDC answers to whatever delegation it does not allow."""
CLOCKS = "the clocks of this machine, the KDC and the host are too far apart; run an NTP client on each"
_CLAUSES = {
    1: "the account {client} has expired at the KDC; have its administrator prolong it",
    6: "the KDC does not know {client}; compare it with the realm's principals",
    7: "the KDC does not know the service {service}; compare it with the realm's principals",
    18: "{client} is locked, or has expired, at the KDC; have its administrator look at the account",
    23: "the password of {client} has expired; it must be changed first",
    32: "the ticket of {client} has ended; a new one is needed",
    33: CLOCKS,
    37: CLOCKS,
    141: "there is no ticket of {client} for this; a new ticket is needed",
    148: CLOCKS,
    154: "krb5.conf has no KDC for the realm; name it there, or have it in DNS",
    156: "no KDC of the realm answers; see whether it is up, and whether a firewall is in between",
    181: "the keytab has no key of {client}; make a new keytab",
    195: "there is no file with tickets of {client}; a new ticket is needed",
    199: "the file with the tickets of {client} is damaged; a new ticket is needed",
    220: "the address of the KDC that krb5.conf names is not known; correct the name",
}


class NoTicket(Unavailable):
    """A ticket that is not to be had. `clause` is the reason, and what to do, for a longer sentence."""

    def __init__(self, what: str, clause: str) -> None:
        super().__init__(f"{what}: {clause}.", hint=clause)
        self.clause = clause


def code_of(error: Any) -> int:
    """The number of a `GSSError` in Kerberos's own table; some large number for one of another table."""
    return (int(error.min_code) - _BASE) & 0xFFFFFFFF


def reason(error: Any, *, client: str, service: str = "") -> str:
    """Why a call failed and what to do about it: in our words where they say more than the library's."""
    clause = _CLAUSES.get(code_of(error))
    return said(error) if clause is None else clause.format(client=client, service=service)


def said(error: Any) -> str:
    """What Kerberos itself says; before that stands always the same text of GSSAPI's."""
    return re.sub(r"^Major \(\d+\): .*, Minor \(\d+\): ", "", " ".join(str(error).split()))
