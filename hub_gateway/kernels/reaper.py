"""Nothing leaks: what carries our label on a cluster and belongs to no live kernel is ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from hub_gateway.deadlines import within
from hub_gateway.errors import GatewayError
from hub_gateway.kernels.store import KernelStore
from hub_gateway.kernels.types import KernelRecord, KernelStatus
from hub_gateway.proxies.base import ClusterObject, ProcessProxy
from hub_gateway.proxies.registry import Proxies

__all__ = ["Reaper"]

AT_ONCE = 8
"""How many leftovers of one cluster are ended at once: those that take their time hold up few others."""


class Reaper:
    """Ends cluster objects that were seen without a kernel for `grace` seconds.

    A cluster may take `timeout` seconds to list its objects, and as long again to end each of them. What goes wrong
    with one object is logged, told to `on_swallowed`, and tried again by the next sweep.
    """

    def __init__(
        self,
        store: KernelStore,
        proxies: Proxies,
        gateway_id: str,
        grace: float,
        log: logging.Logger,
        *,
        timeout: float = 60.0,
        on_swallowed: Callable[[str], None] = lambda where: None,
    ) -> None:
        self.store = store
        self.proxies = proxies
        self.gateway_id = gateway_id
        self.grace = grace
        self.log = log
        self.timeout = timeout
        self._on_swallowed = on_swallowed
        self._seen: dict[tuple[str, str, str], float] = {}

    async def sweep(self) -> None:
        """Look once at every cluster; one that cannot be asked is left for the next time."""
        await asyncio.gather(*(self.sweep_one(name) for name, _ in self.proxies.all()))

    async def sweep_one(self, name: str) -> None:
        """Look once at one cluster, which is the affair of its proxy alone."""
        proxy = self.proxies.get(name)
        try:
            objects = await within(proxy.owned(self.gateway_id), self.timeout)
        except (GatewayError, OSError, asyncio.TimeoutError) as error:
            self._on_swallowed("reaper")
            self.log.warning("Proxy %s cannot be searched for leftovers: %s", name, _said(error), extra={"proxy": name})
            return
        # Read after the cluster was: an object without a row now has had one, or never will.
        known = await self.store.some({one.kernel_id for one in objects})
        rows = {key: record for key, record in known.items() if record.live and record.proxy == name}
        leftovers = [one for one in objects if not _belongs(proxy, one, rows.get(one.kernel_id))]
        await self._end(name, proxy, [_with_owner(one, known.get(one.kernel_id)) for one in leftovers])

    async def _end(self, name: str, proxy: ProcessProxy, leftovers: list[ClusterObject]) -> None:
        now = time.monotonic()
        keys = {(name, one.kernel_id, repr(one.state)): one for one in leftovers}
        self._seen = {key: at for key, at in self._seen.items() if key[0] != name or key in keys}
        due = [one for key, one in keys.items() if now - self._seen.setdefault(key, now) >= self.grace]
        slots = asyncio.Semaphore(AT_ONCE)

        async def end(leftover: ClusterObject) -> None:
            async with slots:
                what = (leftover.kernel_id, leftover.description)
                self.log.warning("Ending a leftover of kernel %s: %s", *what, extra=_about(name, leftover))
                await within(proxy.terminate(leftover.state), self.timeout)

        for leftover, error in zip(due, await asyncio.gather(*map(end, due), return_exceptions=True), strict=True):
            if isinstance(error, Exception):
                self._on_swallowed("reaper")
                what = (leftover.kernel_id, leftover.description, _said(error))
                self.log.warning(
                    "A leftover of kernel %s (%s) is not ended: %s",
                    *what,
                    exc_info=_defect(error),
                    extra=_about(name, leftover),
                )


def _about(proxy: str, found: ClusterObject) -> dict[str, str]:
    return {"kernel_id": found.kernel_id, "proxy": proxy}


def _said(error: Exception) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "the cluster does not answer in time"
    return str(error) or type(error).__name__


def _defect(error: Exception) -> Exception | None:
    return None if isinstance(error, GatewayError | OSError | asyncio.TimeoutError) else error


def _with_owner(found: ClusterObject, record: KernelRecord | None) -> ClusterObject:
    """With whose principal it runs, which only the kernel's row knows: to end it may take a ticket of theirs."""
    if record is None or record.principal is None or record.unix_user != found.state.get("user"):
        return found
    return replace(found, state={**found.state, "principal": record.principal})


def _belongs(proxy: ProcessProxy, found: ClusterObject, record: KernelRecord | None) -> bool:
    if record is None:
        return False
    # While it is launched, the object may be ahead of the row.
    launching = record.status is KernelStatus.STARTING and record.registration is None
    return launching or proxy.same(dict(record.proxy_state), found.state)
