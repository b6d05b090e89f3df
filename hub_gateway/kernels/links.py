"""This process's relays: at most one per kernel, made on demand, thrown away at will."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from hub_gateway.errors import Conflict, GatewayError, Unavailable
from hub_gateway.kernels.store import LinkFacts
from hub_gateway.kernels.types import Registration
from hub_gateway.kernels.waiting import WaitingRequests

if TYPE_CHECKING:
    from hub_gateway.link.relay import KernelRelay

__all__ = ["Links"]

T = TypeVar("T")

STALE = "stale epoch"
"""How an agent refuses a gateway with an old epoch; see the link protocol."""


class Links:
    """The relays of one process, by kernel id.

    `make` makes one that is not linked yet; `on_event(kernel_id, event)` hears what agents report;
    `facts_of(kernel_ids)` reads what it takes to link; `on_unlinked(kernel_id, error)` hears what became of
    `link_later` where it failed; `route(facts)` gives the address by which this process reaches an agent; `waiting`
    keeps what waits for a link.
    """

    def __init__(
        self,
        make: Callable[[str], KernelRelay],
        on_event: Callable[[str, Mapping[str, Any]], None],
        facts_of: Callable[[Sequence[str]], Awaitable[Mapping[str, LinkFacts]]],
        on_unlinked: Callable[[str, GatewayError], None],
        route: Callable[[LinkFacts], Awaitable[Registration]],
        waiting: WaitingRequests | None = None,
    ) -> None:
        self._make = make
        self._on_event = on_event
        self._facts_of = facts_of
        self._on_unlinked = on_unlinked
        self._route = route
        self._waiting = waiting
        self._relays: dict[str, KernelRelay] = {}
        self._connecting: dict[str, asyncio.Task[Mapping[str, Any]]] = {}
        self._later: dict[str, asyncio.Task[None]] = {}

    def relay(self, kernel_id: str) -> KernelRelay:
        """The relay of a kernel, made if there is none."""
        found = self._relays.get(kernel_id)
        if found is None:
            found = self._relays[kernel_id] = self._make(kernel_id)
            found.on_event = lambda event: self._on_event(kernel_id, event)
            waiting = self._waiting
            if waiting is not None:
                found.pending.on_waits = lambda key, frames: waiting.keep(kernel_id, key, frames)
                found.pending.on_settled = lambda keys: waiting.drop(kernel_id, keys)
        return found

    def existing(self, kernel_id: str) -> KernelRelay | None:
        """The relay of a kernel, if this process has one."""
        return self._relays.get(kernel_id)

    def __iter__(self) -> Iterator[tuple[str, KernelRelay]]:
        return iter(list(self._relays.items()))

    async def connect(self, facts: LinkFacts, *, timeout: float) -> KernelRelay:
        """Link to the agent, once however many ask.

        Raises `Unavailable`, and `Conflict` for a stale epoch: whoever asks then begins anew with fresh facts.
        """
        relay = self.relay(facts.kernel_id)
        if relay.linked:
            return relay
        task = self._connecting.get(facts.kernel_id)
        if task is None:
            task = asyncio.ensure_future(self._connect(relay, facts, timeout))
            self._connecting[facts.kernel_id] = task
            task.add_done_callback(lambda _: self._connecting.pop(facts.kernel_id, None))
        # Not awaited itself: somebody else's cancellation, or a link that is closed, must not cancel us.
        await asyncio.wait({task})
        if task.cancelled():
            raise Unavailable("The link to the kernel was closed. Try again in a moment.")
        task.result()
        return relay

    async def link(self, kernel_id: str, *, timeout: float = 5.0) -> KernelRelay:
        """The linked relay of a kernel. Raises `Unavailable`, and `Conflict` where it is taken over meanwhile."""
        relay = self._relays.get(kernel_id)
        if relay is not None and relay.linked:
            return relay
        try:
            return await self._fresh(kernel_id, timeout)
        except Conflict:  # the epoch rose after it was read
            return await self._fresh(kernel_id, timeout)

    async def call(self, kernel_id: str, call: Callable[[KernelRelay], Awaitable[T]]) -> T:
        """Call a kernel's agent. Raises what `link` and `call` raise.

        The link of a replica that does not drive the kernel keeps the epoch that it was made with. Once another
        replica has taken the kernel over, its calls are refused; it is then made anew, once.
        """
        relay = await self.link(kernel_id)
        try:
            return await call(relay)
        except Conflict as error:
            if error.hint != STALE:
                raise
        self.disconnect(kernel_id)
        return await call(await self.link(kernel_id))

    async def restore(self, kernel_id: str) -> None:
        """Give a relay what an earlier gateway, or another replica, was given for it. Raises `Unavailable`."""
        if self._waiting is not None and kernel_id in await self._waiting.kernels():
            self.relay(kernel_id).restore(await self._waiting.load(kernel_id))

    async def restore_all(self) -> None:
        """The same for all that are linked: what was waiting at a replica that is gone is found at last."""
        if self._waiting is None:
            return
        for kernel_id in await self._waiting.kernels():
            relay = self._relays.get(kernel_id)
            if relay is not None and relay.linked:
                relay.restore(await self._waiting.load(kernel_id))

    def link_later(self, kernel_id: str) -> None:
        """Link in the background, for websockets that wait."""
        if kernel_id not in self._later:
            task = self._later[kernel_id] = asyncio.ensure_future(self._link_quietly(kernel_id))
            task.add_done_callback(lambda _: self._later.pop(kernel_id, None))

    async def _link_quietly(self, kernel_id: str) -> None:
        try:
            await self.link(kernel_id)
        except GatewayError as error:
            self._on_unlinked(kernel_id, error)

    async def _fresh(self, kernel_id: str, timeout: float) -> KernelRelay:
        facts = (await self._facts_of([kernel_id])).get(kernel_id)
        if facts is None:
            raise Unavailable("The kernel is still starting; try again in a moment.", retry_after=1.0)
        return await self.connect(facts, timeout=timeout)

    async def _connect(self, relay: KernelRelay, facts: LinkFacts, timeout: float) -> Mapping[str, Any]:
        await self.restore(facts.kernel_id)
        registration = await self._route(facts)
        try:
            return await relay.connect(
                registration, facts.client_secret, facts.client_public, facts.epoch, timeout=timeout
            )
        except Conflict:
            relay.disconnect()  # it would go on trying with an epoch that is refused for ever
            raise

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
        for task in self._later.values():
            task.cancel()
        for kernel_id in list(self._relays):
            self.drop(kernel_id)
