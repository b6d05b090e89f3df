"""The lock under which one transaction at a time, of however many processes, admits, gives back or changes a limit."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session as Transaction

__all__ = ["lock", "locked"]

LOCK = 0x51756F74  # "Quot"
_LOCK = text(f"SELECT pg_advisory_xact_lock({LOCK})")


def lock(tx: Transaction) -> None:
    """Make this transaction the only one that admits, gives back or changes a limit, until it ends.

    To be called before anything is read that the others may change. On SQLite every writing transaction is that
    already, from its first statement on, which this makes sure of.
    """
    if locked(tx):
        return
    connection = tx.connection()
    if connection.dialect.name == "postgresql":
        connection.execute(_LOCK)
    tx.info[LOCK] = True


def locked(tx: Transaction) -> bool:
    """Whether this transaction is the only one that admits, gives back or changes a limit."""
    return bool(tx.info.get(LOCK))
