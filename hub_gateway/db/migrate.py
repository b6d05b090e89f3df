"""The revision of the database, and how it gets to this version's."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DatabaseError, InterfaceError

from hub_gateway._paths import migrations_dir
from hub_gateway.db.engine import Database, not_opened
from hub_gateway.db.revision import LOCK
from hub_gateway.errors import Unavailable

__all__ = [
    "RevisionError",
    "backup",
    "check_revision",
    "current",
    "head",
    "migrating",
    "migrations_path",
    "prepare",
    "upgrade",
]


class RevisionError(Unavailable):
    """The database is not at the revision that this version works with."""


def migrations_path() -> Path:
    """Where the migration scripts are: in the installed package, or at the top of a checkout."""
    path = migrations_dir()
    if not (path / "env.py").is_file():
        raise RevisionError("The migration scripts are missing from this installation.", hint="install the wheel again")
    return path


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration, made in place of an .ini file."""
    made = Config()
    made.set_main_option("script_location", str(migrations_path()).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes["connection"] = connection
    return made


def head() -> str:
    """The revision of this version."""
    found = ScriptDirectory.from_config(config()).get_current_head()
    assert found is not None
    return found


def current(db: Database) -> str | None:
    """The revision of the database; None for an empty one. Raises `Unavailable`."""
    try:
        with db.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()
    except (DatabaseError, InterfaceError) as error:
        raise not_opened(db.url, error) from error


def check_revision(db: Database) -> None:
    """Raise `RevisionError`, which says what to do, where the database is not at `head`."""
    found, wanted = current(db), head()
    if found == wanted:
        return
    if found is None:
        raise RevisionError("The database is empty.", hint="run `jupyter hubgateway db upgrade`")
    if found not in {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}:
        raise RevisionError(
            f"The database was written by a newer version of the gateway (revision {found}; known is {wanted}).",
            hint="install that version again, or restore the backup that was made before its upgrade",
        )
    raise RevisionError(
        f"The database is of an older version (revision {found}; this version needs {wanted}).",
        hint="stop all replicas and run `jupyter hubgateway db upgrade`",
    )


def prepare(db: Database, *, upgrade_older: bool) -> None:
    """At start: set up an empty database; upgrade an older one if asked to; refuse any other than `head`."""
    found = current(db)
    if found == head():
        return
    if found is None and not _foreign_tables(db):
        upgrade(db, save=False)
    elif found is not None and upgrade_older and _known(found):
        upgrade(db)
    check_revision(db)


def upgrade(db: Database, *, save: bool = True) -> Path | None:
    """Bring the database to `head`; the path of the copy made before (SQLite, `save`), if any."""
    saved = backup(db) if save and db.sqlite and current(db) not in (None, head()) else None
    with migrating(db) as connection:
        command.upgrade(config(connection), "head")
    return saved


@contextlib.contextmanager
def migrating(db: Database) -> Iterator[Connection]:
    """The transaction in which a database is migrated, alone; on SQLite without foreign keys, which are checked after.

    SQLite changes a table by making it anew and dropping the old one, which would delete, or refuse to leave alone,
    every row of other tables that refers to it (https://sqlite.org/lang_altertable.html#otheralter).
    """
    with db.engine.execution_options(hub_gateway_write=True).connect() as connection:
        if db.sqlite:
            _foreign_keys(connection, "OFF")  # in a transaction it would do nothing
        try:
            with connection.begin():
                if not db.sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
                yield connection
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all() if db.sqlite else []
                if broken:
                    tables = ", ".join(sorted({str(row[0]) for row in broken}))
                    raise RevisionError(
                        "The database was not upgraded, and is as it was: rows would refer to what does not exist.",
                        hint=f"in the tables {tables}",
                    )
        finally:
            if db.sqlite:
                _foreign_keys(connection, "ON")  # the connection goes back to the pool


def _foreign_keys(connection: Connection, state: str) -> None:
    raw = connection.connection.driver_connection
    assert isinstance(raw, sqlite3.Connection)
    raw.execute(f"PRAGMA foreign_keys = {state}")


def backup(db: Database) -> Path:
    """Copy a SQLite database, in use or not, beside itself; the path of the copy."""
    assert db.url.database is not None
    source = Path(db.url.database)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
    target = source.with_name(f"{source.name}.{current(db)}.{stamp}.bak")
    target.touch(mode=0o600)
    reading, writing = sqlite3.connect(source), sqlite3.connect(target)
    try:
        reading.backup(writing)
    finally:
        reading.close()
        writing.close()
    return target


def _known(revision: str) -> bool:
    return revision in {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}


def _foreign_tables(db: Database) -> bool:
    """Whether a database without a revision holds tables with our names, made by something else."""
    from hub_gateway.db.tenancy import Base

    with db.engine.connect() as connection:
        found = set(inspect(connection).get_table_names()) & set(Base.metadata.tables)
    if found:
        raise RevisionError(
            f"The database has no revision but holds the tables {', '.join(sorted(found))}.",
            hint="give the gateway a database (or schema) of its own",
        )
    return False
