"""Policies as documents: one as JSON, all of them as a YAML file.

A policy in a document has its subject and object as `kind:name` (or `everyone`, `any`), amounts as numbers in base
units or with a unit (`4G`), durations in seconds, moments in ISO 8601. What is left out has its default.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, TypeVar

import yaml

from hub_gateway.errors import BadRequest
from hub_gateway.kernels.types import JSON
from hub_gateway.quotas.amounts import amount
from hub_gateway.quotas.fields import Body
from hub_gateway.quotas.types import (
    Action,
    Counts,
    ObjectKind,
    Origin,
    Period,
    Policy,
    Resource,
    SubjectKind,
    Weekly,
    WindowKind,
)

__all__ = ["POLICY_FIELDS", "Diff", "difference", "document", "policies_of", "policy_json", "policy_of", "subject_of"]

E = TypeVar("E", bound=enum.Enum)
MAX_SECONDS = 10 * 366 * 86400
MAX_POLICIES = 10_000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
WRITTEN = (
    "subject",
    "object",
    "resource",
    "gpu_model",
    "counts",
    "window",
    "window_seconds",
    "period",
    "timezone",
    "hard",
    "soft",
    "burst",
    "burst_seconds",
    "action",
    "queue_seconds",
    "grace_seconds",
    "priority",
    "enabled",
    "valid_from",
    "valid_until",
    "weekly",
    "note",
    "origin",
    "delegated",
)
READ_ONLY = ("name", "approver", "version", "created_at", "created_by", "updated_at", "updated_by")
POLICY_FIELDS = (*WRITTEN, *READ_ONLY)
"""The fields of a policy in JSON. What is read only may be sent back as it was received."""


def subject_of(policy: Policy) -> str:
    """Whom a policy is about, as `kind:name`, or `everyone`."""
    kind = policy.subject_kind
    return kind.value if kind is SubjectKind.EVERYONE else f"{kind.value}:{policy.subject}"


def policy_json(policy: Policy) -> dict[str, JSON]:
    """A policy as a document: amounts in base units, subject and object as `kind:name`."""
    anything = policy.object_kind is ObjectKind.ANY
    found: dict[str, JSON] = {
        "name": policy.name,
        "subject": subject_of(policy),
        "object": "any" if anything else f"{policy.object_kind.value}:{policy.object}",
        "weekly": [
            {"days": list(week.days), "begin": _clock(week.begin), "end": _clock(week.end)} for week in policy.weekly
        ],
    }
    for name in POLICY_FIELDS:
        if name not in found:
            found[name] = _plain(getattr(policy, name))
    return found


def policy_of(name: str, body: Body, *, version: int) -> Policy:
    """The policy that a body asks for; what is left out has its default. Raises `BadRequest`."""
    if body.found.get("name", name) != name:
        raise BadRequest("The field `name` differs from the name in the address; a policy cannot be renamed.")
    subject_kind, subject = _named(body, "subject", SubjectKind, SubjectKind.EVERYONE, None)
    object_kind, thing = _named(body, "object", ObjectKind, ObjectKind.ANY, "any")
    resource = _word(body, "resource", Resource, Resource.KERNELS)
    origin = _word(body, "origin", Origin, Origin.POLICY)
    period = body.text("period")
    policy = Policy(
        name=name,
        subject_kind=subject_kind,
        subject=subject,
        object_kind=object_kind,
        object=thing,
        resource=resource,
        gpu_model=body.text("gpu_model", size=64),
        counts=_word(body, "counts", Counts, Counts.EACH),
        window=_word(body, "window", WindowKind, WindowKind.NOW),
        window_seconds=_seconds(body, "window_seconds"),
        period=_word(body, "period", Period, Period.MONTH) if period else None,
        timezone=body.text("timezone", size=64) or "UTC",
        hard=_amount(body, "hard", resource),
        soft=_amount(body, "soft", resource),
        burst=_amount(body, "burst", resource),
        burst_seconds=_seconds(body, "burst_seconds"),
        action=_word(body, "action", Action, Action.REJECT),
        queue_seconds=_seconds(body, "queue_seconds"),
        grace_seconds=_seconds(body, "grace_seconds"),
        priority=int(body.number("priority", low=-(10**6), high=10**6, default=0)),
        enabled=body.flag("enabled", True),
        valid_from=body.moment("valid_from"),
        valid_until=body.moment("valid_until"),
        weekly=_weekly(body),
        note=body.note("note"),
        origin=origin,
        delegated=body.flag("delegated", False),
        version=version,
    )
    one = policy.subject_kind in (SubjectKind.USER, SubjectKind.SERVICE)
    if policy.origin is Origin.GRANT and (not one or policy.valid_until is None):
        raise BadRequest(
            "A grant is for one user or service (`subject` is `user:...` or `service:...`) and has an end "
            "(`valid_until`)."
        )
    return policy


def _named(body: Body, name: str, kinds: type[E], whole: E, default: str | None) -> tuple[E, str]:
    """`kind:name`, or the word that means all."""
    value = body.text(name, size=300) or default
    if value == whole.value:
        return whole, "*"
    kind, colon, rest = (value or "").partition(":")
    words = {one.value: one for one in kinds if one is not whole}
    if kind not in words or not colon or not rest or len(rest) > 255:
        raise BadRequest(
            f"The field `{name}` must be `{whole.value}` or one of {', '.join(f'`{word}:NAME`' for word in words)}."
        )
    return words[kind], rest


def _word(body: Body, name: str, kinds: type[E], default: E) -> E:
    value = body.text(name)
    if not value:
        return default
    try:
        return kinds(value)
    except ValueError:
        words = ", ".join(str(one.value) for one in kinds)
        raise BadRequest(f"The field `{name}` must be one of {words}.") from None


def _seconds(body: Body, name: str) -> int | None:
    if body.found.get(name) is None:
        return None
    return int(body.number(name, low=0, high=MAX_SECONDS))


def _amount(body: Body, name: str, resource: Resource) -> float | None:
    value = body.found.get(name)
    return None if value is None else amount(resource, f"The field `{name}`", value)


def _weekly(body: Body) -> tuple[Weekly, ...]:
    value = body.found.get("weekly")
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 50:
        raise _bad_weekly()
    return tuple(_week(one) for one in value)


def _week(value: Any) -> Weekly:
    if not isinstance(value, dict) or set(value) != {"days", "begin", "end"}:
        raise _bad_weekly()
    days = value["days"]
    if not isinstance(days, list) or not days or len(days) > 7:
        raise _bad_weekly()
    if any(not isinstance(day, int) or isinstance(day, bool) or not 0 <= day <= 6 for day in days):
        raise _bad_weekly()
    return Weekly(tuple(sorted(set(days))), _minutes(value["begin"]), _minutes(value["end"]))


def _minutes(value: Any) -> int:
    found = re.fullmatch(r"([01][0-9]|2[0-4]):([0-5][0-9])", value) if isinstance(value, str) else None
    minutes = int(found[1]) * 60 + int(found[2]) if found else 1441
    if minutes > 1440:
        raise _bad_weekly()
    return minutes


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _bad_weekly() -> BadRequest:
    return BadRequest(
        "The field `weekly` must be a list of times of the week, each with `days` (0, Monday, to 6), `begin` and `end` "
        'such as {"days": [0, 1, 2, 3, 4], "begin": "08:00", "end": "18:00"}.'
    )


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value


@dataclass(frozen=True)
class Diff:
    """What a file of policies would change: names, and what is wrong with it."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    problems: tuple[Any, ...] = ()


def document(policies: Sequence[Policy]) -> str:
    """All policies as a YAML file; what is as by default is left out. Read again, it gives the same policies."""
    usual = policy_json(Policy("", SubjectKind.EVERYONE))
    listed = []
    for policy in sorted(policies, key=lambda policy: policy.name):
        found = policy_json(policy)
        kept = {name: found[name] for name in WRITTEN if found[name] != usual[name]}
        listed.append({"name": policy.name, "subject": found["subject"], **kept})
    text: str = yaml.safe_dump({"policies": listed}, sort_keys=False, allow_unicode=True, width=120)
    return text


def policies_of(text: str) -> list[Policy]:
    """The policies of a YAML (or JSON) file. Raises `BadRequest`, which names the policy that is wrong."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise BadRequest(f"The file of policies is not YAML: {' '.join(str(error).split())[:300]}.") from error
    listed = found.get("policies") if isinstance(found, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_POLICIES or set(found) != {"policies"}:
        raise BadRequest("A file of policies is a list under the key `policies`, and nothing else.")
    made: dict[str, Policy] = {}
    for number, entry in enumerate(listed, 1):
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise BadRequest(
                f"Policy {number} of the file has no name of letters, digits and the signs `.`, `_`, `@`, `-`."
            )
        if name in made:
            raise BadRequest(f"The file has two policies of the name {name}.")
        try:
            made[name] = policy_of(name, Body(_texts(entry), POLICY_FIELDS), version=0)
        except BadRequest as error:
            raise BadRequest(f"Policy {name} of the file: {error.message}") from error
    return list(made.values())


def _texts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """YAML reads moments as such; everything else of ours is text, numbers and lists."""
    return {str(key): _plain(value) if isinstance(value, datetime) else value for key, value in entry.items()}


def difference(now: Sequence[Policy], wanted: Sequence[Policy]) -> Diff:
    """What is to be done to get from some policies to others. Grants are left alone: they are not part of files."""
    before = {policy.name: policy for policy in now if policy.origin is not Origin.GRANT}
    after = {policy.name: policy for policy in wanted}
    return Diff(
        added=tuple(sorted(set(after) - set(before))),
        changed=tuple(sorted(name for name in set(after) & set(before) if said(after[name]) != said(before[name]))),
        removed=tuple(sorted(set(before) - set(after))),
    )


def said(policy: Policy) -> Policy:
    """A policy without when and by whom it was set."""
    return replace(
        policy, id=None, version=0, created_at=None, created_by="", updated_at=None, updated_by="", approver=None
    )
