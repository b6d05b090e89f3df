"""Admission through several processes on one database: limits are reached exactly, and never exceeded, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from hub_gateway.db import revision
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.secrets import Vault
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.kernels import failpoints
from hub_gateway.kernels.store import KernelStore
from hub_gateway.quotas import use
from hub_gateway.quotas.types import Counts, Policy, SubjectKind
from tests.harness.quotas import new, put

ROOT = Path(__file__).parents[2]
PROCESSES = 4
KEY = Vault.generate_key()
LAB = 7
ALL = Policy("lab", SubjectKind.GROUP, "lab", counts=Counts.TOGETHER, hard=LAB)
EACH = Policy("each", SubjectKind.EVERYONE, hard=2)


@pytest.fixture
def url(db_url: Callable[[], str | None], tmp_path: Path) -> str:
    return db_url() or f"sqlite:///{tmp_path}/race.sqlite"


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    made = Database(url)
    revision.prepare_at_start(made, upgrade_older=False)
    yield made
    asyncio.run(made.close())


@pytest.fixture
def store(db: Database) -> KernelStore:
    return KernelStore(db, Vault([KEY]), instance="looks on")


class Racers:
    """Processes that admit, started and then let go at once."""

    def __init__(self, url: str, tmp_path: Path) -> None:
        self.url = url
        self.tmp_path = tmp_path
        self.running: list[subprocess.Popen[str]] = []

    def start(self, name: str, count: int, failpoint: str = "") -> None:
        self.running.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.harness.admitting", self.url, KEY, name, str(count)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=self.tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT), failpoints.ENV: failpoint},
            )
        )

    def race(self, how: str = "go") -> list[Counter[str] | None]:
        """What came of each: None for one that was killed."""
        for process in self.running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in self.running:
            assert process.stdin is not None
            process.stdin.write(f"{how}\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120)[0] for process in self.running]
        return [
            None if process.returncode == -signal.SIGKILL else Counter(json.loads(answer))
            for process, answer in zip(self.running, answers, strict=True)
        ]


@pytest.fixture
def racers(url: str, tmp_path: Path) -> Iterator[Racers]:
    made = Racers(url, tmp_path)
    yield made
    for process in made.running:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def held(db: Database) -> list[str]:
    open_ones = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
    return list(db.read_sync(lambda tx: tx.scalars(open_ones).all()))


def test_a_limit_is_reached_exactly(store: KernelStore, db: Database, racers: Racers) -> None:
    for policy in (ALL, EACH):
        asyncio.run(put(store, policy))
    for number in range(PROCESSES):
        racers.start(f"p{number}", 20)
    outcomes = sum((found or Counter() for found in racers.race()), Counter())
    assert outcomes == {"admitted": LAB, "refused": PROCESSES * 20 - LAB}
    owners = db.read_sync(lambda tx: Counter(tx.scalars(select(Reservation.owner))))
    assert sum(owners.values()) == LAB and max(owners.values()) <= 2
    assert db.write_sync(use.recount) == 0


def test_while_room_comes_and_goes_there_is_never_too_much(store: KernelStore, db: Database, racers: Racers) -> None:
    """By the ledger, which has every admission and every end in the order in which they were committed."""
    for policy in (ALL, EACH):
        asyncio.run(put(store, policy))
    for number in range(PROCESSES):
        racers.start(f"p{number}", 60)
    outcomes = sum((found or Counter() for found in racers.race("churn")), Counter())
    assert outcomes.total() == PROCESSES * 60 and set(outcomes) == {"admitted", "refused"}
    assert db.write_sync(use.recount) == 0

    def moments(tx: object) -> list[tuple[float, int, str]]:
        found = []
        for entry in tx.scalars(select(LedgerEntry)):  # type: ignore[attr-defined]
            found += [(entry.started, 1, entry.owner), (entry.stopped, -1, entry.owner)]
        for one in tx.scalars(select(Reservation).where(Reservation.released_at.is_(None))):  # type: ignore[attr-defined]
            found.append((one.created_at.timestamp(), 1, one.owner))
        return sorted(found)

    now: Counter[str] = Counter()
    most = 0
    for _, change, owner in db.read_sync(moments):
        now[owner] += change
        assert now[owner] <= 2
        most = max(most, now.total())
    assert most <= LAB and outcomes["admitted"] > 3 * LAB


def test_who_is_killed_holds_all_or_nothing(store: KernelStore, db: Database, racers: Racers) -> None:
    """kill -9 before the commit leaves nothing, and after it a kernel that the next gateway starts."""
    asyncio.run(put(store, ALL))
    racers.start("before", 10, "admit.before_commit:3")
    racers.start("after", 10, "admit.after_commit:2")
    assert racers.race() == [None, None]
    kept = held(db)
    assert sorted(kept) == ["after-0", "after-1", "before-0", "before-1"]
    rows = db.read_sync(lambda tx: {row.id: row.status for row in tx.execute(select(Kernel.id, Kernel.status))})
    assert rows == dict.fromkeys(kept, "starting")
    assert db.write_sync(use.recount) == 0
    racers.running.clear()
    racers.start("next", 10)
    [outcomes] = racers.race()
    assert outcomes == {"admitted": LAB - 4, "refused": 10 - (LAB - 4)}


def test_who_is_killed_while_others_wait_keeps_nobody_out(store: KernelStore, db: Database, racers: Racers) -> None:
    """The lock of all admissions goes with its holder."""
    asyncio.run(put(store, ALL))
    for number in range(3):
        racers.start(f"dies{number}", 1, "admit.before_commit")
    racers.start("lives", LAB - 1)
    assert racers.race() == [None, None, None, {"admitted": LAB - 1}]
    asyncio.run(asyncio.wait_for(_fill(store), 60))
    assert len(held(db)) == LAB and db.write_sync(use.recount) == 0


async def _fill(store: KernelStore) -> None:
    await asyncio.gather(*(store.admit(new(n, groups=("lab",))) for n in range(10)), return_exceptions=True)
