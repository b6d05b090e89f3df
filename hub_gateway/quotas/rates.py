"""What one kernel takes of what a policy limits; asked by admission, the queue, enforcement and simulation alike.

A policy of which a kernel takes nothing does not concern that kernel, however much of it is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

from sqlalchemy.orm import Session as Transaction

from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.prices import FREE, Prices, all_prices
from hub_gateway.quotas.types import Policy, Resource

__all__ = ["EPSILON", "prices_at", "prices_of", "prices_then", "rate_of"]

EPSILON = 1e-6


def rate_of(policy: Policy, resources: Resources, prices: Prices = FREE) -> float:
    """What a kernel takes of a policy's resource: at one instant, or (of what is used up over time) in an hour."""
    if policy.resource in (Resource.KERNELS, Resource.STARTING, Resource.KERNEL_HOURS):
        return 1.0
    if policy.resource in (Resource.CPU, Resource.CORE_HOURS):
        return resources.cpu
    if policy.resource is Resource.MEMORY:
        return float(resources.memory)
    if policy.resource is Resource.COST:
        return prices.per_hour(resources.cpu, resources.memory, resources.gpu, resources.gpu_model)
    return float(resources.gpu) if policy.gpu_model in ("", resources.gpu_model) else 0.0


def prices_at(tx: Transaction, policies: Iterable[Policy], now: datetime) -> Prices:
    """The price list for what is launched at a moment. It is looked up only if one of these policies limits cost."""
    if not any(policy.resource is Resource.COST for policy in policies):
        return FREE
    return prices_then(all_prices(tx).values(), now)


def prices_then(known: Iterable[Prices], now: datetime) -> Prices:
    """The one of these lists that holds at a moment: the newest of those that are valid, as `prices.CURRENT` says."""
    valid = [
        (one.valid_from, one.version, one) for one in known if one.valid_from is not None and one.valid_from <= now
    ]
    return max(valid, key=lambda found: found[:2])[2] if valid else FREE


def prices_of(tx: Transaction, policies: Iterable[Policy]) -> Callable[[int], Prices]:
    """The price lists by their version. They are looked up only if one of these policies limits cost."""
    if not any(policy.resource is Resource.COST for policy in policies):
        return lambda version: FREE
    known = all_prices(tx)
    return lambda version: known.get(version, FREE)
