"""Quotas, as the web layer and the command line call them. Who may do what is decided before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy.orm import Session as Transaction
from traitlets import Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway import audit
from hub_gateway.auth.people import NoPeople, People
from hub_gateway.db.engine import Database
from hub_gateway.db.lock import lock
from hub_gateway.db.models import utcnow
from hub_gateway.db.settings import put
from hub_gateway.errors import BadRequest, NotFound, Unavailable
from hub_gateway.kernels.admissions import Admitter
from hub_gateway.kernels.specs import KernelSpecs
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas import explain, queue, requests, simulate
from hub_gateway.quotas.admission import Admission
from hub_gateway.quotas.document import Diff, difference, document, policies_of
from hub_gateway.quotas.explain import Explanation, LimitView
from hub_gateway.quotas.policies import MAINTENANCE
from hub_gateway.quotas.requests import Request
from hub_gateway.quotas.simulate import Simulation
from hub_gateway.quotas.types import Demand, Origin, Policy, SubjectKind, Verdict
from hub_gateway.quotas.validate import Problem, SpecFacts, check, check_all

__all__ = ["PutResult", "QuotaService", "spec_facts"]

T = TypeVar("T")


@dataclass(frozen=True)
class PutResult:
    """A policy as it was (or would be) set, and what is to be thought about."""

    policy: Policy
    problems: tuple[Problem, ...] = ()


class QuotaService(LoggingConfigurable):
    """Policies, limits, the queue and requests. `people` says which groups there are, where that is known."""

    initial_policies = Unicode(
        help="""A YAML file of policies that are set at the first start, while there are none.

        Afterwards policies are changed on the pages, or by `jupyter hubgateway quota`.
        """
    ).tag(config=True)

    def __init__(
        self,
        *,
        db: Database,
        admitter: Admitter,
        specs: KernelSpecs,
        proxies: Proxies,
        half_life: float,
        on_change: Callable[[], None] = lambda: None,
        people: People | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.db = db
        self.admitter = admitter
        self.admission: Admission = admitter.admission
        self.specs = specs
        self.proxies = proxies
        self.half_life = half_life
        self._people = None if isinstance(people, NoPeople) else people
        self._on_change = on_change
        """Called when a limit has changed, so that what waits is looked at."""

    # Policies

    async def policies(self) -> Sequence[Policy]:
        """All policies and grants, by name."""
        return await self.db.read(self.admission.policies.all)

    async def policy(self, name: str) -> Policy | None:
        """One of them."""
        return await self.db.read(lambda tx: self.admission.policies.index(tx).by_name.get(name))

    async def put(self, policy: Policy, actor: str, dry_run: bool = False) -> PutResult:
        """Set a policy. Raises `BadRequest` (what is wrong with it), `Conflict` (it was changed meanwhile)."""
        enforced, groups, specs = self._enforced(), await self._groups([policy]), await self._specs()

        def write(tx: Transaction) -> PutResult:
            lock(tx)
            others = self.admission.policies.all(tx)
            problems = check(policy, others, known_groups=groups, proxies=enforced, specs=specs, now=utcnow())
            _refuse(problems)
            if dry_run:
                return PutResult(policy, tuple(problems))
            action = "grant.set" if policy.origin is Origin.GRANT else "policy.set"
            return PutResult(self.admission.policies.put(tx, policy, actor, action=action), tuple(problems))

        return await self._change(write)

    async def delete(self, name: str, actor: str) -> None:
        """Delete a policy. Raises `NotFound`."""
        await self._change(lambda tx: self.admission.policies.delete(tx, name, actor))

    async def export(self) -> str:
        """All policies (grants are temporary, and left out) as a YAML file."""
        return document([policy for policy in await self.policies() if policy.origin is not Origin.GRANT])

    async def diff(self, text: str) -> Diff:
        """What a file would change. Raises `BadRequest`."""
        wanted = policies_of(text)
        groups, specs = await self._groups(wanted), await self._specs()
        return self._diff(await self.policies(), wanted, self._enforced(), groups, specs)

    async def apply(self, text: str, actor: str, dry_run: bool = False, keep: bool = False) -> Diff:
        """Make the policies those of a file, all or nothing; `keep` leaves those alone that it does not name.

        Raises `BadRequest`.
        """
        wanted = policies_of(text)
        enforced, groups, specs = self._enforced(), await self._groups(wanted), await self._specs()

        def write(tx: Transaction) -> Diff:
            lock(tx)
            store = self.admission.policies
            now = store.all(tx)
            found = self._diff(now, wanted, enforced, groups, specs)
            if keep:
                named = {policy.name for policy in wanted}
                others = [policy for policy in now if policy.name not in named]
                together = [*wanted, *others]
                problems = check_all(together, known_groups=groups, proxies=enforced, specs=specs, now=utcnow())
                found = replace(found, removed=(), problems=tuple(problems))
            _refuse(found.problems)
            if dry_run:
                return found
            before = {policy.name: policy for policy in now}
            for policy in wanted:
                if policy.name in (*found.added, *found.changed):
                    known = before.get(policy.name)
                    store.put(tx, replace(policy, version=known.version if known else 0), actor, action="policy.import")
            for name in found.removed:
                store.delete(tx, name, actor)
            return found

        return await self._change(write)

    async def first_start(self, text: str) -> int:
        """Set the policies of a file if there are none; how many."""
        if await self.policies():
            return 0
        return len((await self.apply(text, audit.GATEWAY)).added)

    @staticmethod
    def _diff(
        now: Sequence[Policy],
        wanted: Sequence[Policy],
        enforced: Mapping[str, frozenset[str]],
        groups: frozenset[str] | None,
        specs: Mapping[str, SpecFacts],
    ) -> Diff:
        problems = check_all(wanted, known_groups=groups, proxies=enforced, specs=specs, now=utcnow())
        return replace(difference(now, wanted), problems=tuple(problems))

    async def _groups(self, wanted: Sequence[Policy]) -> frozenset[str] | None:
        """The groups that there are; None where nobody knows, or it does not matter."""
        if self._people is None or not any(policy.subject_kind is SubjectKind.GROUP for policy in wanted):
            return None
        try:
            return frozenset(group.name for group in await self._people.groups())
        except Unavailable as error:
            self.log.warning("Groups of policies are not looked up: %s", error.message)
            return None

    def _enforced(self) -> dict[str, frozenset[str]]:
        """What each proxy can enforce."""
        return {name: proxy.enforces for name, proxy in self.proxies.all()}

    async def _specs(self) -> dict[str, SpecFacts]:
        return await spec_facts(self.specs, self.proxies)

    # Limits

    async def limits(self, owner: str, owner_kind: SubjectKind, groups: Collection[str]) -> list[LimitView]:
        """What applies to somebody, and what is used of it."""
        now = utcnow()
        return await self.db.read(lambda tx: explain.limits(tx, self.admission, owner, owner_kind, groups, now))

    async def explain(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspec: str | None = None
    ) -> Explanation:
        """Which policies count for a launch of somebody's, and why. Raises `NotFound` for an unknown kernelspec."""
        demand = await self._demand(owner, owner_kind, groups, kernelspec)
        now = utcnow()
        return await self.db.read(lambda tx: explain.explain(tx, self.admission, demand, now, kernelspec=kernelspec))

    async def simulate(self, policies: str | Sequence[Policy], days: int) -> Simulation:
        """What the launches of the last days would have met. Raises `BadRequest`."""
        proposed = policies_of(policies) if isinstance(policies, str) else list(policies)
        return await self.db.read(lambda tx: simulate.simulate(tx, proposed, days, utcnow()))

    async def room(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspecs: Sequence[str]
    ) -> dict[str, Verdict]:
        """For each kernelspec: what would become of a launch now."""
        demands = {name: await self._demand(owner, owner_kind, groups, name) for name in kernelspecs}
        now = utcnow()

        def read(tx: Transaction) -> dict[str, Verdict]:
            return {name: self.admission.decide(tx, one, now, looking=True) for name, one in demands.items()}

        return await self.db.read(read)

    async def _demand(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspec: str | None
    ) -> Demand:
        if kernelspec is None:
            return Demand(owner, owner_kind, frozenset(groups), "", "")
        spec = await self.specs.find(kernelspec)
        if spec is None or not spec.offered(groups):
            raise NotFound(f"There is no kernelspec {kernelspec[:100]!r} on this gateway for {owner}.")
        try:
            proxy = self.proxies.resolve(spec.proxy)
        except BadRequest:
            proxy = spec.proxy or ""
        bounds = spec.bounds
        return Demand(owner, owner_kind, frozenset(groups), spec.name, proxy, bounds.queue, bounds.usual)

    # The queue

    async def queue(self) -> Sequence[queue.QueueEntry]:
        """What waits, in order."""
        return await self.db.read(lambda tx: queue.entries(tx, self.admitter, utcnow(), half_life=self.half_life))

    # Requests

    async def requests(
        self,
        state: str | None = None,
        owner: str | None = None,
        *,
        owners: Collection[str] | None = None,
        before: int | None = None,
        limit: int = 500,
    ) -> Sequence[Request]:
        """Requests for more, newest first; of one owner, of some owners (None: of all), with numbers before one."""
        return await self.db.read(lambda tx: requests.find(tx, state, owner, owners=owners, before=before, limit=limit))

    async def request(self, request_id: int) -> Request | None:
        """One request."""
        return await self.db.read(lambda tx: requests.get(tx, request_id))

    async def open_request(
        self, owner: str, groups: Collection[str], policy: str, amount: float, until: datetime, reason: str
    ) -> Request:
        """Ask for more. Raises `NotFound`, `BadRequest`, `Conflict`, `TooManyRequests`."""

        def write(tx: Transaction) -> Request:
            found = self.admission.policies.index(tx).by_name.get(policy)
            if found is None:
                raise NotFound(f"There is no limit {policy[:100]!r}; see your limits for their names.")
            return requests.open_request(tx, owner, groups, found, amount, until, reason)

        return await self.db.write(write)

    async def answer(
        self,
        request_id: int,
        actor: str,
        grant: bool,
        text: str,
        *,
        amount: float | None = None,
        until: datetime | None = None,
        lead: bool = False,
    ) -> Request:
        """Grant or refuse a request, once; as a `lead`, whose permission is for some only, or an administrator.

        Raises `NotFound`, `Conflict` (also where a grant would have no effect), `BadRequest`, `Forbidden`.
        """
        enforced = self._enforced()

        def write(tx: Transaction) -> Request:
            lock(tx)
            others = self.admission.policies.all(tx)
            return requests.answer(
                tx,
                self.admission.policies,
                request_id,
                actor,
                grant=grant,
                text=text,
                amount=amount,
                until=until,
                lead=lead,
                check=lambda grant: _refuse(check(grant, others, proxies=enforced, now=utcnow())),
            )

        return await self._change(write)

    async def withdraw(self, request_id: int, owner: str) -> Request:
        """Take one's own request back. Raises `NotFound`."""
        return await self.db.write(lambda tx: requests.withdraw(tx, request_id, owner))

    # Maintenance

    async def maintenance(self) -> str | None:
        """The sentence that is shown while nothing is launched, or None."""

        return await self.db.read(lambda tx: self.admission.policies.maintenance(tx) or None)

    async def set_maintenance(self, sentence: str | None, actor: str) -> None:
        """Begin maintenance (nothing is launched, what runs goes on), or end it with None."""

        def write(tx: Transaction) -> None:
            put(tx, MAINTENANCE, sentence or "")
            detail = {"sentence": sentence}
            audit.append(tx, actor=actor, action="maintenance.set", subject="gateway", detail=detail)

        await self._change(write)

    async def _change(self, write: Callable[[Transaction], T]) -> T:
        made = await self.db.write(write)
        self._on_change()
        return made


async def spec_facts(specs: KernelSpecs, proxies: Proxies) -> dict[str, SpecFacts]:
    """The kernelspecs, as policies are held against them."""
    found = {}
    for name, (proxy, bounds) in (await specs.bounds()).items():
        try:
            resolved = proxies.resolve(proxy)
        except BadRequest:
            resolved = proxy or ""
        found[name] = SpecFacts(resolved, bounds.queue, bounds.usual)
    return found


def _refuse(problems: Sequence[Problem]) -> None:
    """Raise `BadRequest` with the errors among the problems."""
    errors = [problem.sentence for problem in problems if problem.level == "error"]
    if errors:
        raise BadRequest(" ".join(errors))
