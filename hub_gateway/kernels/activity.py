"""Tells the Hub that a user's kernels work, so that its idle-culler spares the server in front of them."""

from __future__ import annotations

import asyncio
import time
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

AGAIN_SECONDS = 3600.0
"""After how long a server that the Hub did not know is named again: there may be one of that name by then."""


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
        self._unknown: dict[tuple[str, str], float] = {}
        """Servers (with their users) that the Hub did not know, and when: kernels outlive who started them."""
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
            async with slots:
                try:
                    await self._tell(user, servers)
                except GatewayError as error:
                    self._on_swallowed("activity")
                    said = (user, error.message)
                    self.log.warning("The Hub does not take the activity of %s: %s", *said, extra={"user": user})
                else:
                    self._reported[user] = max(servers.values())

        await asyncio.gather(*(tell(user, servers) for user, servers in news.items()))
        self._reported = {user: at for user, at in self._reported.items() if user in by_user}
        self._unknown = {key: at for key, at in self._unknown.items() if at > time.monotonic() - AGAIN_SECONDS}
        return len(news)

    async def _tell(self, user: str, servers: Mapping[str | None, datetime]) -> None:
        """Report a user's activity. A Hub that does not know one of the servers takes nothing of what names it."""
        named: dict[str, JSON] = {
            name: {"last_activity": isoformat(at)}
            for name, at in servers.items()
            if name is not None and (user, name) not in self._unknown
        }
        body: dict[str, JSON] = {"last_activity": isoformat(max(servers.values()))}
        try:
            await self._post(user, {**body, "servers": named} if named else body)
        except GatewayError:
            if not named:
                raise
            await self._post(user, body)  # raises where it is the Hub that is away
            for name, active in named.items():
                try:
                    await self._post(user, {"servers": {name: active}})
                except GatewayError as error:
                    self._unknown[user, name] = time.monotonic()
                    said = (name, user, error.message)
                    self.log.info("The Hub knows no server %r of %s: %s", *said, extra={"user": user})


def _active(record: KernelRecord) -> datetime:
    """A kernel that computes is active now, however long ago it last said something."""
    return utcnow() if record.execution_state is ExecutionState.BUSY else record.last_activity
