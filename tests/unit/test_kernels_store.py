"""Kernels' rows: admission, leases and their epochs, registrations, lists."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from hub_gateway.db import migrate
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, Reservation, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.errors import BadRequest, Conflict, Forbidden, NotFound
from hub_gateway.kernels.admissions import Admitted
from hub_gateway.kernels.controller import exit_of
from hub_gateway.kernels.leases import LeaseLost, Leases
from hub_gateway.kernels.reconcile import _recorded as recorded
from hub_gateway.kernels.registration import proof_of
from hub_gateway.kernels.store import Activity, KernelStore
from hub_gateway.kernels.types import (
    ExecutionState,
    KernelRecord,
    KernelStatus,
    KernelTarget,
    LaunchPlan,
    NewKernel,
    Resources,
)
from tests.harness.quotas import apart

PLAN = LaunchPlan(("kernel", "{connection_file}"), {"A": "1"}, "/tmp", "message", {"image_name": "x"})
KEY = "x" * 40


def new(kernel_id: str = "k1", owner: str = "alice", **more: Any) -> NewKernel:
    return NewKernel(kernel_id, owner, "python", "local", PLAN, **more)


@pytest.fixture
async def db(db_url: Callable[[], str | None], tmp_path: Path) -> AsyncIterator[Database]:
    made = Database(db_url() or f"sqlite:///{tmp_path}/test.sqlite")
    migrate.prepare(made, upgrade_older=False)
    yield made
    await made.close()


VAULT = Vault([Vault.generate_key()])


@pytest.fixture
def store(db: Database) -> KernelStore:
    return KernelStore(db, VAULT, instance="one", cache_seconds=60)


def replica(db: Database, instance: str, lease_seconds: float = 30.0) -> tuple[KernelStore, Leases]:
    made = KernelStore(db, VAULT, instance=instance, lease_seconds=lease_seconds, cache_seconds=0)
    return made, Leases(made, replica=instance.rstrip("0123456789"))


async def existing(store: KernelStore, kernel_id: str) -> KernelRecord:
    record = await store.get(kernel_id)
    assert record is not None
    return record


async def reserved(db: Database) -> set[str]:
    statement = select(Reservation.kernel_id).where(Reservation.released_at.is_(None))
    return set(await db.read(lambda tx: tx.execute(statement).scalars().all()))


async def test_admission_is_a_row_and_a_reservation(store: KernelStore, db: Database) -> None:
    found = await store.admit(
        new(groups=("a", "b"), hub_server="gpu", resources=Resources(2.5, 2**40, 1), path="x.ipynb")
    )
    admitted = found.record
    assert admitted == await store.get("k1")
    assert (admitted.status, admitted.target) == (KernelStatus.STARTING, KernelTarget.RUNNING)
    assert admitted.groups == ("a", "b") and admitted.hub_server == "gpu"
    assert admitted.resources == Resources(2.5, 2**40, 1)
    plan, token, public = await store.plan("k1")
    assert plan == PLAN and len(token) > 30 and len(public) == 40
    row = await db.read(lambda tx: tx.execute(select(Reservation)).scalar_one())
    assert (row.owner, row.kernels, row.cpu, row.memory, row.gpu) == ("alice", 1, 2.5, 2**40, 1)


@pytest.mark.parametrize("together", [True, False])
async def test_an_id_is_taken_once(store: KernelStore, db: Database, together: bool) -> None:
    if not together:
        apart(store)
    answers = await asyncio.gather(*(store.admit(new()) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(answer, Admitted) for answer in answers) == 1
    assert sum(isinstance(answer, Conflict) for answer in answers) == 9
    assert await reserved(db) == {"k1"}


async def test_the_gateway_id_stays_and_is_one_for_all_replicas(db: Database) -> None:
    found = await asyncio.gather(*(replica(db, f"r{n}")[0].gateway_id() for n in range(8)))
    assert len(set(found)) == 1


# Lists


async def test_lists_show_the_owners_kernels_that_are_not_stopped(store: KernelStore) -> None:
    for number, owner in enumerate(("alice", "bob", "alice", "alice")):
        await store.admit(new(f"k{number}", owner))
    leases = Leases(store, replica="one")
    for kernel_id, status in (("k2", "failed"), ("k3", "stopped")):
        lease = leases.of(await existing(store, kernel_id))
        assert lease
        await leases.update(lease, status=status)
    assert [record.id for record in await store.list("alice")] == ["k0", "k2"]
    assert [record.id for record in await store.list("bob")] == ["k1"]
    assert await store.list("carol") == ()


async def test_a_list_is_cached_until_this_process_writes(store: KernelStore, db: Database) -> None:
    other, _ = replica(db, "other")
    await store.admit(new("k1"))
    first = await store.list("alice")
    assert await store.list("alice") is first
    await other.admit(new("k2"))
    assert len(await store.list("alice")) == 1  # for `cache_seconds` at most
    await store.ask_to_stop("k1")
    assert [(r.id, r.target.value) for r in await store.list("alice")] == [("k1", "stopped"), ("k2", "running")]


async def test_what_was_written_is_listed_at_once(store: KernelStore) -> None:
    """However many lists were being read while it was written."""
    for number in range(20):
        reading = [asyncio.ensure_future(store.list("alice")) for _ in range(5)]
        await store.admit(new(f"k{number}"))
        assert len(await store.list("alice")) == number + 1
        await asyncio.gather(*reading)


async def test_a_list_survives_a_reader_that_goes_away(store: KernelStore) -> None:
    await store.admit(new())
    first = asyncio.ensure_future(store.list("alice"))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(store.list("alice"))
    await asyncio.sleep(0)
    first.cancel()
    assert len(await second) == 1


# Leases


async def test_leases_are_taken_once_and_raise_the_epoch(db: Database) -> None:
    first, _ = replica(db, "a1", lease_seconds=-1)  # has run out at once
    for number in range(20):
        await first.admit(new(f"k{number}"))
    rivals = [replica(db, f"r{n}x")[1] for n in range(4)]
    taken = await asyncio.gather(*(rival.claim() for rival in rivals))
    assert sorted(itertools.chain(*taken)) == sorted(f"k{n}" for n in range(20))
    assert {(r.epoch) for r in await first.live()} == {2}
    assert await rivals[0].claim() == []


async def test_a_lost_lease_writes_nothing(db: Database) -> None:
    slow_store, slow = replica(db, "slow1", lease_seconds=-1)
    record = (await slow_store.admit(new())).record
    lease = slow.of(record)
    assert lease is not None
    await slow.update(lease, message="mine")  # run out, but nobody took it
    _, quick = replica(db, "quick1")
    assert await quick.claim("k1") == ["k1"]
    with pytest.raises(LeaseLost):
        await slow.update(lease, status="failed", release=True)
    found = await slow_store.get("k1")
    assert found is not None and found.status is KernelStatus.STARTING and found.message == "mine"
    assert await reserved(db) == {"k1"}
    assert slow.of(found) is None and quick.of(found) is not None


async def test_a_successor_takes_over_at_once_only_if_it_is_sole(db: Database) -> None:
    first_store, first = replica(db, "host1")
    await first.open(sole=True)
    await first_store.admit(new())
    _, stranger = replica(db, "elsewhere1")
    assert await stranger.open(sole=True) == []  # of another replica, which lives
    _, second = replica(db, "host2")
    assert await second.open(sole=False) == []
    _, third = replica(db, "host3")
    assert await third.open(sole=True) == ["k1"]
    record = await first_store.get("k1")
    assert record is not None and record.lease_holder == "host3" and record.epoch == 2


async def test_leases_are_renewed_and_let_go(db: Database) -> None:
    store, leases = replica(db, "a1", lease_seconds=0.3)
    await leases.open(sole=True)
    await store.admit(new())
    _, other = replica(db, "b1")
    for _ in range(5):
        await leases.renew()
        assert await other.claim() == []
        await asyncio.sleep(0.1)  # time is what is tested
    await leases.close()
    assert await other.claim() == ["k1"]


async def test_unfinished_work_is_found(db: Database) -> None:
    store, leases = replica(db, "a1")
    await leases.open(sole=True)
    for kernel_id, status, target in (("starting", "starting", "running"), ("fine", "running", "running"),
                                      ("stop", "running", "stopped"), ("stopping", "stopping", "running"),
                                      ("gone", "stopped", "stopped")):  # fmt: skip
        record = (await store.admit(new(kernel_id))).record
        lease = leases.of(record)
        assert lease
        await leases.update(lease, status=status, target=target)
    assert sorted(await leases.unfinished()) == ["starting", "stop", "stopping"]


# Registration


async def registration(store: KernelStore, **changes: Any) -> dict[str, Any]:
    _, token, _ = await store.plan("k1")
    facts = {"kernel_id": "k1", "epoch": 1, "host": "10.0.0.5", "port": 4711, "public_key": KEY, **changes}
    proof = proof_of(token, facts["kernel_id"], facts["epoch"], facts["host"], facts["port"], facts["public_key"])
    return {"version": 1, "gateway_id": "g", "pid": 7, "proof": proof, **facts}


async def test_a_registration_is_taken_once(store: KernelStore) -> None:
    await store.admit(new())
    payload = await registration(store)
    answers = await asyncio.gather(*(store.register("k1", payload) for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(answer, KernelRecord) for answer in answers) == 1
    assert sum(isinstance(answer, Conflict) for answer in answers) == 4
    facts = (await store.link_facts(["k1", "unknown"]))["k1"]
    assert (facts.registration.host, facts.registration.port, facts.registration.pid) == ("10.0.0.5", 4711, 7)
    assert len(facts.client_secret) == 40


async def test_who_cannot_prove_anything_never_waits_for_the_writer(
    store: KernelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.admit(new())
    payload = await registration(store)

    async def write(fn: Any) -> Any:
        raise AssertionError("it went to the writer")

    monkeypatch.setattr(store.db, "write", write)
    with pytest.raises(Forbidden):
        await store.register("k1", {**payload, "proof": "0" * 64})
    with pytest.raises(NotFound):
        await store.register("k2", {**payload, "kernel_id": "k2"})
    with pytest.raises(Conflict):
        await store.register("k1", await registration(store, epoch=7))


@pytest.mark.parametrize("host", ["n1", "n-1.example.org", "node_7.", "10.0.0.5", "::1", "fe80::1%eth0"])
async def test_hosts_that_agents_may_have(store: KernelStore, host: str) -> None:
    await store.admit(new())
    found = await store.register("k1", await registration(store, host=host))
    assert found.registration is not None and found.registration.host == host


@pytest.mark.parametrize("change", [{"host": "evil"}, {"port": 1}, {"public_key": "y" * 40}, {"epoch": 2}])
async def test_a_registration_that_is_tampered_with_is_refused(store: KernelStore, change: dict[str, Any]) -> None:
    await store.admit(new())
    payload = {**await registration(store), **change}
    with pytest.raises(Forbidden):
        await store.register("k1", payload)
    assert (await store.link_facts(["k1"])) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"host": None},
        {"port": "1"},
        {"port": 0},
        {"public_key": ""},
        {"proof": None},
        {"kernel_id": "k2"},
        {"pid": "x"},
        {"pid": 2**40},
        {"host": "a\0b"},
        {"host": "a b"},
        {"host": "-o.example"},
        {"host": "tcp://10.0.0.5:1;ipc:///x"},
        {"public_key": "\ud800" * 40},
        {"proof": "\ud800"},
    ],
)
async def test_a_malformed_registration_is_refused(store: KernelStore, change: dict[str, Any]) -> None:
    await store.admit(new())
    payload = await registration(store)
    with pytest.raises(BadRequest):
        await store.register("k1", {**payload, **change})


async def test_a_registration_of_an_earlier_launch_is_refused(store: KernelStore, db: Database) -> None:
    with pytest.raises(NotFound):
        await store.register("k1", {"kernel_id": "k1", "epoch": 1, "host": "h", "port": 1, "public_key": KEY,
                                    "pid": 1, "proof": ""})  # fmt: skip
    await store.admit(new())
    payload = await registration(store)
    await db.write(lambda tx: tx.execute(update(Kernel).values(launch_epoch=2)) and None)
    with pytest.raises(Conflict):
        await store.register("k1", payload)
    assert await store.register("k1", await registration(store, epoch=2))


async def test_whatever_an_agent_or_a_cluster_says_can_be_written(store: KernelStore) -> None:
    """A value that a database refuses would be tried again for ever, and the kernel would neither run nor end."""
    leases = Leases(store, replica="one")
    lease = leases.of((await store.admit(new())).record)
    assert lease
    said = "caf\u00e9 \U0001f600 \0 \ud800 end"
    ended = exit_of({"event": "exited", "code": 2**70, "stderr_tail": said})
    values = {"message": ended.sentence, "exit_code": ended.exit_code, "stderr_tail": ended.stderr_tail}
    await leases.update(lease, **values)
    record = await existing(store, "k1")
    assert record.stderr_tail == "caf\u00e9 \U0001f600 \ufffd \ufffd end" and record.exit_code is None
    assert "\ufffd" in record.message
    agent = {"host": "h", "port": 4711, "public_key": KEY, "pid": 2**40}
    state: dict[str, Any] = {"said": [said], said: 2**70, "epoch": 2**70, "registration": agent}
    await leases.update(lease, **recorded(state))
    record = await existing(store, "k1")
    assert record.proxy_state["said"] == [record.stderr_tail] and record.proxy_state[record.stderr_tail] == 2**70
    assert record.registration is not None and record.registration.pid == 0
    for bad in ({"host": "\0"}, {"port": 2**40}, {"public_key": said}, {"host": "h" * 300}):
        assert "agent_host" not in recorded({"registration": {**agent, **bad}})


# What relays saw


async def test_activity_is_written_for_running_kernels(store: KernelStore) -> None:
    leases = Leases(store, replica="one")
    moment = utcnow() + timedelta(hours=1)
    for kernel_id in ("k1", "k2"):
        lease = leases.of((await store.admit(new(kernel_id))).record)
        assert lease
        if kernel_id == "k1":
            await leases.update(lease, status=KernelStatus.RUNNING.value)
    await store.write_activity([])
    await store.write_activity([Activity(k, ExecutionState.BUSY, moment, 2) for k in ("k1", "k2", "k3")])
    one, two = await store.get("k1"), await store.get("k2")
    assert one is not None and two is not None
    assert (one.execution_state, one.last_activity, one.connections) == (ExecutionState.BUSY, moment, 2)
    assert (two.execution_state, two.connections) == (ExecutionState.STARTING, 0)


# The end


async def test_a_failed_kernel_can_be_admitted_again(store: KernelStore, db: Database) -> None:
    leases = Leases(store, replica="one")
    first = (await store.admit(new())).record
    lease = leases.of(first)
    assert lease
    with pytest.raises(Conflict):
        await store.revive("k1")
    _, token, public = await store.plan("k1")
    await leases.update(lease, status="failed", release=True, message="died", agent_port=1, proxy_state={"pid": 1})
    assert await reserved(db) == set()
    again = (await store.revive("k1")).record
    assert again.status is KernelStatus.STARTING and again.message == "" and again.registration is None
    assert (again.epoch, again.launch_epoch, again.restarts, again.proxy_state) == (2, 2, 1, {})
    assert await reserved(db) == {"k1"}
    plan, new_token, new_public = await store.plan("k1")
    assert plan == PLAN and new_token != token and new_public != public
    with pytest.raises(LeaseLost):
        await leases.update(lease, message="of its earlier life")


async def test_stopping_a_failed_kernel_takes_it_off_the_list(store: KernelStore) -> None:
    leases = Leases(store, replica="one")
    lease = leases.of((await store.admit(new())).record)
    assert lease
    await leases.update(lease, status="failed", release=True)
    stopped = await store.ask_to_stop("k1")
    assert stopped is not None and stopped.status is KernelStatus.STOPPED
    assert await store.ask_to_stop("unknown") is None


async def test_rows_age(store: KernelStore) -> None:
    leases = Leases(store, replica="one")
    now = utcnow()
    for kernel_id, status, age in (
        ("f1", "failed", 10),
        ("f2", "failed", 1),
        ("s1", "stopped", 10),
        ("s2", "stopped", 1),
    ):
        lease = leases.of((await store.admit(new(kernel_id))).record)
        assert lease
        await leases.update(lease, status=status, stopped_at=now - timedelta(hours=age))
    await store.age_out(now - timedelta(hours=5), now - timedelta(hours=5))
    found = {key: await store.get(key) for key in ("f1", "f2", "s1", "s2")}
    assert {key: record and record.status.value for key, record in found.items()} == {
        "f1": None,
        "f2": "failed",
        "s1": None,
        "s2": "stopped",
    }
