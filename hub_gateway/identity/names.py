"""Which names may stand for a person, a unix user and a Kerberos principal at all; no rule can widen this.

Whatever a rule makes of a Hub user's name must be plain ASCII. Unicode is never folded (NFKC): that would turn
different names into one.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

__all__ = [
    "Principal",
    "hub_name_problem",
    "lower",
    "parse_principal",
    "shown",
    "unix_name_problem",
    "upper",
]

MAX_HUB_NAME = 128
MAX_PRINCIPAL = 255

# What useradd accepts; no option, no number, no path, nothing that a tool could take for something else.
_UNIX = re.compile(r"[a-z_][a-z0-9_.-]{0,31}", re.ASCII)
# Digits may come first: many directories name people by their number.
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_REALM = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*(\.[A-Za-z0-9][A-Za-z0-9-]*)*", re.ASCII)
_LOWER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_UPPER = {code: code - 32 for code in range(ord("a"), ord("z") + 1)}


def lower(text: str) -> str:
    """Lower-case A to Z and nothing else: Unicode has letters whose lower case is an ASCII one."""
    return text.translate(_LOWER)


def upper(text: str) -> str:
    """Upper-case a to z and nothing else."""
    return text.translate(_UPPER)


def shown(name: str) -> str:
    """A name for a sentence: quoted, at most 64 characters, and with look-alike letters made visible."""
    return ascii(name if len(name) <= 64 else f"{name[:61]}...")


def hub_name_problem(name: str) -> str:
    """Why a Hub user of this name can be mapped to nobody; empty where there is no reason."""
    if not name:
        return "it is empty"
    if len(name) > MAX_HUB_NAME:
        return f"it is longer than {MAX_HUB_NAME} characters"
    if unicodedata.normalize("NFC", name) != name:
        return "it is not in Unicode's composed form (NFC)"
    if any(unicodedata.category(letter)[0] in "CZ" for letter in name):
        return "it has spaces, or control or invisible characters"
    if "/" in name:
        return "it has a slash"
    return ""


def unix_name_problem(name: str) -> str:
    """Why this cannot be a unix user that kernels run as; empty where there is no reason."""
    if _UNIX.fullmatch(name):
        return ""
    return (
        "a unix user's name begins with a to z or _ and goes on with at most 31 of a to z, 0 to 9, dot, minus and "
        "underscore"
    )


@dataclass(frozen=True)
class Principal:
    """A Kerberos principal: its components, of which a person's has one, and its realm."""

    components: tuple[str, ...]
    realm: str

    def __str__(self) -> str:
        return f"{'/'.join(self.components)}@{self.realm}"

    @property
    def primary(self) -> str:
        """The first component."""
        return self.components[0]

    @property
    def key(self) -> str:
        """The name under which it is claimed: directories that ignore case would take two spellings for one."""
        return lower(str(self))


def parse_principal(text: str, default_realm: str = "") -> Principal:
    """A principal from its usual spelling. Without a realm it is of the default one, never of none.

    Raises `ValueError` with the reason. Escapes (`\\@`) are refused: what needs them is no name for a person.
    """
    if len(text) > MAX_PRINCIPAL:
        raise ValueError(f"it is longer than {MAX_PRINCIPAL} characters")
    name, at, realm = text.partition("@")
    if not at:
        realm = default_realm
    if not realm:
        raise ValueError("it has no realm, and IdentityMapper.default_realm is not set")
    if not _REALM.fullmatch(realm):
        raise ValueError("its realm is not a domain name")
    components = tuple(name.split("/"))
    if not all(_COMPONENT.fullmatch(one) for one in components):
        raise ValueError("its name has other characters than letters and digits of ASCII, dot, minus and underscore")
    return Principal(components, realm)
