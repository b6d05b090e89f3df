"""Grants: more of one limit, for one user, for a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime

from hub_gateway.errors import Conflict, Forbidden
from hub_gateway.quotas.resolve import applicable, name_of, slot
from hub_gateway.quotas.types import Demand, ObjectKind, Origin, Policy, SubjectKind

__all__ = ["GRANT_PRIORITY", "check_counts", "check_lead", "grant_from", "kind_of"]

GRANT_PRIORITY = 1000
MAX_PRIORITY = 10**6


def kind_of(owner: str) -> SubjectKind:
    """Whether an owner of kernels is a user or a service."""
    return SubjectKind.USER if name_of(owner) == owner else SubjectKind.SERVICE


def grant_from(
    before: Policy, *, name: str, owner: str, hard: float, ends: datetime, approver: str, note: str
) -> Policy:
    """The grant that gives an owner more of a policy: like it, but for whom it is, how much, until when, and its rank.

    So it counts in its place, and at its times only. A burst that the new limit has reached is none any more.
    """
    bursts = before.burst is not None and before.burst > hard
    return replace(
        before,
        name=name,
        origin=Origin.GRANT,
        subject_kind=kind_of(owner),
        subject=name_of(owner),
        hard=hard,
        burst=before.burst if bursts else None,
        burst_seconds=before.burst_seconds if bursts else None,
        priority=min(max(GRANT_PRIORITY, before.priority + 1), MAX_PRIORITY),
        enabled=True,
        valid_from=None,
        valid_until=ends,
        approver=approver,
        note=note[:2000],
        id=None,
        version=0,
        created_at=None,
        created_by="",
        updated_at=None,
        updated_by="",
    )


def check_lead(before: Policy) -> None:
    """Whether who has a permission for some only may give more of a policy. Raises `Forbidden`."""
    if not before.delegated:
        raise Forbidden(
            f"The limit {before.name} is an administrator's, and your permission is for some users only, so more of it "
            "is not yours to give; ask the administrator of the gateway."
        )


def check_counts(
    grant: Policy, before: Policy, others: Iterable[Policy], groups: Collection[str], now: datetime
) -> None:
    """Whether a grant gives more than there is. Raises `Conflict` with the reason why it would not."""
    if before.hard is None or (grant.hard is not None and grant.hard <= before.hard):
        raise Conflict(f"The limit {before.name} allows as much already; give more than that.")
    owner = grant.subject if grant.subject_kind is SubjectKind.USER else f"services/{grant.subject}"
    demand = Demand(owner, grant.subject_kind, frozenset(groups), "", "")
    same = [one for one in others if slot(one) == slot(grant) and one.weekly in ((), grant.weekly)]
    # They are about the same object, whatever that is, and compared as at a time at which the grant holds.
    plain = [replace(one, object_kind=ObjectKind.ANY, object="*", weekly=()) for one in (grant, *same)]
    (best,) = applicable(plain, demand, now)
    if best.name != grant.name:
        raise Conflict(
            f"A grant would change nothing: for {owner} the policy {best.name} (priority {best.priority}) counts, and "
            "would still count in its place; change that policy."
        )
