"""Facts about this installation that every replica shares: texts by name.

A launch needs several of them: a transaction reads all there are, in one statement, once - and again when it has
taken the lock, before which others may have changed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from sqlalchemy import Insert, Table, bindparam, insert, select, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock, locked
from hub_gateway.db.models import Setting

__all__ = ["Beside", "put", "put_beside", "settings"]

SETTINGS = "settings"
_TABLE = cast(Table, Setting.__table__)
# Made once, and not objects of the session: each launch writes a line of the audit trail, and its hash here.
_ALL = select(_TABLE.c.key, _TABLE.c.value)
_CHANGE = update(_TABLE).where(_TABLE.c.key == bindparam("of")).values(value=bindparam("to"))
_MAKE = insert(_TABLE)


def settings(tx: Transaction) -> dict[str, str]:
    """All settings, as of this transaction; to be changed by `put` alone."""
    of = (SETTINGS, locked(tx))
    found: dict[str, str] | None = tx.info.get(of)
    if found is None:
        found = tx.info[of] = {row.key: row.value for row in tx.connection().execute(_ALL)}
    return found


def put(tx: Transaction, key: str, value: str) -> None:
    """Set one of them."""
    lock(tx)
    known = settings(tx)
    if key in known:
        tx.connection().execute(_CHANGE, {"of": key, "to": value})
    else:
        tx.connection().execute(_MAKE, {"key": key, "value": value})
    known[key] = value


class Beside:
    """An INSERT of a row that is made together with a change of a setting. To be made once."""

    def __init__(self, alone: Insert) -> None:
        self.alone = alone
        self.both = alone.add_cte(_CHANGE.cte("setting"))


def put_beside(tx: Transaction, key: str, value: str, beside: Beside, row: Mapping[str, object]) -> None:
    """Set one of them and insert a row: in one statement where the database has that (PostgreSQL)."""
    lock(tx)
    known = settings(tx)
    if key in known and tx.get_bind().dialect.name == "postgresql":
        tx.connection().execute(beside.both, {**row, "of": key, "to": value})
        known[key] = value
    else:
        tx.connection().execute(beside.alone, row)
        put(tx, key, value)
