"""Whether the database is at this version's revision, without Alembic.

A running gateway needs to know just that, and Alembic would cost it 10 MB of memory for good. A new database is made
from the models, which a test holds equal to what the migrations make; everything else is Alembic's business.
"""

from __future__ import annotations

from sqlalchemy import Column, MetaData, String, Table, insert, inspect, select, text
from sqlalchemy.exc import DatabaseError, InterfaceError

from hub_gateway.db.engine import Database, not_opened
from hub_gateway.db.tenancy import Base

__all__ = ["HEAD", "prepare_at_start"]

HEAD = "0002"
"""The revision of this version; a test holds it equal to the newest migration."""

LOCK = 0x48756247  # "HubG": replicas that start together set up or upgrade one after the other
VERSION = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True, nullable=False))


def prepare_at_start(db: Database, *, upgrade_older: bool) -> None:
    """Set up an empty database, upgrade an older one if asked to, refuse any other. Raises `Unavailable`."""
    try:
        if _at_head(db):
            return
    except (DatabaseError, InterfaceError) as error:
        raise not_opened(db.url, error) from error
    from hub_gateway.db import migrate

    migrate.prepare(db, upgrade_older=upgrade_older)


def _at_head(db: Database) -> bool:
    """Whether it is at `HEAD`, after it was set up where it was empty."""
    with db.engine.execution_options(hub_gateway_write=True).begin() as connection:
        if not db.sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        tables = set(inspect(connection).get_table_names())
        if VERSION.name in tables:
            return connection.execute(select(VERSION.c.version_num)).scalars().all() == [HEAD]
        if tables & set(Base.metadata.tables):
            return False
        Base.metadata.create_all(connection)
        VERSION.create(connection)
        connection.execute(insert(VERSION).values(version_num=HEAD))
        return True
