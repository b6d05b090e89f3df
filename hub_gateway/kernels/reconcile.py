"""One step of one kernel from where it is to where it should be.

Nothing here is remembered between steps that cannot be lost: each begins by reading the row, makes one
outside effect at a time and records it before the next. A crash at any instruction leaves a row from
which the next step goes on, in whichever process takes the lease.

    starting --launch, register, ready--> running --exit, stop--> stopping --terminated--> stopped | failed

A kernel that ends by itself goes through `stopping` too, so that its reservation is given back only when
nothing of it is left; it ends as `failed` where its target is still `running`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import case

from hub_gateway.db.models import Kernel, utcnow
from hub_gateway.db.secrets import VaultError
from hub_gateway.deadlines import within
from hub_gateway.errors import GatewayError, NotFound, Unavailable
from hub_gateway.kernels import failpoints
from hub_gateway.kernels.leases import Lease, LeaseLost, Leases
from hub_gateway.kernels.links import Links
from hub_gateway.kernels.store import KernelStore, addressable, number, storable
from hub_gateway.kernels.types import ExecutionState, KernelRecord, KernelStatus, KernelTarget
from hub_gateway.logs import about
from hub_gateway.metrics import METRICS
from hub_gateway.proxies.base import AgentSettings, LaunchRequest, Phase, PhaseReport, ProcessProxy, State
from hub_gateway.proxies.registry import Proxies

if TYPE_CHECKING:
    from hub_gateway.link.relay import KernelRelay

__all__ = ["Exit", "Reconciler", "Timing", "state_of"]

STILL_LAUNCHING_SECONDS = 0.5
STDERR = " Last lines of stderr: "
"""Between a sentence and what the kernel wrote."""


@dataclass(frozen=True)
class Timing:
    """How long things may take (seconds)."""

    start: float = 60.0
    link: float = 5.0
    ask: float = 10.0
    break_off: float = 5.0
    stop: float = 10.0
    terminate: float = 60.0


@dataclass(frozen=True)
class Exit:
    """How a kernel ended: as its agent or its resource manager says."""

    sentence: str
    exit_code: int | None = None
    stderr_tail: str = ""


@dataclass
class _Memory:
    """What this process knows of a kernel that it is starting; worth nothing after a crash."""

    epoch: int
    began: float
    deadline: float
    allowed: float = 0.0
    """How long (seconds) the launch may take."""
    launched: bool = False
    launching: asyncio.Task[None] | None = None
    broken_off: bool = False
    progress: str = ""
    exit: Exit | None = None
    report: PhaseReport | None = None


class Reconciler:
    """Drives kernels for a controller, which says what changed and calls `step` once `gateway_id` is set."""

    def __init__(
        self,
        store: KernelStore,
        leases: Leases,
        links: Links,
        proxies: Proxies,
        *,
        agent: Callable[[str, str, str], AgentSettings],
        timing: Timing,
        log: logging.Logger,
    ) -> None:
        self.store = store
        self.leases = leases
        self.links = links
        self.proxies = proxies
        self.gateway_id = ""
        self.agent = agent
        self.timing = timing
        self.log = log
        self._memory: dict[str, _Memory] = {}

    # What the controller hears between steps

    def ended(self, kernel_id: str, how: Exit) -> None:
        """The agent says that the kernel has ended for good."""
        memory = self._memory.get(kernel_id)
        if memory is None:
            memory = self._memory[kernel_id] = _Memory(0, asyncio.get_running_loop().time(), 0.0)
        memory.exit = how

    def reported(self, kernel_id: str, report: PhaseReport) -> None:
        """The resource manager said something about the kernel."""
        memory = self._memory.get(kernel_id)
        if memory is None:
            memory = self._memory[kernel_id] = _Memory(0, asyncio.get_running_loop().time(), 0.0)
        memory.report = report

    def waiting(self, kernel_id: str) -> bool:
        """Whether the kernel was launched by this process and has not registered yet."""
        memory = self._memory.get(kernel_id)
        return memory is not None and memory.launched

    def interrupt_launch(self, kernel_id: str) -> None:
        """Break off a launch that is under way: its kernel is no longer wanted."""
        memory = self._memory.get(kernel_id)
        # Once: a second cancellation would cut short what the launch does to end in order.
        if memory is not None and memory.launching is not None and not memory.broken_off:
            memory.broken_off = True
            memory.launching.cancel()

    def forget(self, kernel_id: str) -> None:
        """Drop what is remembered of earlier lives of this kernel."""
        self._memory.pop(kernel_id, None)

    # The step

    async def step(self, kernel_id: str) -> float | None:
        """Bring one kernel nearer to its target; None, or after how many seconds to look again."""
        record = await self.store.get(kernel_id)
        if record is None or not record.live:
            self.settle(kernel_id, record)
            return None
        lease = self.leases.of(record)
        if lease is None:
            if not await self.leases.claim(kernel_id):
                # Its holder hears the same. Kept, it would end a later life of this kernel that we may drive.
                self.forget(kernel_id)
                return None
            record = await self.store.get(kernel_id)
            lease = None if record is None else self.leases.of(record)
            if record is None or lease is None:
                return None
        try:
            if record.status is KernelStatus.STOPPING:
                return await self._stop(record, lease)
            if record.target is not KernelTarget.RUNNING:
                await self.leases.update(lease, status=KernelStatus.STOPPING.value)
                failpoints.hit("stop.recorded")
                return await self._stop(record, lease)
            if record.status is KernelStatus.STARTING:
                return await self._start(record, lease)
            return await self._supervise(record, lease)
        except LeaseLost:
            self.forget(kernel_id)
            self.log.warning("Another replica drives kernel %s now", kernel_id, extra=about(record))
            return None

    def settle(self, kernel_id: str, record: KernelRecord | None) -> None:
        """Make the relay of a kernel that holds nothing any more say so."""
        self.forget(kernel_id)
        relay = self.links.existing(kernel_id)
        if relay is None:
            return
        if record is None or record.status is KernelStatus.STOPPED:
            relay.fail("The kernel has been shut down.", [])
            self.links.drop(kernel_id)
        elif record.status is KernelStatus.FAILED:
            self.links.disconnect(kernel_id)
            relay.fail(record.message, tail_lines(record.stderr_tail))

    async def _start(self, record: KernelRecord, lease: Lease) -> float | None:
        now = asyncio.get_running_loop().time()
        memory = self._memory.get(record.id)
        if memory is None or memory.epoch != lease.epoch:
            allowed = await self._allowed(record)
            heard, memory = self._memory.get(record.id), _Memory(lease.epoch, now, now + allowed, allowed)
            if heard is not None and record.registration is not None:  # else it was about an earlier launch
                memory.exit, memory.report = heard.exit, heard.report
            self._memory[record.id] = memory
        left = memory.deadline - now
        if record.registration is None and not memory.launched and left > 0:
            return await self._launch(record, lease, memory)
        report, memory.report = memory.report, None
        if memory.exit is None and report is not None and report.phase is Phase.GONE:
            memory.exit = await self._post_mortem(record, report, "before it was ready")
        if memory.exit is None and left <= 0:
            memory.exit = await self._too_slow(record, memory.allowed)
        if memory.exit is not None:
            return await self._fail(record, lease, memory.exit)
        if report is not None and report.reason:
            self.links.relay(record.id).announce(report.reason)
        if record.registration is None:
            return min(left, 5.0)
        return await self._await_ready(record, lease, memory, left)

    async def _allowed(self, record: KernelRecord) -> float:
        """How long (seconds) the kernel's launch may take."""
        try:
            plan, _, _ = await self.store.plan(record.id)
        except (NotFound, VaultError):  # the launch meets the same, and says it when its time is over
            return self.timing.start
        return plan.start_seconds or self.timing.start

    async def _await_ready(self, record: KernelRecord, lease: Lease, memory: _Memory, left: float) -> float | None:
        facts = (await self.store.link_facts([record.id])).get(record.id)
        if facts is None:
            return 0.0  # the row has changed since it was read
        try:
            relay = await self.links.connect(facts, timeout=min(self.timing.link, left))
        except Unavailable:
            memory.report = await self._ask(record)
            return 0.2
        if not relay.ready:
            return left  # "ready" (or "exited") comes as an event
        failpoints.hit("ready.before")
        await self.leases.update(
            lease,
            ready=True,
            status=KernelStatus.RUNNING.value,
            execution_state=relay.execution_state,
            started_at=utcnow(),
            last_activity=utcnow(),
            message="",
        )
        failpoints.hit("ready.after")
        self._count_launch(record, "success")
        self.forget(record.id)
        return None

    async def _launch(self, record: KernelRecord, lease: Lease, memory: _Memory) -> float | None:
        """Consume the proxy's launch, in a task that a stop can cancel and that has a deadline."""
        task = memory.launching = asyncio.ensure_future(self._consume(record, lease, memory))
        task.add_done_callback(_looked_at)
        memory.broken_off = False
        try:
            # Each progress that the launch tells moves the deadline.
            while not task.done() and (left := memory.deadline - asyncio.get_running_loop().time()) > 0:
                await asyncio.wait({task}, timeout=left)
            if not task.done():
                self.interrupt_launch(record.id)
                # Its kernel fails now. `_stop` waits for a launch that takes longer to end in order.
                await asyncio.wait({task}, timeout=self.timing.break_off)
                record = await self.store.get(record.id) or record  # with what the launch recorded
                return await self._fail(record, lease, await self._hung(record, memory))
        except asyncio.CancelledError:  # this process ends: leave what was started to whoever comes next
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            raise
        memory.launching = None
        if task.cancelled():
            return 0.0  # the target has changed
        try:
            task.result()
        except Unavailable:
            if asyncio.get_running_loop().time() < memory.deadline:
                raise
            record = await self.store.get(record.id) or record
            return await self._fail(record, lease, await self._too_slow(record, memory.allowed))
        except GatewayError as error:
            record = await self.store.get(record.id) or record
            return await self._fail(record, lease, Exit(storable(error.message)))
        memory.launched = True
        return 0.0

    async def _consume(self, record: KernelRecord, lease: Lease, memory: _Memory) -> None:
        proxy = self.proxies.get(record.proxy)
        plan, token, public = await self.store.plan(record.id)
        if record.launch_epoch != lease.epoch:
            await self.leases.update(lease, launch_epoch=lease.epoch)
        agent = self.agent(record.id, token, public)
        request = LaunchRequest(
            kernel_id=record.id,
            gateway_id=self.gateway_id,
            epoch=lease.epoch,
            owner=record.owner,
            kernelspec=record.kernelspec,
            argv=plan.argv,
            env=plan.env,
            agent=replace(
                agent,
                transport=plan.transport,
                kernel_encryption=plan.encryption,
                start_seconds=plan.start_seconds or agent.start_seconds,
            ),
            cwd=plan.cwd,
            unix_user=record.unix_user,
            principal=record.principal,
            tickets=plan.tickets,
            interrupt_mode=plan.interrupt_mode,
            resources=record.resources,
            config=plan.config,
            previous=dict(record.proxy_state) or None,
        )
        async with aclosing(proxy.launch(request)) as states:  # type: ignore[type-var]
            number = 0
            async for state in states:
                number += 1
                failpoints.hit(f"launch.{number}.yielded")
                target = await self.leases.update(lease, **_recorded(state))
                failpoints.hit(f"launch.{number}.recorded")
                progress = state.get("progress")
                if isinstance(progress, str):
                    memory.progress = storable(progress)
                    self.links.relay(record.id).announce(progress)
                    # An image may take longer to fetch than a kernel to start.
                    memory.deadline = asyncio.get_running_loop().time() + memory.allowed
                if target is not KernelTarget.RUNNING:
                    return

    async def _supervise(self, record: KernelRecord, lease: Lease) -> float | None:
        memory = self._memory.get(record.id)
        if memory is not None and memory.exit is not None:
            return await self._fail(record, lease, memory.exit)
        report = memory.report if memory is not None else None
        relay = self.links.existing(record.id)
        was_linked = relay is not None and bool(relay.welcome)
        if relay is not None and relay.linked:
            if report is None or report.phase is not Phase.GONE or await _answers(relay):
                self.forget(record.id)
                return None
            memory = self._memory.get(record.id)
            if memory is not None and memory.exit is not None:  # the agent's last word was still on its way
                return await self._fail(record, lease, memory.exit)
            self.links.disconnect(record.id)  # nobody is there to be asked again
        elif report is None or report.phase is not Phase.GONE:
            facts = (await self.store.link_facts([record.id])).get(record.id)
            if facts is None:
                return 0.0  # the row has changed since it was read
            try:
                await self.links.connect(facts, timeout=self.timing.link)
                self.forget(record.id)
                return None
            except Unavailable:
                report = await self._ask(record)
                if report.phase is not Phase.GONE:
                    raise
        when = "with its agent" if was_linked else "while no gateway was linked to it"
        return await self._fail(record, lease, await self._post_mortem(record, report, when))

    async def _fail(self, record: KernelRecord, lease: Lease, how: Exit) -> float | None:
        # Without what the kernel wrote, which is its user's.
        said = how.sentence.partition(STDERR)[0]
        self.log.warning("Kernel %s of %s failed: %s", record.id, record.owner, said, extra=about(record))
        await self.leases.update(
            lease,
            status=KernelStatus.STOPPING.value,
            execution_state=ExecutionState.DEAD.value,
            message=how.sentence,
            exit_code=how.exit_code,
            stderr_tail=how.stderr_tail,
        )
        failpoints.hit("fail.recorded")
        if record.status is KernelStatus.STARTING:
            self._count_launch(record, "failure")
        relay = self.links.relay(record.id)
        if relay.linked:
            await _answers(relay)  # what the agent sent before has arrived when its answer has
        memory = self._memory.get(record.id)
        ours = memory is not None and memory.launched
        # One that an earlier process launched may have run, though that process had no time to write it down.
        ran = record.status is KernelStatus.RUNNING or (record.registration is not None and not ours)
        relay.fail(how.sentence, tail_lines(how.stderr_tail), ran=ran)
        return await self._stop(record, lease, ended=True)

    async def _stop(self, record: KernelRecord, lease: Lease, *, ended: bool = False) -> float | None:
        memory = self._memory.get(record.id)
        ended = ended or record.target is KernelTarget.RUNNING or (memory is not None and memory.exit is not None)
        relay = self.links.existing(record.id)
        # A kernel that has not answered yet has nothing to save; its agent is told by the proxy.
        if not ended and relay is not None and relay.linked and relay.ready:
            try:
                await within(relay.shutdown(), self.timing.stop)
            except (GatewayError, asyncio.TimeoutError) as error:
                self.log.info(
                    "Kernel %s did not end when asked (%s); ending it",
                    record.id,
                    str(error) or type(error).__name__,
                    extra=about(record),
                )
            self.links.disconnect(record.id)  # asked once, whatever else has to be repeated
        if memory is not None and memory.launching is not None and not memory.launching.done():
            return STILL_LAUNCHING_SECONDS  # what it is about to start would not be found yet
        proxy = self.proxies.get(record.proxy)
        await within(proxy.terminate(state_of(record, self.gateway_id)), self.timing.terminate)
        failpoints.hit("stop.terminated")
        wanted = Kernel.target == KernelTarget.STOPPED.value
        await self.leases.update(
            lease,
            release=True,
            status=case((wanted, KernelStatus.STOPPED.value), else_=KernelStatus.FAILED.value),
            execution_state=ExecutionState.DEAD.value,
            connections=0,
            stopped_at=utcnow(),
            lease_until=0.0,
        )
        failpoints.hit("stop.released")
        self.settle(record.id, await self.store.get(record.id))
        return None

    def _count_launch(self, record: KernelRecord, status: str) -> None:
        memory = self._memory.get(record.id)
        if memory is not None:
            took = asyncio.get_running_loop().time() - memory.began
            METRICS.launch_seconds.labels(record.proxy, status).observe(took)

    async def _ask(self, record: KernelRecord) -> PhaseReport:
        asked = self.proxies.get(record.proxy).poll({record.id: state_of(record, self.gateway_id)})
        try:
            reports = await within(asked, self.timing.ask)
        except asyncio.TimeoutError:
            return PhaseReport(Phase.UNKNOWN)
        return reports.get(record.id, PhaseReport(Phase.UNKNOWN))

    async def _post_mortem(self, record: KernelRecord, report: PhaseReport, when: str) -> Exit:
        reason = f": {report.reason}" if report.reason else ""
        return await self._last_words(record, f"The kernel ended {when}{reason.rstrip('.')}.", report.exit_code)

    async def _too_slow(self, record: KernelRecord, allowed: float) -> Exit:
        what = "did not register" if record.registration is None else "did not answer"
        return await self._last_words(
            record, f"The kernel {what} within {allowed:.0f} seconds of its launch; start it again.", None
        )

    async def _hung(self, record: KernelRecord, memory: _Memory) -> Exit:
        said = f" It last said: {memory.progress.rstrip('.')}." if memory.progress else ""
        return await self._last_words(
            record,
            f"The resource manager ({record.proxy}) did not finish the launch within {memory.allowed:.0f} seconds."
            f"{said} Start the kernel again later, or ask your administrator whether the cluster works.",
            None,
        )

    async def _last_words(self, record: KernelRecord, sentence: str, code: int | None) -> Exit:
        proxy = self.proxies.get(record.proxy)
        try:
            logs = proxy.logs(state_of(record, self.gateway_id), 20)
            lines = storable(await within(logs, self.timing.ask))
        except (GatewayError, OSError, asyncio.TimeoutError) as error:
            why = str(error) or type(error).__name__
            self.log.info("No logs of kernel %s: %s", record.id, why, extra=about(record))
            lines = ""
        return Exit(with_stderr(storable(sentence), lines), number(code), lines)


def _looked_at(task: asyncio.Task[None]) -> None:
    """Nobody asks a launch that was given up how it ended."""
    if not task.cancelled():
        task.exception()


async def _answers(relay: KernelRelay) -> bool:
    """Whether the agent answers now."""
    try:
        await relay.ping(timeout=2.0)
    except GatewayError:
        return False
    return True


def state_of(record: KernelRecord, gateway_id: str) -> State:
    """A kernel's state as `terminate`, `poll` and `logs` get it."""
    return {**record.proxy_state, "kernel_id": record.id, "gateway_id": gateway_id, "unix_user": record.unix_user}


def tail_lines(text: str, lines: int = 20) -> list[str]:
    """The last lines of a text."""
    return text.splitlines()[-lines:]


def with_stderr(sentence: str, tail: str) -> str:
    """A sentence, followed by the last lines of stderr where there are any."""
    lines = tail_lines(tail.strip(), 5)
    return sentence if not lines else f"{sentence}{STDERR}{' / '.join(lines)}"


def _recorded(state: State) -> dict[str, Any]:
    """The columns that a yielded state sets, in which an agent or a cluster may have written anything."""
    kept = {key: value for key, value in state.items() if key not in ("registration", "progress")}
    values: dict[str, Any] = {"proxy_state": storable(kept)}
    epoch = number(state.get("epoch"))
    if epoch is not None:
        values["launch_epoch"] = epoch
    registration = ProcessProxy.registration(state)
    if registration is not None and addressable(registration.host, registration.port, registration.public_key):
        values |= {
            "registered_at": utcnow(),
            "agent_host": registration.host,
            "agent_port": registration.port,
            "agent_public_key": registration.public_key,
            "agent_pid": number(registration.pid) or 0,
        }
    return values
