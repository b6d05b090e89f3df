"""What somebody held by day, beside their limits."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from hub_gateway.quotas.explain import LimitView
from hub_gateway.quotas.reports import Report, Row
from hub_gateway.quotas.types import Counts, Resource
from hub_gateway.web.held import held_by_day

START = datetime(2030, 1, 1, tzinfo=timezone.utc)
NOW = START + timedelta(days=2, hours=6)


def limit(policy: str, hard: float | None, resource: Resource = Resource.KERNELS, **more: Any) -> LimitView:
    usual: dict[str, Any] = {"gpu_model": "", "object": "any", "counts": Counts.EACH, "subject": "everyone"}
    rest: dict[str, Any] = {"window": "now", "soft": None, "burst": None, "used": 0.0}
    return LimitView(policy, resource, hard=hard, **{**usual, **rest, **more})


def by_day(*rows: Row) -> Report:
    return Report("day", START, NOW, rows, Row("total", 0, 0, 0, 0, 0, 0), "units")


def test_hours_of_a_day_are_a_mean_over_that_day() -> None:
    rows = (Row("2030-01-01", 2, 48.0, 12.0, 96.0, 0.0, 0.0), Row("2030-01-03", 1, 3.0, 6.0, 0.0, 0.0, 0.0))
    limits = [limit("a", 4), limit("memory", 8 * 2**30, Resource.MEMORY)]
    held = held_by_day(by_day(*rows), limits, NOW)
    assert [(one.title, one.limit) for one in held.resources] == [("Kernels", 4), ("Memory (GiB)", 8)]
    assert (held.first, held.last) == ("2030-01-01", "2030-01-03")
    assert held.days == (
        ("2030-01-01", (2.0, 4.0)),
        ("2030-01-02", (0.0, 0.0)),
        ("2030-01-03", (0.5, 0.0)),  # six hours of this day are over
    )


def test_only_limits_that_compare_are_drawn_and_the_lowest_counts() -> None:
    limits = [
        limit("high", 9),
        limit("low", 2),
        limit("none", None),
        limit("some", 1, object="kernelspec:r"),
        limit("all", 1, counts=Counts.TOGETHER),
        limit("hours", 1, Resource.KERNEL_HOURS),
        limit("model", 1, Resource.GPU, gpu_model="A100"),
    ]
    held = held_by_day(by_day(), limits, NOW)
    assert [(one.title, one.policy) for one in held.resources] == [("Kernels", "low")]
    assert not held_by_day(by_day(), [], NOW).resources
