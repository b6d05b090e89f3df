"""Amounts as people write them: `4`, `0.5`, `4G`, `512Mi`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hub_gateway.errors import BadRequest
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.types import Resource

__all__ = ["LARGEST", "amount", "cores", "devices", "memory", "rate", "resources_of", "shown"]

LARGEST = 2**53
"""Above this a double no longer knows every whole number, and no cluster has as much of anything."""

_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGTP]i?)?[bB]?\s*\Z")
_UNITS = {"": 1, **{unit: 1024**power for power, unit in enumerate("KMGTP", 1)}, "k": 1024}
SMALLEST_MEMORY = 2**20


def rate(what: str, value: object) -> float:
    """A finite number, from 0 to `LARGEST`, as it is written. Raises `BadRequest`."""
    if isinstance(value, str):
        found = _TEXT.match(value)
        if found is None or found[2]:
            raise BadRequest(f"{what} must be a number such as 2 or 0.5; {_short(value)} is none.")
        value = float(found[1])
    # An integer may be too large to be asked whether it is finite.
    odd = isinstance(value, float) and not math.isfinite(value)
    if odd or isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{what} must be a number such as 2 or 0.5; {_short(value)} is none.")
    if not 0 <= value <= LARGEST:
        raise BadRequest(f"{what} must not be negative, nor above 2^53; {_short(value)} is.")
    return float(value)


def cores(what: str, value: object) -> float:
    """Cores, to a thousandth (as Kubernetes counts them). Raises `BadRequest`."""
    return round(rate(what, value), 3)


def devices(what: str, value: object) -> int:
    """A whole number. Raises `BadRequest`."""
    found = rate(what, value)
    if found != int(found):
        raise BadRequest(f"{what} must be a whole number; {_short(value)} is not.")
    return int(found)


def memory(what: str, value: object) -> int:
    """Bytes: a number of them, or a text with a unit (`512M`, `4G`, `4Gi`; powers of 1024). Raises `BadRequest`.

    Less than 1 MiB is taken for a forgotten unit.
    """
    if isinstance(value, str):
        found = _TEXT.match(value)
        if found is None:
            raise BadRequest(f"{what} must be an amount of memory such as 512M or 4G; {_short(value)} is none.")
        value = float(found[1]) * _UNITS[(found[2] or "").removesuffix("i")]
    size = rate(what, value)
    if 0 < size < SMALLEST_MEMORY:
        raise BadRequest(f"{what} is {size:g} bytes, so a unit is missing; write it as 512M or 4G.")
    return int(size)


def amount(resource: Resource, what: str, value: object) -> float:
    """The amount of a limit, in the resource's base unit. Raises `BadRequest`."""
    if resource is Resource.MEMORY:
        return float(memory(what, value))
    if resource in (Resource.KERNELS, Resource.STARTING, Resource.GPU):
        return float(devices(what, value))
    return cores(what, value)


def resources_of(found: Mapping[str, Any], where: str) -> Resources:
    """Resources as a kernelspec writes them: `cpu`, `memory`, `gpu`, `gpu_model`. Raises `BadRequest`."""
    model = found.get("gpu_model", "")
    if not isinstance(model, str) or len(model) > 64:
        raise BadRequest(f"gpu_model of {where} must be a name of at most 64 characters.")
    return Resources(
        cpu=cores(f"cpu of {where}", found.get("cpu", 0)),
        memory=memory(f"memory of {where}", found.get("memory", 0)),
        gpu=devices(f"gpu of {where}", found.get("gpu", 0)),
        gpu_model=model,
    )


def shown(resource: Resource, value: float, gpu_model: str = "") -> str:
    """An amount with its unit, as people read it: `4 GPUs`, `1 kernel`, `16 GiB`, `2.5 core-hours`."""
    if resource is Resource.MEMORY:
        for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB")):
            if value >= 1024**power:
                return f"{value / 1024**power:.4g} {unit}"
        return f"{value:g} bytes"
    word = {
        Resource.KERNELS: "kernel",
        Resource.STARTING: "starting kernel",
        Resource.CPU: "core",
        Resource.GPU: f"{gpu_model} GPU".strip(),
        Resource.KERNEL_HOURS: "kernel-hour",
        Resource.CORE_HOURS: "core-hour",
        Resource.GPU_HOURS: "GPU-hour",
        Resource.COST: "cost unit",
    }[resource]
    number = f"{value:.6g}" if not resource.timed else f"{value:.4g}"
    return f"{number} {word}{'' if number == '1' else 's'}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
