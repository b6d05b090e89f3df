"""The distributed proxy on hosts that know users by Kerberos: a real KDC, and sshd with GSSAPI and no keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.contract.ssh_case import USERS, SshCase, distributed, prepare_nodes
from tests.engines.kdc import Kdc
from tests.engines.kdc_ldap import LdapKdc
from tests.engines.ssh import ADDRESSES, LOGIN

__all__ = [
    "HOST",
    "KDCS",
    "PRINCIPAL",
    "SERVICES",
    "SSH_K5LOGIN",
    "SSH_S4U",
    "SSH_TGT",
    "WAYS",
    "KerberosCase",
    "kerberized",
    "people",
    "with_services",
    "with_tgt",
]

PRINCIPAL = "hub-gateway/localhost"
HOST = "node.example.test"
KDCS: dict[Path, Kdc] = {}
"""The KDCs of tests that run, by state directory."""
ENVIRONMENT: dict[Path, str | None] = {}
"""What KRB5_CONFIG was before, of the same."""
SERVICES = ("HTTP/rm.example.test", "hdfs/nn.example.test")
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sudo": ({"keys": True}, ()),
    "k5login": ({"login_as_owner": True}, USERS),
    "s4u": ({"owner_login": "s4u"}, ()),
}
"""How the gateway logs in: options, and as whom by k5login."""
SSHD = """\
GSSAPIAuthentication yes
GSSAPIStrictAcceptorCheck no
PubkeyAuthentication no
"""
K5LOGIN = """\
[libdefaults]
    k5login_directory = {directory}
    k5login_authoritative = true
"""


def kerberized(
    state_dir: Path, kdc: Kdc, *let_in: str, keys: bool = False, hosts: int = 3, **traits: Any
) -> dict[str, Any]:
    """Hosts that let the gateway's principal in as the login, and as those of `let_in`; each user as themselves.

    With `keys` they let the gateway's key in as the login, and have a rule of sudo.
    """
    KDCS[state_dir], ENVIRONMENT[state_dir] = kdc, os.environ.get("KRB5_CONFIG")
    kdc.start()
    os.environ["KRB5_CONFIG"] = str(kdc.krb5_conf)
    allowed = state_dir / "k5login"
    allowed.mkdir()
    for user in (LOGIN, *let_in):
        (allowed / user).write_text(f"{PRINCIPAL}@{kdc.realm}\n")
    # Files in one variable: the hosts' own settings before those of the realm.
    hosts_conf = state_dir / "hosts.conf"
    hosts_conf.write_text(K5LOGIN.format(directory=allowed))
    environment = {
        "KRB5_CONFIG": f"{hosts_conf}:{kdc.krb5_conf}",
        "KRB5_KTNAME": str(kdc.keytab("hosts", f"host/{HOST}")),
        "KRB5RCACHENAME": "none:",
    }
    more = "" if keys else SSHD
    nodes = prepare_nodes(state_dir, *ADDRESSES[:hosts], more=more, environment=environment)
    config = dict(distributed(nodes, state_dir))
    gateway = str(kdc.keytab("gateway", PRINCIPAL))
    if keys:
        config["DistributedProxy"] = {**config["DistributedProxy"], **traits}
        return config
    nodes.drop_sudo_rule()
    config["DistributedProxy"] = {
        **config["DistributedProxy"],
        "gss_keytab": gateway,
        "gss_principal": f"{PRINCIPAL}@{kdc.realm}",
        "gss_names": dict.fromkeys(nodes.hosts, HOST),
        **traits,
    }
    return config


def by_k5login(state_dir: Path) -> Mapping[str, Any]:
    pytest.importorskip("gssapi")
    return kerberized(state_dir, Kdc(state_dir / "kdc"), *USERS, login_as_owner=True)


def by_s4u(state_dir: Path) -> Mapping[str, Any]:
    pytest.importorskip("gssapi")
    kdc = LdapKdc(state_dir / "kdc")
    config = kerberized(state_dir, kdc, owner_login="s4u")
    for user in USERS:
        kdc.person(user)
    kdc.change(PRINCIPAL, "+ok_to_auth_as_delegate")
    kdc.delegates(PRINCIPAL, f"host/{HOST}")
    return config


def with_services(way: str, life: str = "1h") -> Callable[[Path], Mapping[str, Any]]:
    """One host with one way to log in, whose kernels get tickets for `SERVICES`."""

    def prepare(state_dir: Path) -> Mapping[str, Any]:
        pytest.importorskip("gssapi")
        kdc = LdapKdc(state_dir / "kdc", life=life)
        traits, let_in = WAYS[way]
        config = kerberized(state_dir, kdc, *let_in, hosts=1, kernel_tickets="services", **traits)
        for user in USERS:
            kdc.person(user)
        kdc.keytab("services", *SERVICES)
        kdc.change(PRINCIPAL, "+ok_to_auth_as_delegate")
        kdc.delegates(PRINCIPAL, f"host/{HOST}", *SERVICES)
        config["IdentityMapper"] = people(kdc)
        config["S4UCredential"] = {
            "keytab": str(kdc.directory / "gateway.keytab"),
            "principal": f"{PRINCIPAL}@{kdc.realm}",
            "services": list(SERVICES),
        }
        return config

    return prepare


def with_tgt(way: str, life: str = "1h") -> Callable[[Path], Mapping[str, Any]]:
    """One host with one way to log in, whose kernels get their owners' own TGTs, which lie in files."""

    def prepare(state_dir: Path) -> Mapping[str, Any]:
        pytest.importorskip("gssapi")
        kdc = Kdc(state_dir / "kdc", life=life)
        traits, let_in = WAYS[way]
        config = kerberized(state_dir, kdc, *let_in, hosts=1, kernel_tickets="tgt", **traits)
        for user in USERS:
            kdc.person(user)
        kdc.keytab("services", *SERVICES)
        config["IdentityMapper"] = people(kdc)
        config["UserTgtCredential"] = {"ccache_file": f"{state_dir}/tickets/{{user}}"}
        (state_dir / "tickets").mkdir(mode=0o700)
        return config

    return prepare


def people(kdc: Kdc) -> dict[str, Any]:
    """Each Hub user is the principal and the unix user of that name."""
    rules = [{"name": "people", "pattern": ".*", "principal": "$0", "unix_user": "$0"}]
    return {"default_realm": kdc.realm, "rules": rules}


@dataclass(frozen=True)
class KerberosCase(SshCase):
    """Hosts that take no keys."""

    needs: tuple[str, ...] = ("ssh", "kerberos", "kerberos-headers")
    refusals: Mapping[str, str] = field(default_factory=lambda: {"nowhere": "nonexistent"})

    def leftovers(self, gateway_id: str, state_dir: Path) -> list[str]:
        kept = (state_dir / "credentials").glob("*/*")
        return super().leftovers(gateway_id, state_dir) + [f"{path}" for path in kept]

    def clean(self, gateway_ids: set[str], state_dir: Path) -> None:
        super().clean(gateway_ids, state_dir)
        if state_dir in KDCS:
            KDCS.pop(state_dir).stop()
            before = ENVIRONMENT.pop(state_dir)
            if before is None:
                os.environ.pop("KRB5_CONFIG", None)
            else:
                os.environ["KRB5_CONFIG"] = before


def case(name: str, prepare: Callable[[Path], Mapping[str, Any]], *more: str) -> KerberosCase:
    needs = ("ssh", "kerberos", "kerberos-headers", *more)
    return KerberosCase(name, 2, prepare, USERS, impersonates=True, needs=needs)


def by_tgt(state_dir: Path) -> Mapping[str, Any]:
    config = with_tgt("sudo")(state_dir)
    for user in USERS:
        KDCS[state_dir].kinit(user, state_dir / "tickets" / user)
    return config


SSH_TGT = case("ssh-tgt", by_tgt, "sudo")
SSH_K5LOGIN = case("ssh-k5login", by_k5login)
SSH_S4U = case("ssh-s4u", by_s4u, "kerberos-ldap")
