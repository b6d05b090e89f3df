"""The queue: who is next, and what those who wait are told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from hub_gateway import audit
from hub_gateway.db.models import Setting, utcnow
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas.policies import MAINTENANCE
from hub_gateway.quotas.queue import Dispatched, QueueEntry, dispatch, due, entries, ordinal
from hub_gateway.quotas.types import Action, Counts, Period, Policy, Resource, SubjectKind, WindowKind
from tests.harness.quotas import begin, drift, new, put, release

POOL = Policy("pool", SubjectKind.EVERYONE, resource=Resource.GPU, counts=Counts.TOGETHER, hard=2, action=Action.QUEUE)
DAY = 86400.0


async def move(store: KernelStore, **later: float) -> Dispatched:
    """One look at the queue, now or later."""
    now = utcnow() + timedelta(**later)
    return await store.write(lambda tx: dispatch(tx, store.admitter, now, half_life=DAY))


async def line(store: KernelStore) -> Sequence[QueueEntry]:
    """What waits, in order."""
    return await store.db.read(lambda tx: entries(tx, store.admitter, utcnow(), half_life=DAY))


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
    assert (await move(quota_store)).admitted == ()
    waiting = await line(quota_store)
    assert [entry.kernel_id for entry in waiting] == ["k3", "k4", "k2"]
    assert waiting[1].sentence.startswith("2nd in the queue of pool: alice holds 2 of 2 GPUs")
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
    assert [entry.owner for entry in await line(quota_store)] == ["alice", "bob"]


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
    assert [entry.position for entry in await line(quota_store)] == list(range(1, 11))


DISPATCHER = """
import asyncio, sys
from hub_gateway.db.engine import Database
from hub_gateway import audit
from hub_gateway.db.models import Setting, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.kernels.store import KernelStore
from hub_gateway.quotas.policies import MAINTENANCE
from hub_gateway.quotas.queue import dispatch

async def main():
    db = Database(sys.argv[1])
    store = KernelStore(db, Vault([Vault.generate_key()]), instance=sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(5):
        found = await store.write(lambda tx: dispatch(tx, store.admitter, utcnow(), half_life=86400.0))
        print(*found.admitted, flush=True)
    await db.close()

asyncio.run(main())
"""


async def test_real_processes_look_at_once(quota_store: KernelStore) -> None:
    """As the one before, between processes that share nothing but the database."""
    await put(quota_store, Policy(**{**vars(POOL), "hard": 7}))
    await quota_store.admit(new(0, owner="alice", resources=Resources(gpu=7)))
    for number in range(1, 16):
        await waits(quota_store, number, f"user{number}", 1)
    url = quota_store.db.url.render_as_string(hide_password=False)
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", DISPATCHER, url, name, stdin=pipe, stdout=pipe)
        for name in ("one", "two", "three")
    ]
    for process in started:
        assert process.stdout is not None and await process.stdout.readline() == b"ready\n"
    await release(quota_store, "k0")
    said = await asyncio.gather(*(process.communicate(b"go\n") for process in started))
    admitted = b" ".join(out for out, _ in said).split()
    assert len(admitted) == len(set(admitted)) == 7
    assert await drift(quota_store) == 0


async def test_who_waits_for_their_own_limit_waits_for_nobody_else(quota_store: KernelStore) -> None:
    """A policy that limits each user alone makes one line per user, not one for all."""
    await put(quota_store, Policy("each", SubjectKind.EVERYONE, hard=1, action=Action.QUEUE))
    for number, owner in enumerate(("alice", "bob")):
        await quota_store.admit(new(number, owner=owner, path=f"{owner}.ipynb"))
        await begin(quota_store, f"k{number}", utcnow() - timedelta(hours=1 + number))
    await waits(quota_store, 2, "alice", 0)
    await waits(quota_store, 3, "bob", 0)
    await waits(quota_store, 4, "bob", 0)
    assert [(entry.owner, entry.position) for entry in await line(quota_store)] == [
        *(("alice", 1), ("bob", 1), ("bob", 2))
    ]
    assert "alice" not in (await line(quota_store))[1].sentence
    await release(quota_store, "k1")  # alice is first in the order, and still holds her one
    assert (await move(quota_store)).admitted == ("k3",)
    assert [entry.kernel_id for entry in await line(quota_store)] == ["k2", "k4"]


async def test_a_large_wish_does_not_starve(quota_store: KernelStore) -> None:
    """However many small ones come and go, the one that waits for everything gets it next."""
    await put(quota_store, POOL)
    for number in (1, 2):
        await quota_store.admit(new(number, owner=f"small{number}", resources=Resources(gpu=1)))
    await waits(quota_store, 3, "large", 2)
    for number in range(4, 8):
        # New ones queue behind it, although one GPU is free half of the time.
        await waits(quota_store, number, f"other{number}", 1)
    await release(quota_store, "k1")
    assert (await move(quota_store)).admitted == ()
    await waits(quota_store, 8, "late", 1)
    await release(quota_store, "k2")
    assert (await move(quota_store)).admitted == ("k3",)


async def test_looking_changes_nothing_and_knows_what_would(quota_store: KernelStore) -> None:
    """Most looks at the queue only read: nobody's launch waits for them."""

    async def moves(**later: float) -> bool:
        now = utcnow() + timedelta(**later)
        return await quota_store.db.read(lambda tx: due(tx, quota_store.admitter, now, half_life=DAY))

    await put(quota_store, Policy(**{**vars(POOL), "queue_seconds": 600}))
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2)))
    assert not await moves()
    await waits(quota_store, 2, "bob", 1)
    assert not await moves() and await moves(minutes=11)
    await release(quota_store, "k1")
    assert await moves()
    assert (await move(quota_store)).admitted == ("k2",)
    assert not await moves()


async def test_those_behind_hear_who_holds_it_now(quota_store: KernelStore) -> None:
    await put(quota_store, POOL)
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2)))
    await waits(quota_store, 2, "bob", 2)
    await waits(quota_store, 3, "carol", 1)
    await waits(quota_store, 4, "dora", 1)
    await release(quota_store, "k1")
    await move(quota_store)
    first, second = await line(quota_store)
    assert first.sentence.startswith("1st in the queue of pool: bob holds 2 of 2 GPUs")
    assert second.sentence.startswith("2nd in the queue of pool: bob holds")


async def test_waiting_for_time_says_when_it_begins_anew(quota_store: KernelStore) -> None:
    hours = Policy(
        *("hours", SubjectKind.EVERYONE),
        resource=Resource.KERNEL_HOURS,
        window=WindowKind.CALENDAR,
        period=Period.MONTH,
        hard=2e-6,  # used up a second after the month has begun
        action=Action.QUEUE,
    )
    await put(quota_store, hours)
    await quota_store.admit(new(1))
    await begin(quota_store, "k1", utcnow() - timedelta(hours=2))
    await waits(quota_store, 2, "bob", 0)
    [entry] = await line(quota_store)
    assert "are used up (policy hours), and it begins anew in" in entry.sentence and entry.frees_in is not None


async def test_maintenance_is_what_those_who_wait_are_told(quota_store: KernelStore) -> None:
    await put(quota_store, POOL)
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=2)))
    await waits(quota_store, 2, "bob", 1)
    await quota_store.write(lambda tx: tx.add(Setting(key=MAINTENANCE, value="New disks until noon.")))
    await release(quota_store, "k1")
    assert (await move(quota_store)) == Dispatched()
    [entry] = await line(quota_store)
    assert "New disks until noon." in entry.sentence


async def test_who_can_never_be_admitted_any_more_does_not_wait_for_ever(quota_store: KernelStore) -> None:
    made = await put(quota_store, POOL)
    await quota_store.admit(new(1, owner="alice", resources=Resources(gpu=1)))
    await waits(quota_store, 2, "bob", 2)
    await put(quota_store, Policy(**{**vars(made), "hard": 1.0}))
    assert (await move(quota_store)).expired == ("k2",)
    ended = await quota_store.get("k2")
    assert ended is not None and ended.status is KernelStatus.FAILED and "asks for 2 GPUs" in ended.message
    refused = await quota_store.db.read(lambda tx: audit.query(tx, action="kernel.refused"))
    assert [(one.subject, one.detail["policy"]) for one in refused] == [("bob", "pool")]


async def test_when_room_is_likely_is_told_from_experience(quota_store: KernelStore) -> None:
    await put(quota_store, POOL)
    for number in range(1, 4):
        await quota_store.admit(new(number, owner="alice"))
        await begin(quota_store, f"k{number}", utcnow() - timedelta(hours=1))
        await release(quota_store, f"k{number}")
    await quota_store.admit(new(5, owner="alice", resources=Resources(gpu=2)))
    await begin(quota_store, "k5", utcnow() - timedelta(minutes=20))
    await waits(quota_store, 6, "bob", 1)
    [entry] = await line(quota_store)
    assert "ends in about 40 minutes" in entry.sentence


def test_ordinals() -> None:
    assert [ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th")
    ]
