"""Limits, reports and pages on a full database: 10,000 live kernels, 1,000 policies, a million ledger entries."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import insert, text

from benchmarks.bench import Bench, milliseconds, percentile
from benchmarks.client import Endpoint, Http
from benchmarks.report import Row
from hub_gateway.db import revision
from hub_gateway.db.engine import Database
from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, Reservation, Setting, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.db.tenancy import LedgerEntry, Policy
from hub_gateway.identity.claims import Claims
from hub_gateway.identity.types import Identity
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import LaunchPlan, NewKernel, Resources
from hub_gateway.quotas import use
from hub_gateway.quotas.enforce import Line, enforce, look
from hub_gateway.quotas.ledger import groups_key
from hub_gateway.quotas.reports import report
from hub_gateway.quotas.runner import LINES
from hub_gateway.runtime import SWITCH_SECONDS
from tests.harness.gateway import GatewayProcess
from tests.harness.postgres import PostgresServer, find_postgres

__all__ = ["admin_table", "admission", "usage_report"]

KERNELS, POLICIES, ENTRIES = 10_000, 1_000, 1_000_000
USERS, GROUPS = 2_000, 100
GIB = 2**30
SPECIAL: dict[int, dict[str, Any]] = {
    1: {"soft": 4.0, "resource": "kernels"},  # which half of the users are above
    2: {"burst": 2e15, "burst_seconds": 600, "grace_seconds": 60},
}
"""Policies of everyone that the enforcer looks at."""
MONTHLY = {"resource": "core_hours", "counts": "together", "window": "calendar", "period": "month"}
"""One for each group: a launch meets two of them."""
WEEKLY = {"resource": "core_hours", "counts": "together", "window": "rolling", "window_seconds": 7 * 86400}
"""And two of these."""
WINDOWS = {1: MONTHLY, 2: WEEKLY}
ENFORCE_SECONDS = 10.0
AIMS = {"SQLite": 10.0, "PostgreSQL": 15.0}


def user(number: int) -> str:
    return f"user{number % USERS}"


def groups_of(number: int) -> list[str]:
    return sorted({f"group{number % GROUPS}", f"group{number * 7 % GROUPS}"})


def fill_kernels(tx: Any) -> None:
    """10,000 live kernels of 2,000 users in 100 groups, and 1,000 policies that none of them has reached."""
    now = utcnow()
    kernels, reservations = [], []
    for number in range(KERNELS):
        common = {
            "owner": user(number),
            "groups": groups_of(number),
            "kernelspec": f"spec{number % 10}",
            "proxy": "local",
            "cpu": 1.0,
            "memory": 2 * GIB,
            "gpu": number % 2,
        }
        created = now - timedelta(minutes=number)
        kernels.append(
            {
                "id": f"filled-{number}",
                **common,
                "status": "running",
                "target": "running",
                "execution_state": "idle",
                "connections": 1,
                "created_at": created,
                "last_activity": created,
                "message": "",
                "stderr_tail": "",
                "restarts": 0,
                "lease_until": 1e12,
                "lease_holder": "somebody else",
                "epoch": 1,
                "launch_epoch": 1,
                "proxy_state": {},
                "launch": "",
                "launch_token": "",
                "link_secret": "",
                "link_public": "",
                "path": f"notebook{number}.ipynb",
            }
        )
        held = {"kernel_id": f"filled-{number}", "kernels": 1, "created_at": created, "billed_from": created}
        reservations.append({**held, **common})
    for start in range(0, KERNELS, 1000):
        tx.execute(insert(Kernel), kernels[start : start + 1000])
        tx.execute(insert(Reservation), reservations[start : start + 1000])
    tx.execute(insert(Policy), [policy(number) for number in range(POLICIES)])
    tx.add(Setting(key="policies_version", value="filled"))
    tx.flush()
    use.recount(tx)


def policy(number: int) -> dict[str, Any]:
    """Limits of everyone, of groups together and of users each."""
    kind = "everyone" if number < 5 else "group" if number < 300 else "user"
    subject = "*" if kind == "everyone" else f"group{number % GROUPS}" if kind == "group" else user(number)
    now = utcnow()
    return {
        "name": f"policy{number}",
        "origin": "policy",
        "subject_kind": kind,
        "subject": subject,
        "object_kind": "kernelspec" if number % 3 == 0 else "any",
        "object": f"spec{number % 10}" if number % 3 == 0 else "*",
        "resource": ("kernels", "cpu", "memory", "gpu", "starting")[number % 5],
        "gpu_model": "",
        "counts": "together" if kind == "group" and number % 2 else "each",
        "window": "now",
        "timezone": "UTC",
        "hard": 1e15,
        "action": "reject",
        "priority": number,
        "enabled": True,
        "delegated": False,
        "weekly": [],
        "note": "",
        "version": 1,
        "created_at": now,
        "created_by": "benchmark",
        "updated_at": now,
        "updated_by": "benchmark",
        **dict.fromkeys(("soft", "burst", "burst_seconds", "grace_seconds", "period", "window_seconds")),
        **(SPECIAL.get(number) or WINDOWS.get(number // 100, {})),
    }


def fill_ledger(tx: Any) -> None:
    """A million entries of a year: of kernels of a few hours, some of several days."""
    chance = random.Random(1)
    now = time.time()
    usual = {
        "kind": "interval",
        "proxy": "local",
        "queue": "",
        "memory": 2 * GIB,
        "gpu_model": "",
        "price_version": 0,
        "note": "",
        "recorded_at": utcnow(),
    }
    keys = [groups_key(groups_of(number)) for number in range(USERS)]
    for start in range(0, ENTRIES, 10_000):
        rows = []
        for number in range(start, start + 10_000):
            seconds = chance.expovariate(1 / 10_000)
            begin = now - chance.uniform(0, 365 * 86400) - seconds
            rows.append(
                {
                    **usual,
                    "kernel_id": f"ended-{number}",
                    "owner": user(number),
                    "groups": keys[number % USERS],
                    "cost_center": f"{number % 20}",
                    "kernelspec": f"spec{number % 10}",
                    "cpu": float(1 + number % 4),
                    "gpu": number % 2,
                    "started": begin,
                    "stopped": begin + seconds,
                    "seconds": seconds,
                }
            )
        tx.execute(insert(LedgerEntry), rows)


@contextmanager
def databases(bench: Bench) -> Iterator[list[tuple[str, str]]]:
    """Names and URLs: SQLite always, PostgreSQL (that waits for the disk, as a real one does) where there is one."""
    found = [("SQLite", f"sqlite:///{bench.fresh(f'tenancy-{time.monotonic_ns()}')}/bench.sqlite")]
    try:
        find_postgres()
    except RuntimeError:
        yield found
        return
    server = PostgresServer(durable=True)
    try:
        yield [*found, ("PostgreSQL", server.create_database("bench"))]
    finally:
        server.close()


async def _filled(url: str, fill: Callable[[Any], None]) -> Database:
    db = Database(url)
    await asyncio.to_thread(revision.prepare_at_start, db, upgrade_older=False)
    await db.write(fill)
    await db.write(lambda tx: tx.execute(text("ANALYZE")) and None)
    return db


async def _timed(count: int, call: Callable[[int], Awaitable[object]]) -> list[float]:
    """Seconds of each of `count` calls, one after the other; the first ten are not counted."""
    samples = []
    for number in range(count + 10):
        began = time.perf_counter()
        await call(number)
        samples.append(time.perf_counter() - began)
    return samples[10:]


def admission(bench: Bench) -> list[Row]:
    """Admission against 10,000 live kernels and 1,000 policies; the baseline is a transaction that writes one row."""
    bench.report.notes.append(
        f"Admission: {KERNELS} live kernels of {USERS} users in {GROUPS} groups, {POLICIES} policies; direct is a "
        "transaction of the same database that writes one row. Its launch plan is encrypted, its keys are made and its "
        "identity is claimed, too. Each launch meets a soft limit, a burst, and two monthly and two rolling limits of "
        "core-hours that its groups have together; the enforcer looks at everything meanwhile, every "
        f"{ENFORCE_SECONDS:.0f} s as by default. Before, it has told those who are above the soft limit, and each "
        "group's meters have been read once. At once: launches that come together, after a third as many others."
    )
    with databases(bench) as found:
        return [row for name, url in found for row in asyncio.run(_admission(bench, name, url))]


async def _admission(bench: Bench, name: str, url: str) -> list[Row]:
    sys.setswitchinterval(SWITCH_SECONDS)
    db = await _filled(url, fill_kernels)
    store, claims = KernelStore(db, Vault([Vault.generate_key()]), instance="bench"), Claims()
    plan = LaunchPlan(argv=("python", "-m", "ipykernel_launcher", "-f", "{connection_file}"), env={"A": "b" * 500})

    async def bare(number: int) -> None:
        await db.write(lambda tx: tx.add(Setting(key=f"bench{number}", value="x")))

    longest = [0.0]
    looks: list[tuple[float, float]] = []

    async def enforce_now() -> None:
        """As the enforcer of every replica does; when it looked, and how long it held admissions up."""
        began = time.perf_counter()
        for some in chunks(await db.read(lambda tx: look(tx, store.admission, utcnow()))):
            await db.write(lambda tx, some=some: _held_up(tx, store, some, longest))
        looks.append((began, time.perf_counter()))

    async def keep_enforcing() -> None:
        while True:
            await enforce_now()
            await asyncio.sleep(ENFORCE_SECONDS)

    async def admit(number: int, of: str = "one") -> None:
        identity = Identity(user(number * 13), user(number * 13), unix_user=user(number * 13))
        began = time.perf_counter()
        await store.admit(
            NewKernel(
                id=f"{of}-{number}",
                owner=user(number * 13),
                groups=tuple(groups_of(number)),
                kernelspec=f"spec{number % 10}",
                proxy="local",
                plan=plan,
                resources=Resources(1.0, GIB, 1),
            ),
            lambda tx: claims.claim(tx, identity),
        )
        if of == "one":
            spans.append((began, time.perf_counter()))

    spans: list[tuple[float, float]] = []
    direct = await _timed(bench.rounds(300), bare)
    await _timed(GROUPS, lambda number: admit(number, "first"))
    await enforce_now()
    looks.clear()
    enforcing = asyncio.ensure_future(keep_enforcing())
    alone = await _timed(bench.rounds(3000), admit)
    enforcing.cancel()
    await asyncio.wait([enforcing])
    beside = [end - began for began, end in spans if any(began < ended and since < end for since, ended in looks)]
    count = bench.rounds(600)
    # The first ones at once make connections, and have the database prepare the statements of each.
    await asyncio.gather(*(admit(number, "before") for number in range(count // 3)))
    began = time.perf_counter()
    await asyncio.gather(*(admit(number, "many") for number in range(count)))
    rate = count / (time.perf_counter() - began)
    await db.close()
    tail = 1000 * percentile(alone, 0.99)
    ratio = statistics.median(alone) / statistics.median(direct)
    return [
        Row(
            f"admission, {name}",
            f"p99 <= {AIMS[name]:.0f} ms",
            milliseconds(direct),
            f"{milliseconds(alone)}, p99 {tail:.2f}",
            ratio=f"{ratio:.1f}",
            met=tail <= AIMS[name],
            raw={"direct": direct, "admission": alone},
        ),
        Row(
            f"admission while the enforcer looks, {name}",
            ours=f"{milliseconds(beside)}, p99 {1000 * percentile(beside, 0.99):.2f}" if beside else "none",
            raw={"admission": beside},
        ),
        Row(
            f"enforcer's longest transaction, {name}",
            "<= 100 ms",
            ours=f"{1000 * longest[0]:.1f} ms",
            met=longest[0] <= 0.1,
            raw={"longest": longest[0]},
        ),
        Row(f"admissions at once, {name}", ">= 200/s", ours=f"{rate:.0f}/s", met=rate >= 200, raw={"rate": rate}),
    ]


def chunks(lines: list[Line]) -> Iterator[list[Line]]:
    """Lines as the enforcer takes them."""
    return (lines[first : first + LINES] for first in range(0, len(lines), LINES))


def _held_up(tx: Any, store: KernelStore, lines: list[Line], longest: list[float]) -> None:
    lock(tx)
    began = time.perf_counter()
    enforce(tx, store.admission, utcnow(), lines)
    longest[0] = max(longest[0], time.perf_counter() - began)


def usage_report(bench: Bench) -> list[Row]:
    """A report over a year and a million entries; the baseline is a plain sum over the same table."""
    bench.report.notes.append(
        f"Usage report: by user, group and day over a year with {ENTRIES} ledger entries; direct is "
        "`SELECT sum(seconds)` over the same table."
    )
    with databases(bench) as found:
        return [row for name, url in found for row in asyncio.run(_report(name, url))]


async def _report(name: str, url: str) -> list[Row]:
    db = await _filled(url, fill_ledger)
    now = utcnow()
    rows = []
    began = time.perf_counter()
    await db.read(lambda tx: tx.execute(text("SELECT sum(seconds) FROM ledger")).scalar_one())
    plain = time.perf_counter() - began
    for by in ("user", "group", "day"):
        samples = []
        for _ in range(3):
            began = time.perf_counter()
            made = await db.read(lambda tx, by=by: report(tx, by, now - timedelta(days=365), now))
            samples.append(time.perf_counter() - began)
        assert made.total.kernels > ENTRIES * 0.9
        took = statistics.median(samples)
        rows.append(
            Row(
                f"usage report by {by}, {name}",
                "<= 2 s",
                f"{plain:.2f} s",
                f"{took:.2f} s",
                ratio=f"{took / plain:.1f}",
                met=took <= 2,
                raw={"samples": samples},
            )
        )
    await db.close()
    return rows


def admin_table(bench: Bench) -> list[Row]:
    """The first page of everybody's kernels over HTTP, at 10,000 of them; the baseline is /healthz."""
    bench.report.notes.append(
        f"Admin table: GET of the first page (50 of {KERNELS} kernels) from a running gateway, sorted by age; "
        "direct is GET /healthz of the same process."
    )
    directory = bench.fresh("admin-table")
    database = Path(directory / "filled.sqlite")
    asyncio.run(_close_after(_filled(f"sqlite:///{database}", fill_kernels)))
    with _administered(directory, f"sqlite:///{database}") as gateway, Http(gateway) as http:
        health = _requests(http, "/healthz", bench.rounds(100))
        first = _requests(http, "/api/admin/kernels?limit=50", bench.rounds(100))
        search = _requests(http, "/api/admin/kernels?limit=50&q=notebook99", bench.rounds(30))
        assert len(json.loads(http.request("GET", "/api/admin/kernels?limit=50")[1])["kernels"]) == 50
    tail = 1000 * percentile(first, 0.95)
    ratio = statistics.median(first) / statistics.median(health)
    return [
        Row(
            "admin table, first page",
            "<= 100 ms",
            milliseconds(health),
            milliseconds(first),
            ratio=f"{ratio:.1f}",
            met=tail <= 100,
            raw={"health": health, "first": first},
        ),
        Row("admin table, search", "<= 100 ms", ours=milliseconds(search), met=percentile(search, 0.95) <= 0.1),
    ]


async def _close_after(making: Awaitable[Database]) -> None:
    await (await making).close()


@contextmanager
def _administered(directory: Path, url: str) -> Iterator[Any]:
    gateway = GatewayProcess(directory / "gateway", users=(), admins=("admin",), db_url=url)
    gateway.start()
    try:
        yield Endpoint("127.0.0.1", gateway.port, gateway.headers("admin"))
    finally:
        gateway.close()


def _requests(http: Http, path: str, count: int) -> list[float]:
    samples = []
    for _ in range(count):
        began = time.perf_counter()
        status, body = http.request("GET", path)
        samples.append(time.perf_counter() - began)
        assert status == 200, (path, status, body[:300])
    return samples
