"""Users ask for more; administrators and leads answer. A granted request becomes a temporary grant."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.among import among
from hub_gateway.db.lock import lock
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import QuotaRequest
from hub_gateway.errors import BadRequest, Conflict, NotFound, TooManyRequests
from hub_gateway.quotas.grants import check_counts, check_lead, grant_from, kind_of
from hub_gateway.quotas.policies import PolicyStore
from hub_gateway.quotas.resolve import concerns
from hub_gateway.quotas.types import Counts, Demand, Policy, Resource

__all__ = ["Request", "answer", "find", "get", "open_request", "withdraw"]

MOST_OPEN = 10


@dataclass(frozen=True)
class Request:
    """A request for more of one policy: up to `amount`, until a moment. `state`: open, granted, refused, withdrawn."""

    id: int
    owner: str
    groups: tuple[str, ...]
    policy: str
    amount: float
    until: datetime
    reason: str
    state: str
    created_at: datetime
    decided_at: datetime | None = None
    decided_by: str | None = None
    answer: str = ""
    grant_name: str | None = None


def _sensible(resource: Resource, amount: float) -> None:
    """Raise `BadRequest` for what no limit can be."""
    whole = resource in (Resource.KERNELS, Resource.STARTING, Resource.GPU)
    if not math.isfinite(amount) or not 0 <= amount <= 2**53 or (whole and amount != int(amount)):
        raise BadRequest(f"{amount:g} is no amount of {resource.value}; give a number such as 4.")


def _request(row: QuotaRequest) -> Request:
    return Request(
        row.id,
        row.owner,
        tuple(row.groups),
        row.policy,
        row.amount,
        row.until,
        row.reason,
        row.state,
        row.created_at,
        row.decided_at,
        row.decided_by,
        row.answer,
        row.grant_name,
    )


def find(
    tx: Transaction,
    state: str | None = None,
    owner: str | None = None,
    *,
    owners: Collection[str] | None = None,
    before: int | None = None,
    limit: int = 500,
) -> Sequence[Request]:
    """Requests, newest first; of one owner, of some owners, with numbers before one."""
    statement = select(QuotaRequest).order_by(QuotaRequest.id.desc()).limit(limit)
    if owners is not None:
        statement = statement.where(among(tx, QuotaRequest.owner, owners))
    if before is not None:
        statement = statement.where(QuotaRequest.id < before)
    if state is not None:
        statement = statement.where(QuotaRequest.state == state)
    if owner is not None:
        statement = statement.where(QuotaRequest.owner == owner)
    return [_request(row) for row in tx.scalars(statement)]


def get(tx: Transaction, request_id: int) -> Request | None:
    """One request."""
    row = tx.get(QuotaRequest, request_id)
    return None if row is None else _request(row)


def open_request(
    tx: Transaction, owner: str, groups: Collection[str], policy: Policy, amount: float, until: datetime, reason: str
) -> Request:
    """Ask for more of a limit of one's own.

    Raises `NotFound` (it is no limit of theirs), `BadRequest`, `Conflict` (asked already), `TooManyRequests`.
    """
    lock(tx)
    if not concerns(policy, Demand(owner, kind_of(owner), frozenset(groups), "", "")):
        raise NotFound(f"There is no limit {policy.name!r} of yours; see your limits for their names.")
    if policy.counts is not Counts.EACH:
        raise BadRequest(
            f"The limit {policy.name} is not yours alone, so it cannot be raised for you; ask for another one, or ask "
            "the administrator."
        )
    _sensible(policy.resource, amount)
    if until <= utcnow():
        raise BadRequest("The request would have ended already; give a later `until`.")
    if policy.hard is None or amount <= policy.hard:
        raise BadRequest(f"You ask for {amount:g}, and your limit {policy.name} is no less; ask for more than that.")
    mine = QuotaRequest.owner == owner, QuotaRequest.state == "open"
    if tx.execute(select(QuotaRequest.id).where(*mine, QuotaRequest.policy == policy.name)).first():
        raise Conflict(
            f"You have asked for more of {policy.name} already; wait for the answer, or withdraw that request."
        )
    if tx.execute(select(func.count()).where(*mine)).scalar_one() >= MOST_OPEN:
        raise TooManyRequests(f"You have {MOST_OPEN} open requests; wait for their answers, or withdraw some.")
    row = QuotaRequest(
        owner=owner,
        groups=sorted(groups),
        policy=policy.name,
        amount=amount,
        until=until,
        reason=reason,
        state="open",
        created_at=utcnow(),
        answer="",
    )
    tx.add(row)
    tx.flush()
    detail = {"request": row.id, "policy": policy.name, "amount": amount, "until": until.isoformat(), "reason": reason}
    audit.append(tx, actor=owner, action="request.open", subject=owner, detail=detail)
    return _request(row)


def answer(
    tx: Transaction,
    policies: PolicyStore,
    request_id: int,
    actor: str,
    *,
    grant: bool,
    text: str,
    amount: float | None = None,
    until: datetime | None = None,
    lead: bool = False,
    check: Callable[[Policy], None] = lambda policy: None,
) -> Request:
    """Grant a request (by a grant that ends) or refuse it, once.

    A `lead` gives more of what leads have set. `check` raises where the grant makes no sense. Raises `NotFound`,
    `Conflict` (also where the grant would have no effect), `BadRequest`, `Forbidden`.
    """
    lock(tx)
    row = tx.get(QuotaRequest, request_id)
    if row is None:
        raise NotFound(f"There is no request {request_id}.")
    if row.state != "open":
        raise Conflict(f"Request {request_id} is {row.state} already, by {row.decided_by or row.owner}.")
    now = utcnow()
    if grant:
        before = policies.index(tx).by_name.get(row.policy)
        if before is None:
            raise NotFound(f"The policy {row.policy} that was asked about does not exist any more; refuse the request.")
        ends = until or row.until
        if ends <= now:
            raise BadRequest("The grant would have ended already; give a later `until`.")
        if amount is not None:
            _sensible(before.resource, amount)
        if lead:
            check_lead(before)
        wanted = grant_from(
            before,
            name=f"grant-{row.id}",
            owner=row.owner,
            hard=amount if amount is not None else row.amount,
            ends=ends,
            approver=actor,
            note=f"Request {row.id}: {row.reason}",
        )
        check_counts(wanted, before, policies.all(tx), row.groups, now)
        check(wanted)
        made = policies.put(tx, wanted, actor, action="grant.set")
        row.grant_name, row.until, row.amount = made.name, ends, made.hard or row.amount
    row.state, row.decided_at, row.decided_by, row.answer = "granted" if grant else "refused", now, actor, text
    tx.flush()
    detail = {"request": row.id, "policy": row.policy, "granted": grant, "amount": row.amount, "answer": text}
    audit.append(tx, actor=actor, action="request.answer", subject=row.owner, detail=detail)
    return _request(row)


def withdraw(tx: Transaction, request_id: int, owner: str) -> Request:
    """Take one's own open request back. Raises `NotFound`."""
    lock(tx)
    row = tx.get(QuotaRequest, request_id)
    if row is None or row.owner != owner or row.state != "open":
        raise NotFound(f"You have no open request {request_id}.")
    row.state, row.decided_at = "withdrawn", utcnow()
    tx.flush()
    audit.append(tx, actor=owner, action="request.withdraw", subject=owner, detail={"request": row.id})
    return _request(row)
