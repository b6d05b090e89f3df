"""Alembic's entry: runs migrations on the connection that `hub_gateway.db.migrate` (or a developer) gives."""

from __future__ import annotations

import os

from alembic import context

from hub_gateway.db.engine import Database
from hub_gateway.db.migrate import migrating
from hub_gateway.db.tenancy import Base


def run() -> None:
    """Migrate the given connection, or the database of HUB_GATEWAY_DB_URL (to make a new revision)."""
    connection = context.config.attributes.get("connection")
    if connection is None:
        with migrating(Database(os.environ["HUB_GATEWAY_DB_URL"])) as connection:
            migrate(connection)
    else:
        migrate(connection)


def migrate(connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        # SQLite changes a table by making it anew.
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


run()
