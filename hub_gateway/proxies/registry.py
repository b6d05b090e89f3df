"""Which process proxy a kernelspec means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from traitlets import Dict, Type, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.errors import BadRequest
from hub_gateway.proxies.base import ProcessProxy
from hub_gateway.proxies.distributed import DistributedProxy
from hub_gateway.proxies.docker import DockerProxy
from hub_gateway.proxies.local import LocalProxy
from hub_gateway.proxies.swarm import SwarmProxy

if TYPE_CHECKING:
    from hub_gateway.identity.credentials import Credentials

__all__ = ["PROXIES", "Proxies"]

PROXIES: dict[str, type[ProcessProxy]] = {
    "local": LocalProxy,
    "distributed": DistributedProxy,
    "docker": DockerProxy,
    "docker-swarm": SwarmProxy,
}
"""The proxies of this package, by the name that `metadata.process_proxy.name` gives."""

# The last part of Enterprise Gateway's class names: kernelspecs written for it keep working.
ENTERPRISE_GATEWAY = {
    "LocalProcessProxy": "local",
    "DistributedProcessProxy": "distributed",
    "DockerProcessProxy": "docker",
    "DockerSwarmProcessProxy": "docker-swarm",
}


class Proxies(LoggingConfigurable):
    """The process proxies of this gateway, made when they are first used.

    `state_dir` is where proxies may keep what belongs to this gateway; `credentials` has tickets for their kernels.
    """

    default_proxy = Unicode(
        "local", help="Name of the process proxy for kernelspecs without `metadata.process_proxy`."
    ).tag(config=True)
    extra_proxies = Dict(
        value_trait=Type(klass=ProcessProxy),
        key_trait=Unicode(),
        help="""Further process proxies: names (or the class names that kernelspecs use) and classes.

        Example: `c.Proxies.extra_proxies = {"ours": "our_package.OurProxy"}`
        """,
    ).tag(config=True)

    def __init__(self, *, state_dir: str = "", credentials: Credentials | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state_dir = state_dir
        self.credentials = credentials
        self._made: dict[str, ProcessProxy] = {}

    def resolve(self, name: str | None) -> str:
        """The proxy that a kernelspec names, by our name or Enterprise Gateway's class. Raises `BadRequest`."""
        wanted = name or self.default_proxy
        if wanted in self.extra_proxies or wanted in PROXIES:
            return wanted
        module, _, last = wanted.rpartition(".")
        if module.startswith("enterprise_gateway.") and last in ENTERPRISE_GATEWAY:
            return ENTERPRISE_GATEWAY[last]
        known = ", ".join(sorted({*PROXIES, *self.extra_proxies}))
        raise BadRequest(
            f"The kernelspec names the process proxy {wanted!r}, which this gateway does not have ({known})."
        )

    def get(self, name: str) -> ProcessProxy:
        """The proxy of that name (of `resolve`). Raises `BadRequest`."""
        if name not in self._made:
            found = self.extra_proxies.get(name) or PROXIES.get(name)
            if found is None:
                raise BadRequest(f"This gateway no longer has the process proxy {name!r}.")
            made = self._made[name] = found(parent=self)
            made.credentials = self.credentials
            made.wanted = made.wanted or name == self.default_proxy or name in self.extra_proxies
        return self._made[name]

    def all(self) -> Iterator[tuple[str, ProcessProxy]]:
        """Every proxy that may hold kernels of this gateway."""
        for name in {*PROXIES, *self.extra_proxies}:
            yield name, self.get(name)

    async def close(self) -> None:
        """Release what the proxies hold."""
        for proxy in self._made.values():
            await proxy.close()
