"""The database layer, on the database under test."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import delete, inspect, literal, select, text, update

from hub_gateway.db import migrate, revision
from hub_gateway.db.clock import db_now
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, Setting, UTCDateTime, WaitingRequest, utcnow
from hub_gateway.db.secrets import Vault, VaultError
from hub_gateway.db.tenancy import Base
from hub_gateway.errors import BadRequest, Unavailable
from hub_gateway.kernels.sessions import Sessions, SessionWish
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import LaunchPlan, NewKernel
from hub_gateway.kernels.waiting import WaitingRequests
from tests.harness.waiting import until


@pytest.fixture
def url(db_url: Callable[[], str | None], tmp_path: Path) -> str:
    return db_url() or f"sqlite:///{tmp_path}/test.sqlite"


@pytest.fixture
async def empty(url: str) -> AsyncIterator[Database]:
    made = Database(url)
    yield made
    await made.close()


@pytest.fixture
async def db(empty: Database) -> Database:
    migrate.prepare(empty, upgrade_older=False)
    return empty


def put(key: str, value: str) -> Callable[..., None]:
    return lambda tx: tx.add(Setting(key=key, value=value))


async def value(db: Database, key: str) -> str | None:
    return await db.read(lambda tx: tx.execute(select(Setting.value).where(Setting.key == key)).scalar_one_or_none())


async def test_a_write_is_one_transaction(db: Database) -> None:
    def half(tx):  # type: ignore[no-untyped-def]
        put("a", "1")(tx)
        tx.flush()
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        await db.write(half)
    assert await value(db, "a") is None
    await db.write(put("a", "2"))
    assert await value(db, "a") == "2"


async def test_concurrent_increments_are_not_lost(db: Database) -> None:
    await db.write(put("n", "0"))

    def increment(tx):  # type: ignore[no-untyped-def]
        row = tx.execute(select(Setting).where(Setting.key == "n").with_for_update()).scalar_one()
        row.value = str(int(row.value) + 1)

    await asyncio.gather(*(db.write(increment) for _ in range(100)))
    assert await value(db, "n") == "100"


async def test_the_loop_goes_on_while_the_database_works(db: Database) -> None:
    """And reads do not wait for a writer."""
    started, leave = threading.Event(), threading.Event()

    def slow(tx):  # type: ignore[no-untyped-def]
        put("slow", "1")(tx)
        tx.flush()
        started.set()
        assert leave.wait(10)

    writing = asyncio.ensure_future(db.write(slow))
    await asyncio.to_thread(started.wait, 10)
    assert await value(db, "slow") is None
    leave.set()
    await writing
    assert await value(db, "slow") == "1"


async def test_an_unreachable_database_is_unavailable(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/no/such/dir.sqlite", f"postgresql://nobody@/x?host={tmp_path}"):
        db = Database(url, timeout=1)
        with pytest.raises(Unavailable) as caught:
            await db.check()
        assert str(tmp_path) not in caught.value.message
        await db.close()


@pytest.mark.parametrize("prepare", [revision.prepare_at_start, migrate.prepare])
async def test_a_damaged_file_is_named(tmp_path: Path, prepare: Callable[..., None]) -> None:
    path = tmp_path / "gateway.sqlite"
    path.write_bytes(b"garbage" * 1000)
    db = Database(f"sqlite:///{path}")
    with pytest.raises(Unavailable, match=str(path)) as caught:
        prepare(db, upgrade_older=True)
    assert "damaged" in caught.value.message and "backup" in caught.value.hint
    with pytest.raises(Unavailable, match="damaged"):
        await db.check()
    await db.close()


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_taken_away_from_a_running_gateway(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "gateway.sqlite"
    db = Database(f"sqlite:///{path}")
    migrate.prepare(db, upgrade_older=True)
    await db.check()
    aside = path.rename(tmp_path / "aside")
    if replaced:
        shutil.copy(aside, path)
    with pytest.raises(Unavailable, match="deleted or replaced"):
        await db.check()
    aside.rename(path)
    await db.check()
    await db.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "nonsense", "oracle://x"])
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        Database(url)


async def test_times_are_aware_and_exact(db: Database) -> None:
    moment = utcnow()
    found = await db.read(lambda tx: tx.execute(select(literal(moment, UTCDateTime))).scalar_one())
    assert found == moment and found.utcoffset() == timedelta(0)


async def test_the_database_has_a_clock(db: Database) -> None:
    now = await db.read(lambda tx: tx.execute(select(db_now())).scalar_one())
    assert abs(now - time.time()) < 2


# Revisions


async def test_an_empty_database_is_set_up(empty: Database) -> None:
    assert migrate.current(empty) is None
    migrate.prepare(empty, upgrade_older=False)
    assert migrate.current(empty) == migrate.head()
    migrate.check_revision(empty)


async def test_migrations_make_what_the_models_say(db: Database) -> None:
    with db.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


async def test_a_new_database_needs_no_alembic(empty: Database) -> None:
    revision.prepare_at_start(empty, upgrade_older=False)
    assert migrate.head() == revision.HEAD == migrate.current(empty)
    with empty.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


async def test_a_newer_database_is_refused(db: Database) -> None:
    await db.write(lambda tx: tx.execute(text("UPDATE alembic_version SET version_num = '9999'")) and None)
    with pytest.raises(migrate.RevisionError, match="newer version"):
        migrate.prepare(db, upgrade_older=True)
    assert migrate.current(db) == "9999"


async def test_a_database_of_something_else_is_refused(empty: Database) -> None:
    await empty.write(lambda tx: tx.execute(text("CREATE TABLE kernels (id INTEGER)")) and None)
    with pytest.raises(migrate.RevisionError, match="kernels"):
        migrate.prepare(empty, upgrade_older=True)


@pytest.fixture
def next_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version of the gateway, with one more migration."""
    later_revision("    op.add_column('kernels', sa.Column('extra', sa.Text()))\n", tmp_path, monkeypatch)


async def test_an_older_database_is_upgraded_with_its_rows(
    db: Database, url: str, request: pytest.FixtureRequest
) -> None:
    store = KernelStore(db, Vault([Vault.generate_key()]), instance="i")
    record = (await store.admit(a_kernel())).record
    request.getfixturevalue("next_revision")
    with pytest.raises(migrate.RevisionError, match="older version") as caught:
        migrate.prepare(db, upgrade_older=False)
    assert "db upgrade" in caught.value.hint
    migrate.prepare(db, upgrade_older=True)
    assert migrate.current(db) == "next"
    assert "extra" in {column["name"] for column in inspect(db.engine).get_columns("kernels")}
    assert await store.get(record.id) == record
    if db.sqlite:
        (saved,) = Path(str(db.url.database)).parent.glob("*.bak")
        copy = Database(f"sqlite:///{saved}")
        assert migrate.current(copy) == revision.HEAD
        assert saved.stat().st_mode & 0o077 == 0
        await copy.close()


def later_revision(upgrade: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tmp_path / "migrations"
    shutil.copytree(migrate.migrations_path(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "next.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\n"
        f"revision = 'next'\ndown_revision = {migrate.head()!r}\nbranch_labels = None\ndepends_on = None\n"
        f"def upgrade():\n{upgrade}"
    )
    monkeypatch.setattr(migrate, "migrations_path", lambda: scripts)


async def test_a_table_that_is_made_anew_takes_no_rows_along(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's way to change a column. Sessions go with their kernel when that is deleted, and only then."""
    store = KernelStore(db, Vault([Vault.generate_key()]), instance="i")
    record = (await store.admit(a_kernel())).record
    sessions = Sessions(store)
    await sessions.insert("alice", SessionWish("a.ipynb", "", "notebook"), record.id)
    changed = (
        "    with op.batch_alter_table('kernels', recreate='auto') as batch:\n"
        "        batch.alter_column('message', existing_type=sa.Text(), nullable=True)\n"
        "        batch.add_column(sa.Column('extra', sa.Text()))\n"
    )
    later_revision(changed, tmp_path, monkeypatch)
    migrate.prepare(db, upgrade_older=True)
    assert "extra" in {column["name"] for column in inspect(db.engine).get_columns("kernels")}
    assert len(await sessions.using(record.id)) == 1
    await db.write(lambda tx: tx.execute(delete(Kernel)) and None)
    assert await sessions.using(record.id) == [], "foreign keys hold again"


async def test_a_migration_that_breaks_a_reference_changes_nothing(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not db.sqlite:
        pytest.skip("not applicable: PostgreSQL's foreign keys hold while it is migrated")
    store = KernelStore(db, Vault([Vault.generate_key()]), instance="i")
    record = (await store.admit(a_kernel())).record
    await Sessions(store).insert("alice", SessionWish("a.ipynb", "", "notebook"), record.id)
    later_revision("    op.execute('DELETE FROM kernels')\n", tmp_path, monkeypatch)
    with pytest.raises(migrate.RevisionError, match="was not upgraded") as caught:
        migrate.prepare(db, upgrade_older=True)
    assert "sessions" in caught.value.hint
    assert migrate.current(db) == revision.HEAD
    assert await store.get(record.id) == record


async def test_replicas_that_start_together_set_it_up_once(url: str) -> None:
    replicas = [Database(url) for _ in range(4)]
    await asyncio.gather(*(asyncio.to_thread(migrate.prepare, replica, upgrade_older=True) for replica in replicas))
    assert {migrate.current(replica) for replica in replicas} == {migrate.head()}
    for replica in replicas:
        await replica.close()


def test_migrations_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (migrate.migrations_path() / "env.py").is_file()
    package = tmp_path / "hub_gateway"
    shutil.copytree(migrate.migrations_path(), package / "_migrations")
    monkeypatch.setattr("hub_gateway._paths._PACKAGE", package)
    assert migrate.migrations_path() == package / "_migrations"
    assert migrate.head() == revision.HEAD


# Secrets


def a_kernel(**more: object) -> NewKernel:
    plan = LaunchPlan(("kernel", "{connection_file}"), {"KERNEL_PASSWORD": "hunter2"})
    values: dict[str, object] = {"id": "k1", "owner": "alice", "kernelspec": "python", "proxy": "local", "plan": plan}
    return NewKernel(**{**values, **more})  # type: ignore[arg-type]


async def test_no_secret_is_in_the_database_in_clear(db: Database) -> None:
    vault = Vault([Vault.generate_key()])
    store = KernelStore(db, vault, instance="i")
    await store.admit(a_kernel())
    plan, token, _ = await store.plan("k1")
    assert plan.env == {"KERNEL_PASSWORD": "hunter2"}
    row = await db.read(lambda tx: repr(tx.execute(select(*Kernel.__table__.columns)).one()))
    assert "hunter2" not in row and token not in row


async def test_waiting_requests_are_kept_in_order_encrypted_and_only_once(db: Database) -> None:
    vault = Vault([Vault.generate_key()])
    store = KernelStore(db, vault, instance="i")
    for kernel_id in ("k1", "k2"):
        await store.admit(a_kernel(id=kernel_id))
    waiting = WaitingRequests(db, vault)
    for key in ("c", "a", "b"):
        waiting.keep("k1", key, [b"\x10", key.encode(), b"", b"secret"])
    waiting.keep("k2", "a", [b"\x10", bytes(range(256))])
    waiting.keep("nobody", "a", [b"\x10"])
    waiting.drop("k1", ["b"])
    await waiting.close()
    other = WaitingRequests(db, vault)
    other.keep("k1", "a", [b"\x10", b"sent through another replica, too"])
    await other.close()
    assert await other.kernels() == {"k1", "k2"}
    assert await other.load("k1") == [(key, [b"\x10", key.encode(), b"", b"secret"]) for key in ("c", "a")]
    assert await other.load("k2") == [("a", [b"\x10", bytes(range(256))])]
    raw = await db.read(lambda tx: tx.execute(select(WaitingRequest.frames)).scalars().all())
    assert not any("secret" in cipher for cipher in raw)
    other.drop("k1", ["a", "c"])
    await other.close()
    assert await other.load("k1") == []
    await store.ask_to_stop("k2")
    await db.write(lambda tx: tx.execute(update(Kernel).values(status="stopped")) and None)
    await other.forget_stopped()
    assert await other.load("k2") == []


async def test_keys_rotate(db: Database) -> None:
    old, new = Vault.generate_key(), Vault.generate_key()
    store = KernelStore(db, Vault([old]), instance="i")
    for number in range(3):
        await store.admit(a_kernel(id=f"k{number}"))
    before = await store.plan("k1")
    assert await Vault([new, old]).rotate(db) == 3
    assert await KernelStore(db, Vault([new]), instance="i").plan("k1") == before
    with pytest.raises(VaultError, match="key"):
        await store.plan("k1")
    with pytest.raises(VaultError):
        await Vault([old]).rotate(db)


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "state" / "keys"
    first = Vault.from_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Vault.from_file(path).decrypt(first.encrypt("x")) == "x"
    path.write_text(f"# new\n{Vault.generate_key()}\n\n{path.read_text()}")
    assert Vault.from_file(path).decrypt(first.encrypt("x")) == "x"
    path.chmod(0o644)
    with pytest.raises(VaultError, match="other users"):
        Vault.from_file(path)
    path.chmod(0o600)
    path.write_text("not a key\n")
    with pytest.raises(VaultError, match="not a key"):
        Vault.from_file(path)
    path.write_text("# only a comment\n")
    with pytest.raises(VaultError, match="no key"):
        Vault.from_file(path)


async def test_rows_stay_when_the_server_goes_away(db: Database) -> None:
    """A connection that the server closed is replaced without an error."""
    if db.sqlite:
        pytest.skip("not applicable: SQLite has no server")
    await db.write(put("a", "1"))
    other = Database(db.url.render_as_string(hide_password=False))
    end = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    await other.write(lambda tx: tx.execute(end) and None)
    assert await value(db, "a") == "1"
    await db.write(lambda tx: tx.execute(update(Setting).values(value="2")) and None)
    await other.close()


@pytest.mark.parametrize("writes", [False, True])
async def test_a_server_that_goes_away_within_a_transaction(db: Database, writes: bool) -> None:
    """What was not committed is done again; where it goes away at every attempt, that is said."""
    if db.sqlite:
        pytest.skip("not applicable: SQLite has no server")
    await db.write(put("n", "0"))
    lost = 0

    def increment(times: int) -> Callable[..., str]:
        def run(tx):  # type: ignore[no-untyped-def]
            nonlocal lost
            tx.execute(update(Setting).values(value=literal("1") + Setting.value))
            if lost < times:
                lost += 1
                tx.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            return tx.execute(select(Setting.value)).scalar_one()

        return run

    call = db.write if writes else db.read
    assert await call(increment(1)) == "10"
    with pytest.raises(Unavailable, match="cannot reach its database"):
        await call(increment(1000))
    assert await value(db, "n") == ("10" if writes else "0")


async def test_what_is_written_gets_into_the_file_while_the_gateway_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's log is not left to grow until somebody's launch has to copy it."""
    monkeypatch.setattr("hub_gateway.db.engine.CHECKPOINT_SECONDS", -1.0)
    path = tmp_path / "gateway.sqlite"
    db = Database(f"sqlite:///{path}")
    migrate.prepare(db, upgrade_older=True)
    for number in range(2):
        await db.write(put(f"large{number}", "x" * 1_000_000))
    await asyncio.to_thread(until, lambda: path.stat().st_size > 2_000_000, "the file to hold what was written")
    await db.close()
