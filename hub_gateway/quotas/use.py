"""What is held: sums of the open reservations, kept in the transactions that write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

from sqlalchemy import Table, bindparam, delete, insert, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock, locked
from hub_gateway.db.models import Reservation
from hub_gateway.db.tenancy import Meter, Use
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.types import Counts, Policy, SubjectKind

__all__ = [
    "EVERYONE",
    "METERS",
    "Held",
    "Holder",
    "change",
    "drop_meters",
    "held_by",
    "holders_of",
    "metered_for",
    "recount",
    "scope_of",
]

HELD, METERS = "quota use", "quota meters"
"""What a transaction has read: nobody else can change it as long as it holds the lock."""
EVERYONE = "*"
AMOUNTS = ("kernels", "starting", "cpu", "memory", "gpu")
KEYS = ("subject_kind", "subject", "kernelspec", "proxy", "queue", "gpu_model")
TOLERANCE = 1e-6

Holder: TypeAlias = tuple[str, str]
"""Kind and name of who holds something."""
_TABLE = cast(Table, Use.__table__)
_METERS = cast(Table, Meter.__table__)
_RESERVATIONS = cast(Table, Reservation.__table__)


def _add(dialect: Any) -> Any:
    """The statement that adds to a row, or makes it."""
    made = dialect.insert(_TABLE)
    added = {name: _TABLE.c[name] + made.excluded[name] for name in AMOUNTS}
    return made.on_conflict_do_update(index_elements=list(KEYS), set_=added)


# Made once: building statements takes longer than running them.
_ADD = {"sqlite": _add(sqlite), "postgresql": _add(postgresql)}
_HELD_BY = select(_TABLE).where(
    tuple_(_TABLE.c.subject_kind, _TABLE.c.subject).in_(bindparam("holders", expanding=True))
)


@dataclass(frozen=True)
class Held:
    """One row: what one subject holds of one sort of kernels."""

    kernelspec: str
    proxy: str
    queue: str
    gpu_model: str
    kernels: int
    starting: int
    cpu: float
    memory: int
    gpu: int


def holders_of(owner: str, owner_kind: SubjectKind, groups: Iterable[str]) -> list[Holder]:
    """Everybody whose use a kernel is part of."""
    return [
        (owner_kind.value, owner),
        *((SubjectKind.GROUP.value, group) for group in sorted(set(groups))),
        (SubjectKind.EVERYONE.value, EVERYONE),
    ]


def metered_for(owner: str, groups: Iterable[str]) -> list[Holder]:
    """Whose meters count what an owner uses up. The ledger does not tell a user from a service of the same name."""
    return [(SubjectKind.SERVICE.value, owner), *holders_of(owner, SubjectKind.USER, groups)]


def scope_of(policy: Policy, owner: str, owner_kind: SubjectKind) -> Holder:
    """Whose use is compared with a policy."""
    if policy.counts is not Counts.TOGETHER:
        return owner_kind.value, owner
    if policy.subject_kind is SubjectKind.EVERYONE:
        return policy.subject_kind.value, EVERYONE
    if policy.subject_kind is SubjectKind.GROUP:
        return policy.subject_kind.value, policy.subject
    return owner_kind.value, owner


def held_by(tx: Transaction, holders: Sequence[Holder]) -> dict[Holder, list[Held]]:
    """What these hold. It is read once in a transaction that holds the lock."""
    known: dict[Holder, list[Held]] = tx.info.setdefault(HELD, {}) if locked(tx) else {}
    unknown = [holder for holder in holders if holder not in known]
    if unknown:
        known.update((holder, []) for holder in unknown)
        for kind, subject, *rest in tx.connection().execute(_HELD_BY, {"holders": unknown}):
            known[kind, subject].append(Held(*rest))
    return {holder: known[holder] for holder in holders}


def change(
    tx: Transaction,
    holders: Sequence[Holder],
    kind: tuple[str, str, str, str],
    *,
    kernels: int,
    starting: int,
    resources: Resources | None = None,
    sign: int = 1,
) -> None:
    """Add to (`sign` -1: take from) what these hold of one kind of kernels: kernelspec, proxy, queue, GPU model."""
    taken = resources or Resources()
    amounts = {
        "kernels": sign * kernels,
        "starting": sign * starting,
        "cpu": sign * taken.cpu,
        "memory": sign * taken.memory,
        "gpu": sign * taken.gpu,
    }
    rows = [dict(zip(KEYS, (*holder, *kind), strict=True)) | amounts for holder in holders]
    tx.connection().execute(_ADD[tx.get_bind().dialect.name], rows)
    known: dict[Holder, list[Held]] = tx.info.get(HELD, {})
    for holder in known.keys() & set(holders):
        known[holder] = _added(known[holder], kind, amounts)


def _added(rows: Iterable[Held], kind: tuple[str, str, str, str], amounts: dict[str, Any]) -> list[Held]:
    """The rows after the database has added to one of them, or made it."""
    of = {(row.kernelspec, row.proxy, row.queue, row.gpu_model): row for row in rows}
    row = of.get(kind) or Held(*kind, kernels=0, starting=0, cpu=0.0, memory=0, gpu=0)
    of[kind] = replace(row, **{name: getattr(row, name) + amount for name, amount in amounts.items()})
    return list(of.values())


def drop_meters(tx: Transaction, holders: Sequence[Holder] | None = None) -> None:
    """Have the meters of these (None: of all) read anew when they are asked for."""
    some = delete(_METERS)
    if holders is not None:
        some = some.where(tuple_(_METERS.c.subject_kind, _METERS.c.subject).in_(holders))
    tx.connection().execute(some)
    tx.info.pop(METERS, None)


def recount(tx: Transaction) -> int:
    """Sum up anew from the open reservations; how many rows were wrong. Meters are read anew when asked for."""
    lock(tx)
    drop_meters(tx)
    right: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0] * len(AMOUNTS))
    columns = _RESERVATIONS.c
    for row in tx.connection().execute(select(_RESERVATIONS).where(columns.released_at.is_(None))).mappings():
        owner_kind = SubjectKind(row["owner_kind"])
        for holder in holders_of(row["owner"], owner_kind, row["groups"] or ()):
            key = (*holder, row["kernelspec"], row["proxy"], row["queue"], row["gpu_model"])
            sums = right[key]
            for number, name in enumerate(AMOUNTS):
                sums[number] += row[name]
    found = {tuple(row[: len(KEYS)]): row[len(KEYS) :] for row in tx.connection().execute(select(_TABLE))}
    nothing = (0.0,) * len(AMOUNTS)
    wrong = sum(
        any(abs(a - b) > TOLERANCE for a, b in zip(found.get(key, nothing), right.get(key, nothing), strict=True))
        for key in {*found, *right}
    )
    tx.connection().execute(delete(_TABLE))
    rows = [dict(zip(KEYS, key, strict=True)) | dict(zip(AMOUNTS, sums, strict=True)) for key, sums in right.items()]
    if rows:
        tx.connection().execute(insert(_TABLE), rows)
    tx.info.pop(HELD, None)
    return wrong
