"""Admission: limits hold, to the unit, whatever happens."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import select

from hub_gateway import audit
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, Reservation, utcnow
from hub_gateway.db.tenancy import LedgerEntry
from hub_gateway.errors import Conflict, LaunchRefused
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas.types import Action, Counts, ObjectKind, Policy, Resource, SubjectKind, WindowKind
from tests.harness.quotas import begin, drift, new, put, release

EVERYONE = SubjectKind.EVERYONE
ONE = Policy("bob-one", SubjectKind.USER, "bob", hard=1)


async def test_a_limit_of_one(quota_store: KernelStore, tenancy_db: Database) -> None:
    """The second launch is refused in a sentence, leaves nothing but a line in the audit trail, and fits later."""
    await put(quota_store, ONE)
    await quota_store.admit(new(1, path="first.ipynb"))
    with pytest.raises(LaunchRefused) as caught:
        await quota_store.admit(new(2))
    said = caught.value.message
    assert "1 kernel" in said and "bob-one" in said and "first.ipynb" in said and "/limits" in said
    assert await quota_store.get("k2") is None
    lines = await tenancy_db.read(lambda tx: audit.query(tx, action="kernel.refused"))
    assert [line.subject for line in lines] == ["bob"] and lines[0].detail["policy"] == "bob-one"
    await quota_store.admit(new(3, owner="alice"))
    await release(quota_store, "k1")
    await quota_store.admit(new(4))
    assert await drift(quota_store) == 0


async def test_look_alikes_are_different_people(quota_store: KernelStore) -> None:
    await put(quota_store, ONE)
    for number, owner in enumerate(("bob", "Bob", "b\u043eb", "bob ", "bo\u0301b")):
        await quota_store.admit(new(number, owner=owner))


async def test_a_group_holds_together(quota_store: KernelStore) -> None:
    await put(
        quota_store,
        Policy("lab", SubjectKind.GROUP, "lab", resource=Resource.GPU, counts=Counts.TOGETHER, hard=4),
    )
    gpus = {"groups": ("lab",), "resources": Resources(gpu=3)}
    await quota_store.admit(new(1, owner="alice", path="train.ipynb", **gpus))
    with pytest.raises(LaunchRefused, match=r"group lab is 4 GPUs .*alice holds 3 GPUs"):
        await quota_store.admit(new(2, **gpus))
    await quota_store.admit(new(3, groups=("lab",), resources=Resources(gpu=1)))
    await quota_store.admit(new(4, groups=("lab",)))
    await quota_store.admit(new(5, resources=Resources(gpu=3)))  # not in the group
    with pytest.raises(LaunchRefused, match="choose a smaller one"):
        await quota_store.admit(new(6, groups=("lab",), resources=Resources(gpu=8)))


async def test_the_most_specific_policy_counts_and_a_grant_wins_until_it_ends(quota_store: KernelStore) -> None:
    await put(quota_store, Policy("all", EVERYONE, hard=1))
    await put(quota_store, Policy("lab", SubjectKind.GROUP, "lab", hard=2))
    await put(quota_store, Policy("big", SubjectKind.GROUP, "big", hard=3))
    groups = ("lab", "big")
    for number in range(3):
        await quota_store.admit(new(number, groups=groups))
    with pytest.raises(LaunchRefused, match="policy big"):
        await quota_store.admit(new(3, groups=groups))
    ends = datetime(2100, 1, 1, tzinfo=timezone.utc)
    grant = await put(quota_store, Policy("more", SubjectKind.USER, "bob", hard=4, priority=1000, valid_until=ends))
    await quota_store.admit(new(3, groups=groups))
    over = utcnow() - timedelta(seconds=1)
    await put(quota_store, Policy(**{**vars(grant), "valid_until": over}))
    with pytest.raises(LaunchRefused, match="policy big"):
        await quota_store.admit(new(4, groups=groups))


async def test_objects_and_clamping(quota_store: KernelStore) -> None:
    kind = {"object_kind": ObjectKind.KERNELSPEC, "object": "spark_*"}
    await put(quota_store, Policy("spark", EVERYONE, hard=1, **kind))
    await put(quota_store, Policy("small", EVERYONE, resource=Resource.CPU, counts=Counts.KERNEL, hard=2))
    await quota_store.admit(new(1, kernelspec="spark_python"))
    with pytest.raises(LaunchRefused, match="spark_"):
        await quota_store.admit(new(2, kernelspec="spark_r"))
    cut = await quota_store.admit(new(3, resources=Resources(cpu=8)))
    assert cut.record.resources.cpu == 2 and "2 cores and not 8 cores" in cut.notices[0]
    with pytest.raises(LaunchRefused, match="needs more than"):
        await quota_store.admit(new(4, resources=Resources(cpu=8), least=Resources(cpu=4)))


async def test_a_launch_may_wait(quota_store: KernelStore, tenancy_db: Database) -> None:
    """It has a row, and holds nothing; those who need the same wait behind it."""
    await put(
        quota_store,
        Policy("pool", EVERYONE, resource=Resource.GPU, counts=Counts.TOGETHER, hard=2, action=Action.QUEUE),
    )
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=1)))
    waits = await quota_store.admit(new(2, resources=Resources(gpu=2)))
    assert waits.record.status is KernelStatus.QUEUED and "alice holds 1 of 2 GPUs" in waits.record.queue_reason
    behind = await quota_store.admit(new(3, owner="carol", resources=Resources(gpu=1)))
    assert behind.record.status is KernelStatus.QUEUED
    assert (await quota_store.admit(new(4, owner="carol"))).record.status is KernelStatus.STARTING
    held = await tenancy_db.read(lambda tx: tx.scalars(select(Reservation.kernel_id)).all())
    assert set(held) == {"k1", "k4"} and await drift(quota_store) == 0
    assert (await quota_store.ask_to_stop("k2")).status is KernelStatus.STOPPED  # type: ignore[union-attr]


async def test_time_that_is_used_up(quota_store: KernelStore) -> None:
    await put(
        quota_store,
        Policy(
            "hours",
            EVERYONE,
            resource=Resource.CORE_HOURS,
            window=WindowKind.ROLLING,
            window_seconds=86400,
            hard=10,
        ),
    )
    await quota_store.admit(new(1, resources=Resources(cpu=4)))
    earlier = utcnow() - timedelta(hours=3)
    await begin(quota_store, "k1", earlier)
    with pytest.raises(LaunchRefused, match="You have used 12 core-hours of your limit of 10 core-hours in 24 hours"):
        await quota_store.admit(new(2, resources=Resources(cpu=1)))
    await release(quota_store, "k1")
    with pytest.raises(LaunchRefused, match="12 core-hours"):
        await quota_store.admit(new(2, resources=Resources(cpu=1)))


async def test_a_failed_kernel_is_admitted_again_like_any_other(quota_store: KernelStore, tenancy_db: Database) -> None:
    await put(quota_store, ONE)
    await quota_store.admit(new(1))

    def failed(tx: Any) -> None:
        quota_store.admission.release(tx, "k1", utcnow())
        tx.get_one(Kernel, "k1").status = KernelStatus.FAILED.value

    await quota_store.write(failed)
    await quota_store.admit(new(2))
    with pytest.raises(LaunchRefused):
        await quota_store.revive("k1")
    await release(quota_store, "k2")
    await quota_store.revive("k1")
    with pytest.raises(Conflict):
        await quota_store.revive("k1")
    assert await drift(quota_store) == 0
    assert await tenancy_db.read(lambda tx: len(tx.scalars(select(LedgerEntry.id)).all())) == 2


async def test_two_admins_do_not_overwrite_each_other(quota_store: KernelStore) -> None:
    made = await put(quota_store, ONE)
    await put(quota_store, Policy(**{**vars(made), "hard": 2.0}))
    with pytest.raises(Conflict, match="somebody else"):
        await put(quota_store, Policy(**{**vars(made), "hard": 9.0}))


async def test_many_at_once_reach_the_limit_exactly(quota_store: KernelStore, tenancy_db: Database) -> None:
    """Through several stores, as through several gateways."""
    await put(quota_store, Policy("ten", EVERYONE, counts=Counts.TOGETHER, hard=10))
    stores = [quota_store, *(KernelStore(tenancy_db, quota_store.vault, instance=f"i{n}") for n in range(3))]
    answers = await asyncio.gather(
        *(stores[n % 4].admit(new(n, owner=f"user{n % 7}")) for n in range(60)), return_exceptions=True
    )
    assert sum(not isinstance(one, BaseException) for one in answers) == 10
    assert all(isinstance(one, LaunchRefused) for one in answers if isinstance(one, BaseException))
    assert await drift(quota_store) == 0
