"""This process's relays: at most one per kernel, made on demand, thrown away at will."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hub_gateway.errors import Unavailable
from hub_gateway.kernels.store import LinkFacts

if TYPE_CHECKING:
    from hub_gateway.link.relay import KernelRelay

__all__ = ["Links"]


class Links:
    """The relays of one process, by kernel id.

    `make` makes one that is not linked yet; `on_event(kernel_id, event)` hears what agents report.
    """

    def __init__(
        self,
        make: Callable[[str], KernelRelay],
        on_event: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._make = make
        self._on_event = on_event
        self._relays: dict[str, KernelRelay] = {}
        self._connecting: dict[str, asyncio.Task[Mapping[str, Any]]] = {}

    def relay(self, kernel_id: str) -> KernelRelay:
        """The relay of a kernel, made if there is none."""
        found = self._relays.get(kernel_id)
        if found is None:
            found = self._relays[kernel_id] = self._make(kernel_id)
            found.on_event = lambda event: self._on_event(kernel_id, event)
        return found

    def existing(self, kernel_id: str) -> KernelRelay | None:
        """The relay of a kernel, if this process has one."""
        return self._relays.get(kernel_id)

    def __iter__(self) -> Iterator[tuple[str, KernelRelay]]:
        return iter(list(self._relays.items()))

    async def connect(self, facts: LinkFacts, *, timeout: float) -> KernelRelay:
        """Link to the agent, once however many ask. Raises `Unavailable`, and `Conflict` for a stale epoch."""
        relay = self.relay(facts.kernel_id)
        if relay.linked:
            return relay
        task = self._connecting.get(facts.kernel_id)
        if task is None:
            task = asyncio.ensure_future(
                relay.connect(
                    facts.registration, facts.client_secret, facts.client_public, facts.epoch, timeout=timeout
                )
            )
            self._connecting[facts.kernel_id] = task
            task.add_done_callback(lambda _: self._connecting.pop(facts.kernel_id, None))
        # Not awaited itself: somebody else's cancellation, or a link that is closed, must not cancel us.
        await asyncio.wait({task})
        if task.cancelled():
            raise Unavailable("The link to the kernel was closed. Try again in a moment.")
        task.result()
        return relay

    def disconnect(self, kernel_id: str) -> None:
        """Close the link of a kernel; its relay stays for the websockets that are open."""
        connecting = self._connecting.get(kernel_id)
        if connecting is not None:
            connecting.cancel()
        relay = self._relays.get(kernel_id)
        if relay is not None:
            relay.disconnect()

    def drop(self, kernel_id: str) -> None:
        """Close the link of a kernel and forget its relay."""
        self.disconnect(kernel_id)
        self._relays.pop(kernel_id, None)

    def close(self) -> None:
        """Close all of them; the kernels go on."""
        for kernel_id in list(self._relays):
            self.drop(kernel_id)
