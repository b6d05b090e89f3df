"""Policies, use, ledger, audit trail, identities; resources, queue and identity of kernels."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

COPIED = ("groups", "kernelspec", "proxy", "unix_user")
BIG_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_index("ix_audit_at", "audit", ["at"])
    op.create_index("ix_audit_subject_id", "audit", ["subject", "id"])
    op.create_table(
        "identity_claims",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("hub_user", sa.String(length=255), nullable=False),
        sa.Column("rule", sa.String(length=255), nullable=False),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", "hub_user", name="pk_identity_claims"),
    )
    op.create_index("ix_identity_claims_hub_user", "identity_claims", ["hub_user"])
    op.create_table(
        "ledger",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("kernel_id", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("groups", sa.Text(), nullable=False),
        sa.Column("cost_center", sa.String(length=255), nullable=False),
        sa.Column("principal", sa.String(length=255), nullable=True),
        sa.Column("unix_user", sa.String(length=255), nullable=True),
        sa.Column("kernelspec", sa.String(length=255), nullable=False),
        sa.Column("proxy", sa.String(length=64), nullable=False),
        sa.Column("queue", sa.String(length=255), nullable=False),
        sa.Column("cpu", sa.Float(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("gpu", sa.Integer(), nullable=False),
        sa.Column("gpu_model", sa.String(length=64), nullable=False),
        sa.Column("started", sa.Float(), nullable=False),
        sa.Column("stopped", sa.Float(), nullable=False),
        sa.Column("continues", sa.Boolean(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("price_version", sa.Integer(), nullable=False),
        sa.Column("corrects", BIG_ID, nullable=True),
        sa.Column("actor", sa.String(length=255), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ledger"),
    )
    op.create_index("ix_ledger_kernel_id", "ledger", ["kernel_id"])
    op.create_index("ix_ledger_owner_stopped", "ledger", ["owner", "stopped"])
    op.create_index("ix_ledger_stopped_started", "ledger", ["stopped", "started"])
    op.create_table(
        "ledger_months",
        sa.Column("month", sa.String(length=7), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_by", sa.String(length=255), nullable=False),
        sa.Column("entries", sa.Integer(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("month", name="pk_ledger_months"),
    )
    op.create_table(
        "notices",
        sa.Column("id", BIG_ID, nullable=False),
        sa.Column("kernel_id", sa.String(length=64), nullable=False),
        sa.Column("sentence", sa.Text(), nullable=False),
        sa.Column("made_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["kernel_id"], ["kernels.id"], name="fk_notices_kernel_id_kernels", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_notices"),
    )
    op.create_index("ix_notices_kernel_id", "notices", ["kernel_id"])
    op.create_table(
        "policies",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("subject_kind", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("object_kind", sa.String(length=16), nullable=False),
        sa.Column("object", sa.String(length=255), nullable=False),
        sa.Column("resource", sa.String(length=32), nullable=False),
        sa.Column("gpu_model", sa.String(length=64), nullable=False),
        sa.Column("counts", sa.String(length=16), nullable=False),
        sa.Column("window", sa.String(length=16), nullable=False),
        sa.Column("window_seconds", sa.BigInteger(), nullable=True),
        sa.Column("period", sa.String(length=16), nullable=True),
        sa.Column("timezone", sa.String(length=64), nullable=False),
        sa.Column("hard", sa.Float(), nullable=True),
        sa.Column("soft", sa.Float(), nullable=True),
        sa.Column("burst", sa.Float(), nullable=True),
        sa.Column("burst_seconds", sa.BigInteger(), nullable=True),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("queue_seconds", sa.BigInteger(), nullable=True),
        sa.Column("grace_seconds", sa.BigInteger(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("valid_from", sa.DateTime(timezone=True), nullable=True),
        sa.Column("valid_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("weekly", sa.JSON(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("delegated", sa.Boolean(), nullable=False),
        sa.Column("approver", sa.String(length=255), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_by", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_policies"),
        sa.UniqueConstraint("name", name="uq_policies_name"),
    )
    op.create_table(
        "price_lists",
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("valid_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kernel_hour", sa.Float(), nullable=False),
        sa.Column("core_hour", sa.Float(), nullable=False),
        sa.Column("gib_hour", sa.Float(), nullable=False),
        sa.Column("gpu_hour", sa.Float(), nullable=False),
        sa.Column("gpu_models", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_price_lists"),
    )
    op.create_table(
        "quota_requests",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("groups", sa.JSON(), nullable=False),
        sa.Column("policy", sa.String(length=100), nullable=False),
        sa.Column("amount", sa.Float(), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("decided_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("decided_by", sa.String(length=255), nullable=True),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("grant_name", sa.String(length=100), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_quota_requests"),
    )
    op.create_index("ix_quota_requests_state_owner", "quota_requests", ["state", "owner"])
    op.create_table(
        "quota_use",
        sa.Column("subject_kind", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("kernelspec", sa.String(length=255), nullable=False),
        sa.Column("proxy", sa.String(length=64), nullable=False),
        sa.Column("queue", sa.String(length=255), nullable=False),
        sa.Column("gpu_model", sa.String(length=64), nullable=False),
        sa.Column("kernels", sa.Integer(), nullable=False),
        sa.Column("starting", sa.Integer(), nullable=False),
        sa.Column("cpu", sa.Float(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("gpu", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint(
            "subject_kind", "subject", "kernelspec", "proxy", "queue", "gpu_model", name="pk_quota_use"
        ),
    )
    op.create_table(
        "policy_states",
        sa.Column("policy_id", sa.Integer(), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("noticed_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policies.id"], name="fk_policy_states_policy_id_policies", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("policy_id", "subject", "state", name="pk_policy_states"),
    )
    op.create_table(
        "meters",
        sa.Column("policy_id", sa.Integer(), nullable=False),
        sa.Column("subject_kind", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("begins", sa.Float(), nullable=False),
        sa.Column("base", sa.Float(), nullable=False),
        sa.Column("slope", sa.Float(), nullable=False),
        sa.Column("latest", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["policy_id"], ["policies.id"], name="fk_meters_policy_id_policies", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("policy_id", "subject_kind", "subject", name="pk_meters"),
    )
    op.create_index("ix_meters_subject_kind_subject", "meters", ["subject_kind", "subject"])
    op.create_table(
        "sent_forms",
        sa.Column("number", sa.String(length=64), nullable=False),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_sent_forms"),
    )
    op.create_index("ix_sent_forms_until", "sent_forms", ["until"])
    op.add_column("kernels", sa.Column("gpu_model", sa.String(length=64), server_default="", nullable=False))
    op.add_column("kernels", sa.Column("queue", sa.String(length=255), server_default="", nullable=False))
    op.add_column("kernels", sa.Column("principal", sa.String(length=255), nullable=True))
    op.add_column("kernels", sa.Column("identity_rule", sa.String(length=255), server_default="", nullable=False))
    op.add_column("kernels", sa.Column("cost_center", sa.String(length=255), server_default="", nullable=False))
    op.add_column("kernels", sa.Column("queued_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("kernels", sa.Column("queue_deadline", sa.DateTime(timezone=True), nullable=True))
    op.add_column("kernels", sa.Column("queue_policy", sa.String(length=100), server_default="", nullable=False))
    op.add_column("kernels", sa.Column("queue_reason", sa.Text(), server_default="", nullable=False))
    op.create_index("ix_kernels_queue_policy", "kernels", ["queue_policy"])
    op.add_column("reservations", sa.Column("owner_kind", sa.String(length=16), server_default="user", nullable=False))
    op.add_column("reservations", sa.Column("groups", sa.JSON(), server_default="[]", nullable=False))
    op.add_column("reservations", sa.Column("kernelspec", sa.String(length=255), server_default="", nullable=False))
    op.add_column("reservations", sa.Column("proxy", sa.String(length=64), server_default="", nullable=False))
    op.add_column("reservations", sa.Column("queue", sa.String(length=255), server_default="", nullable=False))
    op.add_column("reservations", sa.Column("gpu_model", sa.String(length=64), server_default="", nullable=False))
    op.add_column("reservations", sa.Column("starting", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("reservations", sa.Column("principal", sa.String(length=255), nullable=True))
    op.add_column("reservations", sa.Column("unix_user", sa.String(length=255), nullable=True))
    op.add_column("reservations", sa.Column("cost_center", sa.String(length=255), server_default="", nullable=False))
    op.add_column("reservations", sa.Column("price_version", sa.Integer(), server_default="0", nullable=False))
    op.add_column("reservations", sa.Column("billed_from", sa.DateTime(timezone=True), nullable=True))

    # What is held already is billed from its beginning. Its use is summed up at the start of the gateway.
    op.execute("UPDATE reservations SET billed_from = created_at")
    kernels = sa.table("kernels", *(sa.column(name) for name in ("id", *COPIED)))
    reservations = sa.table("reservations", *(sa.column(name) for name in ("kernel_id", *COPIED)))
    for name in COPIED:
        known = sa.select(kernels.c[name]).where(kernels.c.id == reservations.c.kernel_id).scalar_subquery()
        op.execute(reservations.update().values({name: known}))
    append_only("ledger")


def append_only(table: str) -> None:
    """Have the database itself refuse to change or delete rows."""
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb.upper()} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
        f"FOR EACH ROW EXECUTE FUNCTION {table}_append_only()"
    )
