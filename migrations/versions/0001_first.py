"""Kernels, reservations, sessions, leases and settings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("replica", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started", sa.Float(), nullable=False),
        sa.Column("heartbeat", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_instances"),
    )
    op.create_index("ix_instances_replica", "instances", ["replica"])

    op.create_table(
        "kernels",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("groups", sa.JSON(), nullable=False),
        sa.Column("hub_server", sa.String(255), nullable=True),
        sa.Column("kernelspec", sa.String(255), nullable=False),
        sa.Column("proxy", sa.String(64), nullable=False),
        sa.Column("unix_user", sa.String(255), nullable=True),
        sa.Column("path", sa.Text(), nullable=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("target", sa.String(16), nullable=False),
        sa.Column("execution_state", sa.String(16), nullable=False),
        sa.Column("connections", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stopped_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_activity", sa.DateTime(timezone=True), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("stderr_tail", sa.Text(), nullable=False),
        sa.Column("restarts", sa.Integer(), nullable=False),
        sa.Column("cull_idle_timeout", sa.Float(), nullable=True),
        sa.Column("cpu", sa.Float(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("gpu", sa.Integer(), nullable=False),
        sa.Column("lease_holder", sa.String(64), nullable=True),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("launch_epoch", sa.Integer(), nullable=False),
        sa.Column("proxy_state", sa.JSON(), nullable=False),
        sa.Column("launch", sa.Text(), nullable=False),
        sa.Column("launch_token", sa.Text(), nullable=False),
        sa.Column("link_secret", sa.Text(), nullable=False),
        sa.Column("link_public", sa.String(64), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("agent_host", sa.String(255), nullable=True),
        sa.Column("agent_port", sa.Integer(), nullable=True),
        sa.Column("agent_public_key", sa.String(64), nullable=True),
        sa.Column("agent_pid", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_kernels"),
    )
    op.create_index("ix_kernels_lease_holder", "kernels", ["lease_holder"])
    op.create_index("ix_kernels_owner_status", "kernels", ["owner", "status"])
    op.create_index("ix_kernels_status_lease_until", "kernels", ["status", "lease_until"])

    op.create_table(
        "settings",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_settings"),
    )
    op.create_table(
        "reservations",
        sa.Column("kernel_id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("kernels", sa.Integer(), nullable=False),
        sa.Column("cpu", sa.Float(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("gpu", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("released_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["kernel_id"], ["kernels.id"], name="fk_reservations_kernel_id_kernels", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("kernel_id", name="pk_reservations"),
    )
    op.create_index("ix_reservations_owner_released_at", "reservations", ["owner", "released_at"])

    op.create_table(
        "waiting_requests",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kernel_id", sa.String(64), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("frames", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["kernel_id"], ["kernels.id"], name="fk_waiting_requests_kernel_id_kernels", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_waiting_requests"),
        sa.UniqueConstraint("kernel_id", "key", name="uq_waiting_requests_kernel_id_key"),
    )

    op.create_table(
        "sessions",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("type", sa.String(64), nullable=False),
        sa.Column("kernel_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["kernel_id"], ["kernels.id"], name="fk_sessions_kernel_id_kernels", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
    )
    op.create_index("ix_sessions_kernel_id", "sessions", ["kernel_id"])
    op.create_index("ix_sessions_owner", "sessions", ["owner"])
