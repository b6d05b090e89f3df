"""What is billed is what kernels lived, to the second, whatever was killed meanwhile: real processes, real kill -9."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

import psutil
from sqlalchemy import select

from hub_gateway.db.engine import Database
from hub_gateway.db.models import Reservation
from hub_gateway.db.tenancy import LedgerEntry
from tests.harness.gateway import GatewayProcess
from tests.harness.notebook import Notebook
from tests.harness.waiting import until

SECOND = 1.0


def with_its_agent(pid: int) -> None:
    """Kill a kernel for good: alone it would be restarted in place."""
    kernel = psutil.Process(pid)
    agent = kernel.parent()
    assert agent is not None
    agent.kill()
    kernel.kill()


def test_the_bill_is_the_lifetimes_whatever_is_killed(make_gateway: Callable[..., GatewayProcess]) -> None:
    """One kernel dies with its agent, one is stopped, one dies while the gateway is down, one lives on."""
    gateway = make_gateway().start()
    posted: dict[str, tuple[float, float]] = {}
    ended: dict[str, tuple[float, float]] = {}
    kernels: dict[str, str] = {}
    pids: dict[str, int] = {}
    with gateway.client("alice") as client:
        for name in ("stopped", "died", "lost", "lives"):
            before = time.time()
            answer = client.post("/api/kernels", json={"name": "python"})
            assert answer.status_code == 201, answer.text
            kernels[name] = answer.json()["id"]
            posted[name] = (before, time.time())
    for name, kernel_id in kernels.items():
        with Notebook(gateway.ws_url, kernel_id, gateway.headers("alice")) as notebook:
            pids[name] = int(notebook.execute("import os; print(os.getpid())").text)

    def billed() -> dict[str, LedgerEntry]:
        db = Database(gateway.db_url)
        try:
            rows = db.read_sync(lambda tx: tx.scalars(select(LedgerEntry)).all())
        finally:
            db.engine.dispose()
        assert len(rows) == len({row.kernel_id for row in rows}), "nobody is billed twice"
        names = {kernel_id: name for name, kernel_id in kernels.items()}
        return {names[row.kernel_id]: row for row in rows}

    def kill_and_start() -> None:
        gateway.kill()
        gateway.start()

    before = time.time()
    with_its_agent(pids["died"])
    until(lambda: "died" in billed(), "the end of the kernel that died")
    ended["died"] = (before, time.time())
    kill_and_start()
    before = time.time()
    with gateway.client("alice") as client:
        assert client.delete(f"/api/kernels/{kernels['stopped']}").status_code == 204
    # The answer says that it is being stopped: the gateway dies while it is, and its successor goes on.
    gateway.kill()
    between = time.time()
    with_its_agent(pids["lost"])
    gateway.start()
    until(lambda: {"stopped", "lost"} <= set(billed()), "both ends are written", timeout=60)
    ended["stopped"], ended["lost"] = (before, time.time()), (between, time.time())
    kill_and_start()
    found = billed()
    assert set(found) == {"died", "stopped", "lost"}
    for name, entry in found.items():
        assert posted[name][0] - SECOND <= entry.started <= posted[name][1] + SECOND, name
        assert ended[name][0] - SECOND <= entry.stopped <= ended[name][1] + SECOND, name
        assert entry.seconds == entry.stopped - entry.started
    with gateway.client("alice") as client:
        shown = client.get("/api/kernels").json()
        assert [one["id"] for one in shown if one["execution_state"] != "dead"] == [kernels["lives"]]
        reported = client.get("/api/usage").json()["total"]["kernel_hours"] * 3600
    asked = time.time()
    db = Database(gateway.db_url)
    try:
        still = db.read_sync(lambda tx: tx.scalars(select(Reservation).where(Reservation.released_at.is_(None))).all())
    finally:
        db.engine.dispose()
    assert [row.kernel_id for row in still] == [kernels["lives"]]
    begun: datetime = still[0].created_at
    assert abs(sum(entry.seconds for entry in found.values()) + asked - begun.timestamp() - reported) <= SECOND
