"""What a kernel takes: what its kernelspec says, and what its user wishes within the kernelspec's bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hub_gateway.errors import BadRequest, LaunchRefused
from hub_gateway.kernels.types import Resources
from hub_gateway.quotas.amounts import cores, devices, memory, resources_of, shown
from hub_gateway.quotas.types import Resource

__all__ = ["Bounds", "bounds_of", "wished"]

KEYS = ("cpu", "memory", "gpu", "gpu_model", "queue")
WISHES = ("KERNEL_CPUS", "KERNEL_MEMORY", "KERNEL_GPUS", "KERNEL_GPU_MODEL", "KERNEL_QUEUE")
"""The variables by which a client asks for something else; Enterprise Gateway's names."""


NOTHING = Resources()


@dataclass(frozen=True)
class Bounds:
    """A kernelspec's resources: the usual ones, the most that may be wished for, the least that it needs.

    They stand in `metadata.hub_gateway` as `resources`, `resources_max`, `resources_min`, each with `cpu` (cores),
    `memory` (such as "4G"), `gpu`; `resources` also with `gpu_model` and `queue`. What `resources_max` does not name
    cannot be wished for beyond the usual. `gpu_models` and `queues` list what may be chosen.
    """

    usual: Resources = field(default_factory=Resources)
    most: Resources = field(default_factory=Resources)
    least: Resources = field(default_factory=Resources)
    queue: str = ""
    gpu_models: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()


def bounds_of(options: Mapping[str, Any], default: Resources = NOTHING) -> Bounds:
    """The bounds that a kernelspec's `metadata.hub_gateway` sets; cores and memory of `default` where it states none.

    Raises `BadRequest`.
    """

    def part(name: str) -> dict[str, Any]:
        found = options.get(name) or {}
        if not isinstance(found, Mapping):
            raise BadRequest(f"metadata.hub_gateway.{name} is not an object.")
        unknown = set(found) - set(KEYS)
        if unknown:
            raise BadRequest(
                f"metadata.hub_gateway.{name} has no {', '.join(sorted(unknown))}; it has {', '.join(KEYS)}."
            )
        return dict(found)

    def names(name: str) -> tuple[str, ...]:
        found = options.get(name) or []
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise BadRequest(f"metadata.hub_gateway.{name} is not a list of names.")
        return tuple(found)

    written = part("resources")
    highest = part("resources_max")
    least = resources_of(part("resources_min"), "resources_min")
    for name in ("cpu", "memory"):
        if not written.get(name) and (amount := getattr(default, name)):
            amount = max(amount, getattr(least, name))
            written[name] = min(amount, getattr(resources_of(highest, "resources_max"), name) or amount)
    usual = resources_of(written, "resources")
    most = resources_of({**written, **highest}, "resources_max")
    for name in ("cpu", "memory", "gpu"):
        low, normal, high = (getattr(one, name) for one in (least, usual, most))
        if not low <= normal <= high:
            raise BadRequest(
                f"{name}: resources_min ({low}), resources ({normal}), resources_max ({high}) must ascend."
            )
    queue = written.get("queue", "")
    if not isinstance(queue, str) or len(queue) > 255:
        raise BadRequest("queue of resources must be a name.")
    return Bounds(usual, most, least, queue, names("gpu_models"), names("queues"))


def wished(bounds: Bounds, kernelspec: str, env: Mapping[str, str]) -> tuple[Resources, str]:
    """What a client asks for by its environment, and in which queue. Raises `BadRequest`, `LaunchRefused`."""
    taken = bounds.usual
    if env.get("KERNEL_CPUS"):
        taken = replace(taken, cpu=cores("KERNEL_CPUS", env["KERNEL_CPUS"]))
    if env.get("KERNEL_MEMORY"):
        taken = replace(taken, memory=memory("KERNEL_MEMORY", env["KERNEL_MEMORY"]))
    if env.get("KERNEL_GPUS"):
        taken = replace(taken, gpu=devices("KERNEL_GPUS", env["KERNEL_GPUS"]))
    if env.get("KERNEL_GPU_MODEL"):
        model = _chosen("GPU model", env["KERNEL_GPU_MODEL"], kernelspec, bounds.gpu_models, taken.gpu_model)
        taken = replace(taken, gpu_model=model)
    queue = bounds.queue
    if env.get("KERNEL_QUEUE"):
        queue = _chosen("queue", env["KERNEL_QUEUE"], kernelspec, bounds.queues, bounds.queue)
    for resource, name in ((Resource.CPU, "cpu"), (Resource.MEMORY, "memory"), (Resource.GPU, "gpu")):
        asked, least, most, normal = (getattr(one, name) for one in (taken, bounds.least, bounds.most, bounds.usual))
        if not asked and normal and resource is not Resource.GPU:
            # It would count for nothing, and resource managers take it for no limit at all.
            raise LaunchRefused(
                f"You ask for {shown(resource, asked)}, with which no kernel of {kernelspec} can run; ask for more, or "
                f"leave it out to get the usual {shown(resource, normal)}."
            )
        if asked > most:
            raise LaunchRefused(
                f"You ask for {shown(resource, asked)}, and a kernel of {kernelspec} may have {shown(resource, most)} "
                "at most; ask for less, or choose another kernel."
            )
        if asked < least:
            raise LaunchRefused(
                f"You ask for {shown(resource, asked)}, and a kernel of {kernelspec} needs {shown(resource, least)} "
                "at least; ask for more."
            )
    return taken, queue


def _chosen(what: str, wish: str, kernelspec: str, allowed: tuple[str, ...], usual: str) -> str:
    if wish != usual and wish not in allowed:
        known = ", ".join(sorted({*allowed, usual} - {""})) or "none"
        raise LaunchRefused(f"The {what} {wish[:64]!r} cannot be chosen for {kernelspec}; possible: {known}.")
    return wish
