"""`jupyter hubgateway db`: the database between two versions, and the keys of its secrets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from hub_gateway.cli.base import Command, Group
from hub_gateway.db import migrate
from hub_gateway.db.engine import Database
from hub_gateway.db.secrets import Vault
from hub_gateway.statedir import StateDir

__all__ = ["DB", "DBRevision", "DBRotateKeys", "DBUpgrade"]


class DatabaseCommand(Command):
    """A command that opens the gateway's database."""

    @contextmanager
    def database(self) -> Iterator[Database]:
        """The database that this configuration names."""
        gateway = self.gateway()
        StateDir(gateway.state_dir).create()
        db = Database(gateway.db_url, pool_size=1)
        try:
            yield db
        finally:
            asyncio.run(db.close())


class DBUpgrade(DatabaseCommand):
    """Bring the database to this version's revision; an SQLite file is copied first."""

    name = "jupyter-hubgateway-db-upgrade"
    description = __doc__

    def run(self) -> int:
        """Upgrade, and say from what to what."""
        with self.database() as db:
            before = migrate.current(db)
            saved = migrate.upgrade(db)
            after = migrate.current(db)
        if before == after:
            print(f"The database is at revision {after} already.")
        else:
            print(f"The database went from revision {before or 'none (empty)'} to {after}.")
        if saved is not None:
            print(f"A copy of the old one is in {saved}.")
        return 0


class DBRevision(DatabaseCommand):
    """Say the revision of the database and the one that this version needs; exit code 1 where they differ."""

    name = "jupyter-hubgateway-db-revision"
    description = __doc__

    def run(self) -> int:
        """Print both."""
        with self.database() as db:
            found = migrate.current(db)
        print(f"database {found or 'empty'}")
        print(f"needed   {migrate.head()}")
        return 0 if found == migrate.head() else 1


class DBRotateKeys(DatabaseCommand):
    """Encrypt every secret in the database anew with the first key of the key file.

    To rotate: put a new key first in the file (32 random bytes in URL-safe base64, for example of `openssl rand
    -base64 32 | tr +/ -_`), restart the gateways, run this, remove the old key, restart again. It may be repeated.
    """

    name = "jupyter-hubgateway-db-rotate-keys"
    description = __doc__

    def run(self) -> int:
        """Rotate, and say how many rows there were."""
        with self.database() as db:
            migrate.check_revision(db)
            vault = Vault.from_file(self.gateway().secret_keys_file)
            rows = asyncio.run(vault.rotate(db))
        print(f"The secrets of {rows} kernels are encrypted with the first key.")
        return 0


class DB(Group):
    """The gateway's database."""

    name = "jupyter-hubgateway-db"
    description = __doc__
    subcommands = {
        "upgrade": (DBUpgrade, DBUpgrade.__doc__),
        "revision": (DBRevision, DBRevision.__doc__),
        "rotate-keys": (DBRotateKeys, str(DBRotateKeys.__doc__).splitlines()[0]),
    }
