"""What `metadata.process_proxy.config` of a kernelspec may hold: each process proxy says it of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

__all__ = ["COMMON", "ENTERPRISE_GATEWAY", "Check", "mounts", "names", "ports", "text", "texts"]

Check: TypeAlias = Callable[[object], str]
"""What a value must be, where it is not that; empty where it is."""

_PORTS = re.compile(r"(\d{1,5})\.\.(\d{1,5})")

ENTERPRISE_GATEWAY = frozenset(
    {
        "alt_yarn_endpoint",
        "authorized_users",
        "conductor_endpoint",
        "executor_image_name",
        "image_name",
        "port_range",
        "remote_hosts",
        "unauthorized_users",
        "yarn_endpoint",
        "yarn_endpoint_security_enabled",
    }
)
"""Enterprise Gateway's keys: kernelspecs written for it may hold any of them, whatever runs their kernels."""


def text(value: object) -> str:
    """A text that is not empty."""
    return "" if isinstance(value, str) and value.strip() else "must be a text"


def texts(value: object) -> str:
    """A list of texts."""
    return "" if isinstance(value, list) and all(not text(one) for one in value) else "must be a list of texts"


def names(value: object) -> str:
    """A list of names, or Enterprise Gateway's comma-separated string."""
    return "" if isinstance(value, str) or not texts(value) else "must be a list of names, or names with commas between"


def ports(value: object) -> str:
    """A range of ports; Enterprise Gateway writes 0..0 for any."""
    wrong = "must be a range of ports such as 40000..40999"
    match = _PORTS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return wrong
    first, last = int(match[1]), int(match[2])
    return "" if first == last == 0 or 0 < first <= last < 65536 else wrong


def mounts(value: object) -> str:
    """A list of volumes, each with `source` and `target`."""
    wrong = "must be a list of objects with source, target and, if wished, read_only"
    if not isinstance(value, list):
        return wrong
    for one in value:
        if not isinstance(one, dict) or {"source", "target"} - set(one) or set(one) - {"source", "target", "read_only"}:
            return wrong
    return ""


COMMON: Mapping[str, Check] = {"authorized_users": names, "unauthorized_users": names}
"""The keys that the gateway itself reads."""
