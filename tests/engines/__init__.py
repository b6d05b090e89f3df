"""What some suites need beside Python and Node.js: how to find it, and which Debian packages bring it.

Standard library only: `python -m tests.engines` runs before there is an environment.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ADMIN_PATH",
    "ENGINES",
    "KRB5_PATH",
    "SYSTEM_PATH",
    "Engine",
    "chromium",
    "dockerd",
    "kerberos",
    "kerberos_ldap",
    "missing",
    "postgresql",
]

ADMIN_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:/usr/bin"
"""Where servers are, which are not on everybody's PATH."""
KRB5_PATH = ADMIN_PATH
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
"""Where Debian has a system's servers and tools."""


def postgresql() -> str | None:
    """The directory of PostgreSQL's server programs; the newest where there are several."""
    versions = Path("/usr/lib/postgresql")
    found = sorted(versions.glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]) if p.parts[-3].isdigit() else 0)
    if found:
        return str(found[-1].parent)
    program = shutil.which("initdb")
    return str(Path(program).resolve().parent) if program else None


def chromium() -> str | None:
    """A browser that Playwright can drive."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def kerberos() -> str | None:
    """MIT's KDC, and what it takes to make a realm and to be its client."""
    needed = ("krb5kdc", "kdb5_util", "kadmin.local", "klist")
    found = [shutil.which(program, path=KRB5_PATH) for program in needed]
    return found[0] if all(found) else None


def kerberos_ldap() -> str | None:
    """What it takes to keep a realm's principals in OpenLDAP."""
    found = [shutil.which(program, path=KRB5_PATH) for program in ("slapd", "ldapmodify", "kdb5_ldap_util")]
    return found[0] if all(found) else None


def dockerd() -> str | None:
    """Docker's daemon, and what it takes to give it a network and images."""
    needed = ("dockerd", "iptables", "debootstrap", "ip", "tar")
    found = [shutil.which(program, path=SYSTEM_PATH) for program in needed]
    return found[0] if all(found) else None


@dataclass(frozen=True)
class Engine:
    """One program that a suite drives for real."""

    find: Callable[[], str | None]
    packages: tuple[str, ...]
    purpose: str


ENGINES = {
    "postgresql": Engine(postgresql, ("postgresql",), "every suite on PostgreSQL"),
    "chromium": Engine(chromium, ("chromium",), "what a person sees in JupyterLab"),
    "kerberos": Engine(kerberos, ("krb5-kdc", "krb5-admin-server", "krb5-user"), "tickets of a real Kerberos realm"),
    "kerberos-ldap": Engine(
        kerberos_ldap,
        ("krb5-kdc-ldap", "slapd", "ldap-utils"),
        "a Kerberos realm with constrained delegation, which MIT's own database does not have",
    ),
    "kerberos-headers": Engine(
        lambda: shutil.which("krb5-config") and shutil.which("cc"),
        ("gcc", "libc6-dev", "libkrb5-dev", "python3-dev"),
        "the gateway's own part of Kerberos, which is built",
    ),
    "docker": Engine(
        dockerd,
        ("docker.io", "iptables", "iproute2", "debootstrap", "debian-archive-keyring"),
        "kernels in containers, and in a swarm of one node",
    ),
    "registry": Engine(
        lambda: shutil.which("docker-registry", path=ADMIN_PATH),
        ("docker-registry",),
        "images that are fetched from a registry, with and without a login",
    ),
    "ssh": Engine(
        lambda: shutil.which("ssh-keygen", path=ADMIN_PATH) and shutil.which("sshd", path=ADMIN_PATH),
        ("openssh-server", "openssh-client"),
        "kernels on hosts that are reached by SSH",
    ),
    "sudo": Engine(lambda: shutil.which("sudo"), ("sudo",), "kernels as another unix user by a sudo rule"),
}


def missing(name: str) -> str:
    """Why suites that need the engine cannot run here, in one line; empty if they can."""
    engine = ENGINES[name]
    if engine.find() is not None:
        return ""
    return f"{name} is not installed (Debian: apt-get install {' '.join(engine.packages)}); it is for {engine.purpose}"
