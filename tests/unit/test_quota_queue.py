"""The queue: who is next, and what those who wait are told."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from hub_gateway.db.models import utcnow
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas.queue import Dispatched, dispatch, entries, ordinal
from hub_gateway.quotas.types import Action, Counts, Policy, Resource, SubjectKind
from tests.harness.quotas import begin, drift, new, put, release

POOL = Policy("pool", SubjectKind.EVERYONE, resource=Resource.GPU, counts=Counts.TOGETHER, hard=2, action=Action.QUEUE)
DAY = 86400.0


async def move(store: KernelStore, **later: float) -> Dispatched:
    """One look at the queue, now or later."""
    now = utcnow() + timedelta(**later)
    return await store.write(lambda tx: dispatch(tx, store.admitter, now, half_life=DAY))


async def waits(store: KernelStore, number: int, owner: str, gpus: int, **more: Any) -> None:
    admitted = await store.admit(new(number, owner=owner, resources=Resources(gpu=gpus), **more))
    assert admitted.record.status is KernelStatus.QUEUED


async def test_room_goes_to_who_used_less(quota_store: KernelStore) -> None:
    """Fair share before first come; and whoever waits for more keeps its place."""
    await put(quota_store, POOL)
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2), path="train.ipynb"))
    await begin(quota_store, "k1", utcnow() - timedelta(hours=2))
    await waits(quota_store, 2, "alice", 1)
    await waits(quota_store, 3, "bob", 2)
    await waits(quota_store, 4, "carol", 1)
    found = await move(quota_store)
    assert found.admitted == () and [entry.kernel_id for entry in found.waiting] == ["k3", "k4", "k2"]
    assert found.waiting[1].sentence.startswith("2nd in the queue of pool: alice (1) holds 2 GPUs of 2 GPUs")
    await release(quota_store, "k1")
    # bob needs both; carol's one would fit beside nobody, and must not slip in before.
    assert (await move(quota_store)).admitted == ("k3",)
    assert (await move(quota_store)).admitted == ()
    await release(quota_store, "k3")
    assert (await move(quota_store)).admitted == ("k4", "k2")
    assert await drift(quota_store) == 0


async def test_use_is_forgotten_by_half_lives(quota_store: KernelStore) -> None:
    """Who used much last week goes before who used a little just now."""
    await put(quota_store, POOL)
    long_ago = utcnow() - timedelta(days=6)
    await quota_store.admit(new(1, owner="alice"))
    await begin(quota_store, "k1", long_ago)
    await release(quota_store, "k1", long_ago + timedelta(hours=10))
    await quota_store.admit(new(2, owner="bob"))
    await begin(quota_store, "k2", utcnow() - timedelta(hours=1))
    await release(quota_store, "k2")
    await quota_store.admit(new(3, owner="dora", resources=Resources(gpu=2)))
    await waits(quota_store, 4, "bob", 1)
    await waits(quota_store, 5, "alice", 1)
    assert [entry.owner for entry in (await move(quota_store)).waiting] == ["alice", "bob"]


async def test_a_deadline_ends_the_wait_with_a_sentence(quota_store: KernelStore) -> None:
    await put(quota_store, Policy(**{**vars(POOL), "queue_seconds": 600}))
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2)))
    await waits(quota_store, 2, "bob", 1)
    assert (await move(quota_store, minutes=9)).expired == ()
    assert (await move(quota_store, minutes=11)).expired == ("k2",)
    ended = await quota_store.get("k2")
    assert ended is not None and ended.status is KernelStatus.FAILED and "alice" in ended.message


async def test_a_policy_that_is_raised_or_deleted_lets_them_in(quota_store: KernelStore) -> None:
    made = await put(quota_store, POOL)
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2)))
    await waits(quota_store, 2, "bob", 1)
    await waits(quota_store, 3, "carol", 1)
    await put(quota_store, Policy(**{**vars(made), "hard": 3.0}))
    assert (await move(quota_store)).admitted == ("k2",)
    await quota_store.write(lambda tx: quota_store.admission.policies.delete(tx, "pool", "admin"))
    assert (await move(quota_store)).admitted == ("k3",)


async def test_others_pass_who_need_something_else(quota_store: KernelStore) -> None:
    await put(quota_store, POOL)
    await put(
        quota_store, Policy("memory", SubjectKind.EVERYONE, resource=Resource.MEMORY, hard=2**30, action=Action.QUEUE)
    )
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2)))
    await waits(quota_store, 2, "bob", 1)
    first = await quota_store.admit(new(3, owner="bob", resources=Resources(memory=2**30)))
    assert first.record.status is KernelStatus.STARTING
    second = await quota_store.admit(new(4, owner="bob", resources=Resources(memory=2**29)))
    assert second.record.queue_policy == "memory"
    await release(quota_store, "k3")
    assert (await move(quota_store)).admitted == ("k4",)


async def test_two_processes_look_at_once(quota_store: KernelStore) -> None:
    """Each kernel is admitted once, and never more than there is room for."""
    await put(quota_store, Policy(**{**vars(POOL), "hard": 10}))
    await quota_store.admit(new(0, owner="alice", resources=Resources(gpu=10)))
    for number in range(1, 21):
        await waits(quota_store, number, f"user{number}", 1)
    await release(quota_store, "k0")
    other = KernelStore(quota_store.db, quota_store.vault, instance="two", admission=quota_store.admission)
    looks = await asyncio.gather(*(move(store) for store in (quota_store, other, quota_store, other)))
    admitted = [kernel_id for look in looks for kernel_id in look.admitted]
    assert len(admitted) == len(set(admitted)) == 10
    assert await drift(quota_store) == 0
    after = await quota_store.db.read(lambda tx: entries(tx, quota_store.admitter, utcnow(), half_life=DAY))
    assert [entry.position for entry in after] == list(range(1, 11))


async def test_when_room_is_likely_is_told_from_experience(quota_store: KernelStore) -> None:
    await put(quota_store, POOL)
    for number in range(1, 4):
        await quota_store.admit(new(number, owner="alice"))
        await begin(quota_store, f"k{number}", utcnow() - timedelta(hours=1))
        await release(quota_store, f"k{number}")
    await quota_store.admit(new(5, owner="alice", resources=Resources(gpu=2)))
    await begin(quota_store, "k5", utcnow() - timedelta(minutes=20))
    await waits(quota_store, 6, "bob", 1)
    [entry] = (await move(quota_store)).waiting
    assert "ends in about 40 minutes" in entry.sentence


def test_ordinals() -> None:
    assert [ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th")
    ]
