"""The tables. SQL is the truth: what a process holds in memory can be thrown away at any instruction.

Moments that people see are aware datetimes in UTC. Moments that decide who may act (leases) are
seconds since the epoch by the *database's* clock, see `hub_gateway.db.clock`.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

__all__ = [
    "Base",
    "Instance",
    "Kernel",
    "Reservation",
    "Session",
    "Setting",
    "UTCDateTime",
    "WaitingRequest",
    "utcnow",
]


def utcnow() -> datetime:
    """Now, aware, in UTC."""
    return datetime.now(timezone.utc)


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime, stored in UTC. SQLite keeps no zone, so the zone is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a moment without a zone")
        return value.astimezone(timezone.utc)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=timezone.utc) if value is not None and value.tzinfo is None else value


class Base(DeclarativeBase):
    """Names of constraints are fixed, so that migrations can refer to them on every database."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: UTCDateTime}


class Setting(Base):
    """Facts about this installation that every replica shares, such as its gateway id."""

    __tablename__ = "settings"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Instance(Base):
    """One gateway process that runs or ran. `replica` stays over restarts, `id` does not."""

    __tablename__ = "instances"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    replica: Mapped[str] = mapped_column(String(255), index=True)
    pid: Mapped[int] = mapped_column(Integer)
    started: Mapped[float] = mapped_column(Float)
    heartbeat: Mapped[float] = mapped_column(Float)


class Kernel(Base):
    """One kernel, from its admission on. The columns are `KernelRecord`'s, and what only the gateway may know.

    `launch`, `link_secret` and `launch_token` are ciphertexts of `hub_gateway.db.secrets.Vault`.
    """

    __tablename__ = "kernels"
    __table_args__ = (Index(None, "owner", "status"), Index(None, "status", "lease_until"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    groups: Mapped[list[str]] = mapped_column(JSON)
    hub_server: Mapped[str | None] = mapped_column(String(255))
    kernelspec: Mapped[str] = mapped_column(String(255))
    proxy: Mapped[str] = mapped_column(String(64))
    unix_user: Mapped[str | None] = mapped_column(String(255))
    path: Mapped[str | None] = mapped_column(Text)

    status: Mapped[str] = mapped_column(String(16))
    target: Mapped[str] = mapped_column(String(16))
    execution_state: Mapped[str] = mapped_column(String(16))
    connections: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    stopped_at: Mapped[datetime | None]
    last_activity: Mapped[datetime]
    message: Mapped[str] = mapped_column(Text)
    exit_code: Mapped[int | None] = mapped_column(Integer)
    stderr_tail: Mapped[str] = mapped_column(Text)
    restarts: Mapped[int] = mapped_column(Integer)
    cull_idle_timeout: Mapped[float | None] = mapped_column(Float)

    cpu: Mapped[float] = mapped_column(Float)
    memory: Mapped[int] = mapped_column(BigInteger)
    gpu: Mapped[int] = mapped_column(Integer)
    gpu_model: Mapped[str] = mapped_column(String(64), server_default="")
    queue: Mapped[str] = mapped_column(String(255), server_default="")
    principal: Mapped[str | None] = mapped_column(String(255))
    identity_rule: Mapped[str] = mapped_column(String(255), server_default="")
    cost_center: Mapped[str] = mapped_column(String(255), server_default="")
    queued_at: Mapped[datetime | None]
    queue_deadline: Mapped[datetime | None]
    queue_policy: Mapped[str] = mapped_column(String(100), server_default="", index=True)
    queue_reason: Mapped[str] = mapped_column(Text, server_default="")

    lease_holder: Mapped[str | None] = mapped_column(String(64), index=True)
    lease_until: Mapped[float] = mapped_column(Float)
    epoch: Mapped[int] = mapped_column(Integer)
    launch_epoch: Mapped[int] = mapped_column(Integer)
    proxy_state: Mapped[dict[str, Any]] = mapped_column(JSON)

    launch: Mapped[str] = mapped_column(Text)
    launch_token: Mapped[str] = mapped_column(Text)
    link_secret: Mapped[str] = mapped_column(Text)
    link_public: Mapped[str] = mapped_column(String(64))
    registered_at: Mapped[datetime | None]
    agent_host: Mapped[str | None] = mapped_column(String(255))
    agent_port: Mapped[int | None] = mapped_column(Integer)
    agent_public_key: Mapped[str | None] = mapped_column(String(64))
    agent_pid: Mapped[int | None] = mapped_column(Integer)


class Reservation(Base):
    """What one kernel holds of its owner's limits, from admission until it is proven gone.

    It is also the ledger's open interval, which begins at `billed_from`.
    """

    __tablename__ = "reservations"
    __table_args__ = (Index(None, "owner", "released_at"),)

    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    kernels: Mapped[int] = mapped_column(Integer)
    cpu: Mapped[float] = mapped_column(Float)
    memory: Mapped[int] = mapped_column(BigInteger)
    gpu: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime]
    released_at: Mapped[datetime | None]
    owner_kind: Mapped[str] = mapped_column(String(16), server_default="user")
    groups: Mapped[list[str]] = mapped_column(JSON, server_default="[]")
    kernelspec: Mapped[str] = mapped_column(String(255), server_default="")
    proxy: Mapped[str] = mapped_column(String(64), server_default="")
    queue: Mapped[str] = mapped_column(String(255), server_default="")
    gpu_model: Mapped[str] = mapped_column(String(64), server_default="")
    starting: Mapped[bool] = mapped_column(Boolean, server_default=false())
    principal: Mapped[str | None] = mapped_column(String(255))
    unix_user: Mapped[str | None] = mapped_column(String(255))
    cost_center: Mapped[str] = mapped_column(String(255), server_default="")
    price_version: Mapped[int] = mapped_column(Integer, server_default="0")
    billed_from: Mapped[datetime | None]


class WaitingRequest(Base):
    """A client's request that waits for its kernel; see `hub_gateway.kernels.waiting`.

    `frames` is a ciphertext, `key` a hash of the client's session and the request's id, `id` gives the order.
    """

    __tablename__ = "waiting_requests"
    __table_args__ = (UniqueConstraint("kernel_id", "key"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"))
    key: Mapped[str] = mapped_column(String(64))
    frames: Mapped[str] = mapped_column(Text)


class Session(Base):
    """A session of the Jupyter REST API: a notebook (or console) and the kernel that it uses."""

    __tablename__ = "sessions"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255), index=True)
    path: Mapped[str] = mapped_column(Text)
    name: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(String(64))
    kernel_id: Mapped[str] = mapped_column(ForeignKey("kernels.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime]
