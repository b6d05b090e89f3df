"""A kernel's environment, from an allow-list: nothing of the gateway's own process gets into it.

In order, later ones win: the kernelspec's `env` (with `${...}` filled from itself and from what the
client may set), what the client may set (`KERNEL_*`, and names that the operator lists), and what the
gateway says (`KERNEL_ID`, `KERNEL_USERNAME`, `KERNEL_GATEWAY`). What the process needs of its node
(`PATH`, `HOME`, ...) is added by the proxy, which knows the node.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from string import Template
from typing import Any

from hub_gateway.errors import BadRequest, Forbidden, PayloadTooLarge

__all__ = ["MAX_TOTAL", "MAX_VALUE", "client_environment", "kernel_environment", "notebook_of"]

MAX_VALUE = 64 * 2**10
MAX_TOTAL = 256 * 2**10
MAX_PATH = 4096

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}\Z")
# Tabs and line feeds occur in honest values; the rest breaks out of logs and terminals, NUL out of execve.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def client_environment(given: object, *, allowed: Collection[str], username: str) -> dict[str, str]:
    """What of the client's environment reaches its kernel.

    `allowed` names what it may set besides `KERNEL_*`; "*" is everything. Other names are left out, as
    Enterprise Gateway does. Raises `BadRequest`, `PayloadTooLarge`, and `Forbidden` where
    `KERNEL_USERNAME` is not the caller's.
    """
    if not isinstance(given, Mapping):
        raise BadRequest("`env` must be an object of names and strings.")
    kept: dict[str, str] = {}
    total = 0
    for name, value in given.items():
        checked = _check(name, value)
        total += len(name) + len(checked)
        if total > MAX_TOTAL:
            raise PayloadTooLarge(f"The environment of a kernel may hold {MAX_TOTAL // 1024} KiB; this one is larger.")
        if name.startswith("KERNEL_") or name in allowed or "*" in allowed:
            kept[name] = checked
    claimed = kept.get("KERNEL_USERNAME")
    if claimed and claimed != username:
        raise Forbidden(
            f"KERNEL_USERNAME says {claimed!r}, but the token belongs to {username!r}; leave KERNEL_USERNAME out."
        )
    return kept


def notebook_of(given: Mapping[str, str]) -> str | None:
    """The notebook that a kernel is for, where the client says so: jupyter_server has its path in JPY_SESSION_NAME.

    It is shown to its owner, and used for nothing else.
    """
    found = given.get("JPY_SESSION_NAME")
    if not isinstance(found, str) or not found or len(found) > MAX_PATH or _CONTROL.search(found):
        return None
    return found


def kernel_environment(
    spec_env: Mapping[str, Any], client: Mapping[str, str], *, kernel_id: str, username: str
) -> dict[str, str]:
    """The whole environment that the gateway gives a kernel. `client` is of `client_environment`."""
    forced = {"KERNEL_ID": kernel_id, "KERNEL_USERNAME": username, "KERNEL_GATEWAY": "1"}
    own = {name: str(value) for name, value in spec_env.items()}
    known = {**own, **client, **forced}
    filled = {name: Template(value).safe_substitute(known) for name, value in own.items()}
    return {**filled, **client, **forced}


def _check(name: object, value: object) -> str:
    if not isinstance(name, str) or not _NAME.match(name):
        raise BadRequest(f"{_shown(name)} is not a name for an environment variable.")
    if not isinstance(value, str):
        raise BadRequest(f"The environment variable {name} must be a string.")
    if len(value) > MAX_VALUE:
        raise PayloadTooLarge(f"The value of {name} is longer than {MAX_VALUE // 1024} KiB.")
    if _CONTROL.search(value):
        raise BadRequest(f"The value of {name} holds control characters; remove them.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRequest(f"The value of {name} is not valid Unicode.")
    return value


def _shown(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:77]}..."
