"""What the web layer asks of the parts that know policies, identities, the ledger and the audit trail.

Authorization is done before: these methods believe whom they are told.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from sqlalchemy.orm import Session as Transaction

from hub_gateway.quotas.types import Policy, SubjectKind, Verdict

__all__ = ["AuditPart", "IdentityPart", "QuotaPart", "ReportsPart"]


class QuotaPart(Protocol):
    """`hub_gateway.quotas.service.QuotaService`."""

    async def policies(self) -> Sequence[Policy]: ...

    async def policy(self, name: str) -> Policy | None: ...

    async def put(self, policy: Policy, actor: str, dry_run: bool = False) -> Any: ...

    async def delete(self, name: str, actor: str) -> Any: ...

    async def export(self) -> str: ...

    async def diff(self, text: str) -> Any: ...

    async def apply(self, text: str, actor: str, dry_run: bool = False, keep: bool = False) -> Any: ...

    async def limits(self, owner: str, owner_kind: SubjectKind, groups: Collection[str]) -> Sequence[Any]: ...

    async def explain(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspec: str | None = None
    ) -> Any: ...

    async def simulate(self, policies: str | Sequence[Policy], days: int) -> Any: ...

    async def queue(self) -> Sequence[Any]: ...

    async def requests(
        self,
        state: str | None = None,
        owner: str | None = None,
        *,
        owners: Collection[str] | None = None,
        before: int | None = None,
        limit: int = 500,
    ) -> Sequence[Any]: ...

    async def request(self, request_id: int) -> Any: ...

    async def open_request(
        self, owner: str, groups: Collection[str], policy: str, amount: float, until: datetime, reason: str
    ) -> Any: ...

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
    ) -> Any: ...

    async def withdraw(self, request_id: int, owner: str) -> Any: ...

    async def maintenance(self) -> str | None: ...

    async def set_maintenance(self, sentence: str | None, actor: str) -> Any: ...

    async def room(
        self, owner: str, owner_kind: SubjectKind, groups: Collection[str], kernelspecs: Sequence[str]
    ) -> Mapping[str, Verdict]: ...


class IdentityPart(Protocol):
    """`hub_gateway.identity.mapper.IdentityMapper`."""

    async def explain(
        self, name: str, groups: Collection[str], *, name_holders: bool = False, attempt: bool = True
    ) -> Any: ...

    async def release(self, hub_user: str, actor: str) -> Any: ...


class AuditPart(Protocol):
    """`hub_gateway.audit.AuditLog`; its methods run in a transaction."""

    def append(
        self, tx: Transaction, *, actor: str, action: str, subject: str, outcome: str, detail: Mapping[str, Any]
    ) -> Any: ...

    def query(
        self,
        tx: Transaction,
        *,
        actor: str | None = None,
        subject: str | None = None,
        action: str | None = None,
        before_id: int | None = None,
        limit: int = 100,
    ) -> Sequence[Any]: ...

    def verify(self, tx: Transaction) -> Any: ...


class ReportsPart(Protocol):
    """`hub_gateway.quotas.reports.Reports`; its methods run in a transaction."""

    def report(
        self,
        tx: Transaction,
        by: str,
        start: datetime,
        end: datetime,
        owner: str | None = None,
        groups: Collection[str] | None = None,
    ) -> Any: ...

    def prices(self, tx: Transaction) -> Sequence[Any]: ...

    def set_prices(self, tx: Transaction, actor: str, **prices: Any) -> Any: ...

    def close_month(self, tx: Transaction, month: str, actor: str) -> Any: ...

    def correct(
        self, tx: Transaction, entry: int, seconds: float, note: str, actor: str, cost_center: str | None = None
    ) -> Any: ...
