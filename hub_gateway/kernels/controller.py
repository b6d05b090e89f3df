"""The controller: hears that something changed, and has it reconciled.

It holds this process's leases, relays and work queue, and the loops that make up for whatever was
missed: a change that nobody told us about is found by the next scan.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from traitlets import Float, Integer, Unicode
from traitlets.config import LoggingConfigurable

from hub_gateway.db.engine import Database
from hub_gateway.db.models import utcnow
from hub_gateway.db.secrets import Vault
from hub_gateway.deadlines import end, within
from hub_gateway.errors import GatewayError
from hub_gateway.kernels.leases import Leases
from hub_gateway.kernels.links import Links
from hub_gateway.kernels.reaper import Reaper
from hub_gateway.kernels.reconcile import Exit, Reconciler, Timing, state_of, with_stderr
from hub_gateway.kernels.store import Activity, KernelStore, LinkFacts, number, storable
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus, KernelTarget, Registration
from hub_gateway.kernels.waiting import WaitingRequests
from hub_gateway.kernels.workqueue import WorkQueue
from hub_gateway.proxies.base import AgentSettings, Phase, PhaseReport
from hub_gateway.proxies.registry import Proxies
from hub_gateway.quotas.admission import Admission

if TYPE_CHECKING:
    from hub_gateway.link.relay import KernelRelay

__all__ = ["SAME_MOMENT", "Controller"]

OPEN_SECONDS = 10.0
"""How often other replicas are told which of their kernels are open here; less than any sensible limit of a culler."""
SAME_MOMENT = timedelta(seconds=1)
"""Agents tell the age of the last activity, so the moment that comes out of it varies by the way it took."""
_BEGUN = (KernelStatus.QUEUED, KernelStatus.STARTING, KernelStatus.RUNNING)


@runtime_checkable
class Watching(Protocol):
    """A process proxy that notices by itself when an agent ends, before it is asked."""

    on_ended: Callable[[str], None]
    """Told the kernel's id, on the event loop."""


class Controller(LoggingConfigurable):
    """Drives the kernels of one gateway process from their status to their target.

    `make_relay(kernel_id)` makes an unlinked `KernelRelay`. `instance` is this process's id, `replica`
    the name that stays over restarts. `service_url` is where agents reach this gateway, prefix included.
    """

    start_seconds = Float(
        60.0,
        help="""How long (seconds) a kernel may take from its launch until it answers; then it has failed.

        The time begins anew whenever the launch tells of progress, as while an image is fetched. It
        holds for a resource manager that does not answer, too: the launch is broken off. What the kernel
        reserved is given back when it is certain that nothing of it runs. A kernelspec may have its own time
        (`metadata.hub_gateway.launch_timeout`).
        """,
    ).tag(config=True)
    shutdown_seconds = Float(
        5.0, help="How long (seconds) a kernel may take to end after shutdown_request and again after SIGTERM."
    ).tag(config=True)
    orphan_seconds = Float(
        3600.0,
        help="""After how long (seconds) without any gateway an agent ends its kernel and itself.

        The price of a long one is a kernel that nobody can reach for that time after its record was lost;
        of a short one, kernels lost in a long outage of the gateway.
        """,
    ).tag(config=True)
    session_seconds = Float(
        86400.0, help="How long (seconds) an agent keeps the place of a client that is away, and its output."
    ).tag(config=True)
    ring_bytes = Integer(
        256 * 2**20,
        help="""How much output (bytes) an agent keeps, at most, for clients that are away or slow.

        Memory of the kernel's node, used only as far as there is such output. Beyond it the oldest `stream` and
        display messages give way to a notice; replies, status, errors and comm messages stay.
        """,
    ).tag(config=True)
    ring_messages = Integer(1_000_000, help="How many messages an agent keeps, see `ring_bytes`.").tag(config=True)
    window_bytes = Integer(
        4 * 2**20, help="How much (bytes) may be on its way from an agent to a gateway and not processed."
    ).tag(config=True)
    stderr_bytes = Integer(16 * 2**10, help="How much of a kernel's last stderr (bytes) is kept.").tag(config=True)
    log_bytes = Integer(
        16 * 2**20,
        help="""How much (bytes) is kept of what a kernel and its agent write to stdout and stderr.

        It lies in two files, `kernel.log` and `kernel.log.1`, in the kernel's runtime directory (for local kernels
        below `LocalProxy.runtime_root`); the older one is dropped when the newer one has half of this. What a cell
        prints does not go there. Where a resource manager keeps the log itself, its own limits hold.
        """,
    ).tag(config=True)
    restart_limit = Integer(
        5, help="How often in a row a kernel that dies is restarted; one that lived for 10 seconds counts anew."
    ).tag(config=True)
    lease_seconds = Float(
        30.0, help="After how long (seconds) another replica takes over the kernels of one that is silent."
    ).tag(config=True)
    poll_seconds = Float(
        10.0, help="How often (seconds) resource managers are asked about kernels that do not speak for themselves."
    ).tag(config=True)
    scan_seconds = Float(
        2.0, help="How often (seconds) the database is searched for work that nobody told this process about."
    ).tag(config=True)
    flush_seconds = Float(
        3.0, help="How often (seconds), at most, activity of kernels is written to the database."
    ).tag(config=True)
    reap_seconds = Float(
        60.0,
        help="""How often (seconds) resource managers are searched for objects without a kernel.

        A resource manager may take as long again to answer, and to end each such object; one that takes longer is
        asked again the next time. Each is searched by itself, so none keeps another from being cleaned up.
        """,
    ).tag(config=True)
    reap_grace_seconds = Float(30.0, help="How long (seconds) such an object must be seen before it is ended.").tag(
        config=True
    )
    failed_seconds = Float(
        3600.0,
        help="How long (seconds) a failed kernel stays listed as `dead`, with its message, if nobody deletes it.",
    ).tag(config=True)
    history_seconds = Float(30 * 86400.0, help="How long (seconds) the record of a stopped kernel is kept.").tag(
        config=True
    )
    workers = Integer(
        64,
        help="""How many kernels of one process proxy are started, stopped or looked after at once.

        Each proxy has as many of its own, so a resource manager that is slow or dead holds up its own kernels alone.
        """,
    ).tag(config=True)
    listen_address = Unicode(
        "127.0.0.1", help="Address on which agents listen, where their proxy does not know better."
    ).tag(config=True)

    def __init__(
        self,
        *,
        db: Database,
        vault: Vault,
        proxies: Proxies,
        make_relay: Callable[[str], KernelRelay],
        instance: str,
        replica: str,
        service_url: str = "",
        admission: Admission | None = None,
        on_swallowed: Callable[[str], None] = lambda where: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.store = KernelStore(db, vault, instance=instance, lease_seconds=self.lease_seconds, admission=admission)
        self.leases = Leases(self.store, replica=replica)
        self.waiting = WaitingRequests(db, vault, on_swallowed)
        self.links = Links(make_relay, self._event, self.store.link_facts, self._unlinked, self._route, self.waiting)
        self.proxies = proxies
        self.service_url = service_url
        self.gateway_id = ""
        self._on_swallowed = on_swallowed
        self._reconciler = Reconciler(
            self.store,
            self.leases,
            self.links,
            self.proxies,
            agent=self._agent_settings,
            timing=Timing(start=self.start_seconds, stop=2 * self.shutdown_seconds + 2),
            log=self.log,
        )
        self._reaper: Reaper | None = None
        self._proxy_of: dict[str, str] = {}
        self._queue = WorkQueue(
            self._handle,
            workers=self.workers,
            lane=lambda kernel_id: self._proxy_of.get(kernel_id, ""),
            on_error=self._failed,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._changed: dict[str, asyncio.Event] = {}
        self._written: dict[str, Activity] = {}
        self._tell_open_at = 0.0
        self._looking: set[asyncio.Task[None]] = set()
        self._closing = False

    # Life

    async def start(self, *, sole: bool = False) -> None:
        """Take over what nobody drives, link to what runs, and begin. Returns when running kernels are linked.

        `sole` says that no earlier process of this replica lives (its lock is ours).
        """
        self.gateway_id = self._reconciler.gateway_id = await self.store.gateway_id()
        self._reaper = Reaper(
            self.store,
            self.proxies,
            self.gateway_id,
            self.reap_grace_seconds,
            self.log,
            timeout=self.reap_seconds,
            on_swallowed=self._on_swallowed,
        )
        for _, proxy in self.proxies.all():
            if isinstance(proxy, Watching):
                proxy.on_ended = self._ended
        taken = await self.leases.open(sole=sole)
        await self._relink(set(taken))
        self._queue.start()
        for kernel_id in taken:
            self._queue.add(kernel_id)
        self._tasks = [
            asyncio.ensure_future(self._every(seconds, name, call))
            for name, seconds, call in (
                ("renew", self.lease_seconds / 3, self.leases.renew),
                ("scan", self.scan_seconds, self._scan),
                ("poll", self.poll_seconds, self._poll),
                ("flush", self.flush_seconds, self.flush),
                ("tidy", self.reap_seconds, self._tidy),
                # Each by itself: a cluster that does not answer keeps nobody from cleaning up another.
                *(("reap", self.reap_seconds, self._sweep(name)) for name, _ in self.proxies.all()),
            )
        ]

    async def close(self) -> None:
        """Stop driving; kernels go on. Leases are let go, so that a successor need not wait."""
        self._closing = True
        await end([*self._tasks, *self._looking])
        await self._queue.close()
        await self.waiting.close()
        try:
            await self.flush()
            await self.leases.close()
        except GatewayError as error:
            self.log.warning("The leases are left to run out: %s", error.hint or error)
        self.links.close()
        await self.proxies.close()

    # What others call

    def changed(self, kernel_id: str, *, stop: bool = False, proxy: str = "") -> None:
        """Something about this kernel changed; `stop` where it is no longer wanted, `proxy` where that is at hand."""
        if proxy:
            self._proxy_of[kernel_id] = proxy
        if stop:
            self._reconciler.interrupt_launch(kernel_id)
        self._queue.add(kernel_id)

    def renewed(self, kernel_id: str) -> None:
        """A failed kernel was admitted again: forget its earlier life, and start it."""
        self._reconciler.forget(kernel_id)
        relay = self.links.existing(kernel_id)
        if relay is not None:
            relay.renew()
        self._queue.add(kernel_id)

    async def wait(
        self, kernel_id: str, until: Callable[[KernelRecord | None], bool], timeout: float
    ) -> KernelRecord | None:
        """Wait until the row of a kernel satisfies `until`; the row then, or when the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            event = self._changed.setdefault(kernel_id, asyncio.Event())
            record = await self.store.get(kernel_id)
            left = deadline - time.monotonic()
            if until(record) or left <= 0:
                return record
            try:
                # Another replica may be the one that changes it, so it is read again in any case.
                await within(event.wait(), min(left, 1.0))
            except asyncio.TimeoutError:
                continue

    async def flush(self) -> None:
        """Write what relays saw since the last time."""
        seen = []
        for kernel_id, relay in self.links:
            if not (relay.linked and relay.ready):
                continue
            now = Activity(kernel_id, relay.execution_state, relay.last_activity, relay.connections)
            before = self._written.get(kernel_id)
            if (
                before is None
                or replace(before, last_activity=now.last_activity) != now
                or (now.last_activity - before.last_activity >= SAME_MOMENT)
            ):
                seen.append(now)
        await self.store.write_activity(seen)
        if time.monotonic() >= self._tell_open_at:
            self._tell_open_at = time.monotonic() + OPEN_SECONDS
            await self.store.write_open([kernel_id for kernel_id, relay in self.links if relay.connections])
        self._written = {
            one.kernel_id: one for one in (*self._written.values(), *seen) if self.links.existing(one.kernel_id)
        }

    # Inside

    async def _handle(self, kernel_id: str) -> float | None:
        if kernel_id not in self._proxy_of:
            record = await self.store.get(kernel_id)
            if record is not None and record.live:
                self._proxy_of[kernel_id] = record.proxy
                return 0.0  # among those of its own proxy, for what it does may take long
        try:
            return await self._reconciler.step(kernel_id)
        finally:
            event = self._changed.pop(kernel_id, None)
            if event is not None:
                event.set()

    def _failed(self, kernel_id: str, error: Exception) -> None:
        self._on_swallowed("controller")
        about = self._about(kernel_id)
        if isinstance(error, GatewayError):
            said = (kernel_id, error.message, error.hint or error.code)
            self.log.warning("Kernel %s: %s (%s); trying again", *said, extra=about)
        elif isinstance(error, asyncio.TimeoutError):
            self.log.warning(
                "Kernel %s: its resource manager does not answer in time; trying again", kernel_id, extra=about
            )
        else:
            self.log.error("Kernel %s: unexpected %r; trying again", kernel_id, error, exc_info=error, extra=about)

    def _about(self, kernel_id: str) -> dict[str, str | None]:
        return {"kernel_id": kernel_id, "proxy": self._proxy_of.get(kernel_id)}

    def _ended(self, kernel_id: str) -> None:
        """A proxy saw an agent end: it is asked at once what that means for the kernel."""
        if not self._closing:
            task = asyncio.ensure_future(self._look_at(kernel_id))
            self._looking.add(task)
            task.add_done_callback(self._looking.discard)

    async def _look_at(self, kernel_id: str) -> None:
        try:
            record = await self.store.get(kernel_id)
            if record is not None:
                await self._poll_some([record])
        except GatewayError as error:
            self._on_swallowed("poll")
            self.log.info(
                "Kernel %s is looked at by the next poll: %s", kernel_id, error.message, extra=self._about(kernel_id)
            )

    def _unlinked(self, kernel_id: str, error: GatewayError) -> None:
        """Websockets wait for a link that cannot be made now; the next scan tries again."""
        self._on_swallowed("controller")
        said = (kernel_id, error.message, error.hint or error.code)
        self.log.warning("Kernel %s is not linked yet: %s (%s)", *said, extra=self._about(kernel_id))
        self._queue.add(kernel_id)

    async def _route(self, facts: LinkFacts) -> Registration:
        """The address by which this process reaches an agent."""
        state = {**facts.proxy_state, "kernel_id": facts.kernel_id}
        return await self.proxies.get(facts.proxy).route(state, facts.registration)

    def _event(self, kernel_id: str, event: Mapping[str, Any]) -> None:
        """An agent, or the link to it, reports."""
        kind = event.get("event")
        if kind in ("state", "restarting") or (kind == "welcome" and event.get("phase") == "starting"):
            return  # listed from memory, written by `flush`
        exited = event.get("exited") if kind == "welcome" and event.get("phase") == "dead" else event
        if isinstance(exited, Mapping) and exited.get("event") == "exited":
            if exited.get("will_restart") or exited.get("while") == "stopping":
                return
            self._reconciler.ended(kernel_id, exit_of(exited))
        self._queue.add(kernel_id)

    async def _relink(self, taken: set[str]) -> None:
        """Link to all running kernels at once, after one look per cluster at which of them are gone."""
        records = (await self.store.some(taken)).values()
        self._proxy_of |= {record.id: record.proxy for record in records}
        running = [record for record in records if record.status is KernelStatus.RUNNING]
        reports = await self._ask(running)
        alive = [r.id for r in running if reports.get(r.id, PhaseReport(Phase.UNKNOWN)).phase is not Phase.GONE]
        facts = await self.store.link_facts(alive)
        found = await asyncio.gather(
            *(self.links.connect(one, timeout=5.0) for one in facts.values()), return_exceptions=True
        )
        missing = sum(isinstance(one, BaseException) for one in found)
        if running:
            self.log.info("Linked to %d of %d running kernels", len(found) - missing, len(running))

    async def _scan(self) -> None:
        claimed = await self.leases.claim()
        for kernel_id in claimed:
            self._written.pop(kernel_id, None)  # from now on it is ours to write
        unfinished = await self.leases.unfinished()
        for kernel_id, target in unfinished.items():
            if target is not KernelTarget.RUNNING:  # asked for through another replica, which cannot break it off
                self._reconciler.interrupt_launch(kernel_id)
        for kernel_id in (*claimed, *unfinished):
            if kernel_id not in self._queue:
                self._queue.add(kernel_id)
        await self._serve_websockets()
        await self.links.restore_all()

    async def _serve_websockets(self) -> None:
        """Link the relays that websockets wait at, also of kernels that another replica drives (nobody tells us).

        A relay that was told that there is no kernel is looked at too: another replica may have started it again.
        """
        waiting = {key: relay for key, relay in self.links if relay.connections and not (relay.linked and relay.ready)}
        if not waiting:
            return
        rows = await self.store.some(waiting)
        for kernel_id, relay in waiting.items():
            record = rows.get(kernel_id)
            begun = record is not None and record.status in _BEGUN and record.lease_holder != self.store.instance
            if begun and relay.failed:
                relay.renew()  # another replica has started it again
            if record is None or record.status is KernelStatus.FAILED:
                if relay.linked or relay.execution_state is not ExecutionState.DEAD:
                    self._queue.add(kernel_id)  # its step settles it
            elif (
                record.live
                and record.registration is not None
                and record.lease_holder != self.store.instance
                and not relay.linked
            ):
                self.links.link_later(kernel_id)

    async def _poll(self) -> None:
        await self._poll_some(await self.store.mine())

    async def _poll_some(self, records: Sequence[KernelRecord]) -> None:
        mine = [record for record in records if record.live and record.lease_holder == self.store.instance]
        # Also those that are linked: a cluster may know of an end before a silent link does.
        asked = [r for r in mine if r.status is KernelStatus.RUNNING or self._reconciler.waiting(r.id)]
        await self._ask(asked, self._reported)

    def _reported(self, reports: Mapping[str, PhaseReport]) -> None:
        for kernel_id, report in reports.items():
            relay = self.links.existing(kernel_id)
            if report.phase is not Phase.RUNNING or relay is None or not relay.linked:
                self._reconciler.reported(kernel_id, report)
                self._queue.add(kernel_id)

    async def _ask(
        self, records: list[KernelRecord], tell: Callable[[Mapping[str, PhaseReport]], None] = lambda reports: None
    ) -> dict[str, PhaseReport]:
        """What the resource managers say of these kernels; one that does not answer says nothing.

        `tell` hears it of each as soon as that one has answered.
        """
        by_proxy: dict[str, list[KernelRecord]] = {}
        for record in records:
            by_proxy.setdefault(record.proxy, []).append(record)

        async def ask(name: str, some: list[KernelRecord]) -> dict[str, PhaseReport]:
            states = {record.id: state_of(record, self.gateway_id) for record in some}
            try:
                reports = await within(self.proxies.get(name).poll(states), self.poll_seconds)
            except (GatewayError, OSError, asyncio.TimeoutError) as error:
                self._on_swallowed("poll")
                self.log.warning(
                    "The resource manager of proxy %s does not answer: %r", name, error, extra={"proxy": name}
                )
                return {}
            tell(reports)
            return reports

        found: dict[str, PhaseReport] = {}
        for reports in await asyncio.gather(*(ask(name, some) for name, some in by_proxy.items())):
            found |= reports
        return found

    def _sweep(self, proxy: str) -> Callable[[], Awaitable[None]]:
        assert self._reaper is not None
        return partial(self._reaper.sweep_one, proxy)

    async def _tidy(self) -> None:
        """Let rows age, and forget what is kept here of kernels that are listed no more."""
        # Before the rows are read: whatever is here already has its row by then.
        relays, waited = list(self.links), {*self._changed, *self._proxy_of}
        now: datetime = utcnow()
        await self.waiting.forget_stopped()
        await self.store.age_out(
            now - timedelta(seconds=self.failed_seconds), now - timedelta(seconds=self.history_seconds)
        )
        listed = set(await self.store.some(waited.union(kernel_id for kernel_id, _ in relays)))
        for kernel_id, relay in relays:
            if kernel_id not in listed and not relay.connections:
                self.links.drop(kernel_id)
        for kernel_id in waited - listed:
            self._changed.pop(kernel_id, None)
            self._proxy_of.pop(kernel_id, None)

    async def _every(self, seconds: float, name: str, call: Callable[[], Awaitable[None]]) -> None:
        """Call again and again; one failure is logged and counted, and changes nothing for the next time."""
        while True:
            try:
                await call()
            except (GatewayError, OSError) as error:
                self._on_swallowed(name)
                self.log.warning("%s: %s (%s)", name, error, getattr(error, "hint", ""))
            except Exception:
                self._on_swallowed(name)
                self.log.exception("Unexpected failure in the loop %s", name)
            await asyncio.sleep(seconds)

    def _agent_settings(self, kernel_id: str, token: str, public: str) -> AgentSettings:
        return AgentSettings(
            client_public_key=public,
            launch_token=token,
            register_url=f"{self.service_url.rstrip('/')}/api/launch/{kernel_id}" if self.service_url else "",
            listen=self.listen_address,
            ring_bytes=self.ring_bytes,
            ring_messages=self.ring_messages,
            window_bytes=self.window_bytes,
            orphan_seconds=self.orphan_seconds,
            session_seconds=self.session_seconds,
            start_seconds=self.start_seconds,
            shutdown_seconds=self.shutdown_seconds,
            stderr_bytes=self.stderr_bytes,
            log_bytes=self.log_bytes,
            restart_limit=self.restart_limit,
        )


def exit_of(event: Mapping[str, Any]) -> Exit:
    """An `exited` event as a sentence for the user. What stands in it comes from the kernel's node: anything."""
    code, signum, tail = event.get("code"), event.get("signal"), storable(str(event.get("stderr_tail") or ""))
    when = "while it was starting" if event.get("while") == "starting" else "and was restarted too often"
    if isinstance(signum, int) and signum > 0:
        try:
            name = signal.Signals(signum).name
        except ValueError:
            name = f"signal {signum}"
        how = f"{name}{', often out of memory' if signum == signal.SIGKILL else ''}"
        code = 128 + signum
    else:
        how = f"exit code {str(storable(code))[:20]}"
    sentence = f"The kernel died {when} ({how})."
    return Exit(with_stderr(sentence, tail), number(code), tail)
