"""The audit trail: who did what to whom, in a chain of hashes.

Each line's hash is over its fields and the hash of the line before, so that a line that is changed, removed, put in or
moved breaks the chain. Number and hash of the last line are kept apart, so that lines missing at the end are noticed,
too. Lines are added under the same lock as everything that admits kernels: there is one order of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any, cast

from sqlalchemy import Table, delete, func, insert, select
from sqlalchemy.orm import Session as Transaction
from traitlets import Float
from traitlets.config import LoggingConfigurable

from hub_gateway.db.lock import lock
from hub_gateway.db.models import utcnow
from hub_gateway.db.settings import Beside, put, put_beside, settings
from hub_gateway.db.tenancy import AuditEntry

__all__ = ["COMMITTED", "GATEWAY", "AuditLog", "Line", "Verification", "append", "purge", "query", "verify"]

GATEWAY = "gateway"
"""The actor of what the gateway does by itself."""
COMMITTED = "audit_lines"
"""Where in a transaction's `info` its lines are, for `Database.on_commit`."""
HEAD = "audit_head"
ANCHOR = "audit_anchor"
NOTHING = "0" * 64
PAGE = 10_000
_TABLE = cast(Table, AuditEntry.__table__)
_ADD = Beside(insert(_TABLE))  # made once: each launch writes a line


@dataclass(frozen=True)
class Line:
    """One line of the audit trail."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    outcome: str
    detail: Mapping[str, Any]
    hash: str


@dataclass(frozen=True)
class Verification:
    """Whether the audit trail is whole; `head` is the last line's hash, to be kept somewhere else."""

    ok: bool
    entries: int
    first_bad: int | None
    sentence: str
    head: str


def _hash(number: int, at: str, actor: str, action: str, subject: str, outcome: str, detail: str, before: str) -> str:
    document = json.dumps([number, at, actor, action, subject, outcome, detail, before], ensure_ascii=True)
    return sha256(document.encode()).hexdigest()


def _moment(at: datetime) -> str:
    return at.astimezone(timezone.utc).isoformat(timespec="microseconds")


def _setting(tx: Transaction, key: str) -> tuple[int, str]:
    """The number and the hash that a setting holds."""
    found = settings(tx).get(key)
    if found is None:
        return 0, NOTHING
    number, _, value = found.partition(":")
    return int(number), value


def append(
    tx: Transaction,
    *,
    actor: str,
    action: str,
    subject: str,
    outcome: str = "ok",
    detail: Mapping[str, Any] | None = None,
) -> Line:
    """Add a line, in the transaction of what it tells."""
    lock(tx)
    last, before = _setting(tx, HEAD)
    at, number = utcnow(), last + 1
    text = json.dumps(detail or {}, sort_keys=True, default=str)
    actor, subject = actor[:255], subject[:255]
    made = _hash(number, _moment(at), actor, action, subject, outcome, text, before)
    put_beside(
        tx,
        HEAD,
        f"{number}:{made}",
        _ADD,
        {
            "id": number,
            "at": at,
            "actor": actor,
            "action": action,
            "subject": subject,
            "outcome": outcome,
            "detail": text,
            "previous": before,
            "hash": made,
        },
    )
    line = Line(number, at, actor, action, subject, outcome, json.loads(text), made)
    tx.info.setdefault(COMMITTED, []).append(line)
    return line


def query(
    tx: Transaction,
    *,
    actor: str | None = None,
    subject: str | None = None,
    action: str | None = None,
    before_id: int | None = None,
    limit: int = 100,
) -> Sequence[Line]:
    """The newest lines, before a number; `action` may end in `*`."""
    statement = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if actor is not None:
        statement = statement.where(AuditEntry.actor == actor)
    if subject is not None:
        statement = statement.where(AuditEntry.subject == subject)
    if action is not None and action.endswith("*"):
        statement = statement.where(AuditEntry.action.startswith(action[:-1], autoescape=True))
    elif action is not None:
        statement = statement.where(AuditEntry.action == action)
    if before_id is not None:
        statement = statement.where(AuditEntry.id < before_id)
    return [
        Line(row.id, row.at, row.actor, row.action, row.subject, row.outcome, json.loads(row.detail), row.hash)
        for row in tx.scalars(statement)
    ]


def verify(tx: Transaction) -> Verification:
    """Follow the chain from its beginning (or from where earlier lines were purged) to its end.

    To be called first in a transaction that reads: what is added meanwhile is not seen.
    """
    if tx.get_bind().dialect.name == "postgresql":
        tx.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    number, before = _setting(tx, ANCHOR)
    checked, purged = 0, number
    columns = (_TABLE.c[name] for name in ("id", "at", "actor", "action", "subject", "outcome", "detail"))
    statement = select(*columns, _TABLE.c.previous, _TABLE.c.hash).order_by(_TABLE.c.id)
    for row in tx.connection().execution_options(yield_per=PAGE).execute(statement):
        what = None
        if row.id != number + 1:
            what = f"Line {number + 1} is missing"
        elif row.previous != before:
            what = f"Line {row.id} does not follow the line before it"
        elif row.hash != _hash(*_fields(row), before):
            what = f"Line {row.id} was changed"
        if what is not None:
            return Verification(
                False, checked, min(row.id, number + 1), f"{what}; restore the database from a backup.", before
            )
        number, before, checked = row.id, row.hash, checked + 1
    last, head = _setting(tx, HEAD)
    if (number, before) != (last, head):
        what = (
            f"Lines {number + 1} to {last} at the end are missing"
            if last > number
            else "Lines were put in at the end, or the record of the last one is lost"
        )
        return Verification(False, checked, number + 1, f"{what}; restore the database from a backup.", before)
    since = f" since line {purged + 1}; what was before is purged" if purged else ""
    return Verification(True, checked, None, f"The audit trail is whole: {checked} lines{since}.", before)


def _fields(row: Any) -> tuple[int, str, str, str, str, str, str]:
    at = row.at if row.at.tzinfo else row.at.replace(tzinfo=timezone.utc)
    return row.id, _moment(at), row.actor, row.action, row.subject, row.outcome, row.detail


def purge(tx: Transaction, before: datetime, actor: str = GATEWAY) -> int:
    """Delete what is older; how many lines. The chain goes on from the hash of the last of them."""
    lock(tx)
    last = tx.execute(select(func.max(AuditEntry.id)).where(AuditEntry.at < before)).scalar_one_or_none()
    if last is None:
        return 0
    row = tx.get_one(AuditEntry, last)
    put(tx, ANCHOR, f"{row.id}:{row.hash}")
    gone = tx.execute(delete(AuditEntry).where(AuditEntry.id <= last).execution_options(synchronize_session=False))
    count = int(cast(Any, gone).rowcount)
    append(tx, actor=actor, action="audit.purge", subject="audit", detail={"before": _moment(before), "lines": count})
    return count


class AuditLog(LoggingConfigurable):
    """The audit trail, as the web layer and the gateway's own loops use it; its methods run in a transaction."""

    retention_days = Float(
        0.0, help="After how many days lines of the audit trail are deleted; 0 keeps all. Purging is a line itself."
    ).tag(config=True)

    def append(
        self, tx: Transaction, *, actor: str, action: str, subject: str, outcome: str, detail: Mapping[str, Any]
    ) -> Line:
        """See `append`."""
        return append(tx, actor=actor, action=action, subject=subject, outcome=outcome, detail=detail)

    def query(
        self,
        tx: Transaction,
        *,
        actor: str | None = None,
        subject: str | None = None,
        action: str | None = None,
        before_id: int | None = None,
        limit: int = 100,
    ) -> Sequence[Line]:
        """See `query`."""
        return query(tx, actor=actor, subject=subject, action=action, before_id=before_id, limit=limit)

    def verify(self, tx: Transaction) -> Verification:
        """See `verify`."""
        return verify(tx)
