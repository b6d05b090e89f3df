"""The tables of tenancy: policies, what is held and used under them, the ledger, the audit trail, identities.

Moments of the ledger are seconds since the epoch (UTC), so that a million intervals can be clipped and summed in SQL.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, cast

from sqlalchemy import DDL, JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, String, Table, Text, event
from sqlalchemy.orm import Mapped, mapped_column

from hub_gateway.db.models import Base

__all__ = [
    "AuditEntry",
    "Base",
    "IdentityClaim",
    "LedgerEntry",
    "LedgerMonth",
    "Meter",
    "Notice",
    "Policy",
    "PolicyState",
    "PriceList",
    "QuotaRequest",
    "SentForm",
    "Use",
]

# SQLite counts rows by itself only in a column that is exactly INTEGER.
_BIG_ID = BigInteger().with_variant(Integer, "sqlite")


class Policy(Base):
    """One quota policy or temporary grant. The columns are `hub_gateway.quotas.types.Policy`'s."""

    __tablename__ = "policies"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    origin: Mapped[str] = mapped_column(String(16))
    subject_kind: Mapped[str] = mapped_column(String(16))
    subject: Mapped[str] = mapped_column(String(255))
    object_kind: Mapped[str] = mapped_column(String(16))
    object: Mapped[str] = mapped_column(String(255))
    resource: Mapped[str] = mapped_column(String(32))
    gpu_model: Mapped[str] = mapped_column(String(64))
    counts: Mapped[str] = mapped_column(String(16))
    window: Mapped[str] = mapped_column(String(16))
    window_seconds: Mapped[int | None] = mapped_column(BigInteger)
    period: Mapped[str | None] = mapped_column(String(16))
    timezone: Mapped[str] = mapped_column(String(64))
    hard: Mapped[float | None] = mapped_column(Float)
    soft: Mapped[float | None] = mapped_column(Float)
    burst: Mapped[float | None] = mapped_column(Float)
    burst_seconds: Mapped[int | None] = mapped_column(BigInteger)
    action: Mapped[str] = mapped_column(String(16))
    queue_seconds: Mapped[int | None] = mapped_column(BigInteger)
    grace_seconds: Mapped[int | None] = mapped_column(BigInteger)
    priority: Mapped[int] = mapped_column(Integer)
    enabled: Mapped[bool] = mapped_column(Boolean)
    valid_from: Mapped[datetime | None]
    valid_until: Mapped[datetime | None]
    weekly: Mapped[list[Any]] = mapped_column(JSON)
    note: Mapped[str] = mapped_column(Text)
    delegated: Mapped[bool] = mapped_column(Boolean)
    approver: Mapped[str | None] = mapped_column(String(255))
    version: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(255))
    updated_at: Mapped[datetime]
    updated_by: Mapped[str] = mapped_column(String(255))


class Use(Base):
    """What a user, a group, a service or everyone holds now, by what it is held of: sums of the open reservations.

    Kept in the transactions that write reservations, so that admission reads a handful of rows, however many
    kernels live.
    """

    __tablename__ = "quota_use"

    subject_kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    subject: Mapped[str] = mapped_column(String(255), primary_key=True)
    kernelspec: Mapped[str] = mapped_column(String(255), primary_key=True)
    proxy: Mapped[str] = mapped_column(String(64), primary_key=True)
    queue: Mapped[str] = mapped_column(String(255), primary_key=True)
    gpu_model: Mapped[str] = mapped_column(String(64), primary_key=True)
    kernels: Mapped[int] = mapped_column(Integer)
    starting: Mapped[int] = mapped_column(Integer)
    cpu: Mapped[float] = mapped_column(Float)
    memory: Mapped[int] = mapped_column(BigInteger)
    gpu: Mapped[int] = mapped_column(Integer)


class PolicyState(Base):
    """What has to be remembered of a policy for one subject: since when it is over a limit, or in its burst."""

    __tablename__ = "policy_states"

    policy_id: Mapped[int] = mapped_column(ForeignKey("policies.id", ondelete="CASCADE"), primary_key=True)
    subject: Mapped[str] = mapped_column(String(255), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), primary_key=True)
    since: Mapped[datetime]
    until: Mapped[datetime | None]
    noticed_at: Mapped[datetime | None]


class Meter(Base):
    """What one subject has used up of a policy with a calendar window: a copy of what ledger and reservations say.

    It is `base` + `slope` * (t - `begins`), in seconds times what is used, at a moment t after `latest`.
    """

    __tablename__ = "meters"
    __table_args__ = (Index(None, "subject_kind", "subject"),)

    policy_id: Mapped[int] = mapped_column(ForeignKey("policies.id", ondelete="CASCADE"), primary_key=True)
    subject_kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    subject: Mapped[str] = mapped_column(String(255), primary_key=True)
    version: Mapped[int] = mapped_column(Integer)
    begins: Mapped[float] = mapped_column(Float)
    base: Mapped[float] = mapped_column(Float)
    slope: Mapped[float] = mapped_column(Float)
    latest: Mapped[float] = mapped_column(Float)


class QuotaRequest(Base):
    """A user's request for more, and its answer."""

    __tablename__ = "quota_requests"
    __table_args__ = (Index(None, "state", "owner"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    groups: Mapped[list[str]] = mapped_column(JSON)
    policy: Mapped[str] = mapped_column(String(100))
    amount: Mapped[float] = mapped_column(Float)
    until: Mapped[datetime]
    reason: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    decided_at: Mapped[datetime | None]
    decided_by: Mapped[str | None] = mapped_column(String(255))
    answer: Mapped[str] = mapped_column(Text)
    grant_name: Mapped[str | None] = mapped_column(String(100))


class LedgerEntry(Base):
    """One interval in which a kernel held resources, or a correction. Rows are only ever added (triggers see to it)."""

    __tablename__ = "ledger"
    __table_args__ = (
        Index(None, "owner", "stopped"),
        Index(None, "stopped", "started"),
        Index(None, "kernel_id"),
    )

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    kernel_id: Mapped[str] = mapped_column(String(64))
    owner: Mapped[str] = mapped_column(String(255))
    groups: Mapped[str] = mapped_column(Text)
    """Names of the owner's groups at launch, sorted, as `hub_gateway.quotas.ledger.groups_key` writes them."""
    cost_center: Mapped[str] = mapped_column(String(255))
    principal: Mapped[str | None] = mapped_column(String(255))
    unix_user: Mapped[str | None] = mapped_column(String(255))
    kernelspec: Mapped[str] = mapped_column(String(255))
    proxy: Mapped[str] = mapped_column(String(64))
    queue: Mapped[str] = mapped_column(String(255))
    cpu: Mapped[float] = mapped_column(Float)
    memory: Mapped[int] = mapped_column(BigInteger)
    gpu: Mapped[int] = mapped_column(Integer)
    gpu_model: Mapped[str] = mapped_column(String(64))
    started: Mapped[float] = mapped_column(Float)
    stopped: Mapped[float] = mapped_column(Float)
    continues: Mapped[bool] = mapped_column(Boolean, default=False)
    """Whether an earlier entry is about the same life of the kernel: it was split where a month was closed."""
    seconds: Mapped[float] = mapped_column(Float)
    """`stopped - started`; a correction's may be negative, and stands at one moment."""
    price_version: Mapped[int] = mapped_column(Integer)
    corrects: Mapped[int | None] = mapped_column(_BIG_ID)
    actor: Mapped[str | None] = mapped_column(String(255))
    note: Mapped[str] = mapped_column(Text)
    recorded_at: Mapped[datetime]


class LedgerMonth(Base):
    """A month (UTC) that is closed: nothing is added to it any more; `digest` is over its entries."""

    __tablename__ = "ledger_months"

    month: Mapped[str] = mapped_column(String(7), primary_key=True)
    closed_at: Mapped[datetime]
    closed_by: Mapped[str] = mapped_column(String(255))
    entries: Mapped[int] = mapped_column(Integer)
    seconds: Mapped[float] = mapped_column(Float)
    digest: Mapped[str] = mapped_column(String(64))


class PriceList(Base):
    """Cost units per hour, from `valid_from` on for what is launched then."""

    __tablename__ = "price_lists"

    version: Mapped[int] = mapped_column(Integer, primary_key=True)
    valid_from: Mapped[datetime]
    kernel_hour: Mapped[float] = mapped_column(Float)
    core_hour: Mapped[float] = mapped_column(Float)
    gib_hour: Mapped[float] = mapped_column(Float)
    gpu_hour: Mapped[float] = mapped_column(Float)
    gpu_models: Mapped[dict[str, float]] = mapped_column(JSON)
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(255))


class AuditEntry(Base):
    """One line of the audit trail; `hash` is over the line and the hash of the one before."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "at"), Index(None, "subject", "id"))

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True)
    at: Mapped[datetime]
    actor: Mapped[str] = mapped_column(String(255))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(255))
    outcome: Mapped[str] = mapped_column(String(16))
    detail: Mapped[str] = mapped_column(Text)
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class IdentityClaim(Base):
    """Which Hub user a principal or unix user belongs to: the first one who was mapped to it."""

    __tablename__ = "identity_claims"
    __table_args__ = (Index(None, "hub_user"),)

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(255), primary_key=True)
    hub_user: Mapped[str] = mapped_column(String(255), primary_key=True)
    rule: Mapped[str] = mapped_column(String(255))
    claimed_at: Mapped[datetime]


class Notice(Base):
    """A sentence that no notebook of the kernel has shown yet."""

    __tablename__ = "notices"
    __table_args__ = (Index(None, "kernel_id"),)

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True)
    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"))
    sentence: Mapped[str] = mapped_column(Text)
    made_at: Mapped[datetime]


class SentForm(Base):
    """A form of the console that was carried out, and is not again; `until` is when its page is too old anyway."""

    __tablename__ = "sent_forms"
    __table_args__ = (Index(None, "until"),)

    number: Mapped[str] = mapped_column(String(64), primary_key=True)
    until: Mapped[datetime]


def _append_only(table: Table) -> None:
    """Have the database itself refuse to change or delete rows of a table."""
    name = table.name
    statements = [
        (
            "sqlite",
            (
                f"CREATE TRIGGER {name}_no_{verb} BEFORE {verb.upper()} ON {name} "
                f"BEGIN SELECT RAISE(ABORT, '{name} is append-only'); END"
            ),
        )
        for verb in ("update", "delete")
    ]
    statements += [
        (
            "postgresql",
            (
                f"CREATE FUNCTION {name}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN RAISE EXCEPTION '{name} is append-only'; END $$"
            ),
        ),
        (
            "postgresql",
            (
                f"CREATE TRIGGER {name}_append_only BEFORE UPDATE OR DELETE ON {name} "
                f"FOR EACH ROW EXECUTE FUNCTION {name}_append_only()"
            ),
        ),
    ]
    for dialect, statement in statements:
        made = DDL(statement)  # type: ignore[no-untyped-call]
        event.listen(table, "after_create", made.execute_if(dialect=dialect))


_append_only(cast(Table, LedgerEntry.__table__))
