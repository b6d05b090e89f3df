"""What somebody held day by day, beside the limits of it: for the page of one's limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from hub_gateway.quotas.prices import GIB
from hub_gateway.quotas.types import Counts, Resource

if TYPE_CHECKING:
    from hub_gateway.quotas.explain import LimitView
    from hub_gateway.quotas.reports import Report

__all__ = ["Held", "HeldResource", "held_by_day"]

MEASURES: dict[Resource, tuple[str, str, float]] = {
    Resource.KERNELS: ("Kernels", "kernel_hours", 1.0),
    Resource.CPU: ("Cores", "core_hours", 1.0),
    Resource.MEMORY: ("Memory (GiB)", "gib_hours", GIB),
    Resource.GPU: ("GPUs", "gpu_hours", 1.0),
}
"""Resource that is held: its title, what the ledger has of it, and how many base units one of the title's has."""


@dataclass(frozen=True)
class HeldResource:
    """One resource that is limited: what is drawn of it."""

    title: str
    policy: str
    limit: float
    """The lowest limit, in the unit of the title."""


@dataclass(frozen=True)
class Held:
    """A line for each day, oldest first: the day, and the mean of each resource over that day's hours."""

    first: str
    last: str
    resources: tuple[HeldResource, ...]
    days: tuple[tuple[str, tuple[float, ...]], ...]


def held_by_day(by_day: Report, limits: Sequence[LimitView], now: datetime) -> Held:
    """The mean held on each day of a report, of every resource on which somebody has a limit of their own.

    A limit that is about some kernels only, that is shared, or that is over a time, is not compared.
    """
    lowest: dict[Resource, LimitView] = {}
    for view in limits:
        if view.resource not in MEASURES or view.hard is None or view.object != "any" or view.gpu_model:
            continue
        if view.counts is Counts.EACH and (
            view.resource not in lowest or view.hard < (lowest[view.resource].hard or 0)
        ):
            lowest[view.resource] = view
    resources = [one for one in MEASURES if one in lowest]
    rows = {row.key: row for row in by_day.rows}
    days = []
    day = by_day.start.replace(hour=0, minute=0, second=0, microsecond=0)
    while day < now:
        hours = max(min(now - day, timedelta(days=1)).total_seconds() / 3600, 1 / 60)
        row = rows.get(f"{day:%Y-%m-%d}")
        means = tuple(0.0 if row is None else getattr(row, MEASURES[one][1]) / hours for one in resources)
        days.append((f"{day:%Y-%m-%d}", means))
        day += timedelta(days=1)
    return Held(
        days[0][0] if days else "",
        days[-1][0] if days else "",
        tuple(
            HeldResource(MEASURES[one][0], lowest[one].policy, (lowest[one].hard or 0.0) / MEASURES[one][2])
            for one in resources
        ),
        tuple(days),
    )
