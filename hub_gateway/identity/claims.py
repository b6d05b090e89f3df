"""Whom a principal and a unix user belong to: the first Hub user who was mapped to it, until released.

Claims are written in the transaction that admits a kernel, under the lock of all admissions, so that of two Hub users
who come at once with one principal only one gets it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import Table, bindparam, delete, func, insert, literal, or_, select, tuple_
from sqlalchemy.orm import Session as Transaction

from hub_gateway.audit import append
from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.db.settings import put, settings
from hub_gateway.db.tenancy import IdentityClaim
from hub_gateway.errors import Conflict, LaunchRefused
from hub_gateway.identity.types import Identity
from hub_gateway.kernels.types import KernelStatus

__all__ = ["Claim", "Claims", "Taken", "claims_of", "find", "holders", "release"]

_TABLE = cast(Table, IdentityClaim.__table__)
_HOLDERS = (
    select(_TABLE)
    .where(tuple_(_TABLE.c.kind, _TABLE.c.name).in_(bindparam("wanted", expanding=True)))
    .order_by(_TABLE.c.hub_user)
)
VERSION = "claims_version"
"""The setting that changes whenever something is released."""
MADE = "claims made"
"""Where in a transaction's `info` the claims are that it has inserted."""
MOST_SEEN = 50_000
_ENDED = (KernelStatus.STOPPED.value, KernelStatus.FAILED.value)


class Taken(LaunchRefused):
    """What a Hub user was mapped to belongs to another one."""


@dataclass(frozen=True)
class Claim:
    """One principal, unix user or uid that belongs to a Hub user. `name` is in lower case."""

    kind: str
    name: str
    hub_user: str
    rule: str
    claimed_at: datetime


def holders(tx: Transaction, identity: Identity) -> Sequence[Claim]:
    """Who holds what this identity needs, its own owner among them."""
    wanted = identity.claimed
    if not wanted:
        return ()
    return [Claim(*row) for row in tx.connection().execute(_HOLDERS, {"wanted": list(wanted)})]


def claims_of(tx: Transaction, hub_user: str) -> Sequence[Claim]:
    """What a Hub user holds."""
    statement = select(_TABLE).where(_TABLE.c.hub_user == hub_user).order_by(_TABLE.c.kind, _TABLE.c.name)
    return [Claim(*row) for row in tx.connection().execute(statement)]


def find(
    tx: Transaction, query: str, *, owners: frozenset[str] | None, after: tuple[str, str, str], limit: int
) -> Sequence[Claim]:
    """What Hub users hold whose own name, or what they hold, has `query` in it; by user, from `after` on.

    `owners` None is everybody.
    """
    key = (_TABLE.c.hub_user, _TABLE.c.kind, _TABLE.c.name)
    statement = select(_TABLE).where(tuple_(*key) > tuple_(*(literal(one) for one in after)))
    if query:
        like = {"autoescape": True}
        statement = statement.where(
            or_(_TABLE.c.hub_user.icontains(query, **like), _TABLE.c.name.icontains(query, **like))
        )
    found = []
    # Who may see some only, sees few: these are picked here, not by a list in SQL, which has its limit.
    for row in tx.connection().execute(statement.order_by(*key)):
        if owners is None or row.hub_user in owners:
            found.append(Claim(*row))
            if len(found) == limit:
                break
    return found


class Claims:
    """Claims for one gateway process, which remembers what it has seen to be whose until anything is released."""

    def __init__(self) -> None:
        self._version = ""
        self._seen: set[tuple[str, str, str]] = set()

    def claim(self, tx: Transaction, identity: Identity) -> None:
        """Take what the identity needs for its owner, and write down the decision. Raises `Taken`.

        Nothing but the line of the audit trail is written where it raises; the transaction is to be committed then,
        too.
        """
        if not identity.claimed:
            return
        lock(tx)
        missing = [] if self._all_seen(tx, identity) else self._missing(tx, identity)
        if missing:
            now = utcnow()
            rows = [
                {"kind": kind, "name": name, "hub_user": identity.owner, "rule": identity.rule, "claimed_at": now}
                for kind, name in missing
            ]
            tx.connection().execute(insert(_TABLE), rows)
            tx.info.setdefault(MADE, set()).update((kind, name, identity.owner) for kind, name in missing)
        _audit(tx, identity, "ok", {"first": [f"{kind} {name}" for kind, name in missing]} if missing else {})

    def _all_seen(self, tx: Transaction, identity: Identity) -> bool:
        """Whether all of it is known to be its owner's."""
        version = settings(tx).get(VERSION, "")
        if version != self._version or len(self._seen) > MOST_SEEN:
            self._version = version
            self._seen.clear()
        return all((kind, name, identity.owner) in self._seen for kind, name in identity.claimed)

    def _missing(self, tx: Transaction, identity: Identity) -> Sequence[tuple[str, str]]:
        """What of it its owner does not have yet. Raises `Taken`."""
        found = holders(tx, identity)
        own = {(one.kind, one.name) for one in found if one.hub_user == identity.owner}
        if not identity.shared:
            for one in found:
                if (one.kind, one.name) not in own:
                    _audit(tx, identity, "refused", {"taken": f"{one.kind} {one.name}", "held_by": one.hub_user})
                    hint = f"{one.kind} {one.name} is held by {one.hub_user}"
                    raise Taken(taken_sentence(identity, one.kind), hint=hint)
        # Not what this transaction has inserted, perhaps for a launch before this one: that may be rolled back.
        self._seen.update({(kind, name, identity.owner) for kind, name in own} - tx.info.get(MADE, set()))
        return [key for key in identity.claimed if key not in own]


def release(tx: Transaction, hub_user: str, actor: str) -> Sequence[Claim]:
    """Give back everything that a Hub user holds; what it was. Raises `Conflict` while kernels run with it."""
    lock(tx)
    found = claims_of(tx, hub_user)
    if not found:
        return ()
    kernels = tx.scalar(
        select(func.count()).select_from(Kernel).where(Kernel.owner == hub_user, Kernel.status.not_in(_ENDED))
    )
    if kernels:
        raise Conflict(
            f"{hub_user} has {kernels} kernel{'s' if kernels > 1 else ''} that run under what is to be released; "
            "stop them first."
        )
    tx.connection().execute(delete(_TABLE).where(_TABLE.c.hub_user == hub_user))
    put(tx, VERSION, uuid.uuid4().hex)
    released = [f"{one.kind} {one.name}" for one in found]
    append(tx, actor=actor, action="identity.release", subject=hub_user, outcome="ok", detail={"released": released})
    return found


def taken_sentence(identity: Identity, kind: str) -> str:
    """What the second one is told; the name of the first one is not theirs to know."""
    what = f"the principal {identity.principal}" if kind == "principal" else f"the unix user {identity.unix_user}"
    return (
        f"Your kernels would run as {what}, which belongs to another user of the Hub, so none is started. If you had "
        "another name on the Hub before, ask the administrator of the gateway to release what that name holds."
    )


def _audit(tx: Transaction, identity: Identity, outcome: str, more: dict[str, object]) -> None:
    action = "identity.mapped" if outcome == "ok" else "identity.refused"
    detail = {**identity.facts(), **more}
    append(tx, actor=identity.owner, action=action, subject=identity.owner, outcome=outcome, detail=detail)
