"""How the gateway logs in to hosts, and as whom: its options, and what they come to for one host and one login."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from traitlets import Bool, Dict, Enum, TraitError, Unicode, default, validate
from traitlets.config import LoggingConfigurable

from hub_gateway.identity.s4u import ConstrainedDelegation
from hub_gateway.kernels.types import JSON
from hub_gateway.proxies.ssh_connect import Problem, SshError
from hub_gateway.proxies.ssh_hosts import Host

__all__ = ["LoginOptions"]


class LoginOptions(LoggingConfigurable):
    """Options of `DistributedProxy`: with what it logs in."""

    options_of = "DistributedProxy"

    user = Unicode(
        help="""The unix user as whom the gateway logs in. By default the name of its own.

        Kernels run as this user unless `UnixUsers.impersonate` is set; it must not be root then.
        """
    ).tag(config=True)
    key_file = Unicode(
        help="""The private key to log in with, without a passphrase; a certificate `KEY-cert.pub` beside it is used.

        By default `~/.ssh/id_ed25519`. Not used where `gss_keytab` is set.
        """
    ).tag(config=True)
    gss_keytab = Unicode(
        help="""Log in by Kerberos (gssapi-with-mic) with the tickets of `gss_principal`, whose keytab this is.

        It takes the optional dependencies `kerberos`.
        """
    ).tag(config=True)
    gss_principal = Unicode(
        help="The principal as whom to log in. Hosts let it in as a user whose k5login (or their own) names it."
    ).tag(config=True)
    gss_names = Dict(
        value_trait=Unicode(),
        key_trait=Unicode(),
        help="The names of hosts in their Kerberos principals (`host/NAME`), where it is not the address in `hosts`.",
    ).tag(config=True)
    login_as_owner = Bool(
        False,
        help="""Log in as each kernel's unix user, rather than as `user` who becomes that user by sudo.

        For hosts that let the gateway's own principal, or key, in as its users. `user` still looks after the hosts.
        """,
    ).tag(config=True)
    owner_login = Enum(
        ("gateway", "s4u"),
        default_value="gateway",
        help="""Whose ticket logs in as a kernel's owner. Other than `gateway`, it turns `login_as_owner` on.

        `gateway`: that of `gss_principal`, whom hosts let in as their users by k5login. `s4u`: the owner's own for this
        host, which the KDC gives the gateway by constrained delegation; hosts need to know nothing of the gateway, and
        who is locked at the KDC is let in nowhere any more, once the connections that are open have ended (a minute
        after their last use). The owner's principal is that of the mapping (`IdentityMapper`), or, where that names
        none, the unix user's name in the realm of `gss_principal`.
        """,
    ).tag(config=True)
    kernel_tickets = Enum(
        ("none", "services", "tgt"),
        default_value="none",
        help="""Which Kerberos tickets kernels get, in a file of their own that KRB5CCNAME names.

        `services`: their owner's for the services of `S4UCredential.services`, and no TGT. The gateway gives a kernel
        newer ones before they end, for as long as it lives. `tgt`: a copy of the owner's own TGT (`UserTgtCredential`),
        with which a kernel reaches whatever its owner reaches; its agent renews it by `kinit -R`, until that is not
        possible any more. This goes with every way to log in. The owner's principal must be one of the mapping
        (`IdentityMapper.rules`).
        """,
    ).tag(config=True)
    check_user = Unicode(
        help="A unix user whose kernels may run: `jupyter hubgateway check` tries whether the gateway may act as this."
    ).tag(config=True)
    check_principal = Unicode(
        help="The principal of `check_user`, where it is not that name in the realm of the gateway or of krb5.conf."
    ).tag(config=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._principals: dict[str, str] = {}
        """The principals of unix users, as far as kernels of theirs were met."""

    @validate("gss_principal")
    def _check_principal(self, proposal: Any) -> Any:
        if proposal["value"] and "@" not in proposal["value"].strip("@"):
            raise TraitError("DistributedProxy.gss_principal needs its realm, as in hub-gateway/host@EXAMPLE.COM")
        return proposal["value"]

    @default("user")
    def _default_user(self) -> str:
        return pwd.getpwuid(os.getuid()).pw_name

    @default("key_file")
    def _default_key_file(self) -> str:
        return str(Path("~/.ssh/id_ed25519").expanduser())

    @property
    def as_owner(self) -> bool:
        """Whether the gateway logs in as each kernel's unix user."""
        return self.login_as_owner or self.owner_login != "gateway"

    def remember(self, state: Mapping[str, JSON], *, anew: bool = False) -> None:
        """Learn from a kernel's state which principal its unix user has; `anew` where the mapping has just said so."""
        user, principal = state.get("user"), state.get("principal")
        if isinstance(user, str) and isinstance(principal, str) and (anew or user not in self._principals):
            self._principals[user] = principal

    def principal_of(self, login: str) -> str:
        """The principal of a unix user."""
        if login == self.check_user and self.check_principal:
            return self.check_principal
        return self._principals.get(login) or f"{login}@{self.gss_principal.rpartition('@')[2]}"

    def way(self, login: str, principal: str | None = None) -> str:
        """How the gateway acts as a unix user, as the end of a sentence."""
        if not self.as_owner:
            how = "with tickets of its own" if self.gss_keytab else "with its key"
            return f"logs in as {self.user} {how} and becomes {login} by a rule of sudo"
        if self.owner_login == "s4u":
            who = principal or self.principal_of(login)
            return f"logs in as {login} with a ticket of {who} by constrained delegation (S4U)"
        if self.gss_keytab:
            return f"logs in as {login} with tickets of {self.gss_principal}, by k5login"
        return f"logs in as {login} with its key"

    def authenticate(self, login: str, host: Host) -> dict[str, Any]:
        """Arguments for `paramiko.SSHClient.connect`. Blocks. Raises `SshError` and `GatewayError`."""
        if not self.gss_keytab:
            if self.owner_login != "gateway" and login != self.user:
                why = f"DistributedProxy.owner_login is {self.owner_login}, and there is no keytab"
                raise SshError(Problem.REFUSED, why, hint="set DistributedProxy.gss_keytab and gss_principal")
            return {"key_filename": str(Path(self.key_file).expanduser())}
        # Here, as it imports paramiko, which is for gateways with SSH hosts alone.
        from hub_gateway.proxies.ssh_gss import delegated_arguments, keytab_arguments

        name = self.gss_names.get(host.name, host.address)
        keytab = Path(self.gss_keytab)
        if self.owner_login == "s4u" and login != self.user:
            delegation = ConstrainedDelegation(keytab, self.gss_principal)
            return delegated_arguments(delegation, self.principal_of(login), name, login)
        return keytab_arguments(keytab, self.gss_principal, name, login)
