"""The audit trail: whatever is done to it is noticed."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, text, update

import hub_gateway
from hub_gateway import audit
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Setting, utcnow
from hub_gateway.db.tenancy import AuditEntry
from hub_gateway.events import AUDIT, Events
from hub_gateway.metrics import METRICS


async def write(db: Database, count: int, **more: Any) -> None:
    for number in range(count):
        line = {"actor": f"user{number}", "action": "kernel.stop", "subject": "bob", "detail": {"n": number}} | more
        await db.write(lambda tx, line=line: audit.append(tx, **line) and None)


async def check(db: Database) -> audit.Verification:
    return await db.read(audit.verify)


async def test_a_whole_trail_is_whole(tenancy_db: Database) -> None:
    assert (await check(tenancy_db)).ok
    await write(tenancy_db, 5)
    found = await check(tenancy_db)
    assert (found.ok, found.entries) == (True, 5) and len(found.head) == 64
    lines = await tenancy_db.read(lambda tx: audit.query(tx, limit=2))
    assert [line.id for line in lines] == [5, 4] and lines[0].detail == {"n": 4} and lines[0].hash == found.head
    assert [line.id for line in await tenancy_db.read(lambda tx: audit.query(tx, before_id=3))] == [2, 1]
    assert len(await tenancy_db.read(lambda tx: audit.query(tx, action="kernel.*", actor="user1"))) == 1


TAMPERING = {
    "actor": update(AuditEntry).where(AuditEntry.id == 3).values(actor="mallory"),
    "action": update(AuditEntry).where(AuditEntry.id == 3).values(action="login"),
    "subject": update(AuditEntry).where(AuditEntry.id == 3).values(subject="alice"),
    "outcome": update(AuditEntry).where(AuditEntry.id == 3).values(outcome="failed"),
    "detail": update(AuditEntry).where(AuditEntry.id == 3).values(detail="{}"),
    "moment": update(AuditEntry).where(AuditEntry.id == 3).values(at=utcnow()),
    "hash": update(AuditEntry).where(AuditEntry.id == 3).values(hash="0" * 64),
    "removed": delete(AuditEntry).where(AuditEntry.id == 3),
    "the first": delete(AuditEntry).where(AuditEntry.id == 1),
    "the last": delete(AuditEntry).where(AuditEntry.id == 5),
    "all": delete(AuditEntry),
    "moved": text("UPDATE audit SET id = CASE id WHEN 2 THEN 103 WHEN 3 THEN 102 END WHERE id IN (2, 3)"),
}


@pytest.mark.parametrize("how", TAMPERING)
async def test_tampering_is_found(tenancy_db: Database, how: str) -> None:
    await write(tenancy_db, 5)
    await tenancy_db.write(lambda tx: tx.execute(TAMPERING[how]) and None)
    found = await check(tenancy_db)
    assert not found.ok and found.first_bad is not None and "Line" in found.sentence


async def test_one_put_in_is_found(tenancy_db: Database) -> None:
    await write(tenancy_db, 3)
    forged = AuditEntry(
        id=4,
        at=utcnow(),
        actor="x",
        action="x",
        subject="x",
        outcome="ok",
        detail="{}",
        previous="0" * 64,
        hash="0" * 64,
    )
    await tenancy_db.write(lambda tx: tx.add(forged))
    assert (await check(tenancy_db)).first_bad == 4


async def test_many_at_once_make_one_chain(tenancy_db: Database) -> None:
    others = [Database(tenancy_db.url.render_as_string(hide_password=False)) for _ in range(2)]
    await asyncio.gather(*(write(db, 20) for db in (tenancy_db, *others)))
    for db in others:
        await db.close()
    found = await check(tenancy_db)
    assert (found.ok, found.entries) == (True, 60)


async def test_purging_keeps_the_rest_verifiable(tenancy_db: Database) -> None:
    await write(tenancy_db, 5)
    past = utcnow() - timedelta(days=40)
    await tenancy_db.write(lambda tx: audit.purge(tx, past) and None)
    assert (await check(tenancy_db)).entries == 5
    gone = await tenancy_db.write(lambda tx: audit.purge(tx, utcnow(), "admin"))
    found = await check(tenancy_db)
    assert gone == 5 and (found.ok, found.entries) == (True, 1) and "since line 6" in found.sentence
    await tenancy_db.write(lambda tx: tx.execute(delete(AuditEntry)) and None)
    assert not (await check(tenancy_db)).ok


async def test_a_lost_head_is_noticed(tenancy_db: Database) -> None:
    await write(tenancy_db, 2)
    await tenancy_db.write(lambda tx: tx.execute(delete(Setting).where(Setting.key == "audit_head")) and None)
    assert not (await check(tenancy_db)).ok


async def test_what_is_rolled_back_is_not_there(tenancy_db: Database) -> None:
    def fails(tx: Any) -> None:
        audit.append(tx, actor="a", action="b", subject="c")
        raise RuntimeError("after it")

    with pytest.raises(RuntimeError):
        await tenancy_db.write(fails)
    await write(tenancy_db, 1)
    found = await check(tenancy_db)
    assert (found.ok, found.entries) == (True, 1)


async def test_events_are_sent_when_they_are_true(tenancy_db: Database, tmp_path: Path) -> None:
    """After the commit, by the schema; a handler that fails is counted."""
    events = Events(files=[str(tmp_path / "events.jsonl")])
    tenancy_db.on_commit = lambda info: events.audited(info.get(audit.COMMITTED, ()))
    await write(tenancy_db, 2)
    with pytest.raises(ZeroDivisionError):
        await tenancy_db.write(lambda tx: (audit.append(tx, actor="a", action="b", subject="c"), 1 / 0))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["actor"] for line in lines] == ["user0", "user1"] and lines[0]["__schema__"] == AUDIT
    lost = Events(files=[str(tmp_path / "missing" / "events.jsonl")])
    before = METRICS.swallowed.labels("events")._value.get()
    lost.emit(AUDIT, {name: value for name, value in lines[0].items() if not name.startswith("__")})
    lost.emit(AUDIT, {"actor": "none of the rest"})
    assert METRICS.swallowed.labels("events")._value.get() == before + 2


def test_every_action_is_in_the_reference() -> None:
    package = Path(hub_gateway.__file__).parent
    text = "".join(path.read_text() for path in package.rglob("*.py"))
    subjects = "policy|grant|kernel|identity|request|maintenance|month|ledger|prices|audit"
    written = set(re.findall(rf'"((?:{subjects})\.(?!js|css|log)[a-z]+|login)"', text))
    page = (package.parent / "docs" / "reference" / "audit.md").read_text()
    assert "policy.set" in written
    assert written == set(re.findall(rf"`((?:{subjects})\.[a-z]+|login)`", page))
