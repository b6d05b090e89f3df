"""The events of a Docker daemon: one stream for all kernels of a gateway, in place of a poll for each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from hub_gateway.errors import Unavailable
from hub_gateway.proxies.docker_client import DockerDaemon, errors
from hub_gateway.proxies.docker_spec import GATEWAY, KERNEL

__all__ = ["DockerEvents"]

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0


class DockerEvents:
    """Calls `on_ended(kernel_id)` on the event loop whenever a container of the gateway has ended.

    A stream that breaks is made anew, ever more slowly. What happened meanwhile is found by the next poll.
    """

    def __init__(self, daemon: DockerDaemon, on_ended: Callable[[str], None], log: logging.Logger) -> None:
        self._daemon = daemon
        self._on_ended = on_ended
        self._log = log
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, gateway_id: str) -> None:
        """Listen from now on; once."""
        if self._thread is None:
            arguments = (gateway_id, asyncio.get_running_loop())
            # A thread of its own, that keeps nobody from ending: it waits for as long as the gateway lives.
            self._thread = threading.Thread(target=self._listen, args=arguments, name="docker-events", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop listening. The thread ends with its connection, at the next event at the latest."""
        self._closed.set()

    def _listen(self, gateway_id: str, loop: asyncio.AbstractEventLoop) -> None:
        import urllib3  # as late as docker itself

        filters = {"type": "container", "event": ["die", "destroy"], "label": [f"{GATEWAY}={gateway_id}"]}
        delay = FIRST_DELAY
        while not self._closed.is_set():
            try:
                for event in self._daemon.connect().events(decode=True, filters=filters):
                    delay = FIRST_DELAY
                    kernel_id = event.get("Actor", {}).get("Attributes", {}).get(KERNEL)
                    if self._closed.is_set():
                        return
                    if kernel_id:
                        with contextlib.suppress(RuntimeError):  # the loop has ended
                            loop.call_soon_threadsafe(self._on_ended, kernel_id)
            except (
                *(Unavailable, errors().DockerException, OSError, ValueError, AttributeError),
                urllib3.exceptions.HTTPError,
            ) as error:
                # Among them what a connection raises that is closed under it, as when this process ends.
                if not self._closed.is_set():
                    self._log.info("The events of Docker broke off: %s", error)
            self._closed.wait(delay)
            delay = min(2 * delay, LONGEST_DELAY)
