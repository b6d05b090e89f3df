"""Price lists: cost units per hour. A kernel is billed by the list that held at its launch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.orm import Session as Transaction

from hub_gateway.db.lock import lock
from hub_gateway.db.models import utcnow
from hub_gateway.db.tenancy import PriceList
from hub_gateway.errors import BadRequest
from hub_gateway.quotas.amounts import rate

__all__ = ["CURRENT", "FREE", "Prices", "all_prices", "set_prices"]

GIB = 2**30
CURRENT = func.coalesce(
    select(PriceList.version)
    .where(PriceList.valid_from <= bindparam("priced_at"))
    .order_by(PriceList.valid_from.desc(), PriceList.version.desc())
    .limit(1)
    .scalar_subquery(),
    0,
)
"""An expression: the version that holds at the moment `priced_at`, the newest of those that are valid."""
RATES = ("kernel_hour", "core_hour", "gib_hour", "gpu_hour")


@dataclass(frozen=True)
class Prices:
    """One list, in cost units per hour: for a kernel, a core, a GiB of memory, a GPU (by model where it has one)."""

    version: int
    valid_from: datetime | None = None
    kernel_hour: float = 0.0
    core_hour: float = 0.0
    gib_hour: float = 0.0
    gpu_hour: float = 0.0
    gpu_models: Mapping[str, float] = field(default_factory=dict)
    created_by: str = ""

    def per_hour(self, cpu: float, memory: int, gpu: int, gpu_model: str) -> float:
        """What one kernel costs in an hour."""
        return self.cost(1.0, cpu, memory / GIB, gpu, gpu_model)

    def cost(self, kernel_hours: float, core_hours: float, gib_hours: float, gpu_hours: float, gpu_model: str) -> float:
        """What use costs."""
        gpu_hour = self.gpu_models.get(gpu_model, self.gpu_hour)
        return (
            kernel_hours * self.kernel_hour
            + core_hours * self.core_hour
            + gib_hours * self.gib_hour
            + gpu_hours * gpu_hour
        )


FREE = Prices(0)
"""Before there is a price list, nothing costs anything."""


def _prices(row: PriceList) -> Prices:
    rates = {name: getattr(row, name) for name in RATES}
    return Prices(row.version, row.valid_from, **rates, gpu_models=dict(row.gpu_models), created_by=row.created_by)


def all_prices(tx: Transaction) -> dict[int, Prices]:
    """Every list, by version, and `FREE`."""
    return {0: FREE} | {row.version: _prices(row) for row in tx.scalars(select(PriceList).order_by(PriceList.version))}


def set_prices(tx: Transaction, actor: str, *, valid_from: datetime | None = None, **rates: Any) -> Prices:
    """Add a list, which holds for launches from `valid_from` (now) on. Raises `BadRequest`.

    `rates`: any of kernel_hour, core_hour, gib_hour, gpu_hour, and gpu_models (a price for each model).
    """
    unknown = set(rates) - {*RATES, "gpu_models"}
    if unknown:
        raise BadRequest(f"A price list has no {', '.join(sorted(unknown))}; it has {', '.join(RATES)}, gpu_models.")
    now = utcnow()
    if valid_from is not None and valid_from < now:
        raise BadRequest("A price list cannot begin in the past: what was launched then has its price.")
    models = rates.pop("gpu_models", None) or {}
    lock(tx)
    row = PriceList(
        version=(tx.execute(select(func.max(PriceList.version))).scalar_one_or_none() or 0) + 1,
        valid_from=valid_from or now,
        gpu_models={str(model): rate(f"The price of {model}", price) for model, price in models.items()},
        created_at=now,
        created_by=actor,
        **{name: rate(f"The price {name}", rates.get(name, 0)) for name in RATES},
    )
    tx.add(row)
    tx.flush()
    return _prices(row)
