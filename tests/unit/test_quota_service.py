"""Policies as documents, problems, requests, explanations and simulations."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert

from hub_gateway import audit
from hub_gateway.auth.base import Caller
from hub_gateway.auth.people import FilePeople, GroupInfo, NoPeople, People
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import QuotaRequest
from hub_gateway.errors import BadRequest, Conflict, Forbidden, LaunchRefused, NotFound, Unavailable
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import Resources
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas import ledger
from hub_gateway.quotas.document import document, policies_of
from hub_gateway.quotas.service import QuotaService
from hub_gateway.quotas.simulate import _Meter
from hub_gateway.quotas.types import (
    Action,
    Counts,
    ObjectKind,
    Period,
    Policy,
    Resource,
    SubjectKind,
    Weekly,
    WindowKind,
)
from hub_gateway.quotas.validate import check
from tests.harness.quotas import begin, new, put, release

USER = SubjectKind.USER
LATER = datetime(2100, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def service(quota_store: KernelStore, tmp_path: Any) -> QuotaService:
    return QuotaService(
        db=quota_store.db,
        admitter=quota_store.admitter,
        specs=KernelSpecs(),
        proxies=Proxies(state_dir=str(tmp_path)),
        half_life=86400.0,
    )


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,20}", fullmatch=True)
AMOUNTS = st.none() | st.integers(0, 2**40).map(float)
MOMENTS = st.none() | st.datetimes(datetime(1980, 1, 1), datetime(2990, 1, 1), timezones=st.just(timezone.utc))
WEEKLY = st.builds(
    Weekly,
    st.sets(st.integers(0, 6), min_size=1).map(lambda days: tuple(sorted(days))),
    st.integers(0, 1439),
    st.integers(0, 1440),
)
POLICIES = st.builds(
    Policy,
    name=NAMES,
    subject_kind=st.sampled_from([USER, SubjectKind.GROUP]),
    subject=NAMES,
    object_kind=st.sampled_from([ObjectKind.KERNELSPEC, ObjectKind.QUEUE]),
    object=NAMES,
    resource=st.sampled_from([Resource.KERNELS, Resource.GPU, Resource.STARTING]),
    counts=st.sampled_from(Counts),
    window=st.sampled_from(WindowKind),
    window_seconds=st.none() | st.integers(1, 10**7),
    period=st.none() | st.sampled_from(Period),
    timezone=st.sampled_from(["UTC", "Europe/Berlin"]),
    hard=AMOUNTS,
    soft=AMOUNTS,
    action=st.sampled_from(Action),
    priority=st.integers(-1000, 1000),
    enabled=st.booleans(),
    valid_from=MOMENTS,
    valid_until=MOMENTS,
    weekly=st.lists(WEEKLY, max_size=3).map(tuple),
    delegated=st.booleans(),
    note=st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=40).map(str.strip),
)


@given(st.lists(POLICIES, max_size=5, unique_by=lambda policy: policy.name))
def test_what_is_exported_is_what_is_imported(policies: list[Policy]) -> None:
    assert policies_of(document(policies)) == sorted(policies, key=lambda policy: policy.name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not YAML"),
        ("policies: 3", "list under the key"),
        ("policies: []\nmore: 1", "list under the key"),
        ("policies: [{subject: everyone}]", "Policy 1 of the file has no name"),
        ("policies: [{name: a, subject: everyone, hard: -1}]", "Policy a of the file.*negative"),
        ("policies: [{name: a, subject: everyone, hard: .nan}]", "Policy a of the file"),
        ("policies: [{name: a, subject: everyone, hard: 1.0e+30}]", "Policy a of the file"),
        ("policies: [{name: a, subject: everyone, resource: memory, hard: '4'}]", "unit is missing"),
        ("policies: [{name: a, subject: robot:x}]", "Policy a of the file.*subject"),
        ("policies: [{name: a, subject: everyone}, {name: a, subject: everyone}]", "two policies of the name a"),
        ("policies: [{name: a, subject: everyone, hrad: 1}]", "`hrad` is not known"),
        ("policies: [&x [*x]]", "no name"),
    ],
)
def test_files_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        policies_of(text)


async def test_a_file_is_applied_whole_or_not_at_all(service: QuotaService) -> None:
    text = "policies:\n- {name: a, subject: everyone, hard: 3}\n- {name: b, subject: 'user:bob', hard: 1}\n"
    assert (await service.apply(text, "admin", dry_run=True)).added == ("a", "b") and not await service.policies()
    await service.apply(text, "admin")
    assert policies_of(await service.export()) == policies_of(text)
    changed = "policies:\n- {name: b, subject: 'user:bob', hard: 2}\n- {name: c, subject: everyone, hard: 9}\n"
    assert await service.diff(changed) == dataclasses.replace(
        await service.diff(changed), added=("c",), changed=("b",), removed=("a",)
    )
    kept = await service.apply(changed.replace("everyone, hard: 9", "'group:x', hard: 9"), "admin", keep=True)
    assert kept.removed == () and [policy.name for policy in await service.policies()] == ["a", "b", "c"]
    bad = "policies:\n- {name: d, subject: everyone, hard: 1}\n- {name: e, subject: everyone, hard: 2}\n"
    with pytest.raises(BadRequest, match="policies d and e say different things"):
        await service.apply(bad, "admin")
    assert [policy.name for policy in await service.policies()] == ["a", "b", "c"]
    assert await service.first_start(bad) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hard": 1, "soft": 2}, "soft limit of 2 above its hard limit"),
        ({"hard": 3, "burst": 2, "burst_seconds": 60}, "hard limit of 3 above its burst"),
        ({"hard": 3, "burst": 4}, "without a time"),
        ({"resource": Resource.CORE_HOURS, "hard": 3}, "needs a window"),
        ({"window": WindowKind.ROLLING, "window_seconds": 60, "hard": 3}, "leave the window out"),
        ({"timezone": "Mars/Olympus", "hard": 3}, "time zone 'Mars/Olympus'"),
        ({"timezone": "../../etc/passwd", "hard": 3}, "time zone"),
        ({"counts": Counts.KERNEL, "hard": 3}, "cpu, memory or gpu"),
        ({"gpu_model": "a100", "hard": 3}, "names a GPU model"),
        ({"queue_seconds": 60, "hard": 3}, "launches do not wait"),
        ({"valid_from": LATER, "valid_until": LATER, "hard": 3}, "ends before it begins"),
        (
            {"object_kind": ObjectKind.PROXY, "object": "local", "resource": Resource.MEMORY, "hard": 2**30},
            "limits memory of local, which cannot enforce it",
        ),
    ],
)
def test_policies_that_make_no_sense(changes: dict[str, Any], said: str) -> None:
    policy = Policy("p", SubjectKind.EVERYONE, **changes)
    problems = check(policy, [], proxies={"local": frozenset()})
    assert any(said in problem.sentence and problem.level == "error" for problem in problems), problems


def test_contradictions_name_both() -> None:
    one, other = Policy("first", USER, "bob", hard=1), Policy("second", USER, "bob", hard=2)
    [problem] = check(one, [one, other])
    assert problem.level == "error" and "first and second" in problem.sentence
    assert check(one, [dataclasses.replace(other, priority=1)]) == []
    assert check(one, [dataclasses.replace(other, subject="carol")]) == []
    apart = dataclasses.replace(one, valid_until=LATER), dataclasses.replace(other, valid_from=LATER)
    assert check(apart[0], [apart[1]]) == []
    [unknown] = check(Policy("g", SubjectKind.GROUP, "ghosts", hard=1), [], known_groups={"lab"})
    assert unknown.level == "warning" and "no group ghosts" in unknown.sentence


async def test_a_group_that_nobody_knows_is_told_at_once(quota_store: KernelStore, tmp_path: Any) -> None:
    """It may come later, so the policy is set; while the Hub is away nothing is said."""
    asked = FilePeople(lambda fresh: [Caller("bob", groups=frozenset({"lab"}))])

    class Away(FilePeople):
        async def groups(self) -> tuple[GroupInfo, ...]:
            raise Unavailable("The Hub is away.")

    def made(people: People) -> QuotaService:
        parts: dict[str, Any] = {"db": quota_store.db, "admitter": quota_store.admitter, "half_life": 86400.0}
        proxies = Proxies(state_dir=str(tmp_path))
        return QuotaService(specs=KernelSpecs(), proxies=proxies, people=people, **parts)

    ghosts, lab = (Policy(name, SubjectKind.GROUP, name, hard=1) for name in ("ghosts", "lab"))
    result = await made(asked).put(ghosts, "admin")
    assert [problem.level for problem in result.problems] == ["warning"]
    assert "The Hub knows no group ghosts" in result.problems[0].sentence
    assert (await made(asked).put(lab, "admin", dry_run=True)).problems == ()
    [problem] = (await made(asked).apply(document([ghosts, lab]), "admin")).problems
    assert problem.policy == "ghosts"
    for silent in (NoPeople(), Away(lambda fresh: [])):
        assert (await made(silent).diff(document([ghosts]))).problems == ()


async def test_a_request_becomes_a_grant_that_ends(service: QuotaService, quota_store: KernelStore) -> None:
    await put(quota_store, Policy("bob-one", USER, "bob", hard=1))
    await quota_store.admit(new(1))
    until = utcnow() + timedelta(days=1)
    with pytest.raises(BadRequest, match="no less"):
        await service.open_request("bob", [], "bob-one", 1, until, "why not")
    asked = await service.open_request("bob", ["lab"], "bob-one", 3, until, "a paper is due")
    with pytest.raises(Conflict, match="already"):
        await service.open_request("bob", [], "bob-one", 4, until, "again")
    with pytest.raises(NotFound):
        await service.withdraw(asked.id, "carol")
    granted = await service.answer(asked.id, "admin", True, "good luck", amount=2)
    assert granted.state == "granted" and granted.grant_name is not None
    with pytest.raises(Conflict, match="granted already, by admin"):
        await service.answer(asked.id, "other", False, "no")
    await quota_store.admit(new(2))
    with pytest.raises(LaunchRefused, match="2 kernels"):
        await quota_store.admit(new(3))
    grant = await service.policy(granted.grant_name)
    assert grant is not None and grant.approver == "admin" and grant.valid_until == until
    assert "grant" not in await service.export()
    actions = await quota_store.db.read(lambda tx: [line.action for line in audit.query(tx)])
    assert {"request.open", "request.answer", "grant.set"} <= set(actions)


@pytest.mark.parametrize(
    ("policy", "amount", "said"),
    [
        ("carol-one", 3, "no limit 'carol-one' of yours"),
        ("lab-one", 3, "no limit 'lab-one' of yours"),
        ("together", 9, "not yours alone"),
        ("bob-one", float("nan"), "no amount of kernels"),
        ("bob-one", float("inf"), "no amount of kernels"),
        ("bob-one", -1, "no amount of kernels"),
        ("bob-one", 1.5, "no amount of kernels"),
        ("bob-one", 2.0**60, "no amount of kernels"),
        ("nothing", 3, "no limit 'nothing'"),
    ],
)
async def test_requests_that_make_no_sense(
    service: QuotaService, quota_store: KernelStore, policy: str, amount: float, said: str
) -> None:
    """Nothing is told about limits of others, either: not even that they are there."""
    await put(quota_store, Policy("bob-one", USER, "bob", hard=1))
    await put(quota_store, Policy("carol-one", USER, "carol", hard=1))
    await put(quota_store, Policy("lab-one", SubjectKind.GROUP, "lab", hard=1))
    await put(quota_store, Policy("together", SubjectKind.EVERYONE, hard=1, counts=Counts.TOGETHER))
    with pytest.raises((BadRequest, NotFound), match=said):
        await service.open_request("bob", [], policy, amount, utcnow() + timedelta(days=1), "please")
    with pytest.raises(BadRequest, match="ended already"):
        await service.open_request("bob", [], "bob-one", 3, utcnow() - timedelta(seconds=1), "please")
    assert await service.requests() == []


async def test_a_request_is_answered_or_withdrawn_never_both(service: QuotaService, quota_store: KernelStore) -> None:
    await put(quota_store, Policy("bob-one", USER, "bob", hard=1))
    until = utcnow() + timedelta(days=1)
    for _ in range(5):
        asked = await service.open_request("bob", [], "bob-one", 3, until, "please")
        await asyncio.gather(
            service.withdraw(asked.id, "bob"),
            service.answer(asked.id, "admin", True, "yes"),
            service.answer(asked.id, "lead", False, "no"),
            return_exceptions=True,
        )
        found = next(one for one in await service.requests() if one.id == asked.id)
        grant = await service.policy(f"grant-{asked.id}")
        assert (found.state == "granted") == (grant is not None)
    with pytest.raises(BadRequest, match="no amount"):
        asked = await service.open_request("bob", [], "bob-one", 3, until, "please")
        await service.answer(asked.id, "admin", True, "yes", amount=float("nan"))


FULL = Policy(
    "p",
    SubjectKind.GROUP,
    "lab",
    object_kind=ObjectKind.KERNELSPEC,
    object="py*",
    hard=2,
    soft=1,
    burst=6,
    burst_seconds=60,
    grace_seconds=30,
    action=Action.QUEUE,
    queue_seconds=9,
    priority=2000,
    weekly=(Weekly(tuple(range(7)), 0, 1440),),
    timezone="Europe/Berlin",
)


async def test_a_grant_is_its_policy_with_more(service: QuotaService, quota_store: KernelStore) -> None:
    """It wins over a policy of any priority, at that policy's times only, and takes nothing away."""
    before = await put(quota_store, FULL)
    until = utcnow() + timedelta(days=1)
    asked = await service.open_request("bob", ["lab"], "p", 3, until, "please")
    made = await service.policy((await service.answer(asked.id, "admin", True, "")).grant_name or "")
    assert made is not None
    same = ("object_kind", "object", "soft", "burst", "burst_seconds", "grace_seconds", "action", "queue_seconds")
    for name in (*same, "weekly", "timezone", "resource", "counts", "window"):
        assert getattr(made, name) == getattr(before, name), name
    assert made.hard == 3
    (limit,) = await service.limits("bob", USER, ["lab"])
    assert (limit.policy, limit.hard, limit.burst) == (made.name, 3, 6)
    again = await service.open_request("bob", ["lab"], made.name, 8, until, "even more")
    await service.answer(again.id, "admin", True, "")
    (limit,) = await service.limits("bob", USER, ["lab"])
    assert (limit.hard, limit.burst) == (8, None), "above the burst there is none"


async def test_a_grant_without_an_effect_is_refused(service: QuotaService, quota_store: KernelStore) -> None:
    await put(quota_store, Policy("all", SubjectKind.EVERYONE, hard=1))
    until = utcnow() + timedelta(days=1)
    asked = await service.open_request("bob", [], "all", 3, until, "please")
    with pytest.raises(Conflict, match="allows as much already"):
        await service.answer(asked.id, "admin", True, "", amount=1)
    await put(quota_store, Policy("hold", USER, "bob", hard=0, priority=5000))
    with pytest.raises(Conflict, match=r"the policy hold \(priority 5000\) counts"):
        await service.answer(asked.id, "admin", True, "")
    assert [one.state for one in await service.requests()] == ["open"]
    assert [one.name for one in await service.policies()] == ["all", "hold"]


async def test_a_lead_grants_more_of_what_leads_have_set(service: QuotaService, quota_store: KernelStore) -> None:
    await put(quota_store, Policy("all", SubjectKind.EVERYONE, hard=4))
    await put(quota_store, Policy("team", SubjectKind.GROUP, "lab", hard=1, delegated=True))
    until = utcnow() + timedelta(days=1)
    frame = await service.open_request("bob", ["lab"], "all", 9, until, "please")
    with pytest.raises(Forbidden, match="The limit all is an administrator's"):
        await service.answer(frame.id, "lea", True, "", lead=True)
    share = await service.open_request("bob", ["lab"], "team", 9, until, "please")
    await service.answer(share.id, "lea", True, "", lead=True)
    for number in range(4):
        await quota_store.admit(new(number, groups=("lab",)))
    with pytest.raises(LaunchRefused, match="policy all"):
        await quota_store.admit(new(4, groups=("lab",)))


async def test_no_request_is_too_old_to_be_seen_and_answered(service: QuotaService, quota_store: KernelStore) -> None:
    await put(quota_store, Policy("all", SubjectKind.EVERYONE, hard=1))
    until = utcnow() + timedelta(days=1)
    first = await service.open_request("bob", [], "all", 3, until, "please")
    row = {
        "groups": [],
        "policy": "all",
        "amount": 2.0,
        "until": until,
        "reason": "",
        "created_at": until,
        "answer": "",
    }
    many = [{**row, "owner": f"u{number % 9}", "state": "open"} for number in range(600)]
    await quota_store.write(lambda tx: tx.execute(insert(QuotaRequest), many) and None)
    assert [one.id for one in await service.requests(owners=["bob", "nobody"])] == [first.id]
    assert await service.request(first.id) == first and await service.request(10**6) is None
    newest = await service.requests(limit=600)
    older = await service.requests(before=newest[-1].id)
    assert len(newest) == 600 and [one.owner for one in older] == ["bob"]
    assert (await service.answer(first.id, "admin", True, "")).state == "granted"


async def test_a_service_can_be_granted_more(service: QuotaService, quota_store: KernelStore) -> None:
    await put(quota_store, Policy("all-one", SubjectKind.EVERYONE, hard=1))
    await quota_store.admit(new(1, owner="services/ci", service=True))
    asked = await service.open_request("services/ci", [], "all-one", 2, utcnow() + timedelta(days=1), "a release")
    await service.answer(asked.id, "admin", True, "")
    await quota_store.admit(new(2, owner="services/ci", service=True))
    with pytest.raises(LaunchRefused, match=r"grant-\d+"):
        await quota_store.admit(new(3, owner="services/ci", service=True))
    await service.apply("policies: []", "admin", keep=True)  # which looks at the grant, too


async def test_explain_says_which_one_counts_and_why(service: QuotaService, quota_store: KernelStore) -> None:
    for policy in (
        Policy("all", SubjectKind.EVERYONE, hard=5),
        Policy("lab", SubjectKind.GROUP, "lab", hard=2),
        Policy("other", SubjectKind.GROUP, "other", hard=9),
        Policy("old", USER, "bob", hard=1, valid_until=utcnow() - timedelta(days=1)),
        Policy("spark", SubjectKind.EVERYONE, object_kind=ObjectKind.KERNELSPEC, object="spark*", hard=1),
    ):
        await put(quota_store, policy)
    for number in range(2):
        await quota_store.admit(new(number, groups=("lab",), path=f"n{number}.ipynb"))
    with pytest.raises(LaunchRefused):
        await quota_store.admit(new(3, groups=("lab",)))
    found = await service.explain("bob", USER, {"lab"})
    views = {view.policy.name: view for view in found.policies}
    assert set(views) == {"all", "lab", "old", "spark"}
    assert views["lab"].applies and (views["lab"].used, views["lab"].room) == (2, 0)
    assert not views["all"].applies and "it is about the group lab, not everyone" in views["all"].why
    assert "ended" in views["old"].why and "spark*" in views["spark"].why
    assert found.sentence.startswith("There is no room") and found.refusals[0].policy == "lab"
    limits = {view.policy: view for view in await service.limits("bob", USER, {"lab"})}
    assert limits["lab"].state == "full" and [one.title for one in limits["lab"].held_by] == ["n0.ipynb", "n1.ipynb"]
    assert limits["spark"].state == "ok" and "all" not in limits
    with pytest.raises(NotFound):
        await service.explain("bob", USER, set(), "no-such-kernelspec")


async def test_simulate_replays_what_happened(service: QuotaService, quota_store: KernelStore) -> None:
    """Three users ran two at once; under a limit of one, each second launch would have been refused."""
    now = utcnow()
    for number, owner in enumerate(("alice", "bob", "carol")):
        for at in (0, 1):
            key = f"k{2 * number + at}"
            await quota_store.admit(new(2 * number + at, owner=owner, resources=Resources(cpu=1)))
            await begin(quota_store, key, now - timedelta(days=2) + timedelta(minutes=at))
            if at:
                await release(quota_store, key, now - timedelta(days=1))
    found = await service.simulate([Policy("one", SubjectKind.EVERYONE, hard=1)], 30)
    assert (found.launches, found.refused) == (6, 3)
    assert found.sentence == "It would have refused 3 of the 6 launches of the last 30 days, of 3 users."
    hours = Policy(
        "hours",
        SubjectKind.EVERYONE,
        resource=Resource.CORE_HOURS,
        counts=Counts.TOGETHER,
        window=WindowKind.ROLLING,
        window_seconds=7 * 86400,
        hard=0.01,
        action=Action.QUEUE,
    )
    later = await service.simulate([hours], 30)
    assert later.refused == 0 and later.queued > 0
    assert "admitted all 6" in (await service.simulate("policies: []", 30)).sentence
    assert (await service.simulate([], 1)).launches == 0
    await put(quota_store, Policy("none", USER, "dora", hard=0))
    with pytest.raises(LaunchRefused):
        await quota_store.admit(new(9, owner="dora"))
    assert (await service.simulate([], 1)).admitted_again == 1


async def test_simulate_says_how_many_of_whom(service: QuotaService, quota_store: KernelStore) -> None:
    """Fourteen launches of three users: 5, 5 and 4 beyond the first that each had open at the time."""
    now = utcnow()
    number = 0
    for owner, count in (("alice", 6), ("bob", 6), ("carol", 5), ("dora", 1)):
        for at in range(count):
            number += 1
            await quota_store.admit(new(number, owner=owner))
            await begin(quota_store, f"k{number}", now - timedelta(hours=20) + timedelta(minutes=at))
            await release(quota_store, f"k{number}", now - timedelta(hours=2))
    found = await service.simulate([Policy("one", SubjectKind.EVERYONE, hard=1)], 7)
    assert found.sentence == "It would have refused 14 of the 18 launches of the last 7 days, of 3 users."
    assert [(one.user, one.refused) for one in found.by_user] == [("alice", 5), ("bob", 5), ("carol", 4), ("dora", 0)]
    starting = Policy("starting", SubjectKind.EVERYONE, resource=Resource.STARTING, hard=1)
    assert "admitted all 18" in (await service.simulate([starting], 7)).sentence


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30), st.integers(1, 4)), max_size=30),
    st.lists(st.integers(0, 100), min_size=1, max_size=20),
    st.integers(0, 40),
)
def test_the_meter_of_a_simulation_is_the_sum_of_its_intervals(
    launches: list[tuple[int, int, int]], looks: list[int], window: int
) -> None:
    meter, known = _Meter(), []
    events = sorted([(start, 1, lasts, rate) for start, lasts, rate in launches] + [(at, 0, 0, 0) for at in looks])
    for at, is_launch, lasts, rate in events:
        if is_launch:
            meter.add(at, at + lasts, rate)
            known.append((at, at + lasts, rate))
            continue
        assert meter.held(at) == sum(rate for start, stop, rate in known if start <= at < stop)
        used = sum(rate * max(0, min(stop, at) - max(start, at - window)) for start, stop, rate in known)
        assert meter.used(at - window, at) * 3600 == pytest.approx(used)


async def test_maintenance_stops_launches_and_nothing_else(service: QuotaService, quota_store: KernelStore) -> None:
    await quota_store.admit(new(1))
    await service.set_maintenance("The cluster is upgraded until noon.", "admin")
    assert await service.maintenance() == "The cluster is upgraded until noon."
    with pytest.raises(LaunchRefused, match="No kernels are started at the moment: The cluster is upgraded"):
        await quota_store.admit(new(2))
    await service.set_maintenance(None, "admin")
    await quota_store.admit(new(2))


async def test_simulate_takes_a_kernel_that_ran_on_over_a_closed_month_for_one_launch(
    service: QuotaService, quota_store: KernelStore
) -> None:
    now = utcnow()
    month = now.replace(day=1) - timedelta(days=1)
    for number, owner in ((1, "alice"), (2, "bob")):
        await quota_store.admit(new(number, owner=owner))
        await begin(quota_store, f"k{number}", month - timedelta(days=1))
    await quota_store.write(lambda tx: ledger.close_month(tx, f"{month:%Y-%m}", "admin"))
    await release(quota_store, "k1", now)
    found = await service.simulate([Policy("two", SubjectKind.EVERYONE, hard=2)], 60)
    assert (found.launches, found.refused) == (2, 0)
