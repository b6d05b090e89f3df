"""A policy as the fields of a form: nothing of it is lost between being shown and being saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from hub_gateway.errors import BadRequest
from hub_gateway.quotas.document import policy_json, policy_of
from hub_gateway.quotas.fields import Body
from hub_gateway.quotas.types import Action, Counts, Origin, Period, Policy, Resource, WindowKind

__all__ = ["CHOICES", "DAYS", "LABELS", "Typed", "Week", "changes", "duration", "field_of", "read", "typed", "wanted"]

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MAX_WEEKS = 50
DURATIONS = ("window_seconds", "burst_seconds", "queue_seconds", "grace_seconds")
AMOUNTS = ("hard", "soft", "burst")
MOMENTS = ("valid_from", "valid_until")
LABELS: dict[str, str] = {
    "subject": "Whom",
    "object": "What of theirs",
    "resource": "Resource",
    "gpu_model": "GPU model",
    "counts": "Compared with what",
    "hard": "Hard limit",
    "soft": "Soft limit",
    "burst": "Burst",
    "burst_seconds": "Burst lasts",
    "grace_seconds": "Grace",
    "action": "A launch that does not fit",
    "queue_seconds": "Waits at most",
    "window": "Over",
    "window_seconds": "Rolling window",
    "period": "Calendar period",
    "timezone": "Time zone",
    "valid_from": "From",
    "valid_until": "Until",
    "weekly": "Times of the week",
    "priority": "Priority",
    "note": "Note",
}
"""The fields that are typed or chosen, by the words beside them."""
TEXTS = tuple(name for name in LABELS if name != "weekly")
CHOICES: dict[str, tuple[str, ...]] = {
    "resource": tuple(one.value for one in Resource),
    "counts": tuple(one.value for one in Counts),
    "window": tuple(one.value for one in WindowKind),
    "period": ("", *(one.value for one in Period)),
    "action": tuple(one.value for one in Action),
}
_UNITS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"([0-9]{1,12})\s*(s|min|h|d|w|)")
_FIELD = re.compile(r"The field `(\w+)`")


@dataclass(frozen=True)
class Week:
    """One time of the week, as it stands in the form."""

    days: tuple[bool, ...] = (False,) * 7
    begin: str = ""
    end: str = ""

    def __bool__(self) -> bool:
        return any(self.days) or bool(self.begin or self.end)


@dataclass(frozen=True)
class Typed:
    """What stands in the form."""

    values: Mapping[str, str]
    weeks: tuple[Week, ...] = ()
    enabled: bool = True
    version: int = 0


def typed(policy: Policy) -> Typed:
    """The form of a policy."""
    found: dict[str, Any] = policy_json(policy)
    values = {name: _written(policy, name, found[name]) for name in TEXTS}
    weeks = tuple(
        Week(tuple(day in week["days"] for day in range(7)), week["begin"], week["end"]) for week in found["weekly"]
    )
    return Typed(values, weeks, policy.enabled, policy.version)


def _written(policy: Policy, name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in DURATIONS:
        unit = next((unit for unit in ("d", "h", "min") if value and value % _UNITS[unit] == 0), "s")
        return f"{value // _UNITS[unit]}{unit}"
    if name in MOMENTS:
        moment: datetime = getattr(policy, name)
        return moment.astimezone(timezone.utc).replace(tzinfo=None).isoformat().replace("T", " ") + "Z"
    if name in AMOUNTS:
        return _amount(policy.resource, value)
    return str(value)


def _amount(resource: Resource, value: float) -> str:
    if not float(value).is_integer():
        return str(value)
    # Whole numbers of any size without an exponent: they are read again.
    whole = int(value)
    if resource is Resource.MEMORY and whole:
        for unit, power in (("G", 3), ("M", 2)):
            if whole % 1024**power == 0:
                return f"{whole // 1024**power}{unit}"
    return str(whole)


def read(field: Callable[[str], str]) -> Typed:
    """What was typed; `field` gives a field of the form, "" where it is missing."""
    values = {name: field(name) for name in TEXTS}
    values["note"] = values["note"].replace("\r\n", "\n").replace("\r", "\n")
    weeks = []
    for number in range(MAX_WEEKS):
        days = tuple(field(f"week{number}_{day}") == "on" for day in range(7))
        weeks.append(Week(days, field(f"week{number}_begin"), field(f"week{number}_end")))
    version = field("version")
    kept = int(version) if version.isdecimal() and len(version) < 10 else 0
    return Typed(values, tuple(week for week in weeks if week), field("enabled") == "on", kept)


def wanted(name: str, form: Typed, before: Policy | None, actor: str) -> Policy:
    """The policy that a form asks for; a grant stays a grant, which the actor approves.

    Raises `BadRequest` (see `field_of`).
    """
    found: dict[str, Any] = {field: value for field, value in form.values.items() if value}
    for field in DURATIONS:
        if field in found:
            found[field] = duration(field, found[field])
    if "priority" in found:
        if not re.fullmatch(r"-?[0-9]{1,7}", found["priority"]):
            raise BadRequest("The field `priority` must be a whole number.")
        found["priority"] = int(found["priority"])
    found["weekly"] = [_week(week) for week in form.weeks]
    found["enabled"] = form.enabled
    if before is not None:
        found |= {"origin": before.origin.value, "delegated": before.delegated}
    made = policy_of(name, Body(found, (*LABELS, "enabled", "origin", "delegated")), version=form.version)
    return replace(made, approver=actor) if made.origin is Origin.GRANT else made


def duration(field: str, text: str) -> int:
    """Seconds, of `90`, `90s`, `5min`, `12h`, `7d` or `2w`. Raises `BadRequest`."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise BadRequest(f"The field `{field}` must be a duration such as 90s, 5min, 12h, 7d or 2w.")
    return int(found[1]) * _UNITS[found[2]]


def _week(week: Week) -> dict[str, Any]:
    clock = {name: _clock(getattr(week, name)) for name in ("begin", "end")}
    return {"days": [day for day, chosen in enumerate(week.days) if chosen], **clock}


def _clock(text: str) -> str:
    found = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})", text)
    if found is None:
        raise BadRequest("The field `weekly` needs days, a begin and an end such as 08:00 and 18:00 (or 24:00).")
    return f"{int(found[1]):02d}:{found[2]}"


def field_of(message: str) -> tuple[str, str]:
    """The field that an error is about ("" for none), and its sentence with the word that stands beside the field."""
    found = _FIELD.match(message)
    if found is None or found[1] not in LABELS:
        return "", message
    if found[1] == "weekly":
        return "weekly", (
            "Each time of the week needs at least one day, and a begin and an end such as 08:00 and 18:00 (or 24:00)."
        )
    return found[1], f"{LABELS[found[1]]} {message[found.end() :].strip()}"


def changes(before: Policy | None, after: Policy) -> list[tuple[str, str, str]]:
    """What a change would change: the field, what it says now, and what it would say."""
    if before is None:
        return []
    old, new = typed(before), typed(after)
    found = [(LABELS[name], old.values[name], new.values[name]) for name in TEXTS]
    found.append((LABELS["weekly"], _times(old.weeks), _times(new.weeks)))
    found.append(("It holds", "yes" if old.enabled else "no", "yes" if new.enabled else "no"))
    return [one for one in found if one[1] != one[2]]


def _times(weeks: tuple[Week, ...]) -> str:
    return "; ".join(
        f"{' '.join(DAYS[day] for day in range(7) if week.days[day])} {week.begin}-{week.end}" for week in weeks
    )
