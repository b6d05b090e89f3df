"""Limits of cores and memory bind kernels whose kernelspec states none of it, or say at once that they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from traitlets import TraitError

from hub_gateway.db.models import utcnow
from hub_gateway.errors import LaunchRefused
from hub_gateway.kernels.resources import bounds_of
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas.queue import dispatch
from hub_gateway.quotas.service import QuotaService
from hub_gateway.quotas.types import Action, Counts, Demand, ObjectKind, Policy, Resource, SubjectKind, WindowKind
from hub_gateway.quotas.validate import SpecFacts, check
from tests.harness.quotas import new, put, release

EVERYONE, GIB = SubjectKind.EVERYONE, 2**30
HOURS = {"resource": Resource.CORE_HOURS, "window": WindowKind.ROLLING, "window_seconds": 86400}
SPECS = {"python": SpecFacts("local", "", Resources()), "big": SpecFacts("local", "", Resources(2, GIB))}


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"resource": Resource.MEMORY, "hard": GIB}, "how much memory its kernels take"),
        ({"resource": Resource.CPU, "hard": 8}, "how many cores its kernels take"),
        ({**HOURS, "hard": 8}, "how many cores its kernels take"),
    ],
)
async def test_what_is_not_stated_is_not_admitted_for_nothing(
    quota_store: KernelStore, limit: dict[str, Any], said: str
) -> None:
    """It is refused, in a sentence, before and at the launch; who states something is admitted."""
    await put(quota_store, Policy("some", EVERYONE, **limit))
    with pytest.raises(LaunchRefused, match=said) as caught:
        await quota_store.admit(new(1))
    assert "kernelspec python" in caught.value.message and "policy some" in caught.value.message
    demand = Demand("bob", SubjectKind.USER, frozenset(), "python", "local")
    verdict = await quota_store.db.read(lambda tx: quota_store.admission.decide(tx, demand, utcnow(), looking=True))
    assert verdict.outcome == "refused" and verdict.sentence == caught.value.message
    await quota_store.admit(new(2, resources=Resources(1, GIB)))


async def test_what_one_kernel_may_take_is_what_it_reserves(quota_store: KernelStore) -> None:
    """So that a limit on all of them holds, and the resource manager is asked for that much."""
    one = {"resource": Resource.MEMORY, "counts": Counts.KERNEL}
    await put(quota_store, Policy("large", EVERYONE, hard=2 * GIB, **one))
    kind = {"object_kind": ObjectKind.KERNELSPEC, "object": "py*"}
    await put(quota_store, Policy("small", EVERYONE, hard=GIB, **one, **kind))
    await put(quota_store, Policy("all", EVERYONE, resource=Resource.MEMORY, hard=2 * GIB))
    for number in (1, 2):
        made = await quota_store.admit(new(number))
        assert made.record.resources.memory == GIB and not made.notices
    with pytest.raises(LaunchRefused, match="no room for 1 GiB more"):
        await quota_store.admit(new(3))


async def test_who_waited_or_failed_before_there_was_such_a_limit(quota_store: KernelStore) -> None:
    """Gets what holds at the launch, like everybody."""
    pool = await put(quota_store, Policy("pool", EVERYONE, hard=1, action=Action.QUEUE))
    await quota_store.admit(new(1))
    assert (await quota_store.admit(new(2))).record.status is KernelStatus.QUEUED
    await put(quota_store, Policy("one", EVERYONE, resource=Resource.MEMORY, counts=Counts.KERNEL, hard=GIB))
    await put(quota_store, Policy("all", EVERYONE, resource=Resource.MEMORY, hard=GIB))
    await release(quota_store, "k1")
    moved = await quota_store.write(lambda tx: dispatch(tx, quota_store.admitter, utcnow(), half_life=86400.0))
    waited = await quota_store.get("k2")
    assert moved.admitted == ("k2",) and waited is not None and waited.resources.memory == GIB
    await put(quota_store, Policy(**{**vars(pool), "hard": 9.0}))
    with pytest.raises(LaunchRefused, match="no room for 1 GiB more"):
        await quota_store.admit(new(3))


def test_a_default_stands_in_for_what_a_kernelspec_does_not_state() -> None:
    default = Resources(2, 4 * GIB)
    assert bounds_of({}, default).usual == bounds_of({}, default).most == default
    stated = bounds_of({"resources": {"cpu": 1, "gpu": 1}}, default)
    assert stated.usual == Resources(1, 4 * GIB, 1)
    within = {"resources_max": {"cpu": 1, "memory": "8G"}, "resources_min": {"memory": "6G"}}
    assert bounds_of(within, default).usual == Resources(1, 6 * GIB)
    assert bounds_of({}).usual == Resources()


async def test_the_default_is_an_option(quota_store: KernelStore, tmp_path: Path) -> None:
    folder = tmp_path / "python"
    folder.mkdir()
    (folder / "kernel.json").write_text(json.dumps({"argv": ["python"], "display_name": "P", "language": "python"}))
    with pytest.raises(TraitError, match="has no gpu"):
        KernelSpecs(default_resources={"gpu": 1})
    with pytest.raises(TraitError, match="512M or 4G"):
        KernelSpecs(default_resources={"memory": "much"})
    memory = Policy("all", EVERYONE, resource=Resource.MEMORY, hard=GIB)
    warned = []
    for default in ({}, {"cpu": 1, "memory": "1G"}):
        specs = KernelSpecs(default_resources=default)
        specs.manager.kernel_dirs = [str(tmp_path)]
        service = QuotaService(
            db=quota_store.db,
            admitter=quota_store.admitter,
            specs=specs,
            proxies=Proxies(state_dir=str(tmp_path)),
            half_life=86400.0,
        )
        found = await service.put(memory, "admin", dry_run=True)
        warned.append([one.sentence for one in found.problems if "no memory" in one.sentence])
    # Beside it stand those of this machine.
    assert warned[1] == [] and "python" in warned[0][0] and "state" in warned[0][0]


def test_a_limit_that_nothing_enforces_says_so() -> None:
    """As a warning, with the names; about one resource manager alone it is an error."""
    proxies = {"local": frozenset[str](), "kubernetes": frozenset({"cpu", "memory"})}
    memory = Policy("all", EVERYONE, resource=Resource.MEMORY, hard=GIB)
    silent, loose = sorted(check(memory, [], proxies=proxies, specs=SPECS), key=lambda one: one.sentence)
    assert {silent.level, loose.level} == {"warning"}
    assert "kernelspec python states no memory" in silent.sentence and "default_resources" in silent.sentence
    assert "limits memory, which local cannot enforce" in loose.sentence
    elsewhere = {"big": SpecFacts("kubernetes", "", Resources(2, GIB))}
    assert check(memory, [], proxies=proxies, specs=elsewhere) == []
    kernels = Policy("few", EVERYONE, hard=5)
    assert check(kernels, [], proxies=proxies, specs=SPECS) == []
