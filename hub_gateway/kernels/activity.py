"""Tells the Hub that a user's kernels work, so that its idle-culler spares the server in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

from traitlets import Float, Integer
from traitlets.config import LoggingConfigurable

from hub_gateway.db.models import utcnow
from hub_gateway.deadlines import end
from hub_gateway.errors import GatewayError
from hub_gateway.kernels.service import KernelService
from hub_gateway.kernels.types import JSON, ExecutionState, KernelRecord, KernelStatus, isoformat

__all__ = ["ActivityReporter"]


class ActivityReporter(LoggingConfigurable):
    """Posts the newest activity of each user's kernels.

    `report(user, body)` does `POST users/:user/activity` with that body; it may raise `GatewayError`.
    """

    activity_seconds = Float(120.0, help="How often (seconds) kernels' activity is reported to the Hub; 0 never.").tag(
        config=True
    )
    concurrency = Integer(10, help="How many of these reports are on their way at once.").tag(config=True)

    def __init__(
        self,
        *,
        service: KernelService,
        report: Callable[[str, Mapping[str, JSON]], Awaitable[None]],
        on_swallowed: Callable[[str], None] = lambda where: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.service = service
        self._on_swallowed = on_swallowed
        self._post = report
        self._reported: dict[str, datetime] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to report, unless it is switched off."""
        if self.activity_seconds > 0:
            self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Stop reporting."""
        if self._task is not None:
            await end([self._task])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.activity_seconds)
            try:
                await self.report()
            except (GatewayError, OSError) as error:
                self._on_swallowed("activity")
                self.log.warning("Activity is not reported now: %s", error)
            except Exception:
                self._on_swallowed("activity")
                self.log.exception("Activity is not reported now, for a reason that nobody thought of")

    async def report(self) -> int:
        """Report what is new since the last time; for how many users."""
        store = self.service.store
        by_user: dict[str, dict[str | None, datetime]] = {}
        for record in map(self.service.overlaid, await store.mine()):
            if "/" in record.owner or record.status is not KernelStatus.RUNNING:
                continue  # services have no servers that could be culled
            servers = by_user.setdefault(record.owner, {})
            servers[record.hub_server] = max(_active(record), servers.get(record.hub_server, record.created_at))
        news = {user: servers for user, servers in by_user.items() if max(servers.values()) != self._reported.get(user)}
        slots = asyncio.Semaphore(self.concurrency)

        async def tell(user: str, servers: dict[str | None, datetime]) -> None:
            newest = max(servers.values())
            body: dict[str, JSON] = {"last_activity": isoformat(newest)}
            named: dict[str, JSON] = {
                name: {"last_activity": isoformat(at)} for name, at in servers.items() if name is not None
            }
            if named:
                body["servers"] = named
            async with slots:
                try:
                    await self._post(user, body)
                except GatewayError as error:
                    self._on_swallowed("activity")
                    self.log.warning(
                        "The Hub does not take the activity of %s: %s", user, error.message, extra={"user": user}
                    )
                else:
                    self._reported[user] = newest

        await asyncio.gather(*(tell(user, servers) for user, servers in news.items()))
        self._reported = {user: at for user, at in self._reported.items() if user in by_user}
        return len(news)


def _active(record: KernelRecord) -> datetime:
    """A kernel that computes is active now, however long ago it last said something."""
    return utcnow() if record.execution_state is ExecutionState.BUSY else record.last_activity
