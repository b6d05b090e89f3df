"""To whom principals and unix users belong, on the database under test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, select

from hub_gateway import audit
from hub_gateway.auth.base import Caller
from hub_gateway.db import migrate
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, UTCDateTime, utcnow
from hub_gateway.db.tenancy import IdentityClaim
from hub_gateway.errors import Conflict, Forbidden, LaunchRefused
from hub_gateway.identity.claims import Taken
from hub_gateway.identity.mapper import Identity, IdentityMapper

RULES = [{"name": "lower", "pattern": "([^@]+)(@example.com)?", "case": "lower", "principal": "$1", "unix_user": "$1"}]


@pytest.fixture
async def db(db_url: Callable[[], str | None], tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(db_url() or f"sqlite:///{tmp_path}/test.sqlite")
    migrate.prepare(made, upgrade_older=False)
    yield made
    await made.close()


@pytest.fixture
def mapper(db: Database) -> IdentityMapper:
    return IdentityMapper(rules=RULES, default_realm="EXAMPLE.TEST", require_unix_user=False, db=db)


async def claim(mapper: IdentityMapper, name: str, **more: Any) -> Identity:
    """As an admission does it: a refusal is committed, for its line in the audit trail."""
    identity = await mapper.map(Caller(name, **more))

    def admit(tx: Any) -> LaunchRefused | None:
        try:
            mapper.claim(tx, identity)
        except LaunchRefused as error:
            return error
        return None

    assert mapper.db is not None
    error = await mapper.db.write(admit)
    if error is not None:
        raise error
    return identity


async def held(db: Database) -> set[tuple[str, str, str]]:
    statement = select(IdentityClaim.kind, IdentityClaim.name, IdentityClaim.hub_user)
    return await db.read(lambda tx: {(kind, name, user) for kind, name, user in tx.execute(statement)})


async def trail(db: Database, action: str = "identity.*") -> list[tuple[str, str, str]]:
    lines = await db.read(lambda tx: list(audit.query(tx, action=action)))
    return [(line.action, line.subject, line.outcome) for line in reversed(lines)]


@pytest.mark.parametrize("second", ["Alice", "ALICE", "alice@example.com"])
async def test_the_second_hub_user_is_refused(mapper: IdentityMapper, db: Database, second: str) -> None:
    await claim(mapper, "alice")
    await claim(mapper, "alice")
    with pytest.raises(Taken, match="belongs to another user of the Hub") as refused:
        await claim(mapper, second)
    assert "'alice'" not in refused.value.message  # who has it is for the operator
    assert "alice" in refused.value.hint
    await claim(mapper, "bob")
    assert {user for _, _, user in await held(db)} == {"alice", "bob"}
    assert await trail(db) == [
        ("identity.mapped", "alice", "ok"),
        ("identity.mapped", "alice", "ok"),
        ("identity.refused", second, "refused"),
        ("identity.mapped", "bob", "ok"),
    ]
    assert (await db.read(audit.verify)).ok


async def test_what_another_gateway_has_released_is_not_remembered(mapper: IdentityMapper, db: Database) -> None:
    """A process does not ask again for what it has seen to be somebody's."""
    other = IdentityMapper(rules=RULES, default_realm="EXAMPLE.TEST", require_unix_user=False, db=db)
    for _ in range(3):
        await claim(mapper, "alice")
    assert await other.release("alice", "admin")
    await claim(other, "Alice")
    with pytest.raises(Taken):
        await claim(mapper, "alice")
    assert {user for _, _, user in await held(db)} == {"Alice"}


async def test_a_claim_that_was_rolled_back_is_not_remembered(mapper: IdentityMapper, db: Database) -> None:
    """Launches that come together share a transaction, and one of them may bring all of it down."""
    identity = await mapper.map(Caller("alice"))

    def launches(tx: Any) -> None:
        for _ in range(2):
            mapper.claim(tx, identity)
        raise RuntimeError("of another launch")

    with pytest.raises(RuntimeError):
        await db.write(launches)
    await claim(mapper, "alice")
    with pytest.raises(Taken):
        await claim(mapper, "Alice")


async def test_two_spellings_of_a_principal_are_one(mapper: IdentityMapper) -> None:
    mapper.rules = [{"pattern": "(.*)", "principal": "$1"}]
    await claim(mapper, "Alice")
    with pytest.raises(Taken, match=r"the principal alice@EXAMPLE\.TEST"):
        await claim(mapper, "alice")


async def test_two_unix_users_of_one_uid_are_one(mapper: IdentityMapper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapper.unix_users, "uid", lambda name, required=True: 4321)
    await claim(mapper, "alice")
    with pytest.raises(Taken, match="the unix user bob"):
        await claim(mapper, "bob")


async def test_sharing_is_only_where_the_rule_says_so(mapper: IdentityMapper, db: Database) -> None:
    mapper.rules = [
        {"name": "course", "groups": ["course"], "pattern": ".*", "unix_user": "student", "shared": True},
        {"name": "one", "pattern": "prof", "unix_user": "student"},
    ]
    course = {"groups": frozenset({"course"})}
    await claim(mapper, "ann", **course)
    await claim(mapper, "ben", **course)
    with pytest.raises(Taken):
        await claim(mapper, "prof")
    assert await held(db) == {("unix_user", "student", "ann"), ("unix_user", "student", "ben")}
    # Whoever has it already is not shut out by who came later.
    mapper.rules = [{"name": "alone", "pattern": ".*", "unix_user": "student"}]
    await claim(mapper, "ann")


async def test_a_renamed_hub_user_is_told_what_to_do_and_released(mapper: IdentityMapper, db: Database) -> None:
    mapper.rules = [{"name": "table", "table": {"alice": "alice@EXAMPLE.TEST", "alice.smith": "alice@EXAMPLE.TEST"}}]
    await claim(mapper, "alice")
    with pytest.raises(Taken, match="If you had another name on the Hub before, ask the administrator"):
        await claim(mapper, "alice.smith")
    steps = await mapper.explain("alice.smith", ())
    assert [step.outcome for step in steps if step.stage == "claim"] == ["refused"]
    assert "belongs to another user of the Hub since" in steps[-2].sentence
    assert "former name, release it" in steps[-2].sentence
    for_admins = await mapper.explain("alice.smith", (), name_holders=True)
    assert "The principal alice@example.test belongs to 'alice' since" in for_admins[-2].sentence
    assert (steps[-1].stage, steps[-1].outcome) == ("result", "refused")
    assert await mapper.release("alice", "admin") is True
    assert await mapper.release("alice", "admin") is False
    await claim(mapper, "alice.smith")
    assert await held(db) == {("principal", "alice@example.test", "alice.smith")}
    assert ("identity.release", "alice", "ok") in await trail(db)
    with pytest.raises(Taken):  # whoever is given the old name does not get the old owner's principal
        await claim(mapper, "alice")


async def test_what_an_earlier_mapping_gave_stays_taken(mapper: IdentityMapper) -> None:
    await claim(mapper, "alice")
    mapper.rules = [{"name": "new", "table": {"alice": {"unix_user": "a2"}, "bob": {"unix_user": "alice"}}}]
    await claim(mapper, "alice")
    with pytest.raises(Taken):
        await claim(mapper, "bob")
    said = [step.sentence for step in await mapper.explain("alice", ()) if step.outcome == "held"]
    assert "Held from an earlier mapping: the unix user alice; nobody else gets it." in said


async def test_nothing_is_released_while_kernels_run(mapper: IdentityMapper, db: Database) -> None:
    await claim(mapper, "alice")
    blank: dict[type, Any] = {str: "", int: 0, float: 0.0, bool: False}
    by_type: dict[type, Any] = {JSON: {}, UTCDateTime: utcnow()}  # SQLAlchemy 2.0 does not say what they are in Python
    row = {
        column.name: by_type[kind] if (kind := type(column.type)) in by_type else blank[column.type.python_type]
        for column in Kernel.__table__.columns
        if not column.nullable and column.server_default is None
    } | {"id": "k1", "owner": "alice", "status": "running"}
    await db.write(lambda tx: tx.execute(Kernel.__table__.insert().values(**row)))
    with pytest.raises(Conflict, match="alice has 1 kernel that run"):
        await mapper.release("alice", "admin")


async def test_refusals_by_rules_are_in_the_audit_trail(mapper: IdentityMapper, db: Database) -> None:
    for name in ("root", "a b", "alice\0", "\ud800"):
        with pytest.raises(Forbidden):
            await mapper.map(Caller(name))
    with pytest.raises(Forbidden):
        await mapper.map(Caller("ci", kind="service"))
    assert [(subject, outcome) for _, subject, outcome in await trail(db, "identity.refused")] == [
        ("root", "refused"),
        ("a b", "refused"),
        ("alice\\0", "refused"),
        ("\\ud800", "refused"),
        ("services/ci", "refused"),
    ]
    lines = await db.read(lambda tx: list(audit.query(tx, subject="root")))
    assert lines[0].detail["rule"] == "lower"
    assert await held(db) == set()


async def test_of_two_who_come_at_once_one_is_admitted(mapper: IdentityMapper, db: Database) -> None:
    """Each in a transaction of its own connection, which waits for the other one in its middle."""
    names = ["alice", "Alice", "ALICE", "aLice", "alice@example.com", "Alice@example.com"]
    identities = [await mapper.map(Caller(name)) for name in names]
    others = [Database(db.url.render_as_string(hide_password=False)) for _ in names]
    barrier = threading.Barrier(len(names))

    def run(other: Database, identity: Identity) -> str:
        barrier.wait(10)
        try:
            other.write_sync(lambda tx: mapper.claim(tx, identity))
        except Taken:
            return ""
        return identity.owner

    won = await asyncio.gather(*(asyncio.to_thread(run, *pair) for pair in zip(others, identities, strict=True)))
    for other in others:
        await other.close()
    assert len([name for name in won if name]) == 1
    assert {user for _, _, user in await held(db)} == set(won) - {""}
