"""What users are told about limits: one full sentence each, that JupyterLab can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.resolve import covers, name_of, window_bounds
from hub_gateway.quotas.types import Counts, Demand, Policy, SubjectKind, WindowKind

if TYPE_CHECKING:
    from hub_gateway.quotas.admission import Fit

__all__ = ["Holding", "holdings", "maintenance", "refusal", "soft", "span", "waiting", "window"]

NAMED = 3
"""How many kernels or people a sentence names."""


@dataclass(frozen=True)
class Holding:
    """A kernel that counts for a policy."""

    kernel_id: str
    owner: str
    kernelspec: str
    title: str
    """The notebook's name, or the kernelspec's."""
    since: datetime


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


def holdings(tx: Transaction, policy: Policy, demand: Demand, *, limit: int = 200) -> list[Holding]:
    """The kernels that count for a policy, oldest first: the owner's own, or everybody's of a common limit."""
    open_ones = (
        select(
            Kernel.id,
            Kernel.owner,
            Kernel.kernelspec,
            Kernel.path,
            Reservation.created_at,
            Reservation.proxy,
            Reservation.queue,
            Reservation.groups,
        )
        .join(Reservation, Reservation.kernel_id == Kernel.id)
        .where(Reservation.released_at.is_(None))
        .order_by(Reservation.created_at)
        .limit(limit)
    )
    together = policy.counts is Counts.TOGETHER and policy.subject_kind in (SubjectKind.GROUP, SubjectKind.EVERYONE)
    if not together:
        open_ones = open_ones.where(Reservation.owner == demand.owner)
    found = []
    for key, owner, kernelspec, path, since, proxy, queue, groups in tx.execute(open_ones):
        if together and policy.subject_kind is SubjectKind.GROUP and policy.subject not in (groups or ()):
            continue
        if covers(policy, kernelspec, proxy, queue):
            found.append(Holding(key, owner, kernelspec, (path or "").rpartition("/")[2] or kernelspec, since))
    return found


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


def _holders(found: Sequence[Holding], demand: Demand, now: datetime) -> str:
    """Who holds it: own kernels by name, others by their owner and how many they have."""
    mine = [one for one in found if one.owner == demand.owner]
    parts = [f"{one.title} ({_ago(one.since, now)})" for one in mine[:NAMED]]
    if len(mine) > NAMED:
        parts.append(f"{len(mine) - NAMED} more of yours")
    others: dict[str, int] = {}
    for one in found:
        if one.owner != demand.owner:
            others[one.owner] = others.get(one.owner, 0) + 1
    ranked = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) == 1 and not mine:
        return name_of(ranked[0][0])
    parts += [f"{name_of(owner)} ({count} kernel{'' if count == 1 else 's'})" for owner, count in ranked[:NAMED]]
    if len(ranked) > NAMED:
        parts.append(f"{len(ranked) - NAMED} more people")
    return _joined(parts)


def _hold(found: Sequence[Holding], demand: Demand) -> str:
    """The verb: one kernel of one's own holds something, or one person."""
    mine = sum(one.owner == demand.owner for one in found)
    holders = mine + len({one.owner for one in found if one.owner != demand.owner})
    return "holds" if holders == 1 else "hold"


def _without_unit(used: str, limit: str) -> str:
    """`4` of `4 GPUs` used of `4 GPUs`."""
    number, _, unit = used.partition(" ")
    of = limit.partition(" ")[2]
    return number if unit and of.startswith((unit, unit.rstrip("s"))) else used


def _joined(parts: Iterable[str]) -> str:
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def refusal(tx: Transaction, demand: Demand, fit: Fit, now: datetime, where: str) -> str:
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
        _, end = window_bounds(policy, now)
        frees = (
            f"it begins anew in {span((end - now).total_seconds())}"
            if policy.window is WindowKind.CALENDAR
            else "it frees as what you used grows older"
        )
        return f"You have used {used} of {_whose(policy)} of {_limit(fit)} {named}: {frees}{look}."
    found = holdings(tx, policy, demand)
    held = _holders(found, demand, now)
    taken = f"{held} {_hold(found, demand)} {used}" if held else f"{used} are in use"
    shut = "shut one down" if any(one.owner == demand.owner for one in found) else "wait until one is shut down"
    need = shown(policy.resource, fit.need, policy.gpu_model)
    return f"There is no room for {need} more: {_whose(policy)} is {_limit(fit)} {named}, and {taken}; {shut}{look}."


def waiting(tx: Transaction, demand: Demand, fit: Fit, now: datetime, found: Sequence[Holding] | None = None) -> str:
    """What a kernel waits for: who holds how much of what. `found` is who holds it, where that is known already."""
    policy = fit.policy
    used = shown(policy.resource, fit.used, policy.gpu_model)
    limit = _limit(fit)
    if policy.resource.timed:
        _, end = window_bounds(policy, now)
        anew = policy.window is WindowKind.CALENDAR
        frees = f", and it begins anew in {span((end - now).total_seconds())}" if anew else ""
        return f"{used} of {limit} are used up (policy {policy.name}){frees}"
    found = holdings(tx, policy, demand) if found is None else found
    held = _holders(found, demand, now)
    verb = _hold(found, demand) if held else "hold"
    return f"{held or 'others'} {verb} {_without_unit(used, limit)} of {limit} (policy {policy.name})"


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
