"""The database: transactions in a bounded pool of threads, on SQLite or PostgreSQL.

The event loop never waits for the database: every transaction runs as a plain function in a
thread. SQLAlchemy's own asyncio layer would run the same synchronous code in greenlets, and its
SQLite driver adds a thread hop for every statement where this has one for the whole transaction.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from hub_gateway.errors import BadRequest, Unavailable
from hub_gateway.metrics import METRICS

__all__ = ["Database", "not_opened", "overloaded"]

T = TypeVar("T")

RETRIED = frozenset({"40001", "40P01"})  # PostgreSQL: serialization failure, deadlock; nothing was committed
ATTEMPTS = 5
SQLITE_READERS = 4  # it reads from memory, mostly: more readers only cost descriptors
CHECKPOINT_SECONDS = 1.0
"""How often at most SQLite's log of what was written is copied into its file."""
LOG_PAGES = 16_000
"""From how many pages (4 KiB) on who commits copies the log: only where that thread of ours cannot keep up."""


class Database:
    """One database, read and written in transactions.

    `url` is SQLAlchemy's. `pool_size` bounds threads and connections, `timeout` (seconds) every wait
    for a lock, a connection or a statement. SQLite has one writer at a time whatever we do, so its
    writes queue in one thread, where they do not wait for each other by sleeping.
    """

    def __init__(self, url: str, *, pool_size: int = 8, timeout: float = 10.0, max_waiting: int = 2000) -> None:
        self.url = _parse(url)
        if self.url.get_backend_name() == "sqlite":
            pool_size = min(pool_size, SQLITE_READERS)
        self.timeout = timeout
        self.engine = _engine(self.url, pool_size, timeout)
        self._writing = self.engine.execution_options(hub_gateway_write=True)
        self._read_session = sessionmaker(self.engine, expire_on_commit=False, autoflush=False)
        self._write_session = sessionmaker(self._writing, expire_on_commit=False)
        self._readers = ThreadPoolExecutor(pool_size, thread_name_prefix="db-read")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="db-write") if self.sqlite else self._readers
        self._checkpoints = ThreadPoolExecutor(1, thread_name_prefix="db-checkpoint")
        self._copied = time.monotonic()
        self.max_waiting = max_waiting
        self.on_commit: Callable[[Mapping[Any, Any]], None] | None = None
        """Told what a transaction left in its `info`, in its thread, when it is committed."""
        self._waiting = 0
        self._file: tuple[int, int] | None = None
        if self.sqlite:
            event.listen(self.engine, "connect", self._opened)

    @property
    def sqlite(self) -> bool:
        """Whether this is the embedded database, which one gateway has to itself."""
        return self.url.get_backend_name() == "sqlite"

    async def read(self, fn: Callable[[Session], T]) -> T:
        """Run `fn` in a thread, in one transaction that is rolled back. Raises `Unavailable`.

        It is called again where its connection turns out to be lost.
        """
        return await self._run(self._readers, lambda: self.read_sync(fn))

    async def write(self, fn: Callable[[Session], T]) -> T:
        """Run `fn` in a thread, in one transaction that is committed.

        `fn` is called again where the database asks for it (serialization failure, deadlock), and where its
        connection turns out to be lost, so it must do nothing but talk to its session. A caller that is
        cancelled does not undo the transaction. Raises `Unavailable`.
        """
        return await self._run(self._writers, lambda: self.write_sync(fn))

    def read_sync(self, fn: Callable[[Session], T]) -> T:
        """`read`, in the calling thread."""
        for attempt in range(ATTEMPTS):
            try:
                with self._read_session() as session:
                    return fn(session)
            except DBAPIError as error:
                if not error.connection_invalidated or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def write_sync(self, fn: Callable[[Session], T]) -> T:
        """`write`, in the calling thread."""
        for attempt in range(ATTEMPTS):
            committing = False
            try:
                with self._write_session.begin() as session:
                    result = fn(session)
                    session.flush()
                    committing = True
                if session.info and self.on_commit is not None:
                    self.on_commit(session.info)
                self._written()
                return result
            except DBAPIError as error:
                # Whether what was lost at the commit was committed nobody knows.
                lost = error.connection_invalidated and not committing
                again = lost or getattr(error.orig, "sqlstate", None) in RETRIED
                if not again or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _written(self) -> None:
        """Have SQLite's log copied now and then: who commits does not wait for the disk."""
        now = time.monotonic()
        if self.sqlite and now - self._copied > CHECKPOINT_SECONDS:
            self._copied = now
            self._checkpoints.submit(self._checkpoint)

    def _checkpoint(self) -> None:
        try:
            with closing(self.engine.raw_connection()) as connection:
                connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").close()
        except (DBAPIError, PoolTimeout, sqlite3.Error):
            METRICS.count_swallowed("checkpoint")  # what was committed stays in the log until the next time

    async def check(self) -> None:
        """Raise `Unavailable` where the database does not answer, or is not the file any more that it was at first."""

        def ask(session: Session) -> None:
            session.execute(text("SELECT 1"))
            if self.sqlite:
                self._same_file()

        await self.read(ask)

    def _same_file(self) -> None:
        """Raise `Unavailable` where connections that are open use a file that a successor would not find."""
        path = Path(str(self.url.database))
        if self._file != _identity(path):
            raise Unavailable(
                f"The gateway's database file {path.name} was deleted or replaced while the gateway was running; "
                "its administrator must restart the gateway.",
                hint=f"{path} is not the file that was opened; what was written since is lost when this process ends",
            )

    def _opened(self, *_: Any) -> None:
        self._file = self._file or _identity(Path(str(self.url.database)))

    async def close(self) -> None:
        """Wait for what runs, and let the connections go."""
        loop = asyncio.get_running_loop()
        for pool in (self._writers, self._readers, self._checkpoints):
            await loop.run_in_executor(None, pool.shutdown)
        self.engine.dispose()

    async def _run(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        if self._waiting >= self.max_waiting:
            raise overloaded()
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable(
                "The gateway cannot reach its database; running kernels are not affected. Try again in a moment.",
                hint=str(error).splitlines()[0],
            ) from error
        except DatabaseError as error:
            if not _damaged(error):
                raise
            raise not_opened(self.url, error) from error
        finally:
            self._waiting -= 1


def overloaded() -> Unavailable:
    """What to say to whoever comes while too many wait."""
    return Unavailable("The gateway's database does not keep up with the requests; try again in a moment.")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def not_opened(url: URL, error: DBAPIError) -> Unavailable:
    """What to say where a database cannot be opened, or read."""
    hint = str(error).splitlines()[0]
    if _damaged(error):
        return Unavailable(
            f"The database file {url.database} is damaged, or is no SQLite database.",
            hint=f"restore it from a backup, or move it away to begin with an empty one: {hint}",
        )
    return Unavailable("The database cannot be opened.", hint=hint)


def _damaged(error: DBAPIError) -> bool:
    # SQLITE_NOTADB and SQLITE_CORRUPT; sqlite3 has classes of their own for everything else.
    return type(error.orig) is sqlite3.DatabaseError


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as error:
        raise BadRequest(f"The database URL cannot be understood: {error}.") from error
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise BadRequest("SQLite needs a file: what a gateway keeps in memory would not survive it.")
        return parsed
    raise BadRequest(f"The database {backend!r} is not supported; use sqlite or postgresql.")


def _engine(url: URL, pool_size: int, timeout: float) -> Engine:
    if url.get_backend_name() == "sqlite":
        # Two connections more than reader threads: the writer's, and the one that copies the log.
        engine = create_engine(url, pool_size=pool_size + 2, max_overflow=0, pool_timeout=timeout)
        event.listen(engine, "connect", _sqlite_connect(timeout))
        event.listen(engine, "begin", _sqlite_begin)
        return engine
    milliseconds = int(timeout * 1000)
    try:
        return create_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=timeout,
            connect_args={
                "connect_timeout": max(1, int(timeout)),
                "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} -c timezone=UTC",
            },
        )
    except ModuleNotFoundError as error:
        raise BadRequest("PostgreSQL needs the package psycopg: pip install 'hub-gateway[postgresql]'.") from error


def _sqlite_connect(timeout: float) -> Callable[[sqlite3.Connection, Any], None]:
    def connect(connection: sqlite3.Connection, _record: Any) -> None:
        # sqlite3 would begin transactions when it sees fit; `_sqlite_begin` says when and how.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(timeout * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        # Survives every death of this process; only a power cut may undo the last transactions, as a whole.
        cursor.execute("PRAGMA synchronous = NORMAL")
        cursor.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    return connect


def _sqlite_begin(connection: Connection) -> None:
    # A writer that begins as a reader can fail halfway with "database is locked", whatever the timeout.
    writing = connection.get_execution_options().get("hub_gateway_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
