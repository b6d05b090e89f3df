"""Which policies a launch has to fit into, and over which time they count. Pure functions.

The rule is told in docs/explanation/limits.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, time, timedelta, timezone
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TypeAlias
from zoneinfo import ZoneInfo

from hub_gateway.quotas.types import Counts, Demand, ObjectKind, Period, Policy, SubjectKind, WindowKind

__all__ = ["Slot", "active", "applicable", "concerns", "covers", "losers", "name_of", "slot", "window_bounds"]

Slot: TypeAlias = tuple[object, ...]
SERVICE = "services/"
MINUTES = 24 * 60
SPECIFIC = {SubjectKind.USER: 2, SubjectKind.SERVICE: 2, SubjectKind.GROUP: 1, SubjectKind.EVERYONE: 0}


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def name_of(owner: str) -> str:
    """The name of a user or service, as policies write it."""
    return owner.removeprefix(SERVICE)


def active(policy: Policy, now: datetime) -> bool:
    """Whether a policy holds at this moment."""
    if not policy.enabled:
        return False
    if policy.valid_from is not None and now < policy.valid_from:
        return False
    if policy.valid_until is not None and now >= policy.valid_until:
        return False
    if not policy.weekly:
        return True
    local = now.astimezone(_zone(policy.timezone))
    day, minute = local.weekday(), local.hour * 60 + local.minute
    for week in policy.weekly:
        if week.begin < week.end:
            if day in week.days and week.begin <= minute < week.end:
                return True
        elif (day in week.days and minute >= week.begin) or ((day - 1) % 7 in week.days and minute < week.end):
            return True
    return False


def covers(policy: Policy, kernelspec: str, proxy: str, queue: str) -> bool:
    """Whether a policy is about kernels of this kernelspec, proxy and queue."""
    if policy.object_kind is ObjectKind.ANY:
        return True
    known = {ObjectKind.KERNELSPEC: kernelspec, ObjectKind.PROXY: proxy, ObjectKind.QUEUE: queue}
    return fnmatchcase(known[policy.object_kind], policy.object)


def concerns(policy: Policy, demand: Demand) -> bool:
    """Whether a policy is about this launch's owner."""
    if policy.subject_kind is SubjectKind.EVERYONE:
        return True
    if policy.subject_kind is SubjectKind.GROUP:
        return policy.subject in demand.groups
    return policy.subject_kind is demand.owner_kind and policy.subject == name_of(demand.owner)


def slot(policy: Policy) -> Slot:
    """Policies with the same slot speak about the same thing, and one of them wins."""
    return (
        policy.delegated,
        policy.counts,
        policy.object_kind,
        policy.object,
        policy.resource,
        policy.gpu_model,
        policy.window,
        policy.window_seconds,
        policy.period,
        policy.timezone if policy.window is WindowKind.CALENDAR else "",
    )


def _rank(policy: Policy) -> tuple[object, ...]:
    """The smallest wins."""
    generous = float("inf") if policy.hard is None else policy.hard
    return (-policy.priority, -SPECIFIC[policy.subject_kind], -generous, policy.name)


def applicable(policies: Iterable[Policy], demand: Demand, now: datetime) -> list[Policy]:
    """The policies that a launch has to fit into: winners of their slots, and all that count together."""
    together: list[Policy] = []
    winners: dict[Slot, Policy] = {}
    for policy in policies:
        if not (concerns(policy, demand) and covers(policy, demand.kernelspec, demand.proxy, demand.queue)):
            continue
        if not active(policy, now):
            continue
        if policy.counts is Counts.TOGETHER:
            together.append(policy)
            continue
        key = slot(policy)
        best = winners.get(key)
        if best is None or _rank(policy) < _rank(best):
            winners[key] = policy
    return [*winners.values(), *together]


def losers(policies: Sequence[Policy], demand: Demand, now: datetime) -> dict[str, str]:
    """Why policies about this owner do not count: the reason, by name."""
    winners = {slot(policy): policy for policy in applicable(policies, demand, now)}
    reasons = {}
    for policy in policies:
        if not concerns(policy, demand):
            continue
        if not policy.enabled:
            reasons[policy.name] = "It is switched off."
        elif policy.valid_until is not None and now >= policy.valid_until:
            reasons[policy.name] = f"It ended {policy.valid_until:%Y-%m-%d %H:%M} UTC."
        elif policy.valid_from is not None and now < policy.valid_from:
            reasons[policy.name] = f"It begins {policy.valid_from:%Y-%m-%d %H:%M} UTC."
        elif not active(policy, now):
            reasons[policy.name] = "It does not hold at this time of the week."
        elif not covers(policy, demand.kernelspec, demand.proxy, demand.queue):
            reasons[policy.name] = f"It is about the {policy.object_kind.value} {policy.object}."
        elif policy.counts is not Counts.TOGETHER and winners[slot(policy)].name != policy.name:
            best = winners[slot(policy)]
            reasons[policy.name] = f"The policy {best.name} counts in its place: {_why(best, policy)}."
    return reasons


def _why(best: Policy, other: Policy) -> str:
    if best.priority != other.priority:
        return f"its priority is {best.priority}, not {other.priority}"
    if SPECIFIC[best.subject_kind] != SPECIFIC[other.subject_kind]:
        return f"it is about {_subject(best)}, not {_subject(other)}"
    if best.hard != other.hard:
        return "it is more generous"
    return "it is the first by name"


def _subject(policy: Policy) -> str:
    if policy.subject_kind is SubjectKind.EVERYONE:
        return "everyone"
    return f"the {policy.subject_kind.value} {policy.subject}"


def window_bounds(policy: Policy, now: datetime) -> tuple[datetime, datetime]:
    """From when to when a policy counts, around `now`; aware, in UTC.

    A calendar window begins at midnight in the policy's zone: the day on which a clock is changed has 23 or 25 hours.
    """
    if policy.window is WindowKind.ROLLING:
        return now - timedelta(seconds=policy.window_seconds or 0), now
    if policy.window is WindowKind.NOW:
        return now, now
    zone = _zone(policy.timezone)
    today = now.astimezone(zone).date()
    if policy.period is Period.DAY:
        first, after = today, today + timedelta(days=1)
    elif policy.period is Period.WEEK:
        first = today - timedelta(days=today.weekday())
        after = first + timedelta(days=7)
    else:
        first = today.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    begin, end = (datetime.combine(day, time(), zone).astimezone(timezone.utc) for day in (first, after))
    return begin, end
