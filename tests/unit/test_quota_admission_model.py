"""Admission against a plain model: whatever is launched, ended, changed, in whatever order, both say the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import select, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db import revision
from hub_gateway.db.engine import Database
from hub_gateway.db.models import Kernel, Reservation
from hub_gateway.db.secrets import Vault
from hub_gateway.db.tenancy import Use
from hub_gateway.errors import LaunchRefused
from hub_gateway.kernels import admissions
from hub_gateway.kernels.admissions import Admitted
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelStatus, Resources
from hub_gateway.quotas import use
from hub_gateway.quotas.queue import dispatch
from hub_gateway.quotas.types import Action, Counts, ObjectKind, Period, Policy, Resource, SubjectKind, WindowKind
from tests.harness.quotas import new

MONDAY = datetime(2030, 1, 7, tzinfo=timezone.utc)
AMOUNTS = ("kernels", "starting", "cpu", "memory", "gpu")
GIB = 2**30
PEOPLE = {"alice": ("lab",), "bob": ("lab", "staff"), "carol": ()}
"""The owners, and the groups that they are in."""

# Few of each, so that they meet.
owners = st.sampled_from(sorted(PEOPLE))
kernelspecs = st.sampled_from(["python", "spark_r"])
taken = st.builds(
    lambda cpu, memory, gpu: Resources(cpu, memory * GIB, gpu[0], gpu[1]),
    st.sampled_from([0.1, 0.2, 1.0]),
    st.integers(1, 3),
    st.sampled_from([(0, ""), (1, "a100"), (2, ""), (1, "h100")]),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    kind = draw(st.sampled_from([SubjectKind.USER, SubjectKind.GROUP, SubjectKind.EVERYONE]))
    subjects = {SubjectKind.USER: sorted(PEOPLE), SubjectKind.GROUP: ["lab", "staff"], SubjectKind.EVERYONE: ["*"]}
    held = [Resource.KERNELS, Resource.STARTING, Resource.CPU, Resource.MEMORY, Resource.GPU]
    resource = draw(
        st.sampled_from([Resource.KERNELS, Resource.KERNELS, *held, Resource.KERNEL_HOURS, Resource.KERNEL_HOURS])
    )
    hard = draw(st.sampled_from([1, 2, 2, 3, 0, None]))
    daily = resource.timed and draw(st.booleans())
    together = draw(st.booleans()) and (daily or not resource.timed)
    queue = draw(st.booleans())
    unit = GIB if resource is Resource.MEMORY else 1
    return Policy(
        "",
        kind,
        draw(st.sampled_from(subjects[kind])),
        *draw(st.sampled_from([(ObjectKind.ANY, "*"), (ObjectKind.KERNELSPEC, "spark_*")])),
        resource=resource,
        gpu_model=draw(st.sampled_from(["", "a100"])) if resource is Resource.GPU else "",
        counts=Counts.TOGETHER if together else Counts.EACH,
        window=WindowKind.CALENDAR if daily else WindowKind.ROLLING if resource.timed else WindowKind.NOW,
        window_seconds=86400 if resource.timed and not daily else None,
        period=Period.DAY if daily else None,
        hard=None if hard is None else float(hard * unit),
        action=Action.QUEUE if queue else Action.REJECT,
        queue_seconds=7200 if queue and draw(st.booleans()) else None,
        priority=draw(st.sampled_from([0, 0, 1])),
    )


@dataclass(frozen=True)
class Launch:
    """A kernel, as the model knows it."""

    owner: str
    kernelspec: str
    resources: Resources
    since: datetime
    starting: bool = True


class Model:
    """What should be: lists that are searched, nothing that is kept up to date."""

    def __init__(self) -> None:
        self.policies: dict[str, Policy] = {}
        self.held: dict[str, Launch] = {}
        self.queued: dict[str, Launch] = {}
        self.failed: dict[str, Launch] = {}
        self.past: list[tuple[Launch, datetime]] = []

    def applying(self, launch: Launch, now: datetime) -> list[Policy]:
        """The policies that a launch must fit into."""
        found = []
        groups = PEOPLE[launch.owner]
        mine = [
            policy
            for policy in self.policies.values()
            if (policy.subject_kind is SubjectKind.EVERYONE or policy.subject in (launch.owner, *groups))
            and fnmatchcase(launch.kernelspec, policy.object)
            and (policy.valid_until is None or now < policy.valid_until)
        ]
        for policy in mine:
            rivals = [
                other
                for other in mine
                if other.counts is Counts.EACH
                and (other.object, other.resource, other.gpu_model, other.window)
                == (policy.object, policy.resource, policy.gpu_model, policy.window)
            ]
            if policy.counts is Counts.TOGETHER or policy is max(rivals, key=self.rank):
                found.append(policy)
        return found

    @staticmethod
    def rank(policy: Policy) -> tuple[Any, ...]:
        """The greatest wins."""
        specific = [SubjectKind.EVERYONE, SubjectKind.GROUP, SubjectKind.USER].index(policy.subject_kind)
        generous = float("inf") if policy.hard is None else policy.hard
        return policy.priority, specific, generous, [-ord(letter) for letter in policy.name]

    def takes(self, policy: Policy, launch: Launch) -> float:
        """What one kernel counts for a policy: at one instant, or in an hour."""
        if not fnmatchcase(launch.kernelspec, policy.object):
            return 0.0
        if policy.resource in (Resource.KERNELS, Resource.KERNEL_HOURS):
            return 1.0
        if policy.resource is Resource.STARTING:
            return float(launch.starting)
        if policy.gpu_model not in ("", launch.resources.gpu_model):
            return 0.0
        return float(getattr(launch.resources, policy.resource.value))

    def used(self, policy: Policy, owner: str, now: datetime) -> float:
        def counts(one: Launch) -> bool:
            if policy.counts is Counts.EACH or policy.subject_kind is SubjectKind.USER:
                return one.owner == owner
            return policy.subject_kind is SubjectKind.EVERYONE or policy.subject in PEOPLE[one.owner]

        if not policy.resource.timed:
            return sum(self.takes(policy, one) for one in self.held.values() if counts(one))
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        begin = midnight if policy.window is WindowKind.CALENDAR else now - timedelta(days=1)
        spans = [*self.past, *((one, now) for one in self.held.values())]
        return sum(
            max(0.0, (min(end, now) - max(one.since, begin)).total_seconds()) / 3600
            for one, end in spans
            if counts(one) and fnmatchcase(one.kernelspec, policy.object)
        )

    def blocking(self, launch: Launch, now: datetime) -> list[Policy]:
        """The policies into which a launch does not fit."""
        found = []
        for policy in self.applying(launch, now):
            if policy.hard is None:
                continue
            used = self.used(policy, launch.owner, now)
            need = 0.0 if policy.resource.timed else self.takes(policy, replace(launch, starting=True))
            over = used >= policy.hard - 1e-6 if policy.resource.timed else used + need > policy.hard + 1e-6
            if over and (policy.resource.timed or need):
                found.append(policy)
        return found

    def refusing(self, launch: Launch, now: datetime) -> bool:
        starting = replace(launch, starting=True)
        return any(
            policy.action is Action.REJECT
            or (not policy.resource.timed and self.takes(policy, starting) > (policy.hard or 0) + 1e-6)
            for policy in self.blocking(launch, now)
        )


class Machine(RuleBasedStateMachine):
    """Drives both. Times are given, and jump, also back."""

    db: Database
    monkeypatch: pytest.MonkeyPatch
    examples: Iterator[int]

    def __init__(self) -> None:
        super().__init__()
        # Everything that decides about an order is the same when an example is repeated; ids of kernels are new.
        self.example = next(self.examples)
        self.numbers = itertools.count()
        self.model = Model()
        # Each has a decade of its own: what the ledger has of an earlier one is in no window of the next.
        self.now = MONDAY + timedelta(days=3650 * self.example % 2_500_000)
        self.store = KernelStore(self.db, Vault([KEY]), instance="one")
        self.admitter = self.store.admitter
        self.monkeypatch.setattr(admissions, "utcnow", lambda: self.now)

    @initialize(some=st.lists(policies(), min_size=1, max_size=4))
    def begin(self, some: list[Policy]) -> None:
        for policy in some:
            self.put(policy, None)

    def put(self, policy: Policy, hours: float | None) -> None:
        ends = None if hours is None else self.now + timedelta(hours=hours)
        named = replace(policy, name=f"p{next(self.numbers):03}", valid_until=ends)
        made = self.write(lambda tx: self.store.admission.policies.put(tx, named, "admin"))
        self.model.policies[made.name] = made

    def write(self, fn: Callable[[Transaction], Any]) -> Any:
        return self.db.write_sync(fn)

    # What happens

    @rule(some=st.lists(st.tuples(owners, kernelspecs, taken), min_size=1, max_size=6))
    def launch(self, some: list[tuple[str, str, Resources]]) -> None:
        for owner, kernelspec, resources in some:
            key = f"k{self.example}-{next(self.numbers):03}"
            kernel = new(0, owner, id=key, groups=PEOPLE[owner], kernelspec=kernelspec, resources=resources)
            launch = Launch(owner, kernelspec, resources, self.now)
            self.answered(key, launch, self.write(lambda tx, kernel=kernel: self.admitter.admit(tx, kernel, SECRETS)))

    @precondition(lambda self: self.model.failed)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        key = self.one_of(data, self.model.failed)
        answer = self.write(lambda tx: self.admitter.revive(tx, key, SECRETS))
        launch = replace(self.model.failed[key], since=self.now, starting=True)
        self.answered(key, launch, answer)
        if not isinstance(answer, LaunchRefused):
            event("revived")
            del self.model.failed[key]

    def answered(self, key: str, launch: Launch, answer: Admitted | LaunchRefused) -> None:
        """Hold an answer against the model, which then follows it."""
        model, now = self.model, self.now
        blocking = model.blocking(launch, now)
        event("refused" if isinstance(answer, LaunchRefused) else answer.verdict.outcome)
        if isinstance(answer, LaunchRefused):
            assert model.refusing(launch, now), f"refused, but {blocking}"
            assert answer.policy in model.policies and answer.policy in answer.message
        elif answer.verdict.outcome == "queued":
            assert not model.refusing(launch, now)
            policy = model.policies[answer.verdict.policy]
            behind = self.waits_for(policy.name)
            assert policy in blocking or (not blocking and policy.counts is Counts.TOGETHER and behind)
            model.queued[key] = launch
        else:
            assert not blocking, "admitted beyond a limit"
            for policy in model.applying(launch, now):
                common = policy.counts is Counts.TOGETHER and policy.action is Action.QUEUE and policy.hard is not None
                overtaken = common and model.takes(policy, launch) > 0 and self.waits_for(policy.name)
                assert not overtaken, "admitted before those who wait for the same"
            model.held[key] = launch

    def waits_for(self, policy: str) -> bool:
        wanted = select(Kernel.id).where(Kernel.status == "queued", Kernel.queue_policy == policy)
        return bool(self.db.read_sync(lambda tx: [key for key in tx.scalars(wanted) if key in self.model.queued]))

    @precondition(lambda self: self.model.queued)
    @rule()
    def move_the_queue(self) -> None:
        model, now = self.model, self.now
        found = self.write(lambda tx: dispatch(tx, self.admitter, now, half_life=86400.0))
        for key in found.admitted:
            launch = replace(model.queued.pop(key), since=now)
            event("taken from the queue")
            assert not model.blocking(launch, now), "taken from the queue beyond a limit"
            model.held[key] = launch
        for key in found.expired:
            event("waited too long")
            model.failed[key] = model.queued.pop(key)
        if len(model.queued) == 1 and not found.expired:
            [launch] = model.queued.values()
            assert model.blocking(launch, now), "it waits for nothing"

    @precondition(lambda self: self.model.held)
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        key = self.one_of(data, self.model.held)
        self.write(lambda tx: self.store.admission.ready(tx, key))
        self.model.held[key] = replace(self.model.held[key], starting=False)

    @precondition(lambda self: self.model.held)
    @rule(data=st.data(), twice=st.booleans(), moves=st.booleans())
    def end(self, data: st.DataObject, twice: bool, moves: bool) -> None:
        key = self.one_of(data, self.model.held)
        status = data.draw(st.sampled_from([KernelStatus.FAILED, KernelStatus.STOPPED]))

        def end(tx: Transaction) -> bool:
            tx.execute(update(Kernel).where(Kernel.id == key).values(status=status.value))
            return self.store.admission.release(tx, key, self.now)

        assert self.write(end)
        assert not (twice and self.write(end)), "given back twice"
        launch = self.model.held.pop(key)
        self.model.past.append((launch, max(self.now, launch.since)))
        if status is KernelStatus.FAILED:
            self.model.failed[key] = launch
        if moves and self.model.queued:
            self.move_the_queue()

    @precondition(lambda self: self.model.queued)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = self.one_of(data, self.model.queued)
        asyncio.run(self.store.ask_to_stop(key))
        del self.model.queued[key]

    @rule(data=st.data(), what=st.sampled_from(["make", "change", "change", "delete"]))
    def change_policies(self, data: st.DataObject, what: str) -> None:
        if what == "make" or not self.model.policies:
            self.put(data.draw(policies()), data.draw(st.sampled_from([None, 2.0])))
            return
        name = self.one_of(data, self.model.policies)
        if what == "delete":
            self.write(lambda tx: self.store.admission.policies.delete(tx, name, "admin"))
            del self.model.policies[name]
        else:
            hard = data.draw(st.sampled_from([None, 0.0, 1.0, 3.0, 3.0 * GIB]))
            changed = replace(self.model.policies[name], hard=hard)
            self.model.policies[name] = self.write(lambda tx: self.store.admission.policies.put(tx, changed, "admin"))

    @rule(hours=st.sampled_from([-1, 0.5, 2, 3, 30]), elsewhere=st.booleans())
    def time_passes(self, hours: float, elsewhere: bool) -> None:
        self.now += timedelta(hours=hours)
        if elsewhere:  # the next is asked of another process, which knows no policies yet
            self.store = KernelStore(self.db, Vault([KEY]), instance="another")
            self.admitter = self.store.admitter

    def one_of(self, data: st.DataObject, found: dict[str, Any]) -> str:
        return data.draw(st.sampled_from(sorted(found)))

    # What is always so

    @invariant()
    def reservations_are_what_is_held(self) -> None:
        def read(tx: Transaction) -> None:
            held = tx.execute(
                select(Reservation.kernel_id, Reservation.starting).where(Reservation.released_at.is_(None))
            )
            assert {row.kernel_id: row.starting for row in held} == {
                key: one.starting for key, one in self.model.held.items()
            }
            waiting = select(Kernel.id).where(Kernel.status == KernelStatus.QUEUED.value)
            assert set(tx.scalars(waiting)) == set(self.model.queued)

        self.db.read_sync(read)

    @invariant()
    def sums_are_right(self) -> None:
        """By the model, and by what a start of the gateway would count."""
        right: dict[tuple[str, ...], list[float]] = {}
        for one in self.model.held.values():
            for holder in (("user", one.owner), *(("group", name) for name in PEOPLE[one.owner]), ("everyone", "*")):
                sums = right.setdefault((*holder, one.kernelspec, one.resources.gpu_model), [0.0] * len(AMOUNTS))
                more = (1, one.starting, one.resources.cpu, one.resources.memory, one.resources.gpu)
                sums[:] = [old + added for old, added in zip(sums, more, strict=True)]

        def read(tx: Transaction) -> None:
            found = {
                (row.subject_kind, row.subject, row.kernelspec, row.gpu_model): [getattr(row, name) for name in AMOUNTS]
                for row in tx.scalars(select(Use))
            }
            for key in {*found, *right}:
                nothing = [0.0] * len(AMOUNTS)
                assert found.get(key, nothing) == pytest.approx(right.get(key, nothing), abs=1e-6), key

        self.db.read_sync(read)

    @invariant()
    def meters_are_right(self) -> None:
        """Whether or not anybody is launched now: what is told of time is what the model says."""

        def read(tx: Transaction) -> None:
            for policy in self.model.policies.values():
                if policy.resource.timed:
                    for owner in PEOPLE:
                        found = self.store.admission.used(
                            tx, policy, use.scope_of(policy, owner, SubjectKind.USER), (), self.now
                        )
                        assert found == pytest.approx(self.model.used(policy, owner, self.now), abs=1e-6)

        self.db.read_sync(read)

    def teardown(self) -> None:
        """The ledger cannot be emptied, so the next example begins where everything has ended long ago."""

        def end(tx: Transaction) -> int:
            wrong = use.recount(tx)
            # Of the database, not of the model, which is behind where an example has failed.
            for key in tx.scalars(select(Reservation.kernel_id).where(Reservation.released_at.is_(None))).all():
                self.store.admission.release(tx, key, self.now)
            tx.execute(update(Kernel).values(status=KernelStatus.STOPPED.value))
            for policy in self.store.admission.policies.all(tx):
                self.store.admission.policies.delete(tx, policy.name, "admin")
            return wrong

        assert self.write(end) == 0


KEY = Vault.generate_key()
SECRETS: dict[str, str] = {"launch": "", "launch_token": "", "link_public": "", "link_secret": ""}


def test_admission_is_what_the_model_says(
    db_url: Callable[[], str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = Database(db_url() or f"sqlite:///{tmp_path}/model.sqlite")
    revision.prepare_at_start(db, upgrade_older=False)
    monkeypatch.setattr(Machine, "db", db, raising=False)
    monkeypatch.setattr(Machine, "monkeypatch", monkeypatch, raising=False)
    monkeypatch.setattr(Machine, "examples", itertools.count(), raising=False)
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(max_examples=30, stateful_step_count=50, deadline=None, suppress_health_check=slow),
        )
    finally:
        asyncio.run(db.close())
