"""Tickets of a kernel's owner, for the kernel itself."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from traitlets import List, Unicode

from hub_gateway.errors import Forbidden
from hub_gateway.identity.providers import Credential, KeytabCredential
from hub_gateway.identity.s4u import ConstrainedDelegation, ServiceTickets
from hub_gateway.identity.types import Identity

__all__ = ["S4UCredential"]


class S4UCredential(KeytabCredential):
    """Tickets of the owner for some services, which the KDC gives the gateway by constrained delegation (S4U)."""

    kind: ClassVar[str] = "s4u"

    services = List(
        Unicode(),
        help="""The services for which kernels get tickets of their owner: `HTTP/rm.example.com`, `hdfs/nn.example.com`.

        A kernel reaches these as its owner, and nothing else: there is no TGT among its tickets. The KDC must let the
        gateway's principal delegate to each. Keytab and principal are those of `KeytabCredential` unless they are
        set for `S4UCredential`.
        """,
    ).tag(config=True)

    def says(self, identity: Identity) -> str:
        services = ", ".join(self.services)
        return f"tickets of {identity.principal or 'nobody'} for {services} alone, by constrained delegation (S4U)."

    async def obtain(self, identity: Identity, kernel_id: str) -> Credential:
        await super().attempt(identity)
        path = await self.store.keep(kernel_id, self._source(identity))
        return Credential(self.kind, identity.unix_user, None, identity.principal, path, self.store.ends(kernel_id))

    async def attempt(self, identity: Identity) -> None:
        await super().attempt(identity)
        source = self._source(identity)
        await self.store.calls.run(lambda: source.delegation.tickets(source.principal, source.services))

    def _source(self, identity: Identity) -> ServiceTickets:
        if identity.principal is None:
            raise Forbidden(
                "Nothing says whose Kerberos tickets your kernels get; ask the administrator of the gateway.",
                hint="the rule of IdentityMapper names no principal",
            )
        return ServiceTickets(
            ConstrainedDelegation(Path(self.keytab), self.principal), identity.principal, tuple(self.services)
        )

    def unset(self) -> str:
        return super().unset() or ("" if self.services else "set S4UCredential.services")
