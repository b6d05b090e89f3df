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
from tests.engines.ssh import LOGIN

__all__ = ["HOST", "KDCS", "PRINCIPAL", "SSH_K5LOGIN", "SSH_S4U", "KerberosCase", "kerberized"]

PRINCIPAL = "hub-gateway/localhost"
HOST = "node.example.test"
KDCS: dict[Path, Kdc] = {}
"""The KDCs of tests that run, by state directory."""
ENVIRONMENT: dict[Path, str | None] = {}
"""What KRB5_CONFIG was before, of the same."""
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


def kerberized(state_dir: Path, kdc: Kdc, *let_in: str, **traits: Any) -> Mapping[str, Any]:
    """Hosts that let the gateway's principal in as the login, and as those of `let_in`; each user as themselves."""
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
    nodes = prepare_nodes(state_dir, more=SSHD, environment=environment)
    config = dict(distributed(nodes, state_dir))
    nodes.drop_sudo_rule()
    config["DistributedProxy"] = {
        **config["DistributedProxy"],
        "gss_keytab": str(kdc.keytab("gateway", PRINCIPAL)),
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


@dataclass(frozen=True)
class KerberosCase(SshCase):
    """Hosts that take no keys."""

    needs: tuple[str, ...] = ("ssh", "kerberos", "kerberos-headers")
    refusals: Mapping[str, str] = field(default_factory=lambda: {"nowhere": "nonexistent"})

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


SSH_K5LOGIN = case("ssh-k5login", by_k5login)
SSH_S4U = case("ssh-s4u", by_s4u, "kerberos-ldap")
