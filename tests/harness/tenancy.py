"""Stand-ins for the parts behind the tenancy API: they keep what they are told, and decide nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from hub_gateway.auth.base import Authenticator, Caller
from hub_gateway.auth.people import FilePeople, Person
from hub_gateway.auth.scopes import ADMIN
from hub_gateway.errors import Conflict, GatewayError, NotFound
from hub_gateway.quotas.types import Policy, Resource, SubjectKind, Verdict

__all__ = ["CALLERS", "Audit", "Identity", "People", "Quotas", "Reports", "Tokens"]

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)


def _user(name: str, *groups: str, scopes: Collection[str] = (), **more: Any) -> Caller:
    return Caller(name, groups=frozenset(groups), scopes=frozenset(scopes), **more)


CALLERS: dict[str, Caller] = {
    caller.name: caller
    for caller in (
        _user("admin", "gateway-admins", scopes=[ADMIN]),
        _user("hubadmin", admin=True),
        _user("lea", "analysts", scopes=[f"{ADMIN}!group=analysts"]),
        _user("otto", "others", scopes=[f"{ADMIN}!group=others"]),
        _user("bob", "analysts"),
        _user("carol", "others"),
        _user("ci", kind="service"),
    )
}
"""Who the tests know: `<name>-token` is the token."""


class People(FilePeople):
    """The users among them; `error` is raised in place of an answer."""

    error: GatewayError | None = None

    def __init__(self) -> None:
        super().__init__(lambda _: [caller for caller in CALLERS.values() if caller.kind == "user"])

    async def everybody(self, *, fresh: bool = False) -> Mapping[str, Person]:
        if self.error is not None:
            raise self.error
        return await super().everybody(fresh=fresh)


class Tokens(Authenticator):
    """Their tokens. `fresh` overrides what a token is worth when it is looked up anew."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.people = People()
        self.error: GatewayError | None = None
        self.fresh: dict[str, Caller | None] = {}
        self.fresh_error: GatewayError | None = None
        self.asked_fresh: list[str] = []

    async def authenticate(self, token: str, *, remote_ip: str = "", fresh: bool = False) -> Caller | None:
        name = token.removesuffix("-token")
        if fresh:
            self.asked_fresh.append(name)
            if self.fresh_error is not None:
                raise self.fresh_error
        if self.error is not None:
            raise self.error
        return self.fresh[name] if fresh and name in self.fresh else CALLERS.get(name)


@dataclass(frozen=True)
class LimitView:
    policy: str
    resource: Resource
    hard: float
    used: float = 1.0


@dataclass(frozen=True)
class Request:
    id: int
    owner: str
    policy: str
    amount: float
    until: datetime | None
    reason: str
    state: str = "open"
    answer: str = ""


@dataclass(frozen=True)
class Put:
    policy: Policy
    problems: tuple[Any, ...] = ()
    simulation: Any = None


@dataclass
class Quotas:
    """Policies by name, with versions."""

    kept: dict[str, Policy] = field(default_factory=dict)
    asked: dict[int, Request] = field(default_factory=dict)
    waiting: list[Any] = field(default_factory=list)
    sentence: str | None = None
    rooms: dict[str, Verdict] = field(default_factory=dict)
    error: GatewayError | None = None
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def policies(self) -> Sequence[Policy]:
        if self.error is not None:
            raise self.error
        return tuple(self.kept.values())

    async def policy(self, name: str) -> Policy | None:
        return self.kept.get(name)

    async def put(self, policy: Policy, actor: str, dry_run: bool = False) -> Put:
        before = self.kept.get(policy.name)
        if (before.version if before else 0) != policy.version:
            raise Conflict(f"The policy {policy.name} was changed meanwhile; read it again.")
        self.calls.append(("put", policy.name, actor, dry_run))
        made = replace(policy, version=policy.version + 1, updated_by=actor, updated_at=NOW)
        if not dry_run:
            self.kept[policy.name] = made
        return Put(made)

    async def delete(self, name: str, actor: str) -> None:
        self.calls.append(("delete", name, actor))
        del self.kept[name]

    async def export(self) -> str:
        return "policies: []\n"

    async def diff(self, text: str) -> dict[str, Any]:
        return {"added": ["x"] if text else [], "changed": [], "removed": [], "problems": []}

    async def apply(self, text: str, actor: str, dry_run: bool = False, keep: bool = False) -> dict[str, Any]:
        self.calls.append(("apply", actor, dry_run, keep))
        return await self.diff(text)

    async def limits(self, owner: str, owner_kind: SubjectKind, groups: Collection[str]) -> Sequence[LimitView]:
        self.calls.append(("limits", owner, owner_kind, frozenset(groups)))
        return [
            LimitView(policy.name, policy.resource, policy.hard or 0)
            for policy in self.kept.values()
            if policy.subject in ("*", owner, *groups)
        ]

    async def explain(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspec: str | None = None
    ) -> dict[str, Any]:
        self.calls.append(("explain", owner, owner_kind, frozenset(groups), kernelspec))
        return {"policies": [], "refusals": []}

    async def simulate(self, policies: Any, days: int) -> dict[str, Any]:
        users = [{"user": name, "launches": 10, "refused": 2, "queued": 1} for name in ("bob", "carol")]
        return {"launches": 20, "refused": 4, "queued": 2, "by_user": users, "sentence": "It would have refused 4."}

    async def queue(self) -> Sequence[Any]:
        return self.waiting

    async def requests(
        self,
        state: str | None = None,
        owner: str | None = None,
        *,
        owners: Collection[str] | None = None,
        before: int | None = None,
        limit: int = 500,
    ) -> Sequence[Request]:
        found = [one for one in self.asked.values() if state in (None, one.state) and owner in (None, one.owner)]
        return [one for one in found if (owners is None or one.owner in owners) and (before is None or one.id < before)]

    async def request(self, request_id: int) -> Request | None:
        return self.asked.get(request_id)

    async def open_request(
        self, owner: str, groups: Collection[str], policy: str, amount: float, until: datetime, reason: str
    ) -> Request:
        made = Request(len(self.asked) + 1, owner, policy, amount, until, reason)
        self.asked[made.id] = made
        return made

    async def answer(self, request_id: int, actor: str, grant: bool, text: str, **more: Any) -> Request:
        self.calls.append(("answer", request_id, actor, grant, more))
        made = replace(self.asked[request_id], state="granted" if grant else "refused", answer=text)
        self.asked[request_id] = made
        return made

    async def withdraw(self, request_id: int, owner: str) -> None:
        found = self.asked.get(request_id)
        if found is None or found.owner != owner:
            raise NotFound("There is no open request of that number that you may answer.")
        self.asked[request_id] = replace(found, state="withdrawn")

    async def maintenance(self) -> str | None:
        return self.sentence

    async def set_maintenance(self, sentence: str | None, actor: str) -> None:
        self.sentence = sentence

    async def room(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspecs: Sequence[str]
    ) -> Mapping[str, Verdict]:
        self.calls.append(("room", owner))
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return {name: self.rooms.get(name, Verdict("admitted")) for name in kernelspecs}


class Identity:
    """Everybody runs as themselves."""

    def __init__(self) -> None:
        self.released: list[tuple[str, str]] = []

    async def explain(
        self, name: str, groups: Collection[str], *, name_holders: bool = False, attempt: bool = True
    ) -> list[dict[str, Any]]:
        return [{"rule": "same-name", "matched": True, "sentence": f"{name} runs as {name}."}]

    async def release(self, hub_user: str, actor: str) -> bool:
        self.released.append((hub_user, actor))
        return hub_user == "bob"


@dataclass(frozen=True)
class Entry:
    id: int
    actor: str
    action: str
    subject: str
    outcome: str
    detail: Mapping[str, Any]


class Audit:
    """A list."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(
        self, tx: Any, *, actor: str, action: str, subject: str, outcome: str, detail: Mapping[str, Any]
    ) -> None:
        self.entries.append(Entry(len(self.entries) + 1, actor, action, subject, outcome, dict(detail)))

    def query(
        self,
        tx: Any,
        *,
        actor: str | None = None,
        subject: str | None = None,
        action: str | None = None,
        before_id: int | None = None,
        limit: int = 100,
    ) -> Sequence[Entry]:
        found = [
            one
            for one in reversed(self.entries)
            if actor in (None, one.actor) and subject in (None, one.subject) and action in (None, one.action)
        ]
        return [one for one in found if before_id is None or one.id < before_id][:limit]

    def verify(self, tx: Any) -> dict[str, Any]:
        whole = {"first_bad": None, "sentence": "The audit trail is whole.", "head": "0" * 64}
        return {"ok": True, "entries": len(self.entries), **whole}


@dataclass(frozen=True)
class Row:
    key: str


@dataclass(frozen=True)
class Report:
    by: str
    owner: str | None
    groups: tuple[str, ...] | None
    rows: tuple[Any, ...] = ()

    def to_csv(self) -> str:
        return "key,kernels\r\n'=1+1,2\r\n"

    def to_table(self) -> str:
        return "key  kernels\n"


class Reports:
    """What was asked of it."""

    def __init__(self) -> None:
        self.asked: list[Report] = []
        self.written: list[tuple[Any, ...]] = []

    def report(
        self,
        tx: Any,
        by: str,
        start: datetime,
        end: datetime,
        owner: str | None = None,
        groups: Collection[str] | None = None,
    ) -> Report:
        rows = tuple(Row(key) for key in ("analysts", "secret")) if by == "group" else ()
        self.asked.append(Report(by, owner, None if groups is None else tuple(groups), rows))
        return self.asked[-1]

    def prices(self, tx: Any) -> Sequence[Any]:
        return [{"version": 1, "core_hour": 0.5}]

    def set_prices(self, tx: Any, actor: str, **prices: Any) -> Any:
        self.written.append(("prices", actor, prices))
        return {"version": 2}

    def close_month(self, tx: Any, month: str, actor: str) -> Any:
        self.written.append(("close", month, actor))
        return {"month": month, "entries": 0}

    def correct(
        self, tx: Any, entry: int, seconds: float, note: str, actor: str, cost_center: str | None = None
    ) -> Any:
        self.written.append(("correct", entry, seconds, note, actor, cost_center))
        return {"id": 2, "corrects": entry}
