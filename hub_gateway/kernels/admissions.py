"""A kernel's row and what it reserves, written together: admitted, queued, or refused."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import zmq
from sqlalchemy import bindparam, update
from sqlalchemy.orm import Session as Transaction

from hub_gateway import audit
from hub_gateway.db.clock import db_now
from hub_gateway.db.lock import lock
from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.errors import Conflict, LaunchRefused
from hub_gateway.identity.types import Identity
from hub_gateway.kernels import failpoints
from hub_gateway.kernels.rows import BY_ID, COLUMNS, KERNELS, one, record_of
from hub_gateway.kernels.types import (
    ExecutionState,
    KernelRecord,
    KernelStatus,
    KernelTarget,
    LaunchPlan,
    NewKernel,
)
from hub_gateway.quotas.admission import Admission
from hub_gateway.quotas.types import Demand, SubjectKind, Verdict

__all__ = ["Admitted", "Admitter", "Claim", "demand_of", "tell_refusal"]

_WAITS = KERNELS.insert()
_STARTS = _WAITS.values(lease_until=db_now() + bindparam("lease_seconds"))
_NOTHING = dict.fromkeys(column.name for column in COLUMNS)

Claim = Callable[[Transaction], None]
"""Makes the owner's principal and unix user theirs, in the transaction of the admission. Raises `Forbidden`."""


@dataclass(frozen=True)
class Admitted:
    """A kernel that was admitted or queued, and what its user should hear of it."""

    record: KernelRecord
    verdict: Verdict
    notices: tuple[str, ...] = ()


def demand_of(new: NewKernel) -> Demand:
    """A launch as policies see it."""
    return Demand(
        owner=new.owner,
        owner_kind=SubjectKind.SERVICE if new.service else SubjectKind.USER,
        groups=frozenset(new.groups),
        kernelspec=new.kernelspec,
        proxy=new.proxy,
        queue=new.queue,
        resources=new.resources,
    )


def tell_refusal(tx: Transaction, demand: Demand, policy: str, sentence: str, **more: str) -> None:
    """Write a launch that was refused into the audit trail, with all that it takes to ask again what becomes of it."""
    detail = {
        **more,
        "kernelspec": demand.kernelspec,
        "proxy": demand.proxy,
        "queue": demand.queue,
        "policy": policy,
        "groups": sorted(demand.groups),
        "resources": asdict(demand.resources),
        "sentence": sentence,
    }
    audit.append(
        tx, actor=demand.owner, action="kernel.refused", subject=demand.owner, outcome="refused", detail=detail
    )


class Admitter:
    """Admits kernels for one gateway process. `instance` holds the leases of what it admits."""

    def __init__(self, vault: Vault, admission: Admission, *, instance: str, lease_seconds: float) -> None:
        self.vault = vault
        self.admission = admission
        self.instance = instance
        self.lease_seconds = lease_seconds

    def secrets(self, plan: LaunchPlan) -> dict[str, Any]:
        """The secret columns of a launch. Made before the transaction: it takes a millisecond that nobody waits for."""
        public, secret = zmq.curve_keypair()
        return {
            "launch": self.vault.encrypt_json(asdict(plan)),
            "launch_token": self.vault.encrypt(secrets.token_urlsafe(32)),
            "link_public": public.decode(),
            "link_secret": self.vault.encrypt(secret.decode()),
        }

    def admit(
        self, tx: Transaction, new: NewKernel, launch: Mapping[str, Any], claim: Claim | None = None
    ) -> Admitted | LaunchRefused:
        """Decide, and write what follows. A refusal is returned, not raised: its line in the audit trail must stay."""
        lock(tx)
        now = utcnow()
        demand = demand_of(new)
        try:
            if claim is not None:
                claim(tx)
            demand, cut = self.admission.clamped(tx, demand, new.least, now)
        except LaunchRefused as error:
            return self._refused(tx, demand, error, error.policy)
        verdict = self.admission.decide(tx, demand, now)
        if verdict.outcome == "refused":
            return self._refused(tx, demand, LaunchRefused(verdict.sentence), verdict.policy)
        taken = demand.resources
        values = {
            "id": new.id,
            "owner": new.owner,
            "groups": sorted(new.groups),
            "hub_server": new.hub_server,
            "kernelspec": new.kernelspec,
            "proxy": new.proxy,
            "unix_user": new.unix_user,
            "principal": new.principal,
            "identity_rule": new.identity_rule,
            "cost_center": new.cost_center,
            "path": new.path,
            "target": KernelTarget.RUNNING.value,
            "execution_state": ExecutionState.STARTING.value,
            "connections": 0,
            "created_at": now,
            "last_activity": now,
            "message": "",
            "stderr_tail": "",
            "restarts": 0,
            "cull_idle_timeout": new.cull_idle_timeout,
            "cpu": taken.cpu,
            "memory": taken.memory,
            "gpu": taken.gpu,
            "gpu_model": taken.gpu_model,
            "queue": new.queue,
            "epoch": 1,
            "launch_epoch": 1,
            "proxy_state": {},
            # Until when the lease is held stands in the statement, which is made once.
            **self._stands(verdict, now, lease=False),
            **launch,
        }
        if verdict.outcome == "admitted":
            tx.connection().execute(_STARTS, {**values, "lease_seconds": self.lease_seconds})
            self._reserve(tx, demand, new, now)
        else:
            tx.connection().execute(_WAITS, values)
        failpoints.hit("admit.before_commit")
        # As it was written: to have half a hundred columns sent back takes as long as a statement.
        return Admitted(record_of({**_NOTHING, **values}), verdict, (*cut, *verdict.notices))

    def revive(
        self,
        tx: Transaction,
        kernel_id: str,
        launch: Mapping[str, Any],
        identity: Identity | None = None,
        claim: Claim | None = None,
    ) -> Admitted | LaunchRefused:
        """Admit a failed kernel once more, under the same id. Raises `Conflict` where it is not failed.

        `identity` is what its owner is now: in which groups, as which principal, at whose expense.
        """
        lock(tx)  # before the row is read: of two who start it again, one must see what the other did
        row = tx.execute(BY_ID, {"kernel": kernel_id}).mappings().one_or_none()
        record = None if row is None else record_of(row)
        if record is None or record.status is not KernelStatus.FAILED:
            raise Conflict(f"Kernel {kernel_id} cannot be started again now.")
        now = utcnow()
        whose: dict[str, Any] = {}
        if identity is not None:
            whose = {
                "groups": sorted(identity.groups),
                "principal": identity.principal,
                "cost_center": identity.cost_center,
            }
            record = replace(record, **{**whose, "groups": tuple(whose["groups"])})
            whose["identity_rule"] = identity.rule
        demand = self.demand(record)
        try:
            if claim is not None:
                claim(tx)
        except LaunchRefused as error:
            return self._refused(tx, demand, error, error.policy)
        demand, verdict = self._anew(tx, demand, now)
        if verdict.outcome == "refused":
            return self._refused(tx, demand, LaunchRefused(verdict.sentence), verdict.policy)
        tx.execute(
            update(Kernel)
            .where(Kernel.id == kernel_id)
            .values(
                target=KernelTarget.RUNNING.value,
                execution_state=ExecutionState.STARTING.value,
                message="",
                exit_code=None,
                stderr_tail="",
                started_at=None,
                stopped_at=None,
                last_activity=now,
                restarts=Kernel.restarts + 1,
                **whose,
                cpu=demand.resources.cpu,
                memory=demand.resources.memory,
                **self._next_launch(),
                **self._stands(verdict, now),
                **launch,
            )
        )
        if verdict.outcome == "admitted":
            self._reserve(tx, demand, record, now, again=True)
        return Admitted(one(tx, kernel_id), verdict, verdict.notices)

    def dequeue(self, tx: Transaction, record: KernelRecord, now: datetime) -> Verdict:
        """Admit a queued kernel if there is room now; else what it waits for is written."""
        demand = self.demand(record)
        demand, verdict = self._anew(tx, demand, now, kernel_id=record.id)
        if verdict.outcome == "admitted":
            values = self._stands(verdict, now) | {"epoch": Kernel.epoch + 1, "launch_epoch": Kernel.epoch + 1}
            values |= {"cpu": demand.resources.cpu, "memory": demand.resources.memory}
            tx.execute(update(Kernel).where(Kernel.id == record.id).values(**values))
            self._reserve(tx, demand, record, now, again=True)  # it may have been alive before, and failed
        elif verdict.outcome == "queued":
            policy = verdict.policy or record.queue_policy
            if (policy, verdict.sentence) != (record.queue_policy, record.queue_reason):
                changed = {"queue_policy": policy, "queue_reason": verdict.sentence}
                tx.execute(update(Kernel).where(Kernel.id == record.id).values(**changed))
        return verdict

    def _anew(
        self, tx: Transaction, demand: Demand, now: datetime, *, kernel_id: str | None = None
    ) -> tuple[Demand, Verdict]:
        """Decide about a kernel that was made earlier: limits of one kernel that are lower now refuse it.

        What it did not state it gets by the limits that hold now.
        """
        try:
            demand, _ = self.admission.clamped(tx, demand, demand.resources, now)
        except LaunchRefused as error:
            return demand, Verdict("refused", policy=error.policy, sentence=error.message)
        return demand, self.admission.decide(tx, demand, now, kernel_id=kernel_id)

    def demand(self, record: KernelRecord) -> Demand:
        """What a kernel that was made earlier asks for."""
        service = record.owner.startswith("services/")
        return Demand(
            owner=record.owner,
            owner_kind=SubjectKind.SERVICE if service else SubjectKind.USER,
            groups=frozenset(record.groups),
            kernelspec=record.kernelspec,
            proxy=record.proxy,
            queue=record.queue,
            resources=record.resources,
        )

    def _reserve(
        self, tx: Transaction, demand: Demand, whose: NewKernel | KernelRecord, now: datetime, *, again: bool = False
    ) -> None:
        self.admission.reserve(
            tx,
            demand,
            now,
            kernel_id=whose.id,
            principal=whose.principal,
            unix_user=whose.unix_user,
            cost_center=whose.cost_center,
            again=again,
        )

    def _stands(self, verdict: Verdict, now: datetime, *, lease: bool = True) -> dict[str, Any]:
        """The columns that say whether a kernel waits or starts. What waits needs no lease: it holds nothing."""
        if verdict.outcome == "queued":
            return {
                "status": KernelStatus.QUEUED.value,
                "lease_holder": None,
                "lease_until": 0.0,
                "queued_at": now,
                "queue_deadline": verdict.deadline,
                "queue_policy": verdict.policy,
                "queue_reason": verdict.sentence,
            }
        return {
            "status": KernelStatus.STARTING.value,
            "lease_holder": self.instance,
            **({"lease_until": db_now() + self.lease_seconds} if lease else {}),
            "queue_deadline": None,
            "queue_policy": "",
            "queue_reason": "",
        }

    @staticmethod
    def _next_launch() -> dict[str, Any]:
        return {
            "epoch": Kernel.epoch + 1,
            "launch_epoch": Kernel.epoch + 1,
            "proxy_state": {},
            "registered_at": None,
            "agent_host": None,
            "agent_port": None,
            "agent_public_key": None,
            "agent_pid": None,
        }

    def _refused(self, tx: Transaction, demand: Demand, error: LaunchRefused, policy: str) -> LaunchRefused:
        tell_refusal(tx, demand, policy, error.message)
        error.policy = policy
        broken = self.admission.policies.index(tx).by_name.get(policy)
        if broken is not None:
            error.resource = broken.resource.value
        return error
