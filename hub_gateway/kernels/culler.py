"""Stops kernels that nobody uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any

from traitlets import Bool, Float
from traitlets.config import LoggingConfigurable

from hub_gateway.db.models import utcnow
from hub_gateway.deadlines import end
from hub_gateway.errors import GatewayError
from hub_gateway.kernels.service import KernelService
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus

__all__ = ["Culler"]


class Culler(LoggingConfigurable):
    """Looks for idle kernels that this process drives, and stops them."""

    cull_idle_timeout = Float(
        0.0,
        help="""After how long (seconds) without activity a kernel is stopped; 0 never.

        Activity is a message from a client or an output of the kernel, also between cells. A kernelspec has its own
        limit in `metadata.hub_gateway.cull_idle_timeout` (0: its kernels are never culled).
        """,
    ).tag(config=True)
    cull_interval = Float(60.0, help="How often (seconds) idle kernels are looked for.").tag(config=True)
    cull_connected = Bool(False, help="Whether kernels are culled that have a notebook (a websocket) open.").tag(
        config=True
    )
    cull_busy = Bool(False, help="Whether kernels are culled that are executing something.").tag(config=True)

    def __init__(
        self, *, service: KernelService, on_swallowed: Callable[[str], None] = lambda where: None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.service = service
        self._on_swallowed = on_swallowed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            await end([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.cull_interval)
            try:
                await self.cull()
            except (GatewayError, OSError) as error:
                self._on_swallowed("culler")
                self.log.warning("Idle kernels are not looked for now: %s", error)
            except Exception:
                self._on_swallowed("culler")
                self.log.exception("Idle kernels are not looked for now, for a reason that nobody thought of")

    async def cull(self) -> list[str]:
        """Stop what is idle now; the ids."""
        now = utcnow()
        store = self.service.store
        idle = [record for record in map(self.service.overlaid, await store.mine()) if self.is_idle(record, now)]
        for record in idle:
            self.log.info(
                "Culling kernel %s of %s: no activity since %s",
                record.id,
                record.owner,
                record.last_activity.isoformat(),
            )
        # One that cannot be stopped now is found again; the others are not held up by it.
        for failed in await asyncio.gather(*(self.service.stop(record.id) for record in idle), return_exceptions=True):
            if isinstance(failed, BaseException):
                raise failed
        return [record.id for record in idle]

    def is_idle(self, record: KernelRecord, now: datetime) -> bool:
        """Whether a kernel is to be culled."""
        limit = self.cull_idle_timeout if record.cull_idle_timeout is None else record.cull_idle_timeout
        if limit <= 0 or record.status is not KernelStatus.RUNNING:
            return False
        if record.connections and not self.cull_connected:
            return False
        if record.execution_state is not ExecutionState.IDLE and not self.cull_busy:
            return False
        return (now - record.last_activity).total_seconds() > limit
