"""The policies' rows: read as `Policy`, kept parsed by version, written with their line in the audit trail."""

from __future__ import annotations

import enum
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.lock import lock
from hub_gateway.db.models import utcnow
from hub_gateway.db.settings import put, settings
from hub_gateway.db.tenancy import Policy as Row
from hub_gateway.errors import Conflict, NotFound
from hub_gateway.quotas.resolve import name_of
from hub_gateway.quotas.types import (
    Action,
    Counts,
    Demand,
    ObjectKind,
    Origin,
    Period,
    Policy,
    Resource,
    SubjectKind,
    Weekly,
    WindowKind,
)
from hub_gateway.quotas.use import METERS

__all__ = ["MAINTENANCE", "PolicyIndex", "PolicyStore", "written"]

VERSION = "policies_version"
"""The setting that holds the version of all policies together: never the same again, also after a roll-back."""
MAINTENANCE = "maintenance"
"""The setting that holds the sentence while nothing is launched."""
_ENUMS: dict[str, type[enum.Enum]] = {
    "subject_kind": SubjectKind,
    "object_kind": ObjectKind,
    "resource": Resource,
    "counts": Counts,
    "window": WindowKind,
    "period": Period,
    "action": Action,
    "origin": Origin,
}
_KEPT = ("id", "version", "created_at", "created_by", "updated_at", "updated_by")


def written(policy: Policy) -> dict[str, Any]:
    """What a policy says, as JSON, without when and by whom it was said."""
    found = {name: value for name, value in asdict(policy).items() if name not in _KEPT}
    for name, value in found.items():
        if isinstance(value, enum.Enum):
            found[name] = value.value
        elif isinstance(value, datetime):
            found[name] = value.isoformat()
    found["weekly"] = [asdict(week) for week in policy.weekly]
    return found


def _policy(row: Row) -> Policy:
    found = {field.name: getattr(row, field.name) for field in fields(Policy)}
    for name, kind in _ENUMS.items():
        if found[name] is not None:
            found[name] = kind(found[name])
    found["weekly"] = tuple(Weekly(tuple(week["days"]), week["begin"], week["end"]) for week in row.weekly)
    return Policy(**found)


@dataclass(frozen=True)
class PolicyIndex:
    """All policies of one version, by name and by whom they are about."""

    version: str
    by_name: Mapping[str, Policy]
    by_subject: Mapping[tuple[SubjectKind, str], tuple[Policy, ...]]
    metered: Mapping[int, Policy] = field(default_factory=dict)
    """Those that count what is used up in a window, by id."""

    def only(self, wanted: Callable[[Policy], bool]) -> PolicyIndex:
        """Some of them, by whom they are about; no longer by name."""
        some = {key: tuple(filter(wanted, found)) for key, found in self.by_subject.items()}
        return PolicyIndex(self.version, {}, {key: found for key, found in some.items() if found})

    def about(self, owner: str, owner_kind: SubjectKind, groups: frozenset[str]) -> Iterator[Policy]:
        """The policies about an owner: theirs, their groups', everyone's."""
        yield from self.by_subject.get((owner_kind, name_of(owner)), ())
        for group in groups:
            yield from self.by_subject.get((SubjectKind.GROUP, group), ())
        yield from self.by_subject.get((SubjectKind.EVERYONE, "*"), ())

    def of(self, demand: Demand) -> Iterator[Policy]:
        """The policies about a launch's owner."""
        return self.about(demand.owner, demand.owner_kind, demand.groups)


class PolicyStore:
    """Policies, read anew only when their version has changed: of any process, on the same database."""

    def __init__(self) -> None:
        self._index = PolicyIndex("none yet", {}, {})

    @staticmethod
    def maintenance(tx: Transaction) -> str:
        """The sentence while nothing is launched, or nothing."""
        return settings(tx).get(MAINTENANCE, "")

    def index(self, tx: Transaction) -> PolicyIndex:
        """All policies, as of this transaction."""
        known: PolicyIndex | None = tx.info.get(self)
        if known is not None:
            return known
        version = settings(tx).get(VERSION, "")
        kept = self._index
        if kept.version == version:
            tx.info[self] = kept
            return kept
        by_name, by_subject = {}, defaultdict(list)
        for row in tx.scalars(select(Row).order_by(Row.name)):
            policy = _policy(row)
            by_name[policy.name] = policy
            by_subject[policy.subject_kind, policy.subject].append(policy)
        metered = {
            policy.id: policy
            for policy in by_name.values()
            if policy.resource.timed and policy.window is not WindowKind.NOW and policy.id is not None
        }
        made = PolicyIndex(version, by_name, {key: tuple(some) for key, some in by_subject.items()}, metered)
        self._index = tx.info[self] = made
        return made

    def all(self, tx: Transaction) -> tuple[Policy, ...]:
        """All policies, by name."""
        return tuple(self.index(tx).by_name.values())

    def put(self, tx: Transaction, policy: Policy, actor: str, *, action: str = "policy.set") -> Policy:
        """Set a policy. `version` must be the one that was read (0: it is new). Raises `Conflict`.

        Whether it makes sense is `hub_gateway.quotas.validate`'s business.
        """
        lock(tx)
        row = tx.execute(select(Row).where(Row.name == policy.name)).scalar_one_or_none()
        if (0 if row is None else row.version) != policy.version:
            raise Conflict(
                f"The policy {policy.name} was changed by somebody else meanwhile; read it again and repeat the change."
            )
        now = utcnow()
        before = None if row is None else written(_policy(row))
        values = {**written(policy), "valid_from": policy.valid_from, "valid_until": policy.valid_until}
        if row is None:
            row = Row(created_at=now, created_by=actor, version=1, updated_at=now, updated_by=actor, **values)
            tx.add(row)
        else:
            for name, value in values.items():
                setattr(row, name, value)
            row.version, row.updated_at, row.updated_by = row.version + 1, now, actor
        tx.flush()
        made = _policy(row)
        detail = {"before": before, "after": written(made)}
        audit.append(tx, actor=actor, action=action, subject=policy.name, detail=detail)
        self._changed(tx)
        return made

    def delete(self, tx: Transaction, name: str, actor: str) -> Policy:
        """Delete a policy. Raises `NotFound`."""
        lock(tx)
        row = tx.execute(select(Row).where(Row.name == name)).scalar_one_or_none()
        if row is None:
            raise NotFound(f"There is no policy {name[:100]!r}.")
        gone = _policy(row)
        tx.delete(row)
        tx.flush()
        detail = {"before": written(gone), "after": None}
        audit.append(tx, actor=actor, action="policy.delete", subject=name, detail=detail)
        self._changed(tx)
        return replace(gone, id=None)

    def _changed(self, tx: Transaction) -> None:
        tx.info.pop(self, None)
        tx.info.pop(METERS, None)
        put(tx, VERSION, uuid.uuid4().hex)
