"""Prometheus metrics, named `hubgateway_<noun>_<verb>_<unit>`; every label value exists from the start.

No label carries a user's name or a kernel's id: metrics are read by more people than may know those.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from hub_gateway.kernels.types import ExecutionState

__all__ = ["CONTENT_TYPE_LATEST", "METRICS", "LoopWatch", "Metrics"]

LINK_COUNTS: Mapping[str, tuple[str, str]] = {
    "messages": ("kernel_messages_relayed", "Messages from kernels that were handed to websockets."),
    "bytes": ("kernel_messages_relayed_bytes", "Bytes of messages from kernels."),
    "requests": ("client_messages_relayed", "Messages from clients to kernels."),
    "bad_frames": ("link_frames_refused", "Frames from agents that could not be understood."),
    "paused": ("websocket_pauses", "Times that a slow websocket was paused."),
    "replaced": ("websocket_replacements", "Websockets replaced by a new one of the same session."),
    "lost_messages": ("kernel_messages_lost", "Messages that no longer were in the agent's buffer when asked for."),
    "buffers_left_out": ("buffers_left_out", "Messages whose binary buffers the client could not take."),
    "too_large": ("messages_replaced_too_large", "Messages too large for the client."),
}
SWALLOWED = ("controller", "culler", "activity", "reaper", "poll", "scan", "flush", "renew", "reap", "hub", "other")
OUTCOMES = ("admitted", "refused", "failed")
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

        self.kernels = Gauge(
            "hubgateway_kernels_running", "Kernels by state.", ["execution_state"], registry=self.registry
        )
        self.websockets = Gauge("hubgateway_websockets_open", "Open kernel websockets.", registry=self.registry)
        self.launches = counter("kernel_launches", "Launches asked for, by outcome of the admission.", "outcome")
        self.frames_refused = counter("client_frames_refused", "Websocket frames that are no Jupyter messages.")
        self.authentications = counter("authentications", "Tokens looked up, by result.", "result")
        self.swallowed = counter("errors_swallowed", "Errors that a background loop survived.", "where")
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
        for state in ExecutionState:
            self.kernels.labels(state.value)
        for outcome in OUTCOMES:
            self.launches.labels(outcome)
        for result in AUTHENTICATIONS:
            self.authentications.labels(result)
        for where in SWALLOWED:
            self.swallowed.labels(where)
        for method in METHODS:
            for status in STATUSES:
                self.requests.labels(method, status)

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
