"""What applies to somebody, what they use of it, and why they were refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.tenancy import PolicyState
from hub_gateway.quotas import sentences
from hub_gateway.quotas.admission import BURST, Admission
from hub_gateway.quotas.amounts import shown
from hub_gateway.quotas.enforce import OVER
from hub_gateway.quotas.holders import Holding, holdings
from hub_gateway.quotas.resolve import active, applicable, concerns, covers, losers, window_bounds
from hub_gateway.quotas.types import Counts, Demand, ObjectKind, Policy, Resource, SubjectKind, WindowKind
from hub_gateway.quotas.use import held_by, holders_of, scope_of

__all__ = ["Explanation", "LimitView", "PolicyView", "Refusal", "explain", "limits"]


@dataclass(frozen=True)
class LimitView:
    """One limit that applies to somebody, and what is used of it. Amounts in the resource's base unit."""

    policy: str
    resource: Resource
    gpu_model: str
    object: str
    counts: Counts
    subject: str
    window: str
    hard: float | None
    soft: float | None
    burst: float | None
    used: float
    held_by: tuple[Holding, ...] = ()
    resets_at: datetime | None = None
    valid_until: datetime | None = None
    state: str = "ok"
    """`ok`, `soft` (above the soft limit), `full` or `burst`."""
    stops_at: datetime | None = None
    """When the newest kernels are stopped, if use stays above the hard limit."""
    origin: str = "policy"
    delegated: bool = False
    """Whether a lead has set it, beside what administrators have."""
    sentence: str = ""
    warning: str = ""
    """What happens if nothing is shut down, where something does."""


@dataclass(frozen=True)
class PolicyView:
    """One policy about somebody: whether it counts for a launch, and why."""

    policy: Policy
    applies: bool
    why: str
    used: float | None = None
    room: float | None = None


@dataclass(frozen=True)
class Refusal:
    """One launch that was refused."""

    at: datetime
    kernelspec: str
    policy: str
    sentence: str


@dataclass(frozen=True)
class Explanation:
    """What applies to a launch of somebody's, and what was refused lately."""

    owner: str
    groups: tuple[str, ...]
    kernelspec: str | None
    policies: tuple[PolicyView, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    sentence: str = ""


def _possible(policies: Sequence[Policy], demand: Demand, now: datetime) -> list[Policy]:
    """What applies to somebody whatever they launch: the winner of each slot, whatever its object."""
    found: dict[str, Policy] = {}
    for policy in policies:
        if not concerns(policy, demand) or not active(policy, now):
            continue
        like = Demand(
            demand.owner,
            demand.owner_kind,
            demand.groups,
            policy.object if policy.object_kind is ObjectKind.KERNELSPEC else demand.kernelspec,
            policy.object if policy.object_kind is ObjectKind.PROXY else demand.proxy,
            policy.object if policy.object_kind is ObjectKind.QUEUE else demand.queue,
        )
        same = [one for one in policies if (one.object_kind, one.object) == (policy.object_kind, policy.object)]
        for winner in applicable(same, like, now):
            found[winner.name] = winner
    return sorted(found.values(), key=lambda one: (one.resource.value, one.object, one.name))


def limits(
    tx: Transaction,
    admission: Admission,
    owner: str,
    owner_kind: SubjectKind,
    groups: Collection[str],
    now: datetime,
) -> list[LimitView]:
    """Every limit that applies to somebody now."""
    demand = Demand(owner, owner_kind, frozenset(groups), "", "")
    index = admission.policies.index(tx)
    held = held_by(tx, holders_of(owner, owner_kind, groups))
    views = []
    for policy in _possible(tuple(index.of(demand)), demand, now):
        scope = scope_of(policy, owner, owner_kind)
        used = 0.0
        if policy.counts is not Counts.KERNEL:
            used = admission.used(tx, policy, scope, held.get(scope, ()), now)
        found = () if policy.resource.timed or policy.counts is Counts.KERNEL else tuple(holdings(tx, policy, demand))
        resets = window_bounds(policy, now)[1] if policy.window is WindowKind.CALENDAR else None
        over = None if policy.grace_seconds is None else tx.get(PolicyState, (policy.id, ":".join(scope), OVER))
        stops_at = None if over is None else over.until
        burst = policy.burst is not None and tx.get(PolicyState, (policy.id, ":".join(scope), BURST)) is not None
        everyone = policy.subject_kind is SubjectKind.EVERYONE
        views.append(
            LimitView(
                policy=policy.name,
                resource=policy.resource,
                gpu_model=policy.gpu_model,
                object="any" if policy.object_kind is ObjectKind.ANY else f"{policy.object_kind.value}:{policy.object}",
                counts=policy.counts,
                subject="everyone" if everyone else f"{policy.subject_kind.value}:{policy.subject}",
                window=sentences.window(policy).strip(),
                hard=policy.hard,
                soft=policy.soft,
                burst=policy.burst,
                used=used,
                held_by=found,
                resets_at=resets,
                valid_until=policy.valid_until,
                state=_state(policy, used, burst),
                stops_at=stops_at,
                origin=policy.origin.value,
                delegated=policy.delegated,
                sentence=_said(policy, used),
                warning=_ends(stops_at),
            )
        )
    return views


def _state(policy: Policy, used: float, burst: bool) -> str:
    if policy.counts is Counts.KERNEL or policy.hard is None:
        return "ok"
    if used > policy.hard and burst:
        return "burst"
    if used >= policy.hard:
        return "full"
    return "soft" if policy.soft is not None and used > policy.soft else "ok"


def _ends(stops_at: datetime | None) -> str:
    if stops_at is None:
        return ""
    return (
        f"More is in use than is allowed: kernels are stopped from {stops_at:%Y-%m-%d %H:%M} UTC on, the newest first."
    )


def _said(policy: Policy, used: float) -> str:
    if policy.hard is None:
        return "No limit."
    limit = shown(policy.resource, policy.hard, policy.gpu_model) + sentences.window(policy)
    if policy.counts is Counts.KERNEL:
        return f"One kernel may take {limit}."
    who = "You hold" if policy.counts is Counts.EACH else "Together, all hold"
    verb = who if not policy.resource.timed else who.replace("hold", "have used")
    return f"{verb} {shown(policy.resource, used, policy.gpu_model)} of {limit}."


def explain(
    tx: Transaction,
    admission: Admission,
    demand: Demand,
    now: datetime,
    *,
    kernelspec: str | None,
) -> Explanation:
    """Every policy about the owner of a launch, whether it counts, and why; and the last refusals."""
    index = admission.policies.index(tx)
    about = sorted(set(index.of(demand)), key=lambda policy: policy.name)
    why_not = losers(about, demand, now)
    fits = {fit.policy.name: fit for fit in admission.fits(tx, index, demand, now)}
    views = []
    for policy in about:
        fit = fits.get(policy.name)
        if policy.name in why_not:
            if kernelspec is None and not covers(policy, demand.kernelspec, demand.proxy, demand.queue):
                why = f"It counts for the {policy.object_kind.value} {policy.object} only."
            else:
                why = why_not[policy.name]
            views.append(PolicyView(policy, False, why))
            continue
        if fit is None:
            views.append(PolicyView(policy, True, _said(policy, 0.0)))
            continue
        room = None if fit.limit is None else max(0.0, fit.limit - fit.used)
        views.append(PolicyView(policy, True, _said(policy, fit.used), fit.used, room))
    refused = [
        Refusal(line.at, line.detail.get("kernelspec", ""), line.detail.get("policy", ""), line.detail["sentence"])
        for line in audit.query(tx, subject=demand.owner, action="kernel.refused", limit=10)
    ]
    verdict = admission.decide(tx, demand, now, looking=True)
    said = {"admitted": "A launch would be admitted now.", "queued": f"A launch would wait: {verdict.sentence}."}
    return Explanation(
        owner=demand.owner,
        groups=tuple(sorted(demand.groups)),
        kernelspec=kernelspec,
        policies=tuple(views),
        refusals=tuple(refused),
        sentence=said.get(verdict.outcome, verdict.sentence),
    )
