"""What users are told about limits: one full sentence each, that JupyterLab can show."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.holders import Room
from hub_gateway.quotas.resolve import name_of
from hub_gateway.quotas.types import Counts, Demand, Policy, Resource, SubjectKind, WindowKind

if TYPE_CHECKING:
    from hub_gateway.quotas.admission import Fit

__all__ = ["NAMED", "maintenance", "refusal", "soft", "span", "waiting", "window"]

NAMED = 3
"""How many kernels or people a sentence names."""


def maintenance(sentence: str) -> str:
    """Why nothing is launched."""
    return f"No kernels are started at the moment: {sentence}"


def span(seconds: float) -> str:
    """A duration as people say it: `40 seconds`, `25 minutes`, `3 hours`, `5 days`."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size or (unit == "minute" and seconds >= 90):
            return f"{round(seconds / size)} {unit}s"
    whole = max(1, round(seconds))
    return f"{whole} second{'' if whole == 1 else 's'}"


def window(policy: Policy) -> str:
    """Over which time a policy counts: `` (now), ` in 7 days`, ` in this calendar month (Europe/Berlin)`."""
    if policy.window is WindowKind.ROLLING:
        return f" in {span(policy.window_seconds or 0)}"
    if policy.window is WindowKind.CALENDAR and policy.period is not None:
        return f" in this calendar {policy.period.value} ({policy.timezone})"
    return ""


def _limit(fit: Fit) -> str:
    policy = fit.policy
    amount = shown(policy.resource, fit.limit or 0.0, policy.gpu_model)
    about = "" if policy.object == "*" else f" of {policy.object_kind.value} {policy.object}"
    return f"{amount}{about}{window(policy)}"


def _whose(policy: Policy) -> str:
    if policy.counts is not Counts.TOGETHER:
        return "your limit"
    if policy.subject_kind is SubjectKind.GROUP:
        return f"the limit of the group {policy.subject}"
    return "the limit of all users together" if policy.subject_kind is SubjectKind.EVERYONE else "your limit"


def _ago(since: datetime, now: datetime) -> str:
    return f"for {span(max(0.0, (now - since).total_seconds()))}"


def _holders(policy: Policy, room: Room, now: datetime) -> str:
    """Who holds it: own kernels by name, others by how much they have; and the verb."""
    counted = policy.resource in (Resource.KERNELS, Resource.STARTING)
    alone = len(room.own) + len(room.others) + room.more == 1
    parts = []
    for one in room.own[:NAMED]:
        amount = "" if counted or alone else f"{shown(policy.resource, one.amount, policy.gpu_model)}, "
        parts.append(f"{one.title} ({amount}{_ago(one.since, now)})")
    if len(room.own) > NAMED:
        parts.append(f"{len(room.own) - NAMED} more of yours")
    for share in room.others:
        amount = "" if alone else f" ({shown(policy.resource, share.amount, policy.gpu_model)})"
        parts.append(name_of(share.owner) + amount)
    if room.more:
        parts.append("one more person" if room.more == 1 else f"{room.more} more people")
    return f"{_joined(parts)} {'holds' if alone else 'hold'}" if parts else ""


def _are(amount: str) -> str:
    return "is" if amount.startswith("1 ") else "are"


def _soon(room: Room) -> str:
    """When room comes, as it did lately."""
    if room.frees_in is None:
        return ""
    which = "it ends" if room.kernels == 1 else "the first of them ends"
    return f"; by experience {which} in about {span(room.frees_in.total_seconds())}"


def _anew(policy: Policy, room: Room) -> str:
    """When there is time again of what is used up over time."""
    if room.frees_in is None:
        return "it allows none"
    when = span(room.frees_in.total_seconds())
    if policy.window is WindowKind.CALENDAR:
        return f"it begins anew in {when}"
    if room.others:
        return f"it frees in about {when}, once what runs now has ended"
    if not room.own:
        return f"it frees in about {when}"
    names = [one.title for one in room.own[:NAMED]]
    if len(room.own) > NAMED:
        names.append(f"{len(room.own) - NAMED} more of yours")
    return f"it frees in about {when} if {_joined(names)} {'is' if len(room.own) == 1 else 'are'} shut down"


def _without_unit(used: str, limit: str) -> str:
    """`4` of `4 GPUs` used of `4 GPUs`."""
    number, _, unit = used.partition(" ")
    of = limit.partition(" ")[2]
    return number if unit and of.startswith((unit, unit.rstrip("s"))) else used


def _joined(parts: Iterable[str]) -> str:
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def refusal(demand: Demand, fit: Fit, room: Room, now: datetime, where: str) -> str:
    """Why a launch is refused: the limit, its use, who holds it, when it frees, and where to look."""
    policy = fit.policy
    look = f", or ask for more at {where}" if where else ", or ask the administrator for more"
    named = f"(policy {policy.name})"
    if fit.hopeless:
        asked = shown(policy.resource, fit.need, policy.gpu_model)
        return (
            f"This kernel asks for {asked}, and {_whose(policy)} is {_limit(fit)} {named}; choose a smaller one{look}."
        )
    used = shown(policy.resource, fit.used, policy.gpu_model)
    if policy.resource.timed:
        who = "All together have" if policy.counts is Counts.TOGETHER else "You have"
        return f"{who} used {used} of {_whose(policy)} of {_limit(fit)} {named}: {_anew(policy, room)}{look}."
    held = _holders(policy, room, now)
    taken = f"{held} {used}" if held else f"{used} {_are(used)} in use"
    shut = "shut one down" if room.own else "wait until one is shut down"
    need = shown(policy.resource, fit.need, policy.gpu_model)
    return (
        f"There is no room for {need} more: {_whose(policy)} is {_limit(fit)} {named}, and {taken}{_soon(room)}; "
        f"{shut}{look}."
    )


def waiting(demand: Demand, fit: Fit, room: Room, now: datetime) -> str:
    """What a kernel waits for: who holds how much of what, and when that frees. A sentence without its end."""
    policy = fit.policy
    used = shown(policy.resource, fit.used, policy.gpu_model)
    limit = _limit(fit)
    if policy.resource.timed:
        return f"{used} of {limit} {_are(used)} used up (policy {policy.name}), and {_anew(policy, room)}"
    held = _holders(policy, room, now) or "others hold"
    return f"{held} {_without_unit(used, limit)} of {limit} (policy {policy.name}){_soon(room)}"


def soft(fits: Iterable[Fit]) -> tuple[str, ...]:
    """Notices about soft limits that a launch goes above."""
    found = []
    for fit in fits:
        policy = fit.policy
        if policy.soft is None or policy.resource.timed:
            continue
        after = fit.used + fit.need
        if after > policy.soft >= fit.used:
            use = shown(policy.resource, after, policy.gpu_model)
            hard = "" if fit.limit is None else f" of {shown(policy.resource, fit.limit, policy.gpu_model)}"
            found.append(f"You now hold {use}{hard}: above the soft limit of the policy {policy.name}.")
    return tuple(found)
