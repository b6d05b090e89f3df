"""Nothing leaks: what carries our label on a cluster and belongs to no live kernel is ended."""

from __future__ import annotations

import asyncio
import logging
import time

from hub_gateway.errors import GatewayError
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from hub_gateway.proxies.base import ClusterObject, ProcessProxy
from hub_gateway.proxies.registry import Proxies

__all__ = ["Reaper"]


class Reaper:
    """Ends cluster objects that were seen without a kernel for `grace` seconds."""

    def __init__(
        self, store: KernelStore, proxies: Proxies, gateway_id: str, grace: float, log: logging.Logger
    ) -> None:
        self.store = store
        self.proxies = proxies
        self.gateway_id = gateway_id
        self.grace = grace
        self.log = log
        self._seen: dict[tuple[str, str, str], float] = {}

    async def sweep(self) -> None:
        """Look once at every cluster; one that cannot be asked is left for the next time."""
        for name, proxy in self.proxies.all():
            await self._sweep(name, proxy)

    async def _sweep(self, name: str, proxy: ProcessProxy) -> None:
        try:
            objects = await proxy.owned(self.gateway_id)
            # Read after the cluster was: an object without a row now has had one, or never will.
            known = await self.store.some({one.kernel_id for one in objects})
            rows = {key: record for key, record in known.items() if record.live and record.proxy == name}
            leftovers = [one for one in objects if not _belongs(proxy, one, rows.get(one.kernel_id))]
            await self._end(name, proxy, leftovers)
        except (GatewayError, OSError, asyncio.TimeoutError) as error:
            self.log.warning("Proxy %s cannot be searched for leftovers: %s", name, error)

    async def _end(self, name: str, proxy: ProcessProxy, leftovers: list[ClusterObject]) -> None:
        now = time.monotonic()
        keys = {(name, one.kernel_id, repr(one.state)): one for one in leftovers}
        self._seen = {key: at for key, at in self._seen.items() if key[0] != name or key in keys}
        for key, leftover in keys.items():
            if now - self._seen.setdefault(key, now) >= self.grace:
                self.log.warning("Ending a leftover of kernel %s: %s", leftover.kernel_id, leftover.description)
                await proxy.terminate(leftover.state)


def _belongs(proxy: ProcessProxy, found: ClusterObject, record: KernelRecord | None) -> bool:
    if record is None:
        return False
    # While it is launched, the object may be ahead of the row.
    launching = record.status is KernelStatus.STARTING and record.registration is None
    return launching or proxy.same(dict(record.proxy_state), found.state)
