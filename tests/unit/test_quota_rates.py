"""A limit is about the kernels that take something of it, and leaves all others alone."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from hub_gateway.db.models import utcnow
from hub_gateway.errors import LaunchRefused
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas import prices
from hub_gateway.quotas.enforce import enforce
from hub_gateway.quotas.queue import dispatch
from hub_gateway.quotas.simulate import simulate
from hub_gateway.quotas.types import Action, Policy, Resource, SubjectKind, WindowKind
from tests.harness.quotas import begin, new, put

GPU, MODEL, PLAIN = Resources(1.0, gpu=1), Resources(1.0, gpu=1, gpu_model="a100"), Resources(1.0)
HOURS = Policy(
    *("hours", SubjectKind.EVERYONE),
    resource=Resource.GPU_HOURS,
    window=WindowKind.ROLLING,
    window_seconds=86400,
    hard=1,
    grace_seconds=0,
)
# A policy of which some kernels take, one that does, and one that does not.
CASES = [
    pytest.param({}, GPU, PLAIN, id="no GPU"),
    pytest.param({"gpu_model": "a100"}, MODEL, GPU, id="another model"),
    pytest.param({"resource": Resource.CORE_HOURS}, PLAIN, Resources(gpu=1), id="no cores"),
    pytest.param({"resource": Resource.COST}, GPU, PLAIN, id="costs nothing"),
]


async def used_up(store: KernelStore, taking: Resources, **changes: Any) -> None:
    """bob has used the limit up, by k1, which runs still."""
    await store.write(lambda tx: prices.set_prices(tx, "admin", gpu_hour=1))
    await put(store, Policy(**{**vars(HOURS), **changes}))
    await store.admit(new(1, resources=taking))
    await begin(store, "k1", utcnow() - timedelta(hours=2))


@pytest.mark.parametrize(("changes", "taking", "other"), CASES)
async def test_time_that_is_used_up_is_no_matter_to_who_needs_none(
    quota_store: KernelStore, changes: dict[str, Any], taking: Resources, other: Resources
) -> None:
    """Nor is it stopped when the grace is over."""
    await used_up(quota_store, taking, **changes)
    with pytest.raises(LaunchRefused, match="You have used 2 "):
        await quota_store.admit(new(2, resources=taking))
    await quota_store.admit(new(3, resources=other))
    now = utcnow()
    await quota_store.write(lambda tx: enforce(tx, quota_store.admission, now))
    _, stops = await quota_store.write(lambda tx: enforce(tx, quota_store.admission, now + timedelta(seconds=1)))
    assert [stop.kernel_id for stop in stops] == ["k1"]


@pytest.mark.parametrize(("changes", "taking", "other"), CASES)
async def test_who_waits_for_time_keeps_nobody_back_who_needs_none(
    quota_store: KernelStore, changes: dict[str, Any], taking: Resources, other: Resources
) -> None:
    """The other waits for a place alone, and gets it, although a kernel of bob's waits for hours before it."""
    place = Policy("place", SubjectKind.EVERYONE, hard=1, action=Action.QUEUE)
    await used_up(quota_store, taking, action=Action.QUEUE, **changes)
    made = await put(quota_store, place)
    for number, resources in ((2, taking), (3, other)):
        assert (await quota_store.admit(new(number, resources=resources))).record.status is KernelStatus.QUEUED
    await put(quota_store, Policy(**{**vars(made), "hard": 9.0}))
    moved = await quota_store.write(lambda tx: dispatch(tx, quota_store.admitter, utcnow(), half_life=86400.0))
    assert moved.admitted == ("k3",)


@pytest.mark.parametrize(("changes", "taking", "other"), CASES)
async def test_a_replay_refuses_nobody_who_needs_none(
    quota_store: KernelStore, changes: dict[str, Any], taking: Resources, other: Resources
) -> None:
    await used_up(quota_store, taking, **changes)
    await quota_store.admit(new(3, resources=other))
    policy = Policy(**{**vars(HOURS), **changes})
    found = await quota_store.db.read(lambda tx: simulate(tx, [policy], 1, utcnow()))
    assert (found.launches, found.refused) == (2, 0)
