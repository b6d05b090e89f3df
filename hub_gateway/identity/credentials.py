"""How proxies get what they need to act as a kernel's owner.

A proxy declares an `IdentityNeed`; a `CredentialProvider` serves one or several of them:

    none         nothing: kernels are the gateway's own, or the cluster's
    sudo         UNIX_USER: the gateway becomes the unix user, as root or by a rule of sudo for its launcher; it holds
                 no secret of theirs
    keytab       PROXY_USER: the gateway has tickets of its own, by its keytab, and says for whom it acts (Hadoop's
                 `doAs` and `--proxy-user`); these tickets never reach a kernel
    s4u          SERVICE_TICKET: tickets of the owner for the services that are listed, by constrained delegation
    user_tgt     USER_TGT: a copy of the owner's own TGT, from the Hub, a file, or the client

A site that gets them in another way brings a provider of its own by `Credentials.providers`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, ClassVar

from traitlets import Dict, Type, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.errors import Forbidden
from hub_gateway.identity.ccaches import CredentialStore
from hub_gateway.identity.delegated import S4UCredential
from hub_gateway.identity.names import lower
from hub_gateway.identity.providers import (
    Credential,
    CredentialProvider,
    KeytabCredential,
    NoCredential,
    SudoCredential,
)
from hub_gateway.identity.types import Identity
from hub_gateway.identity.usertgt import UserTgtCredential
from hub_gateway.proxies.base import IdentityNeed

__all__ = [
    "Credential",
    "CredentialProvider",
    "Credentials",
    "KeytabCredential",
    "NoCredential",
    "S4UCredential",
    "SudoCredential",
    "UserTgtCredential",
]


class Credentials(LoggingConfigurable):
    """The providers of this gateway, by need, and the store of their tickets. `auth_state` is the Hub's, by user."""

    providers = Dict(
        value_trait=Type(klass=CredentialProvider),
        key_trait=Unicode(),
        help="""Which provider serves which need of a proxy, where it is not the usual one.

        Needs are `none`, `unix_user`, `service_ticket`, `user_tgt` and `proxy_user`.
        Example: `c.Credentials.providers = {"service_ticket": "our_site.VaultCredential"}`
        """,
    ).tag(config=True)

    USUAL: ClassVar[dict[IdentityNeed, type[CredentialProvider]]] = {
        IdentityNeed.NONE: NoCredential,
        IdentityNeed.UNIX_USER: SudoCredential,
        IdentityNeed.PROXY_USER: KeytabCredential,
        IdentityNeed.SERVICE_TICKET: S4UCredential,
        IdentityNeed.USER_TGT: UserTgtCredential,
    }

    def __init__(
        self,
        *,
        store: CredentialStore,
        auth_state: Callable[[str], Awaitable[Mapping[str, Any]]] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        self.store = store
        self.auth_state = auth_state
        self._made: dict[IdentityNeed, CredentialProvider] = {}

    def provider(self, need: IdentityNeed) -> CredentialProvider | None:
        """Who serves a need; None where nobody does."""
        if need not in self._made:
            made = self.providers.get(need.value) or self.USUAL.get(need)
            if made is None:
                return None
            self._made[need] = made(parent=self, store=self.store)
            self._made[need].auth_state = self.auth_state
        return self._made[need]

    @property
    def own_principals(self) -> frozenset[str]:
        """The gateway's own principals, which are nobody else's, in lower case."""
        found = [self.provider(need) for need in IdentityNeed]
        principals = [one.principal for one in found if isinstance(one, KeytabCredential)]
        return frozenset(lower(principal) for principal in principals if principal)

    def says(self, identity: Identity, need: IdentityNeed) -> tuple[bool, str]:
        """Whether a need is served, and what would be used for this identity."""
        provider = self.provider(need)
        if provider is None:
            return False, f"nothing serves the need {need.value}; see Credentials.providers."
        unset = provider.unset()
        return not unset, unset or provider.says(identity)

    async def obtain(self, identity: Identity, need: IdentityNeed, kernel_id: str) -> Credential:
        """What a proxy may use for this kernel. Raises `Forbidden`, `Unavailable`."""
        return await self._serving(need).obtain(identity, kernel_id)

    async def attempt(self, identity: Identity, need: IdentityNeed) -> None:
        """Find out whether `obtain` would do now; nothing is kept. Raises what that would."""
        await self._serving(need).attempt(identity)

    def takes_offered(self, need: IdentityNeed) -> bool:
        """Whether tickets that a client has brought along are used for a need."""
        provider = self.provider(need)
        return provider is not None and provider.takes_offered()

    def problem(self, need: IdentityNeed) -> str:
        """Why a need cannot be served as this is configured; empty if it can. May block."""
        provider = self.provider(need)
        return f"Credentials.providers has nothing for {need.value}" if provider is None else provider.problem()

    def _serving(self, need: IdentityNeed) -> CredentialProvider:
        provider = self.provider(need)
        if provider is None:
            raise Forbidden(
                "This gateway has no credential of the kind that these kernels need; ask its administrator.",
                hint=f"Credentials.providers has nothing for {need.value}",
            )
        return provider

    async def ended(self, kernel_id: str) -> None:
        """Purge what was kept for a kernel that has ended."""
        await self.store.drop(kernel_id)

    def start(self, live: Collection[str] = ()) -> None:
        """Purge what an earlier process left of kernels that do not live any more. Blocks for a moment."""
        self.store.start(live)

    async def close(self) -> None:
        """Renew nothing more."""
        await self.store.close()
