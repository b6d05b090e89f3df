"""What the REST API shows of the gateway's own types."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Any

from hub_gateway.kernels.types import JSON
from hub_gateway.quotas.document import policy_json
from hub_gateway.quotas.types import Policy

__all__ = ["plain"]


def plain(value: Any) -> JSON:
    """A value of ours as JSON: dataclasses are objects, moments in UTC, durations in seconds, sets sorted."""
    if isinstance(value, Policy):
        return policy_json(value)
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key.value if isinstance(key, enum.Enum) else key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [plain(item) for item in sorted(value)]
    return [plain(item) for item in value]
