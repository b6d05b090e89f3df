"""What those are told who find no room: who holds how much of it, and when it frees."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from hub_gateway.db.models import utcnow
from hub_gateway.errors import LaunchRefused
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.explain import limits
from hub_gateway.quotas.queue import entries
from hub_gateway.quotas.types import Action, Counts, Demand, ObjectKind, Policy, Resource, SubjectKind, WindowKind
from tests.harness.quotas import begin, new, put, release

EVERYONE, USER, GROUP = SubjectKind.EVERYONE, SubjectKind.USER, SubjectKind.GROUP
TOGETHER = {"counts": Counts.TOGETHER}


async def refused(store: KernelStore, number: int, owner: str = "bob", **more: Any) -> str:
    with pytest.raises(LaunchRefused) as caught:
        await store.admit(new(number, owner=owner, **more))
    return caught.value.message


async def test_only_what_holds_some_of_it_is_named(quota_store: KernelStore) -> None:
    """Not the notebook that has no GPU, nor the one with another model, nor the one of another kernelspec."""
    a100 = Resources(gpu=1, gpu_model="a100")
    kind = {"resource": Resource.GPU, "gpu_model": "a100", "object_kind": ObjectKind.KERNELSPEC, "object": "py*"}
    await put(quota_store, Policy("one", EVERYONE, hard=1, **kind))
    await quota_store.admit(new(1, path="cpu-only.ipynb"))
    await quota_store.admit(new(2, path="h100.ipynb", resources=Resources(gpu=1, gpu_model="h100")))
    await quota_store.admit(new(3, path="other.ipynb", kernelspec="r", resources=a100))
    await quota_store.admit(new(4, path="work/train.ipynb", resources=a100))
    said = await refused(quota_store, 5, resources=a100)
    assert "and train.ipynb (for 1 second) holds 1 a100 GPU; shut one down" in said
    assert not any(name in said for name in ("cpu-only", "h100", "other"))
    [view] = await quota_store.db.read(
        lambda tx: limits(tx, quota_store.admission, "bob", SubjectKind.USER, (), utcnow())
    )
    assert [(one.title, one.amount) for one in view.held_by] == [("train.ipynb", 1.0)]


async def test_a_notebook_that_runs_does_not_hold_up_those_that_start(quota_store: KernelStore) -> None:
    await put(quota_store, Policy("starting", EVERYONE, resource=Resource.STARTING, hard=1))
    await quota_store.admit(new(1, path="runs.ipynb"))
    await quota_store.write(lambda tx: quota_store.admission.ready(tx, "k1"))
    await quota_store.admit(new(2, path="starts.ipynb"))
    said = await refused(quota_store, 3)
    assert "starts.ipynb" in said and "runs.ipynb" not in said


async def test_others_are_named_by_how_much_they_hold(quota_store: KernelStore) -> None:
    """Not by how many kernels they have, most of which have nothing of it."""
    await put(quota_store, Policy("gpus", EVERYONE, resource=Resource.GPU, hard=4, action=Action.QUEUE, **TOGETHER))
    for number in range(3):
        await quota_store.admit(new(number, owner="alice"))
    await quota_store.admit(new(3, owner="carol", resources=Resources(gpu=3)))
    await quota_store.admit(new(4, owner="dora", resources=Resources(gpu=1)))
    waits = await quota_store.admit(new(5, resources=Resources(gpu=1)))
    said = "carol (3 GPUs) and dora (1 GPU) hold 4 of 4 GPUs (policy gpus)"
    assert waits.record.queue_reason == said
    [entry] = await quota_store.db.read(lambda tx: entries(tx, quota_store.admitter, utcnow(), half_life=86400.0))
    assert entry.sentence == f"1st in the queue of gpus: {said}."


@pytest.mark.parametrize("group", ["lab", 'l"a\\b%_', "l\u00e4b"])
async def test_holders_in_a_group_are_found_among_many(quota_store: KernelStore, group: str) -> None:
    """However many older kernels others have, of groups whose names look alike."""
    await put(quota_store, Policy("both", GROUP, group, hard=1, **TOGETHER))
    for number in range(205):
        await quota_store.admit(new(number, owner=f"user{number}", groups=(group.upper(), f"{group}2", f'x"{group}')))
    await quota_store.admit(new(300, owner="alice", groups=("a", group)))
    assert "and alice holds 1 kernel; wait until" in await refused(quota_store, 301, groups=(group,))


async def test_when_room_is_likely_is_said_to_who_is_refused(quota_store: KernelStore) -> None:
    """By how long such kernels lived lately; in the verdict, too."""
    await put(quota_store, Policy("one", EVERYONE, hard=1))
    now = utcnow()
    for number in range(1, 4):
        await quota_store.admit(new(number, owner=f"user{number}"))
        await begin(quota_store, f"k{number}", now - timedelta(hours=1))
        await release(quota_store, f"k{number}", now)
    await quota_store.admit(new(5, path="first.ipynb"))
    await begin(quota_store, "k5", utcnow() - timedelta(minutes=20))
    said = await refused(quota_store, 6)
    assert "first.ipynb (for 20 minutes) holds 1 kernel; by experience it ends in about 40 minutes; shut" in said
    demand = Demand("bob", USER, frozenset(), "python", "local")
    verdict = await quota_store.db.read(lambda tx: quota_store.admission.decide(tx, demand, utcnow(), looking=True))
    assert verdict.frees_in is not None and abs(verdict.frees_in - timedelta(minutes=40)) < timedelta(minutes=1)


async def test_when_a_rolling_window_has_room_again(quota_store: KernelStore) -> None:
    """Two hours were used, 23 to 21 hours ago; of a limit of one, half of them have to be older than a day."""
    day = {"window": WindowKind.ROLLING, "window_seconds": 86400}
    await put(quota_store, Policy("hours", EVERYONE, resource=Resource.KERNEL_HOURS, hard=1, **day))
    now = utcnow()
    await quota_store.admit(new(1))
    await begin(quota_store, "k1", now - timedelta(hours=23))
    await release(quota_store, "k1", now - timedelta(hours=21))
    assert "(policy hours): it frees in about 2 hours, or ask" in await refused(quota_store, 2)
    await put(quota_store, Policy("more", USER, "alice", resource=Resource.KERNEL_HOURS, hard=1, **day))
    await quota_store.admit(new(3, owner="alice", path="long.ipynb"))
    await begin(quota_store, "k3", now - timedelta(hours=30))
    said = await refused(quota_store, 4, owner="alice")
    assert "it frees in about 23 hours if long.ipynb is shut down" in said


async def test_a_limit_of_nothing_frees_never(quota_store: KernelStore) -> None:
    day = {"window": WindowKind.ROLLING, "window_seconds": 86400}
    await put(quota_store, Policy("none", EVERYONE, resource=Resource.KERNEL_HOURS, hard=0, **day))
    assert "(policy none): it allows none, or ask" in await refused(quota_store, 1)
