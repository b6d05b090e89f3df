"""Prometheus metrics, named `hubgateway_<noun>_<verb>_<unit>`; every label value exists from the start.

No label carries a user's name or a kernel's id: metrics are read by more people than may know those. The names of
policies are labels (`quota_use_ratio`); a policy that is named for a user names that user.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from hub_gateway.kernels.types import ExecutionState
from hub_gateway.quotas.types import Resource

__all__ = ["CONTENT_TYPE_LATEST", "METRICS", "LoopWatch", "Metrics"]

LINK_COUNTS: Mapping[str, tuple[str, str]] = {
    "messages": ("kernel_messages_relayed", "Messages from kernels that were handed to websockets."),
    "bytes": ("kernel_messages_relayed_bytes", "Bytes of messages from kernels."),
    "requests": ("client_messages_relayed", "Messages from clients to kernels."),
    "bad_frames": ("link_frames_refused", "Frames from agents that could not be understood."),
    "link_errors": ("link_errors_survived", "Errors while a message from an agent was handled, or its link read."),
    "paused": ("websocket_pauses", "Times that a slow websocket was paused."),
    "replaced": ("websocket_replacements", "Websockets replaced by a new one of the same session."),
    "lost_messages": ("kernel_messages_lost", "Messages that no longer were in the agent's buffer when asked for."),
    "buffers_left_out": ("buffers_left_out", "Messages whose binary buffers the client could not take."),
    "too_large": ("messages_replaced_too_large", "Messages too large for the client."),
}
SWALLOWED = (
    *("controller", "culler", "activity", "reaper", "poll", "scan", "flush", "renew", "reap", "tidy", "hub"),
    *("queue", "enforcer", "audit", "events", "credentials", "use", "waiting", "checkpoint", "other"),
)
OUTCOMES = ("admitted", "queued", "refused", "failed")
PROXIES = ("local", "distributed", "docker", "docker-swarm")
LAUNCHES = ("success", "failure")
CHANNELS = ("notebook", "webhook", "email")
LAUNCH_BUCKETS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
WAIT_BUCKETS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
ADMISSION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0)
AUTHENTICATIONS = ("cached", "accepted", "refused", "unavailable", "stale")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
STATUSES = ("1xx", "2xx", "3xx", "4xx", "5xx")
LOOP_SECONDS = 0.1


class Metrics:
    """All metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"hubgateway_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"hubgateway_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"hubgateway_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.kernels = Gauge(
            "hubgateway_kernels_running", "Kernels by state.", ["execution_state"], registry=self.registry
        )
        self.websockets = Gauge("hubgateway_websockets_open", "Open kernel websockets.", registry=self.registry)
        self.launches = counter("kernel_launches", "Launches asked for, by outcome of the admission.", "outcome")
        self.frames_refused = counter("client_frames_refused", "Websocket frames that are no Jupyter messages.")
        self.authentications = counter("authentications", "Tokens looked up, by result.", "result")
        self.swallowed = counter("errors_swallowed", "Errors that a background loop survived.", "where")
        self.launch_seconds = histogram(
            "kernel_launch_duration_seconds",
            "From the begin of a launch until the kernel answers, or has failed, in this process.",
            LAUNCH_BUCKETS,
            "proxy",
            "status",
        )
        self.admission_seconds = histogram(
            "admission_duration_seconds",
            "How long a launch takes to be admitted, queued or refused, with its turn at the database.",
            ADMISSION_BUCKETS,
        )
        self.queue_wait_seconds = histogram(
            "queue_wait_duration_seconds", "How long kernels waited in a queue until they were admitted.", WAIT_BUCKETS
        )
        self.queued = gauge("kernels_queued", "Kernels that wait in a queue.")
        self.held = gauge("resources_held", "What live kernels hold: kernels, cores, bytes, devices.", "resource")
        self.use_ratio = gauge(
            "quota_use_ratio", "Use of a limit that is counted together, as a share of its hard limit.", "policy"
        )
        self.policies = gauge("policies_active", "Quota policies and grants that hold now.")
        self.maintenance = gauge("maintenance_enabled", "1 while no kernels are launched, for maintenance.")
        self.refusals = counter("quota_refusals", "Launches that a limit refused, by what was limited.", "resource")
        self.notices = counter("notices_sent", "Notices about limits, by channel and outcome.", "channel", "outcome")
        self.audit_entries = counter("audit_entries_written", "Lines added to the audit trail.")
        self.ledger_entries = counter("ledger_entries_written", "Intervals and corrections added to the ledger.")
        self.requests = Histogram(
            "hubgateway_request_duration_seconds",
            "Duration of HTTP requests (websockets: until they are open).",
            ["method", "status"],
            registry=self.registry,
        )
        self.loop_delays = Histogram(
            "hubgateway_event_loop_delay_seconds",
            f"How late the event loop is with what is due every {LOOP_SECONDS} s.",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0),
            registry=self.registry,
        )
        self.link = {name: counter(metric, text) for name, (metric, text) in LINK_COUNTS.items()}
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """Every series exists from the start: what has never happened is 0, not absent."""
        labels: tuple[tuple[Counter | Gauge | Histogram, Iterable[tuple[str, ...]]], ...] = (
            (self.kernels, ((state.value,) for state in ExecutionState)),
            (self.launches, ((outcome,) for outcome in OUTCOMES)),
            (self.launch_seconds, product(PROXIES, LAUNCHES)),
            (self.refusals, ((resource.value,) for resource in Resource)),
            (self.held, (("kernels",), ("cpu",), ("memory",), ("gpu",))),
            (self.notices, product(CHANNELS, ("sent", "failed"))),
            (self.authentications, ((result,) for result in AUTHENTICATIONS)),
            (self.swallowed, ((where,) for where in SWALLOWED)),
            (self.requests, product(METHODS, STATUSES)),
        )
        for metric, values in labels:
            for some in values:
                metric.labels(*some)

    def count_request(self, method: str, status: int, seconds: float) -> None:
        """An HTTP request. A method that only an attacker would use does not make a series of its own."""
        self.requests.labels(method if method in METHODS else "other", f"{status // 100}xx").observe(seconds)

    def count_link(self, name: str, amount: int) -> None:
        """A relay's or link's count; a name that is not known here is counted as swallowed."""
        found = self.link.get(name)
        if found is None:
            self.count_swallowed("other")
        else:
            found.inc(amount)

    def count_swallowed(self, where: str) -> None:
        """An error that was survived."""
        self.swallowed.labels(where if where in SWALLOWED else "other").inc()

    def expose(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class LoopWatch:
    """Measures how late the event loop is: one timer, whose delay is what everybody else waits, too."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to measure, on the running loop."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(loop.time() + LOOP_SECONDS, self._look, loop, loop.time() + LOOP_SECONDS)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        now = loop.time()
        self._metrics.loop_delays.observe(max(0.0, now - due))
        self._timer = loop.call_at(now + LOOP_SECONDS, self._look, loop, now + LOOP_SECONDS)

    async def close(self) -> None:
        """Stop measuring."""
        if self._timer is not None:
            self._timer.cancel()


METRICS = Metrics()
"""The metrics of this process. Counters only go up, so that sharing them is harmless."""
